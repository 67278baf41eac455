"""What a checkpoint is, in words: whose state, which versions, which layout, how many bytes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from megatron_flashoptim.checkpoint import metadata, param_groups
from megatron_flashoptim.checkpoint.folder import FLASH, WEIGHTS, CheckpointFolder
from megatron_flashoptim.codec.spec import FORMAT_VERSION
from megatron_flashoptim.optim.shard import EXP_AVG_SQ

WEIGHT_ROW = "weights"
_STATE_KIND = re.compile(
    r"(?:.*\.)?optimizer\.(?:state\.(?P<model>\w+)\.|distributed\..*bucket_idx_\d+\.(?P<bucket>\w+)$)"
)
_SIZES = {
    "data": "data_parallel_size",
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "expert": "expert_model_parallel_size",
    "context": "context_parallel_size",
}
_MODEL = {"layers": "num_layers", "hidden": "hidden_size", "experts": "num_experts"}


@dataclass(frozen=True)
class Bytes:
    """All tensors of one kind and dtype.

    Attributes:
        kind: ``"weights"`` or the kind of optimizer state.
        dtype: of its tensors, such as ``"bfloat16"``.
        tensors, elements, bytes: how many.
    """

    kind: str
    dtype: str
    tensors: int
    elements: int
    bytes: int


def describe(folder: CheckpointFolder) -> dict[str, str]:
    """Return field and value, what is known of them, in the order to be shown."""
    common, flash = folder.common, folder.flash
    arguments = common.get("args")
    iteration = common.get("iteration", folder.iteration)
    files = [file for file in folder.path.iterdir() if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    found = {
        "iteration": "a release" if iteration is None else str(iteration),
        "optimizer": _optimizer(folder),
        "layout": f"{folder.sharding_type}, torch_dist" if folder.sharding_type else "torch_dist",
        "versions": _versions(folder),
        "model": _named(arguments, _MODEL),
        "parallel": _named(arguments, _SIZES),
        "schedule": _schedule(common),
        "files": f"{len(files)} files, {size} bytes",
    }
    if flash.get("per_element_scales"):
        found["scales"] = f"per element in {len(flash['per_element_scales'])} tensors"
    if flash.get("buckets"):
        counts = [len(buckets) for chunk in flash["buckets"] for buckets in chunk]
        found["buckets"] = f"{sum(counts)} of the first model-parallel rank"
    return {name: value for name, value in found.items() if value}


def bytes_by_kind(folder: CheckpointFolder) -> list[Bytes]:
    """Return what the tensors take, weights first."""
    found: dict[tuple[str, str], list[int]] = {}
    for key, info in folder.reader.tensors().items():
        match = _STATE_KIND.match(key)
        kind = (match["model"] or match["bucket"]) if match else WEIGHT_ROW
        dtype: torch.dtype = info.properties.dtype
        row = found.setdefault((kind, str(dtype).removeprefix("torch.")), [0, 0, 0])
        elements = math.prod(info.size)
        for position, more in enumerate((1, elements, elements * dtype.itemsize)):
            row[position] += more
    rows = [Bytes(kind, dtype, *counts) for (kind, dtype), counts in found.items()]
    return sorted(rows, key=lambda row: (row.kind != WEIGHT_ROW, row.kind, row.dtype))


def _optimizer(folder: CheckpointFolder) -> str:
    if folder.optimizer == WEIGHTS:
        return "none, weights only"
    if folder.optimizer != FLASH:
        return "Megatron's Adam, fp32 masters and moments"
    flash = folder.flash
    saved = metadata.format_of(flash)
    told = [metadata.optimizer_of(flash), f"{saved['master_bits']}-bit masters"]
    if any(row.kind == EXP_AVG_SQ for row in bytes_by_kind(folder)):
        told.append(f"{saved['exp_avg_sq_code']} code")
    told.append(f"groups of {flash.get('group_size')}")
    told += [f"{flash.get('weights')} weights", f"rounding seed {flash.get('seed')}"]
    return ", ".join(told)


def _versions(folder: CheckpointFolder) -> str:
    told = []
    if folder.optimizer == FLASH:
        version = folder.flash.get("version")
        told.append(f"flash format {version} (this release reads up to {FORMAT_VERSION})")
    if (version := folder.common.get("checkpoint_version")) is not None:
        told.append(f"Megatron checkpoint {version}")
    return ", ".join(told)


def _schedule(common: dict[str, Any]) -> str:
    told = []
    scheduler = common.get("opt_param_scheduler") or {}
    if "num_steps" in scheduler:
        told.append(f"{scheduler['num_steps']} samples")
    if isinstance(state := common.get("optimizer"), dict):
        groups = param_groups.of_optimizer(state)
        steps = sorted({int(group["step"]) for group in groups if "step" in group})
        rates = sorted({float(group["lr"]) for group in groups if "lr" in group})
        betas = sorted({tuple(group["betas"]) for group in groups if "betas" in group})
        momenta = sorted({float(group["momentum"]) for group in groups if "momentum" in group})
        if steps:
            told.append("step " + ", ".join(map(str, steps)))
        if rates:
            told.append("learning rate " + ", ".join(f"{rate:g}" for rate in rates))
        if betas:
            told.append("betas " + ", ".join(f"{one:g} {two:g}" for one, two in betas))
        if momenta:
            told.append("momentum " + ", ".join(f"{momentum:g}" for momentum in momenta))
    return ", ".join(told)


def _named(arguments: object, names: dict[str, str]) -> str:
    values = {word: getattr(arguments, name, None) for word, name in names.items()}
    return ", ".join(f"{word} {value}" for word, value in values.items() if value is not None)
