"""Processes of a pool, whose first process may be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_FIRST = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from megatron_flashoptim.checkpoint import quiet

if __name__ == "__main__":
    pool = ProcessPoolExecutor(
        2, mp_context=multiprocessing.get_context("spawn"), initializer=quiet.start
    )
    print(*{pool.submit(os.getpid).result() for _ in range(2)}, flush=True)
    for _ in range(9):
        pool.submit(time.sleep, 600)
    time.sleep(600)
"""


def _is_there(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    """Else they go on beside the same command started again, and wait for ever after that."""
    script = tmp_path / "first.py"
    script.write_text(_FIRST)
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        pids = [int(pid) for pid in first.stdout.readline().split()]
        assert pids and all(map(_is_there, pids))
        first.kill()
        first.wait()
        end = time.monotonic() + 30
        while any(map(_is_there, pids)) and time.monotonic() < end:
            time.sleep(0.05)
        left = [pid for pid in pids if _is_there(pid)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert not left
