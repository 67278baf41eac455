"""Reading tensors of a ``torch_dist`` checkpoint one box at a time, outside Megatron's own load.

Megatron reads all tensors of a sharded state dict in one go, and torch's reader whole saved shards.
Here a box is copied out of the mapped file, so that nothing but the box is in memory. Nothing is
collective: each process reads what it wants.
"""

from __future__ import annotations

import io
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_flashoptim.checkpoint.boxes import Box
from megatron_flashoptim.checkpoint.damage import WAYS_OUT, read_metadata, reason
from megatron_flashoptim.checkpoint.torch_file import Stored, check_archive, locate, mapped

# Saved shards whose place is remembered.
_MOST_REMEMBERED = 64


class CheckpointReader:
    """The tensors of one checkpoint folder.

    Args:
        folder: folder of one iteration, with torch's ``.metadata``.
        checked: before an item (what one rank saved of a tensor) is read for the first time, all
            of its bytes are compared with their CRC-32. For those who read whole items in the
            end: with data-parallel ranks that read a part each, every one would read all.

    Attributes:
        folder: the same.
        metadata: torch's, of all tensors and byte strings.

    Raises:
        ValueError: ``.metadata`` is missing or damaged.
    """

    def __init__(self, folder: str | Path, *, checked: bool = False) -> None:
        self.folder = Path(folder)
        self.metadata: Metadata = read_metadata(folder)
        # Items that need no check any more: by file, where they begin.
        self._sound: dict[str, set[int]] | None = {} if checked else None
        self._tensors = self.metadata.state_dict_metadata
        self._stored: dict[MetadataIndex, Stored] = {}
        self._chunks: dict[str, list[Box]] = {}
        self._order: dict[str, tuple[list[int], list[int]]] = {}
        self._longest: dict[str, int] = {}
        self._found: dict[str, str] = {}

    def tensors(self) -> Mapping[str, TensorStorageMetadata]:
        """Return shape, dtype and saved boxes (``chunks``) of each tensor by key."""
        return {k: v for k, v in self._tensors.items() if isinstance(v, TensorStorageMetadata)}

    def byte_strings(self) -> list[str]:
        """Return the keys of what is no tensor, such as RNG states."""
        return [k for k, v in self._tensors.items() if isinstance(v, BytesStorageMetadata)]

    def find(self, pattern: str) -> str:
        """Return the key that a pattern with at most one ``*`` stands for.

        A key without may have ``chained_N.`` in front, as Megatron's chains had once. Without
        such a tensor, returns the pattern, which then names it in errors.
        """
        if pattern in self._tensors:
            return pattern
        if pattern not in self._found:
            begin, star, end = pattern.partition("*")
            if not star:
                begin, end = "chained_", f".{pattern}"
            keys = (key for key in self._tensors if key.startswith(begin) and key.endswith(end))
            self._found[pattern] = next(keys, pattern)
        return self._found[pattern]

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor.

        Raises:
            ValueError: the checkpoint has no tensor of that key.
        """
        return tuple(self._tensor(key).size)

    def chunks(self, key: str) -> list[Box]:
        """Return the boxes in which a tensor was saved.

        Raises:
            ValueError: the checkpoint has no tensor of that key.
        """
        if key not in self._chunks:
            chunks = self._tensor(key).chunks
            self._chunks[key] = [Box(tuple(c.offsets), tuple(c.sizes)) for c in chunks]
        return self._chunks[key]

    def read(self, key: str, box: Box) -> torch.Tensor:
        """Return a box of a tensor, of its dtype, in host memory.

        Raises:
            ValueError: the checkpoint has no such tensor, or no such box in it.
        """
        values = torch.empty(box.shape, dtype=self._tensor(key).properties.dtype)
        self.read_into(values, key, box.offset)
        return values

    def read_into(
        self, target: torch.Tensor, key: str, offset: Sequence[int], *, partly: bool = False
    ) -> None:
        """Read a box of a tensor.

        Args:
            target: receives the box, of its shape and converted to its dtype.
            key: of the tensor.
            offset: where the box begins in it.
            partly: elements beyond the tensor's end stay as they are.

        Raises:
            ValueError: the checkpoint has no such tensor, or not all of the box.
        """
        box = Box(tuple(offset), tuple(target.shape))
        if self._copy_into(target, key, box) != box.numel() and not partly:
            raise ValueError(
                f"{key} in {self.folder} has the shape {self.shape(key)} and not all elements of "
                f"the box at {box.offset} of shape {box.shape}"
            )

    def read_bytes(self, key: str) -> bytes:
        """Return a byte string by its key.

        Raises:
            ValueError: the checkpoint has none of that key, or it is damaged.
        """
        info = self.metadata.storage_data.get(MetadataIndex(key))
        if info is None:
            raise ValueError(f"the checkpoint in {self.folder} has nothing under the key {key}")
        with self._open(info.relative_path, key) as file:
            file.seek(info.offset)
            found: bytes = file.read(info.length)
        if self._sound is not None:
            try:
                check_archive(io.BytesIO(found))
            except Exception as problem:
                raise self._damaged(info.relative_path, key, problem) from problem
        return found

    def _tensor(self, key: str) -> TensorStorageMetadata:
        found: Any = self._tensors.get(key)
        if not isinstance(found, TensorStorageMetadata):
            raise ValueError(
                f"the checkpoint in {self.folder} has no tensor {key}: it holds no such state "
                "for this model. Load the weights alone with --no-load-optim --no-load-rng, or "
                "--finetune"
            )
        return found

    def _copy_into(self, target: torch.Tensor, key: str, box: Box) -> int:
        """Copy the saved part of a box into a tensor; returns the number of elements copied."""
        copied = 0
        dtype = self._tensor(key).properties.dtype
        for number, saved in self._near(key, box):
            common = box.intersect(saved)
            if common is None:
                continue
            stored = self._located(key, saved, number)
            into = _part(target, common.relative_to(box.offset))
            try:
                values = mapped(self.folder / stored.file, stored, dtype)
            except (ValueError, OSError) as problem:
                raise self._damaged(stored.file, key, problem) from problem
            into.copy_(_part(values, common.relative_to(saved.offset)))
            copied += common.numel()
        return copied

    def _near(self, key: str, box: Box) -> Iterator[tuple[int, Box]]:
        """Yield number and box of the saved boxes that may have a part of a box, by dimension 0.

        A tensor of 100 layers, cut by hundreds of ranks, is saved in tens of thousands of boxes.
        """
        chunks = self.chunks(key)
        if not box.shape:
            yield from enumerate(chunks)
            return
        if key not in self._order:
            order = sorted(range(len(chunks)), key=lambda number: chunks[number].offset[0])
            self._order[key] = order, [chunks[number].offset[0] for number in order]
            self._longest[key] = max((chunk.shape[0] for chunk in chunks), default=0)
        order, first = self._order[key]
        begin = bisect_right(first, box.offset[0] - self._longest[key])
        for number in order[begin : bisect_left(first, box.offset[0] + box.shape[0])]:
            yield number, chunks[number]

    def _located(self, key: str, saved: Box, number: int) -> Stored:
        """Return where a saved box is in the files."""
        index = MetadataIndex(key, torch.Size(saved.offset), number)
        if index not in self._stored:
            while len(self._stored) >= _MOST_REMEMBERED:
                del self._stored[next(iter(self._stored))]
            info = self.metadata.storage_data.get(index)
            if info is None:
                raise self._damaged(
                    ".metadata", key, LookupError("does not say in which file it is")
                )
            if getattr(info, "transform_descriptors", None):
                raise ValueError(
                    f"{key} in {self.folder} was saved with the transformations "
                    f"{info.transform_descriptors}, which are not known here; save it without"
                )
            name, offset = info.relative_path, info.offset
            sound = None if self._sound is None else self._sound.setdefault(name, set())
            checked = sound is not None and offset not in sound
            with self._open(name, key) as file:
                try:
                    found = locate(file, name, offset, info.length, checked=checked)
                except Exception as problem:  # damaged archives and pickles raise anything
                    raise self._damaged(name, key, problem) from problem
            if sound is not None:
                sound.add(offset)
            self._stored[index] = found
        return self._stored[index]

    def _open(self, name: str, key: str) -> Any:
        try:
            return open(self.folder / name, "rb")
        except OSError as problem:
            raise self._damaged(name, key, problem) from problem

    def _damaged(self, name: str, key: str, problem: Exception) -> ValueError:
        return ValueError(
            f"the checkpoint in {self.folder} is damaged: {key} in {name}: {reason(problem)}. "
            + WAYS_OUT
        )


def _part(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    for dim, (start, extent) in enumerate(zip(box.offset, box.shape, strict=True)):
        tensor = tensor.narrow(dim, start, extent)
    return tensor
