"""Weights of a checkpoint as safetensors, in the keys and shapes of Megatron's checkpoints.

A tensor may be larger than the memory, so files are laid out first and filled box by box. The
format is a JSON header and the tensors' bytes behind it; the safetensors package reads it back.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_flashoptim.checkpoint.alone import alone, lock_of
from megatron_flashoptim.checkpoint.boxes import Box, flat_number, view_of_box
from megatron_flashoptim.checkpoint.deviation import named
from megatron_flashoptim.checkpoint.folder import ADAM, WEIGHTS, CheckpointFolder, open_folder
from megatron_flashoptim.checkpoint.iterations import check_destination
from megatron_flashoptim.checkpoint.metadata import RESAVE
from megatron_flashoptim.checkpoint.model_state import ModelState, Span
from megatron_flashoptim.checkpoint.recoding import SPAN
from megatron_flashoptim.checkpoint.writer import content_hash

# Bytes after which a new file begins; one tensor is in one file, however large.
_FILE_BYTES = 5 * 10**9
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
INDEX = "model.safetensors.index.json"
_WORK = ".converting"


@dataclass(frozen=True)
class Placed:
    """Where a tensor goes.

    Attributes:
        key, dtype, shape: of the tensor.
        file: name of its file.
        start: its first byte in it.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    start: int


@dataclass(frozen=True)
class _Written:
    """A box of a tensor and the hash of what was written."""

    tensor: Placed
    box: Box
    hash: int


class WeightsExport:
    """One export, planned when made.

    Args:
        source: folder of a checkpoint, or of one of its iterations.
        destination: new folder.
        dtype: of what is written: fp32 joins masters, bf16 takes the model weights, or the high
            parts of masters where flash keeps those of FP8 weights by tensor. What the model itself
            has in fp32, such as a router's bias, is fp32 in both.
        iteration: of the source; by default its latest.

    Raises:
        ValueError: the source has no masters that can be read, or the destination is taken.
    """

    def __init__(
        self, source: Path, destination: Path, dtype: torch.dtype, iteration: int | None = None
    ) -> None:
        self.folder: CheckpointFolder = open_folder(source, iteration, checked=True)
        check_destination(destination, self.folder.path)
        self.destination = destination = destination.resolve()  # "." has no name
        self._dtype = dtype
        self._state = ModelState(self.folder)
        if dtype == torch.float32 and not self.folder.state():
            what, otherwise = "holds weights only", ""
            if self.folder.optimizer != WEIGHTS:
                what = (
                    f"has the sharding type {self.folder.sharding_type}, in which only a run of "
                    "the same layout knows which master is whose"
                )
                otherwise = f"; for the fp32 masters {RESAVE}"
            raise ValueError(
                f"{self.folder.path} {what}: give --dtype bf16 for the model weights{otherwise}"
            )
        if self.folder.path.resolve().is_relative_to(destination):
            raise ValueError(
                f"{destination} holds the source {self.folder.path}, which is only read; give "
                "another folder"
            )
        self.tensors = self._placed()
        if destination.exists() and not self._may_be_filled():
            raise self._taken()

    def _taken(self) -> ValueError:
        return ValueError(f"{self.destination} is there already; remove it, or give another folder")

    def _may_be_filled(self) -> bool:
        """Return whether the destination is an empty folder, or one that a kill left unfinished."""
        if not self.destination.is_dir():
            return False
        found = {path.name for path in self.destination.iterdir()}
        found.discard(lock_of(Path(_WORK)).name)
        # Files are moved out of the working folder one by one, and it is removed after them.
        left = {_WORK, INDEX, *self._headers} if _WORK in found else set()
        return found <= left

    def _placed(self) -> list[Placed]:
        files: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
        used = 0
        for key in sorted(self.folder.weights()):
            found = self.folder.reader.tensors()[key]
            dtype = found.properties.dtype
            if dtype.is_floating_point and dtype != torch.float32:
                dtype = self._dtype
            size = math.prod(found.size) * dtype.itemsize
            if files[-1] and used + size > _FILE_BYTES:
                files.append([])
                used = 0
            files[-1].append((key, dtype, tuple(found.size)))
            used += size
        placed = []
        self._headers: dict[str, bytes] = {}
        for number, tensors in enumerate(files, start=1):
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            header, starts = _header(tensors)
            self._headers[name] = header
            placed += [
                Placed(*tensor, name, len(header) + start)
                for tensor, start in zip(tensors, starts, strict=True)
            ]
        return placed

    def kept_in_fp32(self) -> int:
        """Return the number of tensors that are fp32 though bf16 was asked for."""
        if self._dtype == torch.float32:
            return 0
        return sum(tensor.dtype == torch.float32 for tensor in self.tensors)

    def numel(self) -> int:
        """Return the number of elements of all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    def bytes_of_result(self) -> int:
        """Return the bytes of all files but the index."""
        data = sum(map(bytes_of_tensor, self.tensors))
        return data + sum(len(header) for header in self._headers.values())

    @torch.no_grad()
    def run(self, progress: Callable[[str, int, int], None]) -> None:
        """Write all files beside or in the destination, read them back, move them into place.

        Raises:
            ValueError: masters that are not those of the weights, too little disk space, a source
                that is damaged, or a file that reads otherwise than written.
            ImportError: the safetensors package is missing.
        """
        import safetensors  # noqa: F401  (for its ImportError, before hours of work, not after)

        self._check_masters(progress)
        # A folder that is there may be the current one, or where a disk is mounted: it stays.
        stays = self.destination.is_dir()
        work = self.destination.with_name(f"{_WORK}-{self.destination.name}")
        if stays:
            work = self.destination / _WORK
        with alone(work):
            self._fill(work, stays, progress)

    def _fill(self, work: Path, stays: bool, progress: Callable[[str, int, int], None]) -> None:
        """Write into a working folder and move that, or what is in it, into place.

        Raises:
            ValueError: as of ``run``.
        """
        if self.destination.exists() and not self._may_be_filled():  # another process was faster
            raise self._taken()
        if work.exists():
            self._remove(work)
        work.mkdir(parents=True)
        free = shutil.disk_usage(work).free
        if self.bytes_of_result() > free:
            work.rmdir()
            raise ValueError(
                f"{self.destination} has {free / 1e9:.1f} GB free, the result needs "
                f"{self.bytes_of_result() / 1e9:.1f} GB"
            )
        try:
            try:
                written = self._write(work, progress)
                self._write_index(work)
            except OSError as problem:
                raise ValueError(
                    f"{self.destination} cannot be written ({problem}); make room, or mend what "
                    "that says, and run the same command again"
                ) from problem
            _verify(work, written, progress)
            if not stays:
                work.rename(self.destination)
                return
            for name in (*self._headers, INDEX):
                (work / name).rename(self.destination / name)
        except BaseException:  # nothing goes on from what is there
            self._remove(work)
            raise
        work.rmdir()

    def _remove(self, work: Path) -> None:
        """Remove what is unfinished, and what was moved out of it already."""
        if work.parent == self.destination:
            for name in (INDEX, *self._headers):
                (self.destination / name).unlink(missing_ok=True)
        shutil.rmtree(work, ignore_errors=True)

    def _check_masters(self, progress: Callable[[str, int, int], None]) -> None:
        """Refuse to take masters that are not those of the weights.

        Raises:
            ValueError: names the parameters.
        """
        if self._dtype != torch.float32 or self.folder.optimizer != ADAM:
            return
        chunks = [chunk for key in self.folder.state() for chunk in self._state.chunks(key)]
        total = sum(chunk.box.numel() for chunk in chunks)
        done, damaged = 0, []
        progress("checking", done, total)
        for chunk in chunks:
            if not self._state.belongs(chunk, SPAN):
                damaged.append(chunk.name)
            done += chunk.box.numel()
            progress("checking", done, total)
        if damaged:
            raise ValueError(
                f"the masters in {self.folder.path} do not belong to its weights: rounded to their "
                f"dtype they are not the weights in {named(damaged)}. The weights are right, and "
                "--dtype bf16 takes them; or `megatron-flashoptim convert --to adam --repair` "
                "makes masters of these weights and keeps all others, and --to weights takes those"
            )

    def _write(self, work: Path, progress: Callable[[str, int, int], None]) -> list[_Written]:
        for name, header in self._headers.items():
            with open(work / name, "wb") as file:
                file.write(header)
                file.flush()
                # Not truncate, which reserves no room: filling a mapped file on a full disk is
                # SIGBUS.
                end = max(t.start + bytes_of_tensor(t) for t in self.tensors if t.file == name)
                os.posix_fallocate(file.fileno(), 0, max(end, len(header)))
        written = []
        done = 0
        progress("converting", done, self.numel())
        for tensor in self.tensors:
            for span in self._spans(tensor.key):
                values = self._values(span).to(tensor.dtype)
                for whole, local in span.boxes():
                    part = span.view(values, local).contiguous()
                    _write_box(work / tensor.file, tensor, whole, part)
                    written.append(_Written(tensor, whole, content_hash(part)))
                done += span.numel
                progress("converting", done, self.numel())
        return written

    def _spans(self, key: str) -> Iterator[Span]:
        for chunk in self._state.chunks(key):
            yield from chunk.cut(SPAN)

    def _values(self, span: Span) -> torch.Tensor:
        if not self._state.has_state(span.chunk.key):
            return self._state.weight(span)
        if self._dtype == torch.float32:
            return self._state.master(span)
        return self._state.high(span)

    def _write_index(self, work: Path) -> None:
        index = {
            "metadata": {"total_size": sum(map(bytes_of_tensor, self.tensors))},
            "weight_map": {tensor.key: tensor.file for tensor in self.tensors},
        }
        (work / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def bytes_of_tensor(tensor: Placed) -> int:
    """Return the bytes of a tensor in its file."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _header(
    tensors: list[tuple[str, torch.dtype, tuple[int, ...]]],
) -> tuple[bytes, list[int]]:
    """Return the bytes in front of the tensors, and where each begins behind them."""
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = [], 0
    for key, dtype, shape in tensors:
        if dtype not in _NAMES:
            raise ValueError(f"{key} is of {dtype}, which safetensors does not have")
        starts.append(end)
        end += math.prod(shape) * dtype.itemsize
        described[key] = {
            "dtype": _NAMES[dtype],
            "shape": shape,
            "data_offsets": [starts[-1], end],
        }
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, starts


def _write_box(path: Path, tensor: Placed, box: Box, values: torch.Tensor) -> None:
    """Write a box of a tensor to its places in the file."""
    if not box.numel():
        return
    ends = tuple(a + b - 1 for a, b in zip(box.offset, box.shape, strict=True))
    first, last = flat_number(box.offset, tensor.shape), flat_number(ends, tensor.shape)
    begin = tensor.start + first * tensor.dtype.itemsize
    page = begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    size = begin - page + (last + 1 - first) * tensor.dtype.itemsize
    with (
        open(path, "r+b") as file,
        mmap.mmap(file.fileno(), size, access=mmap.ACCESS_WRITE, offset=page) as pages,
    ):
        flat = torch.frombuffer(
            pages, dtype=tensor.dtype, count=last + 1 - first, offset=begin - page
        )
        view_of_box(flat, tensor.shape, first, box).copy_(values)
        del flat  # the mapping is in use as long as a tensor is on it


def _verify(work: Path, written: list[_Written], progress: Callable[[str, int, int], None]) -> None:
    """Read all boxes back with the safetensors package.

    Raises:
        ValueError: names what reads otherwise.
    """
    from safetensors import safe_open

    total = sum(each.box.numel() for each in written)
    done = 0
    progress("verifying", done, total)
    for each in written:
        key, box = each.tensor.key, each.box
        inside = tuple(slice(a, a + b) for a, b in zip(box.offset, box.shape, strict=True))
        # Opened each time: pages of a mapped file count as this process's memory.
        with safe_open(work / each.tensor.file, framework="pt") as file:
            found = file.get_slice(key)[inside] if inside else file.get_tensor(key)
            if content_hash(found) != each.hash:
                raise ValueError(f"{key} in {work / each.tensor.file} reads otherwise than written")
            del found
        done += box.numel()
        progress("verifying", done, total)
