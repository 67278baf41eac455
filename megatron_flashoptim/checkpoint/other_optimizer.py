"""What is said where an optimizer of Megatron's own fails to load a checkpoint of flash state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from megatron.core.dist_checkpointing import load_content_metadata
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject

from megatron_flashoptim.checkpoint import metadata
from megatron_flashoptim.checkpoint.folder import UNREADABLE
from megatron_flashoptim.checkpoint.loading import ReadsFolder


@contextlib.contextmanager
def told_of_flash_state(sharded_state_dict: Any, folder: str) -> Iterator[None]:
    """Say in one line that a checkpoint is of a flash optimizer, where loading it fails.

    Nothing is read before: a load that succeeds is as fast as without.

    Args:
        sharded_state_dict: to be loaded by the body.
        folder: of one iteration.

    Raises:
        ValueError: instead of what the body raised, which lists every key of the state.
    """
    try:
        yield
    except UNREADABLE:
        saved, sharding_type = _flash_state(folder)
        if saved is None or not _is_of_another(sharded_state_dict):
            raise
        optimizer = metadata.optimizer_of(saved)
        raise ValueError(
            f"the checkpoint in {folder} was saved with --optimizer {optimizer}, and this run has "
            f"an optimizer of Megatron's own; {_ways_out(optimizer, sharding_type)}"
        ) from None


def _flash_state(folder: str) -> tuple[dict[str, Any] | None, str | None]:
    """Return the description of the flash state, or None, and the sharding type."""
    try:
        content = load_content_metadata(folder) or {}
    except UNREADABLE:
        content = {}
    return content.get(metadata.KEY), content.get(metadata.SHARDING_TYPE)


def _is_of_another(sharded_state_dict: Any) -> bool:
    """Return whether a state dict asks for the state of an optimizer that is no flash one."""
    if not isinstance(sharded_state_dict, dict) or "optimizer" not in sharded_state_dict:
        return False
    return not any(
        isinstance(value, LocalNonpersistentObject) and isinstance(value.obj, ReadsFolder)
        for value in nested_values(sharded_state_dict["optimizer"])
    )


def _ways_out(optimizer: str, sharding_type: str | None) -> str:
    ways = f"give --optimizer {optimizer}, or load the weights alone with {metadata.WEIGHTS_ALONE}"
    if not metadata.holds_adam_state(optimizer):
        return ways
    convert = "`megatron-flashoptim convert --to adam` makes one for Adam"
    if sharding_type != metadata.FULLY_RESHARDABLE:
        convert += f", but not of {sharding_type}: {metadata.RESAVE}"
    return f"{convert}; or {ways}"
