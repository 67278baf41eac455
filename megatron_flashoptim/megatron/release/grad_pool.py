"""GradPool: a few slots of memory that gradient buckets take turns in.

Every bucket keeps its own addresses; which slot's memory stands behind them is decided when the
bucket is opened, that is when its first gradient arrives. A bucket keeps the slot it had, and a
backward pass that fills buckets in the same order as the one before maps nothing.

A slot is free for another bucket once its own is closed. That the closed bucket's gradients have
been used, too, is for the caller to wait for, before it writes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_flashoptim.megatron.release.address_range import AddressRange, Memory

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Slot:
    """Memory for one open bucket.

    Attributes:
        chunks: chunks of memory, in order.
        holder: the region that was opened on it last.
        is_open: that region is open.
        closed: when it was closed, counted over all slots.
    """

    chunks: list[Any] = field(default_factory=list)
    holder: Region | None = None
    is_open: bool = False
    closed: int = 0


@dataclass(eq=False)
class Region:
    """The addresses of one bucket's gradients.

    Attributes:
        addresses: the range they are in.
        offset, nbytes: where; offsets are multiples of a chunk.
        slot: whose memory is behind them, or None.
    """

    addresses: AddressRange
    offset: int
    nbytes: int
    slot: Slot | None = None

    @property
    def num_chunks(self) -> int:
        """Chunks of memory that the region needs."""
        return -(-self.nbytes // self.addresses.chunk_bytes)


class GradPool:
    """Memory of the regions that are open at the same time.

    Args:
        memory: where chunks come from.
        slots: how many slots to make before one is used again. If more regions are open at the
            same time, the pool grows, and says so.
        warn: what it says so by.

    Attributes:
        memory: where chunks come from.
        slots: the slots made so far.
    """

    def __init__(
        self, memory: Memory, slots: int, warn: Callable[[str], None] = logger.warning
    ) -> None:
        self.memory = memory
        self._warn = warn
        self.slots: list[Slot] = []
        self._wanted = slots
        self._closed = 0

    def open(self, region: Region, wait_until_unused: Callable[[], None]) -> Region | None:
        """Put memory behind a region; its content is what the memory last held.

        Args:
            region: a region that is not open.
            wait_until_unused: called before the region loses the memory it has; returns when
                nothing uses its addresses any more.

        Returns:
            The region that was opened on this memory before, maybe ``region`` itself; None if
            there was none.
        """
        slot = region.slot
        if slot is None or slot.is_open:
            slot = self._choose()
            self._move(region, slot, wait_until_unused)
        before, slot.holder = slot.holder, region
        slot.is_open = True
        return before

    def close(self, region: Region) -> None:
        """Let the memory of a region be used for another one."""
        assert region.slot is not None and region.slot.holder is region
        self._closed += 1
        region.slot.is_open = False
        region.slot.closed = self._closed

    def close_all(self) -> None:
        """Let the memory of all regions be used for others."""
        for slot in self.slots:
            if slot.is_open and slot.holder is not None:
                self.close(slot.holder)

    def _choose(self) -> Slot:
        """Return the slot that was closed first, or a new one."""
        closed = [slot for slot in self.slots if not slot.is_open]
        if closed and len(self.slots) >= self._wanted:
            return min(closed, key=lambda slot: slot.closed)
        self.slots.append(Slot())
        if len(self.slots) > self._wanted:
            self._warn(
                f"{len(self.slots)} gradient buckets are open at the same time, more than the "
                f"{self._wanted} of --flash-release-slots: the pool grows"
            )
        return self.slots[-1]

    def _move(self, region: Region, slot: Slot, wait_until_unused: Callable[[], None]) -> None:
        while len(slot.chunks) < region.num_chunks:
            slot.chunks.append(self.memory.allocate())
        if region.slot is not None:
            wait_until_unused()
            region.addresses.unmap(region.offset, region.num_chunks)
        region.slot = slot
        for number in range(region.num_chunks):
            at = region.offset + number * region.addresses.chunk_bytes
            region.addresses.map(at, slot.chunks[number])
