"""Addresses apart from memory: ranges that are reserved, and chunks of memory to put behind them.

A chunk can stand behind several addresses at once, so that tensors which are not needed at the same
time share memory while each keeps its own address. On a GPU that is CUDA's virtual memory
management (through cuda-bindings, which torch brings), on a CPU a memory file that is mapped.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch


class AddressRange(ABC):
    """A range of addresses without memory; touching it where nothing is mapped is a fault.

    Attributes:
        tensor: uint8 over the whole range; keeps the range reserved as long as it lives.
        chunk_bytes: bytes of a chunk, of which offsets are multiples.
    """

    tensor: torch.Tensor
    chunk_bytes: int

    @abstractmethod
    def map(self, offset: int, chunk: Any) -> None:
        """Put a chunk behind the bytes at ``offset``, where nothing is."""

    @abstractmethod
    def unmap(self, offset: int, chunks: int) -> None:
        """Take the memory of so many chunks away; nothing may be using these addresses."""


class Memory(ABC):
    """Chunks of memory of one device.

    Attributes:
        chunk_bytes: bytes of a chunk.
        nbytes: bytes of all chunks.
    """

    chunk_bytes: int
    nbytes: int

    @abstractmethod
    def allocate(self) -> Any:
        """Return a new chunk, of undefined content.

        Raises:
            MemoryError: the device has no such memory left.
        """


def reserve(nbytes: int, device: torch.device) -> AddressRange:
    """Reserve addresses for at least ``nbytes`` bytes on a device."""
    return CudaRange(nbytes, device) if device.type == "cuda" else HostRange(nbytes)


def memory_of(device: torch.device) -> Memory:
    """Return a source of chunks for ranges on a device."""
    return CudaMemory(device) if device.type == "cuda" else HostMemory()


def chunk_bytes_of(device: torch.device) -> int:
    """Return the bytes of a chunk on a device."""
    return _cuda_chunk_bytes(device) if device.type == "cuda" else mmap.PAGESIZE


def _whole_chunks(nbytes: int, chunk_bytes: int) -> int:
    return -(-nbytes // chunk_bytes) * chunk_bytes


def _when_gone(owner: Any, free: Callable[..., None], *arguments: Any) -> None:
    """Free when nothing refers to ``owner``, but not when the process ends: it frees all."""
    weakref.finalize(owner, free, *arguments).atexit = False


# Host memory, for Megatron on CPU ranks.

_FAILED = ctypes.c_void_p(-1).value


def _mmap(address: int | None, nbytes: int, protection: int, flags: int, file: int, at: int) -> int:
    # The mmap module cannot map to a given address.
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
        *(ctypes.c_int, ctypes.c_int, ctypes.c_long),
    )
    found = libc.mmap(address, nbytes, protection, flags, file, at)
    if found == _FAILED:
        raise MemoryError(f"mmap of {nbytes} bytes failed: {os.strerror(ctypes.get_errno())}")
    return int(found)


def _munmap(address: int, nbytes: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(nbytes))


_MAP_FIXED = 0x10  # which the mmap module does not name
_MAP_NORESERVE = 0x4000
_NOTHING = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_PROT_NONE = 0


class HostRange(AddressRange):
    """Addresses of this process.

    Args:
        nbytes: at least so many bytes.
    """

    def __init__(self, nbytes: int) -> None:
        self.chunk_bytes = mmap.PAGESIZE
        self._nbytes = _whole_chunks(nbytes, self.chunk_bytes)
        self._address = _mmap(None, self._nbytes, _PROT_NONE, _NOTHING, -1, 0)
        exported = (ctypes.c_uint8 * self._nbytes).from_address(self._address)
        _when_gone(exported, _munmap, self._address, self._nbytes)
        self.tensor = torch.frombuffer(exported, dtype=torch.uint8)

    def map(self, offset: int, chunk: tuple[int, int]) -> None:
        """Put a chunk of ``HostMemory`` behind the bytes at ``offset``."""
        file, at = chunk
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        flags = mmap.MAP_SHARED | _MAP_FIXED
        _mmap(self._address + offset, self.chunk_bytes, protection, flags, file, at)

    def unmap(self, offset: int, chunks: int) -> None:
        """Take the memory of so many chunks away."""
        nbytes = chunks * self.chunk_bytes
        _mmap(self._address + offset, nbytes, _PROT_NONE, _NOTHING | _MAP_FIXED, -1, 0)


class HostMemory(Memory):
    """Chunks of a file in memory.

    Attributes:
        file: descriptor of the file.
    """

    def __init__(self) -> None:
        self.chunk_bytes = mmap.PAGESIZE
        self.nbytes = 0
        self.file = os.memfd_create("gradients")
        _when_gone(self, os.close, self.file)

    def allocate(self) -> tuple[int, int]:
        """Return a new chunk: descriptor of the file and offset in it."""
        at = self.nbytes
        self.nbytes += self.chunk_bytes
        os.ftruncate(self.file, self.nbytes)
        return self.file, at


# Memory of a GPU.

# In granules of the device (2 MiB): few calls of the driver, and little lost by rounding up.
_GRANULES_PER_CHUNK = 8


def _driver() -> Any:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as problem:
        raise ImportError(
            "--flash-gradient-release needs the package cuda-bindings on a GPU, which torch 2.11 "
            "brings; pip install cuda-bindings"
        ) from problem


def _checked(call: str, *arguments: Any) -> Any:
    """Call the CUDA driver; return its result.

    Raises:
        MemoryError: the device is out of memory.
        RuntimeError: names the call and the driver's error.
    """
    driver = _driver()
    error, *values = getattr(driver, call)(*arguments)
    if error == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise MemoryError(f"{call}: the GPU is out of memory")
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the CUDA driver's {call} failed: {error.name}")
    return values[0] if values else None


def _allocation(device: torch.device) -> Any:
    """Return the driver's description of memory on a device."""
    driver = _driver()
    description = driver.CUmemAllocationProp()
    description.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    description.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    description.location.id = _index(device)
    return description


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _cuda_chunk_bytes(device: torch.device) -> int:
    torch.cuda.synchronize(device)  # the driver needs the context that torch makes when first used
    minimum = _driver().CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    granule = _checked("cuMemGetAllocationGranularity", _allocation(device), minimum)
    return _GRANULES_PER_CHUNK * int(granule)


class _Exported:
    """Shows addresses of a GPU to torch, which keeps it as long as a tensor uses them."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class CudaRange(AddressRange):
    """Addresses of a GPU.

    Args:
        nbytes: at least so many bytes.
        device: the GPU.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.chunk_bytes = _cuda_chunk_bytes(device)
        self._device = device
        self._nbytes = _whole_chunks(nbytes, self.chunk_bytes)
        self._address = int(_checked("cuMemAddressReserve", self._nbytes, 0, 0, 0))
        self._mapped: set[int] = set()
        exported = _Exported(self._address, self._nbytes)
        _when_gone(exported, _free_range, self._address, self._nbytes, self.chunk_bytes,
                   self._mapped)  # fmt: skip
        # Torch asks the driver whose addresses these are, which it knows of mapped ones only.
        memory = CudaMemory(device)
        self.map(0, memory.allocate())
        self.tensor = torch.as_tensor(exported, device=torch.device("cuda", _index(device)))
        self.unmap(0, 1)

    def map(self, offset: int, chunk: Any) -> None:
        """Put a chunk of ``CudaMemory`` behind the bytes at ``offset``."""
        driver = _driver()
        address = self._address + offset
        _checked("cuMemMap", address, self.chunk_bytes, 0, chunk, 0)
        self._mapped.add(address)
        access = driver.CUmemAccessDesc()
        access.location = _allocation(self._device).location
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        _checked("cuMemSetAccess", address, self.chunk_bytes, [access], 1)

    def unmap(self, offset: int, chunks: int) -> None:
        """Take the memory of so many chunks away."""
        for chunk in range(chunks):
            address = self._address + offset + chunk * self.chunk_bytes
            _checked("cuMemUnmap", address, self.chunk_bytes)
            self._mapped.remove(address)


class CudaMemory(Memory):
    """Chunks of a GPU's memory, outside torch's allocator.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.chunk_bytes = _cuda_chunk_bytes(device)
        self.nbytes = 0
        self._device = device
        self._chunks: list[Any] = []
        _when_gone(self, _free_chunks, self._chunks)

    def allocate(self) -> Any:
        """Return a new chunk: the driver's handle."""
        try:
            chunk = _checked("cuMemCreate", self.chunk_bytes, _allocation(self._device), 0)
        except MemoryError:
            torch.cuda.empty_cache()  # what torch keeps for itself may be enough
            chunk = _checked("cuMemCreate", self.chunk_bytes, _allocation(self._device), 0)
        self._chunks.append(chunk)
        self.nbytes += self.chunk_bytes
        return chunk


def _free_range(address: int, nbytes: int, chunk_bytes: int, mapped: set[int]) -> None:
    torch.cuda.synchronize()  # the driver does not wait for kernels that use the addresses
    for chunk in mapped:
        _checked("cuMemUnmap", chunk, chunk_bytes)
    _checked("cuMemAddressFree", address, nbytes)


def _free_chunks(chunks: list[Any]) -> None:
    # The driver keeps the memory of a chunk that is still mapped.
    for chunk in chunks:
        _checked("cuMemRelease", chunk)
