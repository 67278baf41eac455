"""Run a function on several CPU ranks, each a fork of this process, with gloo between them.

The parent imports Megatron once (fixture ``megatron``); a fork has it for free, and whatever a
test does to Megatron's global state dies with it.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch


def run_ranks(
    world_size: int, body: Callable[..., Any], *args: Any, timeout: float = 240, **kwargs: Any
) -> list[Any]:
    """Return what ``body(*args, **kwargs)`` returns on each rank.

    Skips the test in a process that sees GPUs, and so cannot be forked.

    Raises:
        AssertionError: a rank raised (its traceback is the message), died or took too long.
    """
    if torch.cuda.is_available():
        pytest.skip("CPU ranks are not forked where GPUs are visible: CUDA_VISIBLE_DEVICES= pytest")
    context = multiprocessing.get_context("fork")
    with TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(rank, world_size, folder, body, args, kwargs))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, timeout)
        finally:
            _kill_with_children(ranks)
        errors = sorted(Path(folder).glob("*.error"), key=lambda file: file.stat().st_mtime_ns)
        if errors:  # the first is the cause, the others lost their peer
            raise AssertionError(f"rank {errors[0].stem} of {world_size}:\n{errors[0].read_text()}")
        for rank, process in enumerate(ranks):
            assert process.exitcode == 0, f"rank {rank} ended with {process.exitcode}"
        return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(world_size)]


def _wait(ranks: list[Any], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in ranks):
        failed = any(process.exitcode not in (None, 0) for process in ranks)
        if failed or time.monotonic() > deadline:
            time.sleep(0.5)  # let the others write their tracebacks
            _kill_with_children(ranks)
            if not failed:
                raise AssertionError(f"ranks took longer than {timeout} s")
        time.sleep(0.02)
    for process in ranks:
        process.join()


def _kill_with_children(ranks: list[Any]) -> None:
    """End the ranks and the helpers that checkpointing starts in them."""
    for process in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _rank(
    rank: int,
    world_size: int,
    folder: str,
    body: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    os.setpgid(0, 0)  # a group of its own, see _kill_with_children
    # Megatron collects garbage at each save and load, which goes through all that was imported.
    gc.freeze()
    try:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=120),
        )
        result = body(*args, **kwargs)
        torch.save(result, f"{folder}/{rank}.pt")
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)
