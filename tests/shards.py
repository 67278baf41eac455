"""Bucket shards for tests: laid out as Megatron lays out a bucket, guarded against stray writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from bitwise import assert_same_bits, patterns, quiet

from megatron_flashoptim.codec import join_master
from megatron_flashoptim.optim.segments import GROUPS_PER_ENTRY, Segment, SegmentTable
from megatron_flashoptim.optim.shard import BucketShard

GROUP = 32
# Every byte of the guards: a NaN in bf16 and fp32, a code no test expects in int8 and uint8.
POISON = 0xFF
# The largest tile of the tests: what a program that ignores its mask writes stays within guards.
GUARD_ELEMENTS = 128 * GROUP


@dataclass(frozen=True)
class Parameter:
    """A parameter of a bucket, by where its groups begin and how many it has."""

    start: int
    groups: int
    row: int = 0
    tensor_id: int = 0


def gradient_of_groups(step: int, groups: int) -> torch.Tensor:
    """Return a flat fp32 gradient, of another size in each group, with a zero in each."""
    generator = torch.Generator().manual_seed(step)
    size = torch.exp(3 * torch.randn(groups, 1, generator=generator))
    gradient = torch.randn(groups, GROUP, generator=generator) * size
    gradient[:, 5] = 0.0
    return gradient.flatten()


def segments_of(
    parameters: Sequence[Parameter],
    begin: int,
    end: int,
    device: str = "cpu",
    groups_per_entry: int = GROUPS_PER_ENTRY,
) -> SegmentTable:
    """Return the segments of the shard that holds the bucket's groups ``begin`` to ``end``."""
    segments = []
    for p in parameters:
        first, last = max(p.start, begin), min(p.start + p.groups, end)
        if first < last:
            segments.append(Segment(first - begin, p.row, p.tensor_id, first - p.start))
    return SegmentTable(segments, end - begin, device, groups_per_entry=groups_per_entry)


class GuardedShard(BucketShard):
    """A shard whose tensors are views between poisoned guards, as views of a buffer are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._guards: list[tuple[str, torch.Tensor]] = []
        self.param = self._between_guards("param", self.param)
        self.grad = self._between_guards("grad", self.grad)
        for name, tensor in list(self.state()):
            setattr(self, name, self._between_guards(name, tensor))

    def _between_guards(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.numel() + 2 * GUARD_ELEMENTS
        storage = torch.empty(size, dtype=tensor.dtype, device=tensor.device)
        storage.view(torch.uint8).fill_(POISON)
        view = storage[GUARD_ELEMENTS:-GUARD_ELEMENTS]
        view.copy_(tensor)
        self._guards += [
            (f"{name} before", storage[:GUARD_ELEMENTS]),
            (f"{name} after", storage[-GUARD_ELEMENTS:]),
        ]
        return view

    def check_guards(self) -> None:
        """Fail if anything was written outside the views."""
        for name, guard in self._guards:
            assert (guard.view(torch.uint8) == POISON).all(), f"written outside: {name}"


def tensors(shard: BucketShard) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tensor of all that a step changes."""
    yield from shard.state()
    yield "param", shard.param


def assert_same_state(actual: BucketShard, expected: BucketShard, what: str = "") -> None:
    """Fail unless parameters and state agree bit for bit (computed NaNs by being NaN)."""
    for (name, got), (_, want) in zip(tensors(actual), tensors(expected), strict=True):
        assert_same_bits(quiet(got.cpu()), quiet(want.cpu()), f"{what} {name}")


def master_weight(shard: BucketShard) -> torch.Tensor:
    """Return the fp32 master weight of a shard."""
    if shard.param.dtype == torch.float32:
        return shard.param.clone()
    return join_master(shard.param, shard.correction)


def is_unchanged(tensor: torch.Tensor, before: torch.Tensor) -> bool:
    """Return whether every bit is what it was."""
    return torch.equal(patterns(tensor), patterns(before))
