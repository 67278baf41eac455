"""Comparing every byte of a checkpoint with the sums saved beside it, without loading it.

``torch.save`` writes a CRC-32 beside each tensor and each description of one. In ``torch_dist``
every item (what one rank saved of a tensor) is such an archive, in the legacy format every file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import ZipFile

from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME

from megatron_flashoptim.checkpoint.damage import (
    MANIFEST,
    not_of_the_manifest,
    read_metadata,
    reason,
)
from megatron_flashoptim.checkpoint.folder import DESCRIBED, check_format
from megatron_flashoptim.checkpoint.torch_file import (
    CHANGED,
    changed_records,
    is_archive,
    part,
    tensor_names,
)

_LEGACY = "mp_rank_*/**/*.pt"


@dataclass(frozen=True)
class Item:
    """A part of a file that is an archive of its own.

    Attributes:
        key: of the tensor; ``""`` for a whole file, whose own description names its tensors.
        offset, length: in bytes.
        is_tensor: whether it has to be an archive; other bytes may have no sum.
    """

    key: str
    offset: int
    length: int
    is_tensor: bool


@dataclass
class Found:
    """What reading files found.

    Attributes:
        files, items: numbers of what was to be read.
        read: bytes that were.
        damaged: a line for each damaged item or file: the file's name, the tensor, what is wrong.
        without_sums: bytes in items that have nothing to compare with.
        seconds: that it took.
    """

    files: int = 0
    items: int = 0
    read: int = 0
    damaged: list[str] = field(default_factory=list)
    without_sums: int = 0
    seconds: float = 0.0


def verify(
    folder: Path,
    tell: Callable[[str, int, int], None] = lambda phase, done, total: None,
    *,
    executor: Executor | None = None,
) -> Found:
    """Read each file of a checkpoint once and compare all CRC-32 that there are.

    What describes a ``torch_dist`` checkpoint has none (``.metadata``, ``metadata.json``): it is
    read, and compared with Megatron's integrity manifest if there is one.

    Args:
        folder: of one iteration, ``torch_dist`` or legacy ``torch``.
        tell: told phase, bytes done and all bytes.
        executor: see ``side_by_side.pool``; each process takes a file at a time.

    Raises:
        ValueError: it is in another format, or ``.metadata``, ``metadata.json`` or the manifest
            cannot be read.
    """
    started = time.monotonic()
    found = Found()
    files = _legacy_files(folder)
    # torch_dist, in which data loaders may have saved files like those of the legacy format.
    if not files or any((folder / name).is_file() for name in DESCRIBED):
        files = {**_files(folder, found), **files}
    total = sum(item.length for items in files.values() for item in items)
    tell("verified", 0, total)
    for one in _each(folder, files, executor):
        found.files += 1
        found.items += one.items
        found.read += one.read
        found.damaged += one.damaged
        found.without_sums += one.without_sums
        tell("verified", min(total, found.read), total)
    found.seconds = time.monotonic() - started
    return found


def _legacy_files(folder: Path) -> dict[str, list[Item]]:
    return {
        str(file.relative_to(folder)): [Item("", 0, file.stat().st_size, True)]
        for file in sorted(folder.glob(_LEGACY))
    }


def _files(folder: Path, found: Found) -> dict[str, list[Item]]:
    """Return the items in each file of a ``torch_dist`` checkpoint, and look at all others."""
    check_format(folder)
    described = [folder / name for name in (*DESCRIBED, MANIFEST)]
    described = [file for file in described if file.is_file()]
    metadata = read_metadata(folder)
    for name in not_of_the_manifest(folder):
        found.damaged.append(f"{name}: not the file of which the integrity manifest has a hash")
    files: dict[str, list[Item]] = {}
    for index, info in metadata.storage_data.items():
        # Megatron gives every tensor an offset, and byte strings none.
        item = Item(index.fqn, info.offset, info.length, index.offset is not None)
        files.setdefault(info.relative_path, []).append(item)
    common = folder / COMMON_STATE_FNAME
    if common.is_file():  # of releases before 0.19
        files[common.name] = [Item("", 0, common.stat().st_size, True)]
    found.files = len(described)
    found.read = sum(file.stat().st_size for file in described)
    return dict(sorted(files.items()))


def _each(folder: Path, files: dict[str, list[Item]], executor: Executor | None) -> Iterator[Found]:
    if executor is None:
        for name, items in files.items():
            yield verify_file(folder, name, items)
        return
    futures = [executor.submit(verify_file, folder, *each) for each in files.items()]
    for future in futures:
        yield future.result()


def verify_file(folder: Path, name: str, items: Sequence[Item]) -> Found:
    """Compare the items in one file with their sums."""
    found = Found(items=len(items))
    try:
        file = open(folder / name, "rb")  # noqa: SIM115 (its failure alone is told as this)
    except OSError as problem:
        found.damaged.append(f"{name}: {problem.strerror}, with {_all(items)}")
        return found
    with file:
        size = file.seek(0, 2)
        cut = []
        for item in sorted(items, key=lambda each: each.offset):
            if item.offset + item.length > size:
                cut.append(item)
                continue
            found.read += item.length
            one = part(file, item.offset, item.length)
            try:
                if not item.is_tensor and not is_archive(one):
                    found.without_sums += item.length
                    continue
                with ZipFile(one) as archive:
                    changed = changed_records(file, item.offset, archive)
                    keys = _keys(item, archive, changed or [])
            except Exception as problem:  # damaged archives raise anything
                where = f"{name}: {item.key}" if item.key else name
                found.damaged.append(f"{where}: cannot be read ({reason(problem)})")
                continue
            if changed is None:
                found.without_sums += item.length
            found.damaged += [f"{name}: {key}: {CHANGED}" for key in keys]
    if cut:
        needed = cut[-1].offset + cut[-1].length
        found.damaged.append(f"{name}: {size} of {needed} bytes, without {_all(cut)}")
    return found


def _keys(item: Item, archive: ZipFile, changed: Sequence[str]) -> list[str]:
    """Return the names of the tensors that changed records belong to."""
    if item.key or not changed:
        return [item.key] if changed else []
    try:
        names = tensor_names(archive)
    except Exception:  # the description is among what changed
        names = {}
    return [names.get(record, record) for record in changed]


def _all(items: Sequence[Item]) -> str:
    """Return which tensors a file has no more."""
    keys = list(dict.fromkeys(item.key for item in items if item.key))
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return f"{keys[0]}{more}" if keys else "all tensors in it"
