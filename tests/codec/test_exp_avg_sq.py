"""Second moment codes, rounded to nearest: error bound, top code, no zero code, lossless.

All for both codes: "sqrt", in proportion to r = sqrt(v), and "fourth_root", to sqrt(r).
"""

from __future__ import annotations

import pytest
import torch
from bitwise import assert_same_bits, bf16, fp32, patterns
from groups import (
    coded,
    drawn_groups,
    every_code,
    group_max,
    per_element,
    random_groups,
    scales_within,
)
from hypothesis import given, settings
from tolerances import EXP_AVG_SQ_CODE_STEPS

from megatron_flashoptim.codec import decode_exp_avg_sq, encode_exp_avg_sq, spec
from megatron_flashoptim.codec.rounding import sqrt_fp32

ALL_CODES = torch.arange(256).to(torch.uint8)
NAN_SCALE = bf16([0x7FC0])
# Scales whose codes all survive decode-then-encode; see the test that pins them.
SMALLEST_LOSSLESS_SCALE = {"sqrt": 2.0**-67, "fourth_root": 2.0**-59}
# From here on, the decoded v is normal, that of code 1 too: scale / 255, or / 255^2, is 2^-63.
SMALLEST_PRECISE_SCALE = {"sqrt": 2.0**-55, "fourth_root": 2.0**-47}
OVERFLOWING_SCALE = 2.0**64

each_code = pytest.mark.parametrize("code", spec.EXP_AVG_SQ_CODES)
each_rounding = pytest.mark.parametrize("rounding", spec.ROUNDINGS)


def _check_error_bound(v: torch.Tensor, code: spec.ExpAvgSqCode) -> None:
    codes, scale = encode_exp_avg_sq(v, code=code)
    decoded = decode_exp_avg_sq(codes, scale, code=code).double().sqrt()
    root, scale = v.double().sqrt(), per_element(scale, v.numel())
    precise = scale >= SMALLEST_PRECISE_SCALE[code]
    codes, decoded, root, scale = (t[precise] for t in (codes, decoded, root, scale))
    half_ulp_of_scale = torch.ldexp(torch.ones_like(scale), scale.frexp().exponent - 9)

    def position(of: torch.Tensor) -> torch.Tensor:
        return 255 * coded(of / scale, code)

    bound = torch.full_like(scale, 0.5 + EXP_AVG_SQ_CODE_STEPS)
    beyond_top = position(scale + half_ulp_of_scale) - 255 + EXP_AVG_SQ_CODE_STEPS
    bound = torch.where(codes == 255, torch.maximum(bound, beyond_top), bound)
    lifted = (codes == 1) & (position(root) < 0.5)
    bound = torch.where(lifted, 1.0 + EXP_AVG_SQ_CODE_STEPS, bound)
    assert ((position(decoded) - position(root)).abs() <= bound).all()


def _check_no_zero_code_for_positive_v(v: torch.Tensor, code: spec.ExpAvgSqCode) -> None:
    codes, _ = encode_exp_avg_sq(v, code=code)
    assert (codes[v > 0] > 0).all()
    assert (codes[v == 0] == 0).all()


@each_code
def test_error_is_at_most_half_a_code_step_of_the_coded_root(code: spec.ExpAvgSqCode) -> None:
    """Bound from the format, for positions p = 255 r / scale, or 255 sqrt(r / scale).

    - Rounding to the nearest code: |decoded - p| <= 1/2.
    - At code 255 the largest r lies up to half a bf16 ulp above or below the scale it made, and
      takes code 255 all the same; elements between the scale and it are clamped to the scale.
    - A positive p below 1/2 takes code 1 instead of 0: off by less than 1.
    """
    for m in random_groups():
        _check_error_bound(m * m, code)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(m=drawn_groups())
@each_code
def test_error_bound_holds_for_drawn_groups(m: torch.Tensor, code: spec.ExpAvgSqCode) -> None:
    _check_error_bound(m * m, code)
    _check_no_zero_code_for_positive_v(m * m, code)


@each_code
def test_decode_then_encode_is_the_identity_for_every_normal_scale_and_code(
    code: spec.ExpAvgSqCode,
) -> None:
    """All bf16 scales from 2^-67, or 2^-59 for fourth roots, to 2^64, times all 256 codes."""
    scales = scales_within(SMALLEST_LOSSLESS_SCALE[code], OVERFLOWING_SCALE)
    codes, scales = every_code(scales, ALL_CODES)
    decoded = decode_exp_avg_sq(codes, scales, code=code)
    new_codes, new_scales = encode_exp_avg_sq(decoded, code=code)
    assert_same_bits(new_codes, codes, "codes")
    assert_same_bits(new_scales, scales, "scales")


@pytest.mark.parametrize(
    ("code", "scale_patterns", "largest_changed"),
    [("sqrt", [0x1DFF, 0x1DC0, 0x1D80], 3), ("fourth_root", [0x21FE, 0x21C0, 0x2180], 1)],
)
def test_documented_limit_subnormal_v_of_small_scales_is_not_lossless(
    code: spec.ExpAvgSqCode, scale_patterns: list[int], largest_changed: int
) -> None:
    """Just below the limit, then 1.5 and 1 times the power of two below it.

    "sqrt": code 1 decodes to (scale/255)^2 with an absolute error of half the smallest subnormal,
    2^-150: that moves the level by 255^2 2^-151 / scale^2 codes, half a code at 2^-67.
    "fourth_root": code 1 decodes to (scale/255^2)^2, which is below 2^-150, and so 0, below 2^-59.
    """
    scales = bf16(scale_patterns)
    assert (scales.double() < SMALLEST_LOSSLESS_SCALE[code]).all()
    codes, scales = every_code(scales, ALL_CODES)
    v = decode_exp_avg_sq(codes, scales, code=code)
    assert float(v[v > 0].min()) < 2.0**-126
    new_codes, new_scales = encode_exp_avg_sq(v, code=code)
    assert_same_bits(new_scales, scales)
    changed = new_codes != codes
    for group in changed.view(3, -1):
        assert group.any()
    assert codes[changed].max() <= largest_changed  # only the smallest codes
    assert (new_codes[changed].int() - codes[changed].int()).abs().max() <= 1


@each_code
def test_the_largest_v_decodes_to_a_finite_number(code: spec.ExpAvgSqCode) -> None:
    """Its root would round up to a scale of 2^64, whose square is infinite."""
    codes, scale = encode_exp_avg_sq(fp32([0x7F7FFFFF]), code=code)
    assert_same_bits(scale, torch.tensor([2.0**64 * (1 - 2.0**-8)], dtype=torch.bfloat16))
    decoded = decode_exp_avg_sq(codes, scale, code=code)
    assert decoded.isfinite().all()
    again, same = encode_exp_avg_sq(decoded, code=code)
    assert_same_bits(again, codes)
    assert_same_bits(same, scale)


@each_code
def test_encode_then_decode_is_idempotent(code: spec.ExpAvgSqCode) -> None:
    for m in random_groups(lowest=2 * SMALLEST_LOSSLESS_SCALE[code]):
        codes, scale = encode_exp_avg_sq(m * m, code=code)
        lossless = per_element(scale, m.numel()) >= SMALLEST_LOSSLESS_SCALE[code]
        once = decode_exp_avg_sq(codes, scale, code=code)
        again, same = encode_exp_avg_sq(once, code=code)
        assert_same_bits(again[lossless], codes[lossless])
        assert_same_bits(same, scale)


@each_code
def test_decoded_values_increase_with_the_code(code: spec.ExpAvgSqCode) -> None:
    scale = torch.full((8,), 4.0, dtype=torch.bfloat16)
    decoded = decode_exp_avg_sq(ALL_CODES, scale, code=code)
    assert (decoded.diff() > 0).all()
    assert decoded[0] == 0.0 and decoded[-1] == 16.0


@pytest.mark.parametrize("exponent", [-149, -148, -140, -127, -126, -100, -20, 0, 20, 100, 126])
@each_rounding
@each_code
def test_largest_element_takes_the_top_code(
    code: spec.ExpAvgSqCode, rounding: spec.Rounding, exponent: int
) -> None:
    """Down to the smallest subnormal v."""
    generator = torch.Generator().manual_seed(exponent + 200)
    v = (torch.rand(64 * 32, generator=generator).double() * 2.0**exponent).float()
    v[5] = 2.0**exponent
    codes, _ = encode_exp_avg_sq(v, code=code, rounding=rounding)
    largest = (v == group_max(v)) & (v > 0)
    assert largest.any() and (codes[largest] == 255).all()


@each_code
def test_scale_is_the_largest_root_rounded_to_bf16(code: spec.ExpAvgSqCode) -> None:
    for m in random_groups():
        _, scale = encode_exp_avg_sq(m * m, code=code)
        assert_same_bits(scale, sqrt_fp32(group_max(m * m)[::32]).to(torch.bfloat16))


@each_rounding
@each_code
def test_positive_v_never_takes_code_zero(code: spec.ExpAvgSqCode, rounding: spec.Rounding) -> None:
    """A zero v would make the next update explode. From the smallest subnormal on."""
    v = torch.cat([fp32([1, 2, 0x7FFFFF, 0x800000]), torch.logspace(-44, 38, 92), torch.zeros(64)])
    v[40] = 1e30
    codes, _ = encode_exp_avg_sq(v, code=code, rounding=rounding)
    assert (codes[v > 0] > 0).all()
    assert (codes[v == 0] == 0).all()


@pytest.mark.parametrize("pattern", [0x00000000, 0x80000000])
@each_code
def test_scale_zero_means_codes_zero(code: spec.ExpAvgSqCode, pattern: int) -> None:
    codes, scale = encode_exp_avg_sq(fp32([pattern]).repeat(40), code=code)
    assert_same_bits(scale, bf16([0, 0]))
    assert_same_bits(codes, torch.zeros(40, dtype=torch.uint8))
    assert_same_bits(decode_exp_avg_sq(codes, scale, code=code), torch.zeros(40))


@each_code
def test_one_huge_value_leaves_tiny_ones_at_code_one_and_other_groups_alone(
    code: spec.ExpAvgSqCode,
) -> None:
    v = torch.full((96,), 1e-12)
    v[40] = 1e12
    codes, scale = encode_exp_avg_sq(v, code=code)
    assert (codes[:32] == 255).all() and (codes[64:] == 255).all()
    assert codes[40] == 255 and int(codes[32:64].int().sum()) == 255 + 31
    assert_same_bits(scale, torch.tensor([1e-6, 1e6, 1e-6], dtype=torch.bfloat16))


@each_rounding
@pytest.mark.parametrize("poison", [torch.inf, torch.nan, -1.0, -torch.inf])
@each_code
def test_infinity_nan_or_a_negative_v_poisons_its_group_only(
    code: spec.ExpAvgSqCode, poison: float, rounding: spec.Rounding
) -> None:
    v = torch.ones(96)
    v[50] = poison
    codes, scale = encode_exp_avg_sq(v, code=code, rounding=rounding)
    assert_same_bits(scale[1:2], NAN_SCALE)
    decoded = decode_exp_avg_sq(codes, scale, code=code)
    assert decoded[32:64].isnan().all()
    assert_same_bits(decoded[:32], v[:32])
    assert_same_bits(decoded[64:], v[64:])
    new_codes, new_scale = encode_exp_avg_sq(decoded, code=code)
    assert_same_bits(new_codes[:32], codes[:32])
    assert_same_bits(new_codes[64:], codes[64:])
    assert_same_bits(new_scale, scale)


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 95])
@each_rounding
@each_code
def test_a_partial_last_group_is_encoded_as_if_zeros_followed(
    code: spec.ExpAvgSqCode, rounding: spec.Rounding, length: int
) -> None:
    v = torch.rand(96, generator=torch.Generator().manual_seed(length))

    def encode(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return encode_exp_avg_sq(v, code=code, rounding=rounding, seed=3, step=4)

    codes, scale = encode(v[:length])
    assert codes.shape == (length,) and scale.shape == (-(-length // 32),)
    padded = v.clone()
    padded[length:] = 0.0
    full_codes, full_scale = encode(padded)
    assert_same_bits(codes, full_codes[:length])
    assert_same_bits(scale, full_scale[: len(scale)])
    decoded = decode_exp_avg_sq(codes, scale, code=code)
    assert_same_bits(decoded, decode_exp_avg_sq(full_codes, full_scale, code=code)[:length])


def test_known_codes() -> None:
    """By hand: 255 * sqrt(v) / 2 is 255, 127.5 (half up: 128), 63.75, 0.5 (1), 0.004 (1), 0."""
    v = torch.tensor([4.0, 1.0, 0.25, 4 / 510**2 * 1.001, 1e-9, 0.0])
    codes, scale = encode_exp_avg_sq(v)
    assert codes.tolist() == [255, 128, 64, 1, 1, 0]
    assert patterns(scale).tolist() == [0x4000]


def test_known_fourth_root_codes() -> None:
    """By hand: 255 * sqrt(sqrt(v) / 2) for v = 4, 1, 1/4, 1/16, 4 / 255^4 is 255, 180.3, 127.5
    (half up: 128), 90.16, 1; and far below 1 for 1e-14.
    """
    v = torch.tensor([4.0, 1.0, 0.25, 0.0625, 4 / 255**4, 1e-14, 0.0])
    codes, scale = encode_exp_avg_sq(v, code="fourth_root")
    assert codes.tolist() == [255, 180, 128, 90, 1, 1, 0]
    assert patterns(scale).tolist() == [0x4000]


def test_the_fourth_root_code_keeps_small_elements_that_the_other_lifts_to_one_step() -> None:
    """A root of 1/1000 of the largest: code 8 of 255, of which half a step is 6 % of sqrt(r)."""
    v = torch.tensor([1.0, 1e-6])
    for code, relative in (("sqrt", 3.0), ("fourth_root", 0.13)):
        decoded = decode_exp_avg_sq(*encode_exp_avg_sq(v, code=code), code=code)
        error = abs(float((decoded[1] / v[1]).sqrt()) - 1)
        assert error < relative and (error > 2.5) == (code == "sqrt")


def test_no_code_named_is_the_sqrt_code() -> None:
    v = torch.rand(100, generator=torch.Generator().manual_seed(0))
    codes, scale = encode_exp_avg_sq(v)
    assert_same_bits(codes, encode_exp_avg_sq(v, code="sqrt")[0])
    assert not torch.equal(codes, encode_exp_avg_sq(v, code="fourth_root")[0])
    decoded = decode_exp_avg_sq(codes, scale)
    assert_same_bits(decoded, decode_exp_avg_sq(codes, scale, code="sqrt"))
