"""Where the elements of a tensor are in a file that ``torch.save`` wrote, and mapping them.

``torch.save`` writes an uncompressed zip archive: a pickle that describes the tensor (strides and
so on) and one record with its storage. In ``torch_dist`` checkpoints many such archives follow each
other in a file. Loading one reads all of its storage; here it stays where it is.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import torch

# Of a record in a zip archive: what is in front of its name, and where the name's length is.
_HEADER_BYTES = 30
_LENGTHS = struct.Struct("<26xHH")
# Bytes whose CRC-32 is computed at once.
_AT_ONCE = 1 << 20
_CHANGED = "its bytes are not those that were saved, by their CRC-32"


@dataclass(frozen=True)
class Stored:
    """Where a saved tensor's elements are.

    Attributes:
        file: name of the file.
        start: byte of the tensor's first element in it, if its elements were bytes: the element
            number of the first is ``first``.
        first: number of the tensor's first element in its storage.
        shape, strides: of the tensor, in elements.
    """

    file: str
    start: int
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def locate(
    file: IO[bytes], name: str, offset: int, length: int, *, checked: bool = False
) -> Stored:
    """Return where the tensor is that ``torch.save`` wrote into a part of a file.

    Args:
        file: open for reading.
        name: of the file, to be kept.
        offset, length: the part, in bytes.
        checked: read all of the tensor's bytes and compare their CRC-32 with the saved one.

    Raises:
        ValueError: it is no single tensor, or compressed.
        BadZipFile, EOFError, UnpicklingError: it is damaged.
    """
    with ZipFile(io.BufferedReader(_Part(file, offset, length))) as archive:
        records = {record.filename.partition("/")[2]: record for record in archive.infolist()}
    if "data.pkl" not in records:
        raise BadZipFile("not written by torch.save")
    description = records["data.pkl"]
    start = _start(file, offset, description)
    # After torch.serialization.set_crc32_options(False) it is 0 for every record.
    has_crc = description.CRC != 0
    if has_crc and _crc(file, start, description.file_size) != description.CRC:
        raise BadZipFile(_CHANGED)
    file.seek(start)
    tensor = _Description(io.BytesIO(file.read(description.file_size))).load()
    if not isinstance(tensor, _Tensor):
        raise ValueError("holds something else than a tensor")
    record = records[f"data/{tensor.storage}"]
    start = _start(file, offset, record)
    if checked and has_crc and _crc(file, start, record.file_size) != record.CRC:
        raise BadZipFile(_CHANGED)
    return Stored(name, start, tensor.first, tuple(tensor.shape), tuple(tensor.strides))


def check_archive(content: bytes) -> None:
    """Compare all that ``torch.save`` wrote with its CRC-32.

    Args:
        content: a whole archive; other bytes are let pass, for they have no sum.

    Raises:
        BadZipFile: it is damaged.
    """
    if not content.startswith(b"PK"):
        return
    with ZipFile(io.BytesIO(content)) as archive:
        if any(record.CRC for record in archive.infolist()) and archive.testzip() is not None:
            raise BadZipFile(_CHANGED)


def _start(file: IO[bytes], offset: int, record: ZipInfo) -> int:
    """Return where the contents of a record of an archive begin in the file."""
    if record.compress_type != ZIP_STORED:
        raise ValueError("is compressed")
    file.seek(offset + record.header_offset)
    lengths: tuple[int, ...] = _LENGTHS.unpack(file.read(_HEADER_BYTES))
    return offset + int(record.header_offset) + _HEADER_BYTES + sum(lengths)


def _crc(file: IO[bytes], start: int, size: int) -> int:
    """Return the CRC-32 of a part of a file, of which a little at a time is in memory."""
    file.seek(start)
    crc = 0
    while size > 0 and (some := file.read(min(size, _AT_ONCE))):
        crc = zlib.crc32(some, crc)
        size -= len(some)
    return crc


def mapped(path: Path, stored: Stored, dtype: torch.dtype) -> torch.Tensor:
    """Return a saved tensor on the mapped file, which lives as long as the tensor.

    Raises:
        ValueError: the file is too short.
    """
    if not math.prod(stored.shape):
        return torch.empty(stored.shape, dtype=dtype)
    start = stored.start + stored.first * dtype.itemsize
    last = sum((n - 1) * s for n, s in zip(stored.shape, stored.strides, strict=True))
    first_page = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    size = start - first_page + (last + 1) * dtype.itemsize
    with open(path, "rb") as file:
        # Private, so that torch has a writable buffer; nothing is written.
        pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY, offset=first_page)
    flat = torch.frombuffer(pages, dtype=dtype, count=last + 1, offset=start - first_page)
    return flat.as_strided(stored.shape, stored.strides)


class _Part(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        super().__init__()
        self._file = file
        self._offset = offset
        self._length = length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}
        self._position = max(0, origin[whence] + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._position)
        count = max(0, min(len(buffer), self._length - self._position))
        data = self._file.read(count)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


@dataclass(frozen=True)
class _Tensor:
    """What the pickle of a tensor says; ``storage`` is the name of its record."""

    storage: str
    first: int
    shape: Sequence[int]
    strides: Sequence[int]


class _Description(pickle.Unpickler):
    """Reads the description of a tensor; calls nothing that the pickle names but this."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what builds the description, or a stand-in for what does not matter."""
        rebuild = {"_rebuild_tensor_v2": _tensor, "_rebuild_tensor_v3": _tensor}
        if module == "torch._utils" and name in rebuild:
            return rebuild[name]
        if module == "torch" or (module, name) == ("collections", "OrderedDict"):
            return _nothing
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a plain tensor")

    def persistent_load(self, pid: Any) -> str:
        """Return the name of a storage's record."""
        return str(pid[2])


def _tensor(
    storage: str, first: int, shape: Sequence[int], strides: Sequence[int], *_: Any
) -> _Tensor:
    return _Tensor(storage, first, shape, strides)


def _nothing(*_: Any) -> None:
    return None
