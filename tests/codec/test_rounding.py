"""The pieces under the codec: bf16 rounding, square root, reciprocal."""

from __future__ import annotations

import torch
from bitwise import assert_same_bits, bf16, finite_samples, fp32, fp32_ulp, patterns

from megatron_flashoptim.codec import rounding


def _positive_patterns() -> torch.Tensor:
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1234, 0xABCD])
    return ((torch.arange(0x7F80) << 16).unsqueeze(1) + low).flatten()


def _positive_samples() -> torch.Tensor:
    """Every exponent, and a million more values between 1 and 4."""
    generator = torch.Generator().manual_seed(0)
    one_to_four = fp32(torch.randint(0x3F800000, 0x40800000, (1 << 20,), generator=generator))
    value = torch.cat([finite_samples(256).abs(), one_to_four])
    return value[value > 0]


def _midpoints(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, in fp64, the midpoints between each value and its lower and upper neighbour."""
    above = value.double() + fp32_ulp(value) / 2
    # Below a power of two the neighbour is half as far.
    is_power = (patterns(value) & 0x7FFFFF) == 0
    return value.double() - fp32_ulp(value) / torch.where(is_power, 4, 2), above


def test_bf16_nearest_equals_torchs_rounding_for_every_high_part() -> None:
    bits = _positive_patterns()
    rounded = bf16(rounding.bf16_bits_nearest(bits))
    assert_same_bits(rounded, fp32(bits).to(torch.bfloat16))


def test_bf16_stochastic_rounds_up_for_as_many_draws_as_the_remainder() -> None:
    """Exact count: of the 2^16 possible draws, as many round up as the lower half says."""
    draws = torch.arange(1 << 16)
    for low in (0, 1, 0x7FFF, 0x8000, 0xFFFF):
        bits = torch.tensor(0x3F800000 + low)
        up = rounding.bf16_bits_stochastic(bits, draws) - 0x3F80
        assert ((up == 0) | (up == 1)).all()
        assert int(up.sum()) == low


def test_square_root_is_correctly_rounded() -> None:
    """y is nearest to sqrt(x) if (y - ulp/2)^2 <= x <= (y + ulp/2)^2.

    The midpoints have 25 significant bits, their squares 50: exact in fp64.
    """
    value = _positive_samples()
    below, above = _midpoints(rounding.sqrt_fp32(value))
    assert (below * below <= value.double()).all()
    assert (value.double() <= above * above).all()


def test_square_root_of_special_values() -> None:
    roots = rounding.sqrt_fp32(fp32([0, 1 << 31, 0x7F800000, 0x7FC00000, 0xBF800000]))
    assert_same_bits(roots[:3], fp32([0, 1 << 31, 0x7F800000]))
    assert roots[3:].isnan().all()


def test_reciprocal_is_correctly_rounded_where_it_is_normal() -> None:
    """y is nearest to 1 / x if (y - ulp/2) x <= 1 <= (y + ulp/2) x: 25 times 24 bits, exact."""
    value = _positive_samples()
    value = value[(value >= 2.0**-127) & (value <= 2.0**126)]
    inverse = rounding.reciprocal_fp32(value)
    below, above = _midpoints(inverse)
    assert (below * value.double() <= 1.0).all()
    assert (above * value.double() >= 1.0).all()


def test_reciprocal_is_zero_from_where_it_would_be_subnormal() -> None:
    """As a GPU's fast reciprocal gives it."""
    values = fp32([0x7E800000, 0x7E800001, 0x7F000000, 0x7F7FFFFF, 0x7F800000])
    assert_same_bits(rounding.reciprocal_fp32(values), fp32([0x00800000, 0, 0, 0, 0]))


def test_reciprocal_of_zero_is_infinite_and_of_a_nan_a_nan() -> None:
    inverse = rounding.reciprocal_fp32(torch.tensor([0.0, torch.nan]))
    assert inverse[0] == torch.inf and inverse[1].isnan()
