"""An error of any rank is raised on all, with the first failed rank's words."""

from __future__ import annotations

from typing import Any

import torch
from ranks import run_ranks

from megatron_flashoptim.checkpoint.together import on_all_ranks

RAISED = {
    "nobody": {},
    "one": {1: ValueError("no such layout")},
    "two": {1: KeyError("0"), 2: ValueError("no such layout")},
    "message is no argument": {2: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid")},
    "all": {rank: RuntimeError(f"of rank {rank}") for rank in range(3)},
}


def _told() -> dict[str, Any]:
    rank = torch.distributed.get_rank()

    def fail(problems: dict[int, Exception]) -> int:
        if rank in problems:
            raise problems[rank]
        return rank

    found: dict[str, Any] = {}
    for name, problems in RAISED.items():
        try:
            found[name] = on_all_ranks(lambda problems=problems: fail(problems))
        except Exception as told:
            assert told.__cause__ is problems.get(rank)
            found[name] = f"{type(told).__name__}: {told}"
    return found


def test_the_first_failed_ranks_error_is_raised_on_all_with_each_ones_own_as_cause() -> None:
    for rank, told in enumerate(run_ranks(3, _told)):
        assert told == {
            "nobody": rank,
            "one": "ValueError: no such layout (on rank 1; 1 of 3 ranks have a problem)",
            "two": "RuntimeError: KeyError: '0' (on rank 1; 2 of 3 ranks have a problem)",
            "message is no argument": "RuntimeError: UnicodeDecodeError: 'utf-8' codec can't "
            "decode byte 0xff in position 0: invalid (on rank 2; 1 of 3 ranks have a problem)",
            "all": "RuntimeError: of rank 0",
        }
