"""Writing a ``torch_dist`` checkpoint part by part, with torch's own file format.

A part is one file. What is in all parts is planned before any is written, so that parts can be
written in any order, by several processes, and one by one again after an interruption: beside each
finished part there is a record of what torch must know of it and of the hashes of its contents.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import pickle
import shutil
import textwrap
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megatron_flashoptim.checkpoint.boxes import Box
from megatron_flashoptim.checkpoint.reader import CheckpointReader

# Characters of what the operating system said.
_MAX_CAUSE = 300
_RECORD = "part-{:06d}.record"


@dataclass(frozen=True)
class NewBox:
    """A box of a tensor to be written.

    Attributes:
        key: of the tensor.
        dtype, shape: of the tensor.
        box: the part.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    box: Box

    def item(self) -> WriteItem:
        """Return it as torch's planner has it."""
        # There may be a million: what is the same is one object.
        offset = torch.Size(self.box.offset)
        return WriteItem(
            index=MetadataIndex(self.key, offset),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                ChunkStorageMetadata(offset, _size(self.box.shape)),
                _properties(self.dtype),
                _size(self.shape),
            ),
        )


@functools.cache
def _size(shape: tuple[int, ...]) -> torch.Size:
    return torch.Size(shape)


@functools.cache
def _properties(dtype: torch.dtype) -> TensorProperties:
    return TensorProperties(dtype=dtype)


@dataclass(frozen=True)
class Layout:
    """What goes into which part of a checkpoint.

    Attributes:
        plans: torch's plan of each part.
        metadata: torch's, of the whole.
    """

    plans: Sequence[SavePlan]
    metadata: Metadata


def plan_parts(parts: Sequence[Sequence[NewBox]], byte_strings: Sequence[str]) -> Layout:
    """Return the layout of a checkpoint; byte strings come after the boxes of the last part.

    Raises:
        ValueError: boxes overlap, or do not cover a tensor.
    """
    last = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in byte_strings]
    plans = [SavePlan([box.item() for box in part]) for part in parts]
    plans[-1].items.extend(last)
    planner = DefaultSavePlanner(flatten_state_dict=False)
    try:
        global_plans, metadata = planner.create_global_plan(plans)
    except ValueError as problem:
        raise ValueError(f"the tensors of the checkpoint are not whole: {problem}") from problem
    # Every part is to torch what one rank saves.
    return Layout(FileSystemWriter("").prepare_global_plan(global_plans), metadata)


class _Producer(DefaultSavePlanner):
    """Gives torch's writer each item when it asks for it, and hashes it."""

    def __init__(self, produce: Callable[[MetadataIndex], torch.Tensor | bytes]) -> None:
        super().__init__(flatten_state_dict=False)
        self._produce = produce
        self.hashes: dict[MetadataIndex, int] = {}
        self.problem: Exception | None = None

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Return a tensor, or a byte string as a file."""
        try:
            value = self._produce(write_item.index)
            self.hashes[write_item.index] = content_hash(value)
        except Exception as problem:
            self.problem = problem  # of what is to be written, not of writing
            raise
        return io.BytesIO(value) if isinstance(value, bytes) else value


@dataclass(frozen=True)
class Record:
    """What is kept of a part once it is on disk.

    Attributes:
        results: torch's, where each item is.
        hashes: of the contents, by index.
        report: of whoever produced the contents.
    """

    results: Any
    hashes: Mapping[MetadataIndex, int]
    report: Any


def write_part(
    folder: Path,
    records: Path,
    number: int,
    plan: SavePlan,
    produce: Callable[[MetadataIndex], torch.Tensor | bytes],
    report: Any = None,
) -> None:
    """Write one part and its record to disk.

    Args:
        folder: of the checkpoint.
        records: folder of the records.
        number: of the part.
        plan: of the part.
        produce: returns the contents of an item; called once for each, in the plan's order but
            for byte strings, which come first.
        report: kept in the record; may change until the last item is produced.

    Raises:
        ValueError: the folder cannot be written.
    """
    producer = _Producer(produce)
    writer = FileSystemWriter(folder, thread_count=1, sync_files=True)
    path = records / _RECORD.format(number)
    unfinished = path.with_suffix(".unfinished")
    try:
        with writing(folder):
            results = writer.write_data(plan, producer).wait()
            with open(unfinished, "wb") as file:
                pickle.dump(Record(results, producer.hashes, report), file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.rename(path)
    except ValueError:
        if producer.problem is not None:
            raise producer.problem from None
        raise


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Say which folder could not be written, and what to do.

    Raises:
        ValueError: instead of any ``OSError``, most of which name no file, and of the
            ``RuntimeError`` of torch's archives, which cannot be ended then.
    """
    try:
        yield
    except (OSError, RuntimeError) as problem:
        raise ValueError(
            f"{folder} cannot be written ({_cause(problem)}); make room, or mend what that says, "
            "and run the same command again"
        ) from problem


def _cause(problem: BaseException) -> str:
    """Return what the operating system said, or else the exception."""
    found: BaseException | None = problem
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return textwrap.shorten(str(found or problem), _MAX_CAUSE)  # shutil's name every file


def read_record(records: Path, number: int) -> Record | None:
    """Return the record of a part, or None where the part is not written, or its record damaged."""
    path = records / _RECORD.format(number)
    if not path.is_file():
        return None
    try:
        found = pickle.loads(path.read_bytes())
    except Exception as problem:  # a damaged pickle raises anything
        if isinstance(problem, OSError):
            raise
        return None
    return found if isinstance(found, Record) else None


def forget_part(records: Path, number: int) -> None:
    """Remove the record of a part, which is then to be written again."""
    (records / _RECORD.format(number)).unlink()


def is_whole(folder: Path, record: Record, plan: SavePlan) -> bool:
    """Return whether a part is the planned one, and its file has its size.

    Folders are copied, file systems fail, and other code of the same release may plan other parts.
    """
    if {result.index for result in record.results} != {item.index for item in plan.items}:
        return False
    ends: dict[str, int] = {}
    for result in record.results:
        info = result.storage_data
        ends[info.relative_path] = max(info.offset + info.length, ends.get(info.relative_path, 0))
    files = ((folder / name, end) for name, end in ends.items())
    return all(file.is_file() and file.stat().st_size >= end for file, end in files)


def write_text(path: Path, text: str) -> None:
    """Write a small file that is there whole or not at all.

    Raises:
        ValueError: its folder cannot be written.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    with writing(path.parent):
        with open(unfinished, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)


def read_json(path: Path) -> Any:
    """Return what is in a small file, None where it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def copy_contents(source: Path, target: Path) -> None:
    """Copy a file, or a folder with all that is in it.

    Without permissions: what is copied of a read-only folder could not be written again by the same
    command after an interruption.
    """
    if not source.is_dir():
        shutil.copyfile(source, target)
        return
    target.mkdir(exist_ok=True)
    for each in source.iterdir():
        copy_contents(each, target / each.name)


def write_metadata(folder: Path, layout: Layout, records: Sequence[Record]) -> None:
    """Write torch's ``.metadata`` of a folder whose parts are all written."""
    writer = FileSystemWriter(folder, sync_files=True)
    writer.finish(layout.metadata, [record.results for record in records])


def verify_part(reader: CheckpointReader, record: Record) -> None:
    """Read a part back and compare it with what was meant to be written.

    Raises:
        ValueError: names what differs.
    """
    boxes: dict[str, dict[tuple[int, ...], Box]] = {}
    for result in record.results:
        index = result.index
        if index.offset is None:
            found: torch.Tensor | bytes = reader.read_bytes(index.fqn)
        else:
            if index.fqn not in boxes:
                boxes[index.fqn] = {box.offset: box for box in reader.chunks(index.fqn)}
            found = reader.read(index.fqn, boxes[index.fqn][tuple(index.offset)])
        if content_hash(found) != record.hashes[index]:
            raise ValueError(
                f"{index.fqn} was not written as it should be in {reader.folder}: the disk or its "
                "file system returned other bytes"
            )


def content_hash(value: torch.Tensor | bytes) -> int:
    """Return the CRC-32 of a tensor's bytes, row-major, or of a byte string."""
    if isinstance(value, bytes):
        return zlib.crc32(value)
    return zlib.crc32(value.contiguous().flatten().view(torch.uint8).numpy().data)
