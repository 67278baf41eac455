"""A check of a torch_dist checkpoint's files before any of them is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

# Files to name in an error; a damaged file system may have thousands.
_MAX_NAMED = 5


def check_files(folder: str | Path) -> None:
    """Compare each file's size with what the checkpoint's own metadata says is in it.

    Args:
        folder: folder of one iteration, with Megatron's ``.metadata``.

    Raises:
        ValueError: names the files that are missing or too short.
    """
    if not Path(folder, ".metadata").is_file():
        return  # no folder of this machine, or no checkpoint: Megatron says so
    storage: dict[Any, Any] = FileSystemReader(folder).read_metadata().storage_data
    needed: dict[str, int] = {}
    for info in storage.values():
        end = info.offset + info.length
        needed[info.relative_path] = max(end, needed.get(info.relative_path, 0))
    problems = []
    for name, size in sorted(needed.items()):
        file = Path(folder, name)
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size < size:
            problems.append(f"{name} has {file.stat().st_size} of {size} bytes")
    if problems:
        more = len(problems) - _MAX_NAMED
        named = "; ".join(problems[:_MAX_NAMED]) + (f"; and {more} more" if more > 0 else "")
        raise ValueError(
            f"the checkpoint in {folder} is damaged: {named}. Load an earlier one with --ckpt-step"
        )


def check_files_together(folder: str | Path) -> None:
    """Have rank 0 check the files and all ranks raise what it found.

    Raises:
        ValueError: as ``check_files``.
    """
    verdict: list[str | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            check_files(folder)
        except ValueError as problem:
            verdict[0] = str(problem)
        except Exception as problem:  # the other ranks wait for a verdict, whatever happened
            verdict[0] = (
                f"the checkpoint in {folder} cannot be read: {type(problem).__name__}: {problem}"
            )
    torch.distributed.broadcast_object_list(verdict, src=0)
    if verdict[0] is not None:
        raise ValueError(verdict[0])
