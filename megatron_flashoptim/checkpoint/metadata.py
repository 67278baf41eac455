"""What a checkpoint says about the flash state in it, and the checks on load."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

from megatron_flashoptim.checkpoint.bucket_space import QUANTIZED, BucketSpace
from megatron_flashoptim.checkpoint.conversion import can_convert_correction
from megatron_flashoptim.codec.spec import FORMAT_VERSION, GROUP_SIZE
from megatron_flashoptim.optim.config import FlashOptimConfig
from megatron_flashoptim.optim.rules import EXP_AVG_SQ, RULES, rule_of

# Key in the checkpoint's content metadata and in the optimizer's state dict.
KEY = "flashoptim"
# How many members a chain has depends on the layout: experts have one of their own only with
# expert parallelism. So all members' groups are saved as those of one, marked by this key.
MERGED = "flashoptim_merged"

SHARDING_TYPE = "distrib_optim_sharding_type"
DP_RESHARDABLE = "dp_reshardable"
FULLY_RESHARDABLE = "fully_reshardable"
FULLY_SHARDED_MODEL_SPACE = "fully_sharded_model_space"
# How a checkpoint in dp_reshardable becomes one that can be converted without a run.
RESAVE = (
    "load it in a run of the optimizer and layout that saved it, save once with "
    "--dist-ckpt-optim-fully-reshardable, and convert that"
)
SUPPORTED_SHARDING_TYPES = (DP_RESHARDABLE, FULLY_RESHARDABLE)
# Of Megatron's own Adam, to be converted.
STOCK_SHARDING_TYPES = (*SUPPORTED_SHARDING_TYPES, FULLY_SHARDED_MODEL_SPACE)

# Fields of FlashOptimConfig that the stored format depends on, each with the value of checkpoints
# older than the field.
_FORMAT_FIELDS: dict[str, Any] = {
    "optimizer": "flash_adamw",
    "master_bits": 24,
    "exp_avg_sq_code": "sqrt",
}
# Of these, those that say how a moment is stored; of no meaning to rules without it.
_OF_MOMENT = {"exp_avg_sq_code": EXP_AVG_SQ}


def holds_adam_state(optimizer: str) -> bool:
    """Return whether an update rule of this name keeps what Megatron's Adam does."""
    return optimizer in RULES and rule_of(optimizer).decoupled_adam is not None


def hold_same_state(saved: str, wanted: str) -> bool:
    """Return whether two update rules, given by name, keep the same state."""
    return saved == wanted or (holds_adam_state(saved) and holds_adam_state(wanted))


def rule_of_adam(*, decoupled: bool) -> str:
    """Return the name of the update rule that steps as Megatron's Adam does.

    Args:
        decoupled: its ``OptimizerConfig.decoupled_weight_decay``.
    """
    return next(name for name in RULES if rule_of(name).decoupled_adam is decoupled)


# Fields whose saved value (first) is converted to the run's (second) on load where this is true.
_CONVERTIBLE: dict[str, Callable[[Any, Any], bool]] = {
    "optimizer": hold_same_state,
    "master_bits": can_convert_correction,
}
# Flags that load no optimizer state.
WEIGHTS_ALONE = "--no-load-optim --no-load-rng, or --finetune"

BUCKETS = "buckets"
# Numbers that stand for the buckets of each data-parallel group, where BUCKETS has those of the
# first: a dict by group for each optimizer of the chain. Not in older checkpoints.
BUCKETS_OF_GROUPS = "buckets_of_groups"
PER_ELEMENT_SCALES = "per_element_scales"
# In checkpoints of bf16 models of which some parameters are fp32, and then their own masters:
# dtypes of the buffers (dp_reshardable), or model keys (fully_reshardable).
BUFFER_WEIGHTS = "buffer_weights"
FP32_WEIGHTS = "fp32_weights"
# In checkpoints in fully_reshardable of a model with quantized weights: model keys whose masters
# have a high part of their own.
QUANTIZED_WEIGHTS = "quantized_weights"
# What ``describe_groups`` adds.
OF_MODEL_SPACE = (PER_ELEMENT_SCALES, FP32_WEIGHTS, QUANTIZED_WEIGHTS)
BFLOAT16, FLOAT32 = "bfloat16", "float32"


def describe(flash: FlashOptimConfig, weights: str) -> dict[str, Any]:
    """Return the plain dict that is stored: version, optimizer, formats, rounding seed.

    Args:
        flash: the configuration in force.
        weights: dtype of the model weights, ``"bfloat16"`` or ``"float32"``: whether they are the
            high part of the master or all of it. Single parameters of a bf16 model may be fp32,
            see ``describe_buckets`` and ``describe_groups``.
    """
    return {
        "version": FORMAT_VERSION,
        "group_size": GROUP_SIZE,
        "weights": weights,
        **{name: getattr(flash, name) for name in _FORMAT_FIELDS if _matters(name, flash)},
        "seed": flash.seed,
    }


def _matters(name: str, flash: FlashOptimConfig) -> bool:
    return name not in _OF_MOMENT or _OF_MOMENT[name] in flash.rule.moments


def describe_buckets(spaces: Sequence[BucketSpace], weights: str) -> dict[str, Any]:
    """Return what ``dp_reshardable`` depends on: the buckets of global rank 0.

    Args:
        spaces: the buckets.
        weights: dtype of the model weights, which those of all buffers have if nothing is said.
    """
    described: dict[str, Any] = {BUCKETS: [space.layout() for space in spaces]}
    dtypes = [space.weights() for space in spaces]
    if set(chain(*dtypes)) - {weights}:
        described[BUFFER_WEIGHTS] = dtypes
    return described


def bucket_digests(spaces: Sequence[BucketSpace]) -> list[tuple[int, int]]:
    """Return for each optimizer its data-parallel group and a number that stands for its buckets.

    Args:
        spaces: the buckets of this rank.
    """
    return [
        (space.dp_group_index, zlib.crc32(repr((space.layout(), space.weights())).encode()))
        for space in spaces
    ]


def describe_bucket_groups(ranks: Iterable[list[tuple[int, int]]]) -> dict[str, Any]:
    """Return what else ``dp_reshardable`` depends on: the buckets of all ranks.

    Args:
        ranks: what ``bucket_digests`` returned on each.
    """
    return {BUCKETS_OF_GROUPS: [dict(of_optimizer) for of_optimizer in zip(*ranks, strict=True)]}


def describe_groups(
    per_element: Iterable[str], fp32: Iterable[str] = (), quantized: Iterable[str] = ()
) -> dict[str, Any]:
    """Return what ``fully_reshardable`` depends on.

    Args:
        per_element: model keys with scales per element.
        fp32: model keys with fp32 weights in a bf16 model.
        quantized: model keys whose high parts are saved beside the weights.
    """
    described = {PER_ELEMENT_SCALES: sorted(per_element)}
    for name, keys in ((FP32_WEIGHTS, fp32), (QUANTIZED_WEIGHTS, quantized)):
        if found := sorted(keys):
            described[name] = found
    return described


def check(saved: dict[str, Any] | None, flash: FlashOptimConfig, weights: str) -> None:
    """Refuse optimizer state that this run can neither read nor convert.

    Raises:
        ValueError: names what the checkpoint holds and what this run wants.
    """
    if saved is None:
        raise ValueError(
            "the checkpoint holds no flash optimizer state (it was written by another optimizer). "
            "Megatron's Adam is converted from --ckpt-format torch_dist only. Load the weights "
            f"alone with {WEIGHTS_ALONE}"
        )
    if not isinstance(saved, dict) or not isinstance(saved.get("version"), int):
        raise ValueError(f"the checkpoint's {KEY} metadata has no version: {saved!r}")
    if saved["version"] > FORMAT_VERSION:
        raise ValueError(
            f"the checkpoint has flash format version {saved['version']}, this release reads up "
            f"to {FORMAT_VERSION}; upgrade megatron-flashoptim"
        )
    wanted = describe(flash, weights)
    for name in ("group_size", "weights", *(n for n in _FORMAT_FIELDS if n in wanted)):
        theirs = saved.get(name, _FORMAT_FIELDS.get(name))
        converts = _CONVERTIBLE.get(name)
        if theirs == wanted[name] or (converts and converts(theirs, wanted[name])):
            continue
        raise ValueError(
            f"the checkpoint was saved with {name} {theirs}, this run has {wanted[name]}; "
            + _otherwise(name, flash)
        )


def _otherwise(name: str, flash: FlashOptimConfig) -> str:
    """Return what to do where a field of the format is not converted on load."""
    if name == "optimizer":
        return f"the moments of one are not those of the other. {_from_zero(flash)}"
    if name == "exp_avg_sq_code":
        return (
            f"`megatron-flashoptim convert --to flash --exp-avg-sq-code {flash.exp_avg_sq_code}` "
            "changes it and keeps masters, moments and schedule; or use the same value; or load "
            f"the weights alone with {WEIGHTS_ALONE}"
        )
    return f"use the same value, or load the weights alone with {WEIGHTS_ALONE}"


def _from_zero(flash: FlashOptimConfig) -> str:
    return (
        f"`megatron-flashoptim convert --to flash --optimizer {flash.optimizer}` keeps the masters "
        f"and starts the moments at zero; or load the weights alone with {WEIGHTS_ALONE}"
    )


def optimizer_of(saved: dict[str, Any]) -> str:
    """Return the name of the update rule whose state is described."""
    return str(saved.get("optimizer", _FORMAT_FIELDS["optimizer"]))


def format_of(saved: dict[str, Any]) -> dict[str, Any]:
    """Return of a description what the stored format depends on."""
    return {name: saved.get(name, old) for name, old in _FORMAT_FIELDS.items()}


def taken_over(saved: dict[str, Any], flash: FlashOptimConfig) -> str | None:
    """Return one line if checked state is of another update rule that keeps the same, else None."""
    theirs = optimizer_of(saved)
    if theirs == flash.optimizer:
        return None
    return f"took over the state of {theirs}, which is that of {flash.optimizer}"


def taken_over_from_adam(decoupled: bool | None, flash: FlashOptimConfig) -> str | None:
    """Return one line if the state of Megatron's Adam goes on by another formula, else None.

    Args:
        decoupled: see ``param_groups.decoupled_by_adam``.
        flash: of the run, with a rule that keeps Adam's state.
    """
    if decoupled is None or decoupled == flash.rule.decoupled_adam:
        return None
    return (
        f"took over the state of Megatron's Adam, which is that of {flash.optimizer}; it was saved "
        f"with decoupled_weight_decay={decoupled}, and {rule_of_adam(decoupled=decoupled)} is what "
        "goes on by the same formula"
    )


def check_sharding_type(content: dict[str, Any] | None) -> None:
    """Refuse a sharding type that flash state is not mapped to.

    Raises:
        ValueError: names the type and the supported ones.
    """
    sharding_type = (content or {}).get(SHARDING_TYPE)
    if sharding_type not in SUPPORTED_SHARDING_TYPES:
        raise ValueError(
            f"flash optimizer state cannot be saved in or loaded from the sharding type "
            f"{sharding_type!r}; supported: {', '.join(SUPPORTED_SHARDING_TYPES)}"
        )


def check_stock(content: dict[str, Any] | None, flash: FlashOptimConfig) -> None:
    """Refuse to convert Megatron's Adam to other state, or from a sharding type that is not read.

    Raises:
        ValueError: names the optimizer, or the type and the supported ones.
    """
    if not holds_adam_state(flash.optimizer):
        raise ValueError(
            f"the checkpoint was saved with an optimizer of Megatron's own, such as Adam, this run "
            f"has {flash.optimizer}; the moments of one are not those of the other. "
            f"{_from_zero(flash)}"
        )
    sharding_type = (content or {}).get(SHARDING_TYPE)
    if sharding_type not in STOCK_SHARDING_TYPES:
        raise ValueError(
            f"the checkpoint has no flash optimizer state, and Megatron's Adam is not converted "
            f"from the sharding type {sharding_type!r}; supported: "
            f"{', '.join(STOCK_SHARDING_TYPES)}. Load the weights alone with {WEIGHTS_ALONE}"
        )


def check_buckets(saved: dict[str, Any], spaces: Sequence[BucketSpace]) -> None:
    """Refuse a checkpoint whose buckets are cut otherwise than this run's.

    Raises:
        ValueError: names both layouts and the options they depend on.
    """
    if any(space.dp_group_index != 0 for space in spaces):
        # The checkpoint has the buckets themselves of the first model-parallel rank only.
        groups = saved.get(BUCKETS_OF_GROUPS, ())
        for (index, digest), digests in zip(bucket_digests(spaces), groups, strict=False):
            if digests.get(index) != digest:
                raise ValueError(
                    f"the checkpoint was saved with other buckets or weights on model-parallel "
                    f"rank {index} than this run has; {_SAME_LAYOUT}"
                )
        return
    layout = [space.layout() for space in spaces]
    dtypes = [space.weights() for space in spaces]
    theirs = saved.get(BUFFER_WEIGHTS, [[saved["weights"]] * len(space) for space in dtypes])
    # Other dtypes make other buckets; with the same ones, something else did.
    if saved.get(BUCKETS) != layout and set(chain(*theirs)) == set(chain(*dtypes)):
        raise ValueError(
            f"the checkpoint was saved with buckets of {saved.get(BUCKETS)} elements, this run has "
            f"{layout}: {_SAME_LAYOUT}"
        )
    if theirs != dtypes:
        advice = _SAME_DTYPES
        if QUANTIZED in chain(*theirs, *dtypes):
            advice = (
                "give or drop --fp8-param-gather as in the run that saved it; checkpoints saved "
                "with --dist-ckpt-optim-fully-reshardable load either way"
            )
        raise ValueError(
            f"the checkpoint was saved with weights of {theirs} in DDP's buffers, this run has "
            f"{dtypes}; {advice}"
        )


_SAME_LAYOUT = (
    "dp_reshardable needs the tensor, pipeline and expert parallel sizes, --overlap-grad-reduce "
    "and --ddp-bucket-size of the run that saved it (by default the bucket size grows with "
    "data-parallel sizes above 40; give the saved run's). Checkpoints saved with "
    "--dist-ckpt-optim-fully-reshardable load anywhere"
)


def check_weights(saved: dict[str, Any], dtypes: Iterable[tuple[str, str]]) -> None:
    """Refuse a checkpoint in which the weights of a parameter have another dtype.

    Args:
        saved: description of a checkpoint in model space.
        dtypes: model keys of this run, each with the dtype of its weights.

    Raises:
        ValueError: names a key and both dtypes.
    """
    fp32 = set(saved.get(FP32_WEIGHTS, ()))
    for key, dtype in sorted(dtypes):
        theirs = FLOAT32 if key in fp32 else saved["weights"]
        if theirs != dtype:
            raise ValueError(
                f"the weights of {key} are {theirs} in the checkpoint and {dtype} in this run; "
                f"{_SAME_DTYPES}"
            )


_SAME_DTYPES = (
    "keep the same parameters in fp32, or load the weights alone with --no-load-optim --no-load-rng"
)


def fp32_keys(dtypes: Iterable[tuple[str, str]]) -> set[str]:
    """Return the model keys with fp32 weights.

    Args:
        dtypes: model keys of all ranks, each with the dtype of its weights.

    Raises:
        ValueError: the weights under a key have several dtypes.
    """
    found: dict[str, str] = {}
    for key, dtype in sorted(dtypes):
        if found.setdefault(key, dtype) != dtype:
            raise ValueError(
                f"some weights of {key} are bf16 and some fp32: in torch_dist Megatron keeps "
                "layers of one kind in one tensor, which has one dtype. Give them one, or save "
                "with --ckpt-format torch"
            )
    return {key for key, dtype in found.items() if dtype == FLOAT32}


def check_covered(ranks: Iterable[dict[str, tuple[int, int]]]) -> None:
    """Refuse to save tensors of which the ranks together have a part of the state only.

    Args:
        ranks: elements saved and all elements of each model key, of each rank and optimizer.

    Raises:
        ValueError: names the tensor and the format that can be used.
    """
    saved: dict[str, int] = {}
    total: dict[str, int] = {}
    for rank in ranks:
        for key, (numel, whole) in rank.items():
            saved[key] = saved.get(key, 0) + numel
            total[key] = whole
    for key, whole in total.items():
        if saved[key] != whole:
            raise ValueError(
                f"{saved[key]} of the {whole} elements of {key} have optimizer state: Megatron "
                "keeps layers of one kind in one tensor, and some of them are frozen. Save with "
                "dp_reshardable (without --dist-ckpt-optim-fully-reshardable)"
            )


def with_saved_seed(flash: FlashOptimConfig, saved: dict[str, Any]) -> FlashOptimConfig:
    """Return the configuration with the checkpoint's rounding seed, which a resumed run keeps."""
    return dataclasses.replace(flash, seed=saved["seed"])
