"""What needs a GPU's memory and speed: every 24-bit master, shards past 2^31 elements."""

from __future__ import annotations

import pytest
import torch
from bitwise import fp32
from rows import adam_row
from shards import GROUP

from megatron_flashoptim.codec import join_master, spec, split_master
from megatron_flashoptim.optim import BucketShard
from megatron_flashoptim.optim.hyper import HyperTable
from megatron_flashoptim.optim.segments import Segment, SegmentTable
from megatron_flashoptim.optim.step import launch_step_kernel_

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU: too slow or too large for a CPU"
)
# Half of what the 24 kept bits of an fp32 pattern resolve, in fp32 patterns.
HALF_QUANTUM = 0x80
INFINITY = 0x7F800000


def _check_masters(patterns: torch.Tensor) -> None:
    """Split and join consecutive positive patterns, and their negatives."""
    for sign in (0, 1 << 31):
        weight = fp32(patterns | sign)
        high, correction = split_master(weight)
        joined = join_master(high, correction)
        again_high, again = split_master(joined)
        assert torch.equal(again_high.view(torch.int16), high.view(torch.int16))
        assert torch.equal(again, correction)
        got = joined.view(torch.int32).to(torch.int64) & 0x7FFFFFFF
        assert (joined.signbit() == (sign != 0)).all()
        assert (got - patterns).abs().max() <= HALF_QUANTUM
        assert (got.diff() >= 0).all()


@needs_gpu
def test_every_finite_24_bit_master_is_right_to_half_a_quantum_idempotent_and_monotone() -> None:
    """All 2^23 mantissas of all 255 exponents, both signs: every finite fp32 number."""
    mantissas = torch.arange(1 << 23, device="cuda")
    for exponent in range(255):
        _check_masters(mantissas + (exponent << 23))


def test_sampled_24_bit_masters_are_right_to_half_a_quantum_idempotent_and_monotone() -> None:
    """Runs of patterns over each binade's start and end, and every 997th."""
    near = torch.arange(-600, 600)
    for exponent in range(1, 255):
        _check_masters(near + (exponent << 23))
    _check_masters(torch.arange(0, INFINITY - HALF_QUANTUM, 997))


@needs_gpu
@pytest.mark.parametrize("rounding", spec.ROUNDINGS)
def test_a_step_past_2_to_31_elements_is_that_of_a_small_shard(rounding: spec.Rounding) -> None:
    """The last groups of a shard of 2^31 + 2^17 elements against a shard of those groups alone.

    One parameter begins at the start, one ends at the end, so that offsets within a parameter
    exceed 2^31 too.
    """
    tail = (1 << 17) // GROUP
    groups = (1 << 31) // GROUP + tail
    first = 5  # group of the large shard where the second parameter begins
    large = _shard(groups, [Segment(0, 0, 7, 0), Segment(first, 1, 8, 0)])
    small = _shard(tail, [Segment(0, 1, 8, groups - tail - first)])
    generator = torch.Generator("cuda").manual_seed(0)
    table = HyperTable(2, "cuda")
    for step in range(1, 3):
        hyper = adam_row(1e-3, 0.1, 0.9, 0.999, 1e-8, step)
        table.fill([hyper, hyper], seed=5)
        grad = torch.randn(tail * GROUP, device="cuda", generator=generator)
        small.grad.copy_(grad)
        large.grad[-grad.numel() :].copy_(grad)
        for shard in (large, small):
            launch_step_kernel_(
                shard, table, exp_avg_sq_rounding=rounding, master_rounding=rounding
            )
    torch.cuda.synchronize()
    assert small.exp_avg.any()
    for name, expected in (("param", small.param), *small.state()):
        got = getattr(large, name)[-expected.numel() :]
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8)), name
    # Gradients before the tail are zero, and so are the moments there; weights were zero too.
    assert not large.exp_avg[: -tail * GROUP].any()
    assert not large.param[: -tail * GROUP].any()


def _shard(groups: int, segments: list[Segment]) -> BucketShard:
    def zeros() -> torch.Tensor:
        return torch.zeros(groups * GROUP, dtype=torch.bfloat16, device="cuda")

    return BucketShard(param=zeros(), grad=zeros(), segments=SegmentTable(segments, groups, "cuda"))
