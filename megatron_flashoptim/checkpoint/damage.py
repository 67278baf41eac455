"""Checks of a torch_dist checkpoint's files before any of them is read, and what damage is said."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

# Files to name in an error; a damaged file system may have thousands.
_MAX_NAMED = 5
# Megatron's, of --verify-integrity: a hash of each file.
MANIFEST = "integrity.json"
# For whoever reads it, a run or a command.
WAYS_OUT = (
    "Copy it again from where it is whole, or take an earlier iteration (--ckpt-step N of a run, "
    "--iteration N of megatron-flashoptim)"
)


def read_metadata(folder: str | Path) -> Metadata:
    """Return torch's ``.metadata`` of a checkpoint folder.

    Raises:
        ValueError: it cannot be read; names the file and says what to do.
    """
    file = Path(folder, ".metadata")
    try:
        found = FileSystemReader(folder).read_metadata()
    except Exception as problem:  # a damaged pickle raises whatever it happens to call
        raise unreadable(file, problem) from problem
    if not isinstance(found, Metadata):
        raise unreadable(file, f"of type {type(found).__name__}")
    return found


def unreadable(file: str | Path, problem: BaseException | str) -> ValueError:
    """Return the error of one of the files that describe a checkpoint."""
    said = problem if isinstance(problem, str) else reason(problem)
    return ValueError(f"{file} cannot be read ({said}): it is damaged. {WAYS_OUT}")


def reason(problem: BaseException) -> str:
    """Return the first sentence of an exception's message; torch's go on for a page, in bold."""
    if isinstance(problem, CheckpointException) and problem.failures:
        # Its own message is that of no error, but which ranks had one.
        return reason(next(iter(problem.failures.values()))[0])
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(problem))
    first = plain.strip().partition("\n")[0].partition(". ")[0].rstrip(".")
    return first or type(problem).__name__


def missing_or_short(folder: str | Path, metadata: Metadata) -> str:
    """Compare each file's size with what the checkpoint's own metadata says is in it.

    Args:
        folder: folder of one iteration.
        metadata: its ``.metadata``.

    Returns:
        The files that are missing or too short, ``""`` if none is.
    """
    storage: dict[Any, Any] = metadata.storage_data
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
    more = len(problems) - _MAX_NAMED
    return "; ".join(problems[:_MAX_NAMED]) + (f"; and {more} more" if more > 0 else "")


def check_files(folder: str | Path, metadata: Metadata | None = None) -> Metadata | None:
    """Compare each file's size with what the checkpoint's own metadata says is in it.

    Args:
        folder: folder of one iteration, with Megatron's ``.metadata``.
        metadata: that, where it is read already.

    Returns:
        The metadata, None where there is none.

    Raises:
        ValueError: names the files that are missing or too short.
    """
    if metadata is None:
        if not Path(folder, ".metadata").is_file():
            return None  # no folder of this machine, or no checkpoint: Megatron says so
        metadata = read_metadata(folder)
    if found := missing_or_short(folder, metadata):
        raise ValueError(f"the checkpoint in {folder} is damaged: {found}. {WAYS_OUT}")
    return metadata


def check_manifest(folder: str | Path) -> None:
    """Compare all files but those of tensors with Megatron's integrity manifest, if there is one.

    Tensors are compared with sums of their own when they are read, see ``CheckpointReader``.

    Raises:
        ValueError: names the manifest where it is damaged, or the file that is another.
    """
    for name in not_of_the_manifest(folder):
        raise ValueError(
            f"the checkpoint in {folder} is damaged: {name} is not the file of which "
            f"{MANIFEST} has a hash. {WAYS_OUT}"
        )


def not_of_the_manifest(folder: str | Path) -> Iterator[str]:
    """Yield the files that are others than Megatron's integrity manifest says, as above.

    Raises:
        ValueError: the manifest is damaged.
    """
    manifest = Path(folder, MANIFEST)
    if not manifest.is_file():
        return
    try:
        saved = json.loads(manifest.read_bytes())
        files, algorithm = dict(saved["files"]), str(saved["algorithm"])
        hashlib.new(algorithm)
    except Exception as problem:  # cut short, no JSON, or not what Megatron writes
        raise unreadable(manifest, problem) from problem
    for name, digest in files.items():
        file = Path(folder, name)
        if name.endswith(".distcp") or not file.is_file():
            continue
        with open(file, "rb") as opened:
            if hashlib.file_digest(opened, algorithm).hexdigest() != digest:
                yield name


def check_files_together(
    folder: str | Path, look: Callable[[Metadata], None] | None = None
) -> None:
    """Have rank 0 check the files and all ranks raise what it found.

    Args:
        folder: folder of one iteration.
        look: called by rank 0 with the metadata of files that are whole, which is large and read
            once.

    Raises:
        ValueError: as ``check_files``.
    """
    verdict: list[str | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            metadata = check_files(folder)
            if metadata is not None and look is not None:
                look(metadata)
        except ValueError as problem:
            verdict[0] = str(problem)
        except Exception as problem:  # the other ranks wait for a verdict, whatever happened
            verdict[0] = (
                f"the checkpoint in {folder} cannot be read: {type(problem).__name__}: {problem}"
            )
    torch.distributed.broadcast_object_list(verdict, src=0)
    if verdict[0] is not None:
        raise ValueError(verdict[0])
