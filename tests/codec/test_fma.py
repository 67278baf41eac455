"""The emulated fused multiply-add: one rounding of the exact ``x * y + z``, in every corner."""

from __future__ import annotations

from fractions import Fraction

import torch
from bitwise import assert_same_bits, fp32, nearest_fp32
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_flashoptim.codec.rounding import fma_fp32

SMALLEST = 2.0**-149
LARGEST = 2.0**128 - 2.0**104


def _exact(x: float, y: float, z: float) -> float:
    """Return ``x * y + z`` rounded once; zeros signed as IEEE-754 has them."""
    total = Fraction(x) * Fraction(y) + Fraction(z)
    if total == 0:
        return x * y + z  # both terms are zeros, or cancel: fp64 has the sign
    return nearest_fp32(total)


def _check(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> None:
    expected = [_exact(*terms) for terms in zip(x.tolist(), y.tolist(), z.tolist(), strict=True)]
    assert_same_bits(fma_fp32(x, y, z), torch.tensor(expected, dtype=torch.float32))


def _rounded_twice(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return (x.double() * y.double() + z.double()).float()


def _finite() -> st.SearchStrategy[float]:
    return st.floats(-LARGEST, LARGEST, width=32)


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(x=_finite(), y=_finite(), z=_finite())
def test_any_finite_terms_are_rounded_once(x: float, y: float, z: float) -> None:
    _check(*torch.tensor([[x], [y], [z]], dtype=torch.float32))


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    mantissas=st.tuples(*[st.integers(1 << 23, (1 << 24) - 1)] * 3),
    exponents=st.tuples(st.integers(-75, 60), st.integers(-75, 60)),
    distance=st.integers(-75, 75),
    negative=st.booleans(),
)
def test_terms_of_any_distance_are_rounded_once(
    mantissas: tuple[int, int, int],
    exponents: tuple[int, int],
    distance: int,
    negative: bool,
) -> None:
    """Random floats are rarely close enough to one another to share a single bit."""
    x, y = (torch.tensor([m * 2.0**e]) for m, e in zip(mantissas, exponents, strict=False))
    z = mantissas[2] * 2.0 ** min(max(sum(exponents) + 23 + distance, -149), 104)
    _check(x, y, torch.tensor([-z if negative else z]))


def test_a_sum_that_fp64_rounds_to_a_midpoint_keeps_the_bits_fp64_lost() -> None:
    """``z`` plus half an ulp of it, short of that by 2^-40 of the half: fp64 cannot hold it and
    rounds to the midpoint, from which fp32 would go on to the even neighbour.
    """
    generator = torch.Generator().manual_seed(0)
    mantissa = torch.randint(1 << 23, 1 << 24, (4000,), generator=generator).float()
    exponent = torch.randint(-60, 60, (4000,), generator=generator)
    sign = torch.randint(0, 2, (3, 4000), generator=generator) * 2 - 1
    z = torch.ldexp(mantissa, exponent) * sign[0]
    half = exponent - 1
    first = half.div(2, rounding_mode="floor")
    x = torch.ldexp(torch.full((4000,), 1 + 2.0**-20), first) * sign[1]
    y = torch.ldexp(torch.full((4000,), 1 - 2.0**-20), half - first) * sign[2]
    _check(x, y, z)
    # Rounding twice is wrong where the even neighbour is the farther one.
    wrong = (_rounded_twice(x, y, z) != fma_fp32(x, y, z)).float().mean()
    assert 0.4 < wrong < 0.6


def test_midpoints_that_nothing_was_lost_of_go_to_the_even_neighbour() -> None:
    z = fp32([0x3F800000, 0x3F800001, 0x3F800002, 0xBF800001])
    half = torch.tensor([1.0, 1.0, 1.0, -1.0])
    expected = fp32([0x3F800000, 0x3F800002, 0x3F800002, 0xBF800002])
    assert_same_bits(fma_fp32(half, torch.full_like(half, 2.0**-24), z), expected)


def test_subnormal_results_are_rounded_once() -> None:
    """Their midpoints lie at other bits of the fp64 pattern, some below all 53 of them."""
    multiples = torch.tensor([0.0, 1.0, 2.0, 3.0, 1000.0, 1001.0, 2.0**22, 2.0**23 - 1, 2.0**23])
    z = multiples * SMALLEST
    z = torch.cat([z, -z])
    for shift in (-20, -2, -1, 0, 1):
        for slack in (1 - 2.0**-20, 1.0, 1 + 2.0**-20):
            x = torch.full_like(z, 2.0**-70 * (1 + 2.0**-20))
            y = torch.full_like(z, 2.0 ** (-79 + shift) * slack)
            for sign in (1, -1):
                _check(sign * x, y, z)


def test_a_result_that_rounds_to_zero_keeps_the_sign_of_the_exact_one() -> None:
    tiny = torch.tensor([2.0**-100, -(2.0**-100)])
    zeros = fp32([0x00000000, 0x80000000])
    assert_same_bits(fma_fp32(tiny, tiny.abs(), torch.zeros(2)), zeros)
    # Half the smallest subnormal, less a bit, beside a smallest one: that is not a tie.
    below_half = torch.tensor([2.0**-75 * (1 + 2.0**-20)]), torch.tensor([-(2.0**-75)])
    assert_same_bits(fma_fp32(*below_half, fp32([1])), fp32([0]))


def test_cancellation_leaves_the_rounding_error_of_the_product() -> None:
    """``x * y - fl(x * y)`` is exact, which two roundings lose altogether."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 2000, generator=generator)
    product = x * y
    left = fma_fp32(x, y, -product)
    _check(x, y, -product)
    assert (left.double() == x.double() * y.double() - product.double()).all()
    assert (left != 0).float().mean() > 0.9
    assert_same_bits(fma_fp32(torch.ones(1), x[:1], -x[:1]), torch.zeros(1))


def test_overflow_begins_half_an_ulp_above_the_largest_number() -> None:
    largest = torch.full((4,), LARGEST)
    half_ulp = 2.0**103
    x = torch.tensor([half_ulp, half_ulp * (1 - 2.0**-24), -half_ulp, 2.0**80])
    one = torch.tensor([1.0, 1.0, -1.0, 1.0])
    expected = [torch.inf, LARGEST, torch.inf, LARGEST]
    assert_same_bits(fma_fp32(x, one, largest), torch.tensor(expected))
    # A product that overflows on its own does not, where the sum comes back.
    back = fma_fp32(torch.tensor([2.0**100]), torch.tensor([2.0**28]), torch.tensor([-LARGEST]))
    assert_same_bits(back, torch.tensor([2.0**104]))


def test_infinities_and_nans_spread_as_in_ieee_arithmetic() -> None:
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([inf, inf, -inf, 2.0, 0.0, inf, nan, 1.0, 1.0])
    y = torch.tensor([2.0, -2.0, 1.0, 3.0, inf, 1.0, 1.0, nan, 1.0])
    z = torch.tensor([1.0, 1.0, -inf, inf, 1.0, -inf, 1.0, 1.0, nan])
    result = fma_fp32(x, y, z)
    assert result[:4].tolist() == [inf, -inf, -inf, inf]
    assert result[4:].isnan().all()
    # Beside values whose fp64 sum is a midpoint, for which the careful path is taken.
    result = fma_fp32(torch.tensor([inf, 1.0]), torch.ones(2), torch.tensor([1.0, 2.0**-24]))
    assert result.tolist() == [inf, 1.0]


def test_shapes_broadcast_and_no_element_decides_for_another() -> None:
    """The careful path is taken for all elements as soon as one needs it."""
    generator = torch.Generator().manual_seed(2)
    x, z = torch.randn(2, 50, 32, generator=generator)
    y = torch.randn(50, 1, generator=generator)
    y[7] = 2.0**-140
    together = fma_fp32(x, y, z * (y != 2.0**-140))
    alone = [fma_fp32(x[i], y[i], z[i] * (y[i] != 2.0**-140)) for i in range(50)]
    assert_same_bits(together, torch.stack(alone))
