"""Megatron's state that is the same on all ranks, made that of another optimizer."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME

from megatron_flashoptim.checkpoint import metadata, param_groups
from megatron_flashoptim.checkpoint.folder import FLASH, CheckpointFolder
from megatron_flashoptim.optim.config import FlashOptimConfig, arguments
from megatron_flashoptim.optim.rules import RULES, rule_of

_EXPERTS = "is_expert_parallel"
# What implementations of Adam keep in param groups beside Megatron's options: torch's AdamW and the
# FusedAdam of Transformer Engine and Apex. The values are those of Megatron's own construction.
_ADAM_OPTIONS: dict[str, Any] = {
    "bias_correction": True,
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    param_groups.DECOUPLED: True,
}


def of_flash(
    folder: CheckpointFolder,
    flash: FlashOptimConfig,
    described: dict[str, Any],
    *,
    keeps_moments: bool = True,
) -> dict[str, Any]:
    """Return the common state of a flash checkpoint in ``fully_reshardable``.

    Args:
        folder: a checkpoint of either optimizer.
        flash: the configuration of the state.
        described: see ``metadata.describe`` and ``metadata.describe_groups``.
        keeps_moments: else they start at zero, and with them the step number; the hyper-parameters
            of both update rules are left out, so that the run's own hold.
    """
    without = set() if folder.optimizer == FLASH else set(_ADAM_OPTIONS)
    if not keeps_moments:
        saved = metadata.optimizer_of(folder.flash)
        without |= _hyper_parameters(saved) | _hyper_parameters(flash.optimizer)
        without.add(param_groups.OPTIMIZER)
    groups = [
        {
            **{name: value for name, value in group.items() if name not in without},
            "step": int(group.get("step") or 0) if keeps_moments else 0,
        }
        for group in _groups(folder)
    ]
    own = {key: described[key] for key in described if key not in metadata.OF_MODEL_SPACE}
    optimizer = {
        "optimizer": {"param_groups": groups},
        metadata.KEY: own,
        metadata.MERGED: True,
        **_beside_groups(folder),
    }
    args = arguments(flash)
    if not flash.rule.takes_l2:  # or a run with these arguments would be refused
        args[param_groups.DECOUPLED] = True
    return _common(folder, args, optimizer, {metadata.KEY: described})


def of_adam(folder: CheckpointFolder) -> dict[str, Any]:
    """Return the common state of a checkpoint of Megatron's Adam in ``fully_reshardable``.

    Experts that have param groups of their own are a member of the chain of their own, as in runs
    with expert parallelism.
    """
    options, args = dict(_ADAM_OPTIONS), arguments(None)
    if folder.flash:
        decoupled = rule_of(metadata.optimizer_of(folder.flash)).decoupled_adam
        # Not every Adam keeps it in its groups: the arguments have to say it too.
        options[param_groups.DECOUPLED] = args[param_groups.DECOUPLED] = decoupled
    groups = [
        {**options, **group, "step": int(group.get("step") or 0)} for group in _groups(folder)
    ]
    members = [
        [group for group in groups if bool(group.get(_EXPERTS)) is experts]
        for experts in (False, True)
    ]
    states = [
        {"optimizer": {"param_groups": member}, **_beside_groups(folder)}
        for member in members
        if member
    ]
    optimizer = states[0] if len(states) == 1 else dict(enumerate(states))
    return _common(folder, args, optimizer, {})


def _hyper_parameters(optimizer: str) -> set[str]:
    """Return the names of what an update rule keeps in param groups."""
    return set(rule_of(optimizer).defaults) if optimizer in RULES else set()


def as_bytes(common: dict[str, Any]) -> bytes:
    """Return the state as ``torch_dist`` stores it among the byte strings."""
    file = io.BytesIO()
    torch.save([common], file)
    return file.getvalue()


def is_file(folder: CheckpointFolder) -> bool:
    """Return whether a checkpoint has the state in a file of its own."""
    return Path(folder.path, COMMON_STATE_FNAME).is_file()


def write_file(folder: Path, common: dict[str, Any]) -> None:
    """Write the state as a file of its own."""
    torch.save(common, folder / COMMON_STATE_FNAME)


def _groups(folder: CheckpointFolder) -> list[param_groups.Group]:
    """Return the param groups of a checkpoint of either optimizer.

    Raises:
        ValueError: there are none.
    """
    found = param_groups.of_optimizer(folder.common.get("optimizer") or {})
    if not found:
        raise ValueError(
            f"{folder.path} has no param groups in its common state: learning rate and step are "
            "unknown. It was not saved by Megatron's distributed optimizer in model space"
        )
    return found


def _beside_groups(folder: CheckpointFolder) -> dict[str, Any]:
    """Return what an optimizer's state dict has beside its groups."""
    saved = folder.common["optimizer"]
    first = saved if "optimizer" in saved else saved[min(k for k in saved if isinstance(k, int))]
    kept = {"param_state_sharding_type": metadata.FULLY_RESHARDABLE}
    if "grad_scaler" in first:
        kept["grad_scaler"] = first["grad_scaler"]
    return kept


def _common(
    folder: CheckpointFolder,
    args: dict[str, Any],
    optimizer: dict[Any, Any],
    described: dict[str, Any],
) -> dict[str, Any]:
    content = {
        **{key: value for key, value in folder.content.items() if key != metadata.KEY},
        metadata.SHARDING_TYPE: metadata.FULLY_RESHARDABLE,
        "chained_optim_avoid_prefix": True,
        **described,
    }
    common = {**folder.common, "optimizer": optimizer, "content_metadata": content}
    if "args" in common:
        common["args"] = copy.copy(common["args"])
        vars(common["args"]).update(args)
    return common
