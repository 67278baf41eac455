"""One process at a time in a working folder, on whatever machine: two would tear up its files.

The system gives a lock back when the process that has it ends, however it does.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from megatron_flashoptim.checkpoint.writer import writing


@contextmanager
def alone(work: Path) -> Iterator[None]:
    """Hold the lock of a working folder: a file beside it, since the folder comes and goes.

    File systems without locks are worked in without.

    Raises:
        ValueError: another process has it.
    """
    lock = lock_of(work)
    while True:
        with _opened(lock) as file:
            if not _is_locked(file, lock, work):
                continue
            try:
                yield
            finally:
                with suppress(OSError):
                    lock.unlink()
            return


def lock_of(work: Path) -> Path:
    """Return the file that is locked; a kill leaves it, and then it means nothing."""
    return work.with_name(work.name + ".lock")


def _opened(lock: Path) -> IO[str]:
    with writing(lock.parent):
        lock.parent.mkdir(parents=True, exist_ok=True)
        return open(lock, "a")


def _is_locked(file: IO[str], lock: Path, work: Path) -> bool:
    """Lock a file; returns whether it is still the lock, which who had it may have removed.

    Raises:
        ValueError: another process has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as problem:
        raise ValueError(
            f"another process is at work in {work}; wait for it, or end it, and run the same "
            "command again"
        ) from problem
    except OSError:
        return True
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), lock.stat())
    return False
