"""Errors of saving and loading are raised on all ranks, whichever rank met them.

A rank that raises alone leaves the others in Megatron's next collective, where they wait until the
job is killed, and its message stands in one log of thousands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# What other errors become, with their name in front: the constructors of many take no message.
_OTHERWISE = RuntimeError
_KEPT: dict[str, type[Exception]] = {kind.__name__: kind for kind in (ValueError, RuntimeError)}


def on_all_ranks[T](action: Callable[[], T]) -> T:
    """Return what an action returns, or raise on all ranks if it raised on any.

    A collective of all ranks: one byte or so of each is gathered, and where there is an error, the
    first rank's is sent to all.

    Args:
        action: may do different things on different ranks; must have no collective in which other
            ranks would wait for one that has raised.

    Raises:
        ValueError, RuntimeError: what the first of the failed ranks raised, and which one that is
            unless all have failed. Other errors as RuntimeError. A rank's own error is the cause.
    """
    problem: Exception | None = None
    try:
        result = action()
    except Exception as found:
        problem = found
    everyone = gathered(problem is not None)
    failed = [rank for rank, has_failed in enumerate(everyone) if has_failed]
    if not failed:
        return result
    first: list[Any] = [None if problem is None else _kind_and_text(problem)]
    torch.distributed.broadcast_object_list(first, src=failed[0])
    kind, text = first[0]
    if len(failed) < len(everyone):
        text += f" (on rank {failed[0]}; {len(failed)} of {len(everyone)} ranks have a problem)"
    raise _KEPT[kind](text) from problem


def gathered[T](own: T) -> list[T]:
    """Return what each rank gave, by rank; a collective of all ranks.

    Args:
        own: something small, which each rank gets from all.
    """
    # Objects, since only torch knows on which device a backend wants its tensors.
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, own)
    return everyone


def _kind_and_text(problem: Exception) -> tuple[str, str]:
    kind = type(problem).__name__
    if _KEPT.get(kind) is type(problem):
        return kind, str(problem)
    return _OTHERWISE.__name__, f"{kind}: {problem}"
