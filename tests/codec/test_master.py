"""Master weight split and join, rounded to nearest: exact, monotone, idempotent."""

from __future__ import annotations

import pytest
import torch
from bitwise import (
    assert_same_bits,
    bf16,
    finite_samples,
    fp32,
    fp32_ulp,
    patterns,
)

from megatron_flashoptim.codec import join_master, split_master

ALL_HIGHS = torch.arange(1 << 16)
IS_NUMBER = (ALL_HIGHS & 0x7F80) != 0x7F80
IS_ZERO = (ALL_HIGHS & 0x7FFF) == 0
QUIET_NANS = fp32([0x7FC00000, 0xFFC00000, 0x7FC12345, 0xFFFFFFFF])
# Their upper half alone would read as an infinity.
SIGNALLING_NANS = fp32([0x7F800001, 0xFF800001, 0x7F80FFFF, 0x7FA00000])


def _split_and_join(weight: torch.Tensor, bits: int) -> torch.Tensor:
    return join_master(*split_master(weight, bits=bits))


def _sample_of_32_bit_patterns() -> torch.Tensor:
    """Every bf16 pattern with low halves around each rounding boundary: 1.6M fp32 patterns."""
    edges = [0, 1, 0x7F, 0x80, 0x81, 0x7F7F, 0x7F80, 0x7FFF, 0x8000, 0x8001, 0xFF7F, 0xFF80, 0xFFFF]
    random = torch.randint(0, 1 << 16, (12,), generator=torch.Generator().manual_seed(1))
    low = torch.cat([torch.tensor(edges), random])
    return (ALL_HIGHS[IS_NUMBER].unsqueeze(1) << 16) + low


def test_24_bits_are_off_by_at_most_half_a_24_bit_quantum() -> None:
    """One 24-bit quantum is 2^8 fp32 ulps, half of it 2^7 ulps = 2^-9 bf16 ulp (2^16 fp32 ulps).

    Rounding works on the pattern: 24 of 32 bits are kept, so the pattern moves by at most 2^7.
    Patterns of one binade are 1 ulp apart, and a carry lands on the next binade's first number.
    """
    weight = finite_samples()
    joined = _split_and_join(weight, 24)
    finite = joined.isfinite()
    error = (joined.double() - weight.double())[finite].abs()
    assert (error <= 2.0**7 * fp32_ulp(weight[finite])).all()
    assert (error == 2.0**7 * fp32_ulp(weight[finite])).any()  # the bound is reached
    overflowed = patterns(weight[~finite]) & 0x7FFFFFFF
    assert overflowed.numel() and (overflowed >= 0x7F7FFF80).all()


def test_24_bit_pattern_is_the_nearest_of_24_bits_half_up_in_magnitude() -> None:
    weight = finite_samples()
    pattern = patterns(weight)
    magnitude = (((pattern & 0x7FFFFFFF) + 0x80) >> 8) << 8
    assert_same_bits(_split_and_join(weight, 24), fp32(magnitude | (pattern & (1 << 31))))


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_high_part_is_the_nearest_bf16(bits: int) -> None:
    """What the forward pass sees is off by half a bf16 ulp, plus half a quantum at 24 bits."""
    weight = finite_samples()
    high, _ = split_master(weight, bits=bits)
    finite = high.isfinite()
    error = (high.double() - weight.double())[finite].abs()
    slack = 2.0**7 if bits == 24 else 0.0
    assert (error <= (2.0**15 + slack) * fp32_ulp(weight[finite])).all()
    not_near_a_tie = (patterns(weight) & 0xFFFF).sub(0x8000).abs() > slack
    nearest = weight.to(torch.bfloat16)
    assert_same_bits(high[not_near_a_tie], nearest[not_near_a_tie])


def test_32_bits_give_back_every_finite_value_bit_for_bit() -> None:
    weight = fp32(_sample_of_32_bit_patterns())
    assert_same_bits(_split_and_join(weight, 32), weight)


def test_24_bit_values_come_back_bit_for_bit() -> None:
    weight = fp32(_sample_of_32_bit_patterns() & ~0xFF)
    assert_same_bits(_split_and_join(weight, 24), weight)


@pytest.mark.parametrize("bits", [24, 32])
def test_join_then_split_changes_no_bit_of_high_and_correction(bits: int) -> None:
    """A zero update: all 65536 high parts, with corrections over their whole range.

    Left out are the pairs that split never makes: below zero in magnitude, beyond infinity.
    """
    limit = 1 << (bits - 17)
    dtype = torch.int8 if bits == 24 else torch.int16
    values = torch.tensor([-limit, 1 - limit, -limit // 3, -1, 0, 1, limit // 3, limit - 1])
    high, correction = ALL_HIGHS.repeat(8), values.repeat_interleave(1 << 16)
    infinite = (high & 0x7FFF) == 0x7F80
    exists = torch.where(IS_ZERO.repeat(8), correction >= 0, IS_NUMBER.repeat(8))
    exists |= infinite & (correction <= 0)
    high, correction = bf16(high[exists]), correction[exists].to(dtype)
    weight = join_master(high, correction)
    new_high, new_correction = split_master(weight - 0.0, bits=bits)
    assert_same_bits(new_high, high, "high")
    assert_same_bits(new_correction, correction, "correction")


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_split_and_join_is_idempotent(bits: int) -> None:
    once = _split_and_join(finite_samples(), bits)
    assert_same_bits(_split_and_join(once, bits), once)


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_sorted_weights_stay_sorted(bits: int) -> None:
    weight = finite_samples().sort().values
    high, correction = split_master(weight, bits=bits)
    assert (high[1:] >= high[:-1]).all()
    joined = join_master(high, correction)
    assert (joined[1:] >= joined[:-1]).all()


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_zeros_keep_their_sign(bits: int) -> None:
    zeros = fp32([0x00000000, 0x80000000])
    high, correction = split_master(zeros, bits=bits)
    assert_same_bits(high, bf16([0x0000, 0x8000]))
    assert correction is None or not correction.any()
    assert_same_bits(join_master(high, correction), zeros)


@pytest.mark.parametrize("sign", [0, 1 << 31])
def test_24_bits_overflow_to_infinity_only_within_half_a_quantum_of_it(sign: int) -> None:
    largest = fp32([sign + 0x7F7FFF00, sign + 0x7F7FFF7F, sign + 0x7F7FFF80, sign + 0x7F7FFFFF])
    high, correction = split_master(largest)
    infinity = (sign >> 16) + 0x7F80
    assert_same_bits(high, bf16([infinity] * 4))
    assert correction is not None and correction.tolist() == [-1, -1, 0, 0]
    expected = fp32([sign + 0x7F7FFF00, sign + 0x7F7FFF00, sign + 0x7F800000, sign + 0x7F800000])
    assert_same_bits(join_master(high, correction), expected)


@pytest.mark.parametrize("bits", [24, 32])
def test_a_high_part_that_overflows_is_still_joined_exactly(bits: int) -> None:
    """From half a bf16 ulp below 2^128 on, bf16 is infinite and the correction holds the rest."""
    start = 0x7F7F7F80 if bits == 24 else 0x7F7F8000
    weight = fp32([start - 0x100, start, 0x7F7FC000, 0x7F7FFF00])
    high, correction = split_master(weight, bits=bits)
    assert_same_bits(high, bf16([0x7F7F, 0x7F80, 0x7F80, 0x7F80]))
    expected = fp32((patterns(weight) + 0x80) >> 8 << 8) if bits == 24 else weight
    assert_same_bits(join_master(high, correction), expected)


@pytest.mark.parametrize("bits", [16, 24, 32])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_infinities_stay_with_correction_0(bits: int, rounding: str) -> None:
    weight = torch.tensor([torch.inf, -torch.inf]).repeat(100)
    high, correction = split_master(weight, bits=bits, rounding=rounding)
    assert_same_bits(high, weight.to(torch.bfloat16))
    assert correction is None or not correction.any()
    assert_same_bits(join_master(high, correction), weight)


@pytest.mark.parametrize("bits", [16, 24, 32])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_nans_stay_nans_with_correction_0(bits: int, rounding: str) -> None:
    weight = torch.cat([QUIET_NANS, SIGNALLING_NANS]).repeat(100)
    high, correction = split_master(weight, bits=bits, rounding=rounding)
    assert high.isnan().all()
    assert correction is None or not correction.any()
    assert join_master(high, correction).isnan().all()


def test_16_bits_have_no_correction_and_join_is_the_high_part() -> None:
    high, correction = split_master(finite_samples(), bits=16)
    assert correction is None
    assert_same_bits(join_master(high, None), high.to(torch.float32))


@pytest.mark.parametrize(("bits", "dtype"), [(24, torch.int8), (32, torch.int16)])
def test_shapes_are_kept_also_of_strided_and_empty_weights(bits: int, dtype: torch.dtype) -> None:
    strided = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).t()[::2]
    for weight in (strided, torch.empty(0), torch.tensor(1.5)):
        high, correction = split_master(weight, bits=bits)
        assert high.shape == weight.shape and high.dtype == torch.bfloat16
        assert correction is not None
        assert correction.shape == weight.shape and correction.dtype == dtype
    expected = split_master(strided.contiguous(), bits=bits)
    for got, want in zip(split_master(strided, bits=bits), expected, strict=True):
        assert_same_bits(got, want)


def test_known_splits() -> None:
    """By hand: 1 + 2^-8 is half a bf16 ulp above 1 and rounds up; its correction steps back."""
    weight = torch.tensor([1.0, 1.0 + 2.0**-8, 1.0 + 2.0**-15, -(1.0 + 2.0**-15), 1.0 + 2.0**-16])
    high, correction = split_master(weight)
    assert_same_bits(high, bf16([0x3F80, 0x3F81, 0x3F80, 0xBF80, 0x3F80]))
    assert correction is not None and correction.tolist() == [0, -128, 1, 1, 1]
