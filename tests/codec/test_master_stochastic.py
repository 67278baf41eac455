"""Stochastic rounding of the master weight: right on average, one of the two neighbours."""

from __future__ import annotations

import pytest
import torch
from bitwise import assert_same_bits, finite_samples, fp32, patterns
from tolerances import SIGMAS

from megatron_flashoptim.codec import join_master, split_master
from megatron_flashoptim.codec.master import split_master_with_draws

DRAWS = 1 << 16
LOST_BITS = {24: 8, 16: 16}
# Upper bits: 1.0; a negative of another binade; the last number of a binade (carries); a
# subnormal; the smallest magnitude. Lower bits: what is lost, as a share of 2^16.
UPPER = [0x3F80, 0xC2F7, 0x407F, 0x0012, 0x8000]


def _stochastic(weight: torch.Tensor, bits: int, seed: int = 0, step: int = 0) -> torch.Tensor:
    return join_master(
        *split_master(weight, bits=bits, rounding="stochastic", seed=seed, step=step)
    )


@pytest.mark.parametrize("bits", [24, 16])
@pytest.mark.parametrize("upper", UPPER)
@pytest.mark.parametrize("share", [1 / 256, 0.25, 0.5, 0.7, 255 / 256])
def test_rounds_up_with_a_probability_equal_to_what_is_lost(
    bits: int, upper: int, share: float
) -> None:
    """The count of n draws with probability p is off by sqrt(n p (1 - p)) per sigma."""
    lost = LOST_BITS[bits]
    remainder = round(share * (1 << lost))
    pattern = (upper << 16) + remainder
    joined = patterns(_stochastic(fp32([pattern]).repeat(DRAWS), bits))
    rounded_up = (joined - (pattern - remainder)) >> lost
    assert ((joined & ((1 << lost) - 1)) == 0).all()
    assert ((rounded_up == 0) | (rounded_up == 1)).all()  # neighbours only
    probability = remainder / (1 << lost)
    sigma = (DRAWS * probability * (1 - probability)) ** 0.5
    assert abs(int(rounded_up.sum()) - DRAWS * probability) <= SIGMAS * sigma


@pytest.mark.parametrize("upper", UPPER)
def test_of_all_draws_as_many_round_up_as_the_bits_that_are_lost_say(upper: int) -> None:
    """Exact counts. Of the 16 bits of a draw, 24-bit masters use the upper 8."""
    draws = torch.arange(1 << 16)
    for remainder in (0, 1, 0x7F, 0x80, 0xFF, 0x100, 0x8000, 0x80FF, 0xFFFF):
        weight = fp32([(upper << 16) + remainder]).repeat(1 << 16)
        for bits, lost in LOST_BITS.items():
            joined = patterns(join_master(*split_master_with_draws(weight, bits=bits, draw=draws)))
            up = (joined >> lost) - (((upper << 16) + remainder) >> lost)
            needed = (remainder & ((1 << lost) - 1)) << (16 - lost)
            assert torch.equal(up, (draws >= (1 << 16) - needed).long())


def test_the_lower_8_bits_of_a_draw_matter_to_16_bit_masters_only() -> None:
    weight = finite_samples(per_exponent=4)
    draws = torch.randint(0, 1 << 16, weight.shape, generator=torch.Generator().manual_seed(0))
    other = draws ^ 0xFF
    for bits, same in ((16, False), (24, True), (32, True)):
        first, second = (
            join_master(*split_master_with_draws(weight, bits=bits, draw=d)) for d in (draws, other)
        )
        assert torch.equal(patterns(first), patterns(second)) == same


@pytest.mark.parametrize("bits", [24, 16])
def test_values_that_need_no_rounding_never_change(bits: int) -> None:
    lost = LOST_BITS[bits]
    weight = fp32(patterns(finite_samples()) >> lost << lost)
    for step in range(4):
        assert_same_bits(_stochastic(weight, bits, step=step), weight)


def test_32_bits_have_nothing_to_round() -> None:
    weight = finite_samples()
    assert_same_bits(_stochastic(weight, 32), weight)


@pytest.mark.parametrize("bits", [24, 16])
def test_same_seed_and_step_give_the_same_bits_and_others_do_not(bits: int) -> None:
    weight = finite_samples(per_exponent=8)
    first = _stochastic(weight, bits, seed=5, step=7)
    assert_same_bits(_stochastic(weight, bits, seed=5, step=7), first)
    for seed, step in ((6, 7), (5, 8), (5 + (1 << 32), 7)):
        assert not torch.equal(_stochastic(weight, bits, seed=seed, step=step), first)


def test_16_bits_keep_the_average_of_updates_far_below_a_bf16_ulp() -> None:
    """1000 updates of 1e-5 on weights of 1.0 (bf16 ulp below 1: 2^-8): nearest would keep 1.0.

    Each step rounds between multiples of ulp 2^-8 (2^-7 above 1), so the variance of one step is
    at most p (1 - p) ulp^2 <= 1e-5 * 2^-7, and that of the mean of n weights 1000 / n of it.
    """
    steps, update, count = 1000, 1e-5, 4096
    weight = torch.ones(count)
    for step in range(steps):
        weight = _stochastic(weight - update, 16, step=step)
    sigma = (steps * update * 2.0**-7 / count) ** 0.5
    assert abs(weight.double().mean().item() - (1.0 - steps * update)) <= SIGMAS * sigma
