"""Addresses without memory, and a pool of memory that stands behind them in turns."""

from __future__ import annotations

import faulthandler
import gc
import logging
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_flashoptim.megatron.release.address_range import chunk_bytes_of, memory_of, reserve
from megatron_flashoptim.megatron.release.grad_pool import GradPool, Region

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHUNK = chunk_bytes_of(DEVICE)


def _used_on_gpu() -> int:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def test_one_chunk_stands_behind_several_addresses() -> None:
    before = _used_on_gpu() if DEVICE.type == "cuda" else 0
    addresses, memory = reserve(64 * CHUNK, DEVICE), memory_of(DEVICE)
    first, second = memory.allocate(), memory.allocate()
    for offset in range(0, 64 * CHUNK, 2 * CHUNK):
        addresses.map(offset, first)
        addresses.map(offset + CHUNK, second)
    addresses.tensor.view(torch.float32).fill_(1.0)
    chunks = addresses.tensor.view(torch.float32).view(64, -1)
    chunks[10].fill_(2.0)
    assert bool((chunks[::2] == 2.0).all()) and bool((chunks[1::2] == 1.0).all())
    assert memory.nbytes == 2 * CHUNK
    if DEVICE.type == "cuda":  # where the first kernels take some memory, too
        assert _used_on_gpu() - before < 16 * CHUNK
    else:
        assert os.fstat(memory.file).st_blocks * 512 == 2 * CHUNK
    addresses.unmap(10 * CHUNK, 2)
    addresses.map(10 * CHUNK, second)
    assert bool((chunks[10] == 1.0).all()) and bool((chunks[0] == 2.0).all())


def _has_memory() -> bool:
    """Return whether this process has a file of memory, open or mapped."""
    fds = (os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())
    return "memfd:gradients" in " ".join((*fds, Path("/proc/self/maps").read_text()))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="looks for the memory files of CPU ranks")
def test_memory_is_given_back_when_no_tensor_uses_it() -> None:
    gc.collect()
    assert not _has_memory()
    addresses, memory = reserve(4 * CHUNK, DEVICE), memory_of(DEVICE)
    addresses.map(0, memory.allocate())
    view = addresses.tensor[:CHUNK]
    view.fill_(1)
    del addresses, memory
    gc.collect()
    assert int(view.sum()) == CHUNK and _has_memory()
    del view
    gc.collect()
    assert not _has_memory()


def _touch(offset: int) -> None:
    faulthandler.disable()  # pytest's, which would print the fault
    addresses, memory = reserve(2 * CHUNK, torch.device("cpu")), memory_of(torch.device("cpu"))
    addresses.map(0, memory.allocate())
    addresses.tensor[offset] = 1
    os._exit(0)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a fault ends the CUDA context of all tests")
def test_touching_addresses_without_memory_is_a_fault() -> None:
    ends = []
    for offset in (0, CHUNK):
        process = multiprocessing.get_context("fork").Process(target=_touch, args=(offset,))
        process.start()
        process.join()
        ends.append(process.exitcode)
    assert ends == [0, -signal.SIGSEGV]


class _Pool:
    """A pool and regions of some sizes, filled with their numbers when opened."""

    def __init__(self, sizes: list[int], slots: int) -> None:
        self.pool = GradPool(memory_of(DEVICE), slots)
        self.regions = []
        for size in sizes:
            nbytes = size * CHUNK - 8  # the last chunk is not needed to its end
            self.regions.append(Region(reserve(nbytes, DEVICE), 0, nbytes))
        self.waited: list[int] = []

    def open(self, number: int) -> int | None:
        region = self.regions[number]
        before = self.pool.open(region, lambda: self.waited.append(number))
        self.content(number).fill_(number)
        return None if before is None else self.regions.index(before)

    def content(self, number: int) -> torch.Tensor:
        region = self.regions[number]
        return region.addresses.tensor[: region.nbytes]

    def close(self, number: int) -> None:
        assert bool((self.content(number) == number).all()), "another region wrote here"
        self.pool.close(self.regions[number])


def test_regions_take_turns_in_the_slot_that_was_closed_first_and_keep_it() -> None:
    tested = _Pool([1, 2, 1, 1, 3], slots=2)
    for iteration in range(2):
        before = []
        for number in range(5):
            before.append(tested.open(number))
            if number:  # while one is open, the next one is opened
                tested.close(number - 1)
        tested.close(4)
        # 3 and 4 were the last ones in the slots.
        assert before == ([None, None, 0, 1, 2] if iteration == 0 else [4, 3, 0, 1, 2])
        assert [tested.regions[n].slot is tested.pool.slots[n % 2] for n in range(5)] == [True] * 5
        # The largest of each slot's.
        assert tested.pool.memory.nbytes == (3 + 2) * CHUNK
    assert tested.waited == [], "the second iteration moves nothing"


def test_a_region_whose_slot_is_open_for_another_moves_to_a_closed_one() -> None:
    tested = _Pool([1, 1, 1], slots=2)
    for number in range(3):
        tested.open(number)
        tested.close(number)
    assert tested.regions[0].slot is tested.regions[2].slot
    tested.open(0)
    assert tested.open(2) == 1, "the slot of region 1, which was closed"
    assert tested.waited == [2]
    tested.close(0)
    tested.close(2)
    assert tested.pool.memory.nbytes == 2 * CHUNK


def test_the_pool_grows_where_more_regions_are_open_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.disable(logging.NOTSET)
    tested = _Pool([1, 1, 1, 1], slots=2)
    for number in range(3):
        assert tested.open(number) is None
        assert len(caplog.records) == (number == 2)
    assert "3 gradient buckets are open at the same time" in caplog.text
    assert "--flash-release-slots" in caplog.text
    for number in range(3):
        tested.close(number)
    assert tested.open(3) == 0
    assert len(tested.pool.slots) == 3


def _raise_out_of_memory(*_: Any) -> Any:
    raise MemoryError("none left")


def test_a_pool_that_gets_no_memory_says_it() -> None:
    tested = _Pool([1], slots=2)
    tested.pool.memory.allocate = _raise_out_of_memory  # type: ignore[method-assign]  # the fault
    with pytest.raises(MemoryError, match="none left"):
        tested.open(0)
