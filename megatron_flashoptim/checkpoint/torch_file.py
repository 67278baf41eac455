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
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo, is_zipfile

import torch

# Of a record in a zip archive: how it begins, what is in front of its name, and where the name's
# length is.
_HEADER = b"PK\3\4"
_HEADER_BYTES = 30
_LENGTHS = struct.Struct("<26xHH")
# Bytes whose CRC-32 is computed at once.
_AT_ONCE = 1 << 20
# Beside what torch itself has: hooks, and the storage of dtypes without a typed one, such as FP8.
_OF_NO_MATTER = (("collections", "OrderedDict"), ("torch.storage", "UntypedStorage"))
CHANGED = "its bytes are not those that were saved, by their CRC-32"


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
    with ZipFile(part(file, offset, length)) as archive:
        records = {_name(record): record for record in archive.infolist()}
        if checked and changed_records(file, offset, archive):
            raise BadZipFile(CHANGED)
    if "data.pkl" not in records:
        raise BadZipFile("not written by torch.save")
    description = records["data.pkl"]
    start = _start(file, offset, description)
    file.seek(start)
    content = file.read(description.file_size)
    if description.CRC and zlib.crc32(content) != description.CRC:
        raise BadZipFile(CHANGED)
    tensor = _Description(io.BytesIO(content)).load()
    if not isinstance(tensor, _Tensor):
        raise ValueError("holds something else than a tensor")
    record = records[f"data/{tensor.storage}"]
    start = _start(file, offset, record)
    return Stored(name, start, tensor.first, tuple(tensor.shape), tuple(tensor.strides))


def check_archive(file: IO[bytes]) -> None:
    """Compare all that ``torch.save`` wrote with its CRC-32.

    Args:
        file: a whole archive; other bytes are let pass, for they have no sum.

    Raises:
        BadZipFile: it is damaged.
    """
    if is_archive(file):
        with ZipFile(file) as archive:
            if changed_records(file, 0, archive):
                raise BadZipFile(CHANGED)


def is_archive(file: IO[bytes]) -> bool:
    """Return whether bytes are an archive, be it with a damaged beginning or a damaged end."""
    file.seek(0)
    return file.read(2) == b"PK" or is_zipfile(file)


def changed_records(file: IO[bytes], offset: int, archive: ZipFile) -> list[str] | None:
    """Compare all records of an archive with their CRC-32, a little at a time in memory.

    Args:
        file: that the archive is in.
        offset: byte at which it begins.
        archive: the same, opened.

    Returns:
        The names of those that are other bytes than were saved; None where there is nothing to
        compare with: after ``torch.serialization.set_crc32_options(False)`` all sums are 0.
    """
    records = archive.infolist()
    if not any(record.CRC for record in records):
        return None
    return [
        _name(record)
        for record in records
        if _crc(file, _start(file, offset, record), record.file_size) != record.CRC
    ]


def part(file: IO[bytes], offset: int, length: int) -> IO[bytes]:
    """Return a part of a file, in bytes, as a file of its own."""
    return io.BufferedReader(_Part(file, offset, length))


def _name(record: ZipInfo) -> str:
    """Return a record's name without the folder that all of an archive are in."""
    return record.filename.partition("/")[2]


def _start(file: IO[bytes], offset: int, record: ZipInfo) -> int:
    """Return where the contents of a record of an archive begin in the file."""
    if record.compress_type != ZIP_STORED:
        raise ValueError("is compressed")
    file.seek(offset + record.header_offset)
    header = file.read(_HEADER_BYTES)
    if not header.startswith(_HEADER):
        raise BadZipFile(CHANGED)
    lengths: tuple[int, ...] = _LENGTHS.unpack(header)
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
        if module == "torch" or (module, name) in _OF_NO_MATTER:
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


def tensor_names(archive: ZipFile) -> dict[str, str]:
    """Return where in the saved object the tensor of each record is, as ``model.layer.weight``.

    Calls nothing that the pickle names: what is neither tensor nor container is left out.

    Raises:
        Exception: the pickle is damaged.
    """
    (pickled,) = (record for record in archive.infolist() if _name(record) == "data.pkl")
    found: dict[str, str] = {}

    def look_into(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, _Tensor):
            found.setdefault(f"data/{value.storage}", ".".join(path))
        elif isinstance(value, dict | list | tuple):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, each in items:
                look_into(each, (*path, str(key)))

    look_into(_Names(io.BytesIO(archive.read(pickled))).load(), ())
    return found


class _Names(_Description):
    """Reads any object for the tensors in it; other objects become stand-ins."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what builds a tensor or a container, or a stand-in."""
        if module.startswith("torch.") and name in _REBUILT:
            return _REBUILT[name]
        if module == "collections" and name in ("OrderedDict", "defaultdict"):
            return _Dict
        return _Kind(name, (_StandIn,), {})


class _Dict(dict[Any, Any]):
    """Of the kinds of dict that a pickle makes, with attributes and a factory or not."""

    def __init__(self, *_: Any) -> None:
        super().__init__()


class _Kind(type):
    """Class of stand-ins, named as in Python where it is a key, as dtypes are in Megatron's."""

    def __repr__(cls) -> str:
        return cls.__name__


class _StandIn(metaclass=_Kind):
    """Takes whatever a pickle does to an object."""

    def __new__(cls, *_: Any, **__: Any) -> _StandIn:
        return object.__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        """Take an element."""

    def extend(self, _: Any) -> None:
        """Take elements."""


# Functions of torch that a pickle names around a tensor.
_REBUILT: dict[str, Any] = {
    "_rebuild_tensor_v2": _tensor,
    "_rebuild_tensor_v3": _tensor,
    "_rebuild_parameter": lambda tensor, *_: tensor,
    "_rebuild_from_type_v2": lambda rebuild, _, arguments, *__: rebuild(*arguments),
}
