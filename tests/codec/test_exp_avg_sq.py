"""Second moment codes, rounded to nearest: error bound, top code, no zero code, lossless."""

from __future__ import annotations

import pytest
import torch
from bitwise import assert_same_bits, bf16, fp32, patterns
from groups import ALL_SCALES, drawn_groups, every_code, group_max, per_element, random_groups
from hypothesis import given, settings
from tolerances import EXP_AVG_SQ_CODE_STEPS

from megatron_flashoptim.codec import decode_exp_avg_sq, encode_exp_avg_sq
from megatron_flashoptim.codec.rounding import sqrt_fp32

ALL_CODES = torch.arange(256).to(torch.uint8)
NAN_SCALE = bf16([0x7FC0])
# Scales whose codes all survive decode-then-encode; see the test that pins them.
SMALLEST_LOSSLESS_SCALE = 2.0**-67
OVERFLOWING_SCALE = 2.0**64


def _check_error_bound(v: torch.Tensor) -> None:
    codes, scale = encode_exp_avg_sq(v)
    decoded = decode_exp_avg_sq(codes, scale).double().sqrt()
    root, scale = v.double().sqrt(), per_element(scale, v.numel())
    half_ulp_of_scale = torch.ldexp(torch.ones_like(scale), scale.frexp().exponent - 9)
    step = scale / 255.0
    bound = (0.5 + EXP_AVG_SQ_CODE_STEPS) * step
    bound = torch.where(codes == 255, torch.maximum(bound, half_ulp_of_scale + 1e-4 * step), bound)
    lifted = (codes == 1) & (root < 0.5 * step)
    bound = torch.where(lifted, (1.0 + EXP_AVG_SQ_CODE_STEPS) * step, bound)
    assert ((decoded - root).abs() <= bound).all()


def _check_no_zero_code_for_positive_v(v: torch.Tensor) -> None:
    codes, _ = encode_exp_avg_sq(v)
    assert (codes[v > 0] > 0).all()
    assert (codes[v == 0] == 0).all()


def test_error_of_the_root_is_at_most_half_a_code_step() -> None:
    """Bound from the format, for r = sqrt(v) and one step = scale / 255.

    - Rounding to the nearest code: |decoded - r| <= step / 2 = scale / 510.
    - At code 255 the largest r lies up to half a bf16 ulp above or below the scale it made, and
      takes code 255 all the same; elements between the scale and it are clamped to the scale.
    - A positive r below half a step takes code 1 instead of 0: off by less than one step.
    """
    for m in random_groups():
        _check_error_bound(m * m)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(m=drawn_groups())
def test_error_bound_holds_for_drawn_groups(m: torch.Tensor) -> None:
    _check_error_bound(m * m)
    _check_no_zero_code_for_positive_v(m * m)


def test_decode_then_encode_is_the_identity_for_every_normal_scale_and_code() -> None:
    """All bf16 scales in [2^-67, 2^64) times all 256 codes."""
    scale = ALL_SCALES.double()
    lossless = (scale >= SMALLEST_LOSSLESS_SCALE) & (scale < OVERFLOWING_SCALE)
    codes, scales = every_code(ALL_SCALES[lossless], ALL_CODES)
    new_codes, new_scales = encode_exp_avg_sq(decode_exp_avg_sq(codes, scales))
    assert_same_bits(new_codes, codes, "codes")
    assert_same_bits(new_scales, scales, "scales")


def test_documented_limit_subnormal_v_below_scale_2_to_minus_67_is_not_lossless() -> None:
    """Code 1 decodes to (scale/255)^2 with an absolute error of half the smallest subnormal,
    2^-150: that moves the level by 255^2 2^-151 / scale^2 codes, half a code at 2^-67.
    """
    scales = bf16([0x1DFF, 0x1DC0, 0x1D80])  # just below 2^-67, then 1.5 and 1 times 2^-68
    codes, scales = every_code(scales, ALL_CODES)
    v = decode_exp_avg_sq(codes, scales)
    assert float(v[v > 0].min()) < 2.0**-126
    new_codes, new_scales = encode_exp_avg_sq(v)
    assert_same_bits(new_scales, scales)
    changed = new_codes != codes
    for group in changed.view(3, -1):
        assert group.any()
    assert codes[changed].max() <= 3  # only the smallest codes
    assert (new_codes[changed].int() - codes[changed].int()).abs().max() <= 1


def test_the_largest_v_decodes_to_a_finite_number() -> None:
    """Its root would round up to a scale of 2^64, whose square is infinite."""
    codes, scale = encode_exp_avg_sq(fp32([0x7F7FFFFF]))
    assert_same_bits(scale, torch.tensor([2.0**64 * (1 - 2.0**-8)], dtype=torch.bfloat16))
    decoded = decode_exp_avg_sq(codes, scale)
    assert decoded.isfinite().all()
    again, same = encode_exp_avg_sq(decoded)
    assert_same_bits(again, codes)
    assert_same_bits(same, scale)


def test_encode_then_decode_is_idempotent() -> None:
    for m in random_groups():
        once = decode_exp_avg_sq(*encode_exp_avg_sq(m * m))
        assert_same_bits(decode_exp_avg_sq(*encode_exp_avg_sq(once)), once)


def test_decoded_values_increase_with_the_code() -> None:
    decoded = decode_exp_avg_sq(ALL_CODES, torch.full((8,), 4.0, dtype=torch.bfloat16))
    assert (decoded.diff() > 0).all()
    assert decoded[0] == 0.0 and decoded[-1] == 16.0


@pytest.mark.parametrize("exponent", [-149, -148, -140, -127, -126, -100, -20, 0, 20, 100, 126])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_largest_element_takes_the_top_code(exponent: int, rounding: str) -> None:
    """Down to the smallest subnormal v."""
    generator = torch.Generator().manual_seed(exponent + 200)
    v = (torch.rand(64 * 32, generator=generator).double() * 2.0**exponent).float()
    v[5] = 2.0**exponent
    codes, _ = encode_exp_avg_sq(v, rounding=rounding)
    largest = (v == group_max(v)) & (v > 0)
    assert largest.any() and (codes[largest] == 255).all()


def test_scale_is_the_largest_root_rounded_to_bf16() -> None:
    for m in random_groups():
        _, scale = encode_exp_avg_sq(m * m)
        assert_same_bits(scale, sqrt_fp32(group_max(m * m)[::32]).to(torch.bfloat16))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_positive_v_never_takes_code_zero(rounding: str) -> None:
    """A zero v would make the next update explode. From the smallest subnormal on."""
    v = torch.cat([fp32([1, 2, 0x7FFFFF, 0x800000]), torch.logspace(-44, 38, 92), torch.zeros(64)])
    v[40] = 1e30
    codes, _ = encode_exp_avg_sq(v, rounding=rounding)
    assert (codes[v > 0] > 0).all()
    assert (codes[v == 0] == 0).all()


@pytest.mark.parametrize("pattern", [0x00000000, 0x80000000])
def test_scale_zero_means_codes_zero(pattern: int) -> None:
    codes, scale = encode_exp_avg_sq(fp32([pattern]).repeat(40))
    assert_same_bits(scale, bf16([0, 0]))
    assert_same_bits(codes, torch.zeros(40, dtype=torch.uint8))
    assert_same_bits(decode_exp_avg_sq(codes, scale), torch.zeros(40))


def test_one_huge_value_leaves_tiny_ones_at_code_one_and_other_groups_alone() -> None:
    v = torch.full((96,), 1e-12)
    v[40] = 1e12
    codes, scale = encode_exp_avg_sq(v)
    assert (codes[:32] == 255).all() and (codes[64:] == 255).all()
    assert codes[40] == 255 and int(codes[32:64].int().sum()) == 255 + 31
    assert_same_bits(scale, torch.tensor([1e-6, 1e6, 1e-6], dtype=torch.bfloat16))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("poison", [torch.inf, torch.nan, -1.0, -torch.inf])
def test_infinity_nan_or_a_negative_v_poisons_its_group_only(poison: float, rounding: str) -> None:
    v = torch.ones(96)
    v[50] = poison
    codes, scale = encode_exp_avg_sq(v, rounding=rounding)
    assert_same_bits(scale[1:2], NAN_SCALE)
    assert not codes[32:64].any()
    decoded = decode_exp_avg_sq(codes, scale)
    assert decoded[32:64].isnan().all()
    assert_same_bits(decoded[:32], v[:32])
    assert_same_bits(decoded[64:], v[64:])
    new_codes, new_scale = encode_exp_avg_sq(decoded)
    assert_same_bits(new_codes, codes)
    assert_same_bits(new_scale, scale)


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 95])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_partial_last_group_is_encoded_as_if_zeros_followed(length: int, rounding: str) -> None:
    v = torch.rand(96, generator=torch.Generator().manual_seed(length))
    codes, scale = encode_exp_avg_sq(v[:length], rounding=rounding, seed=3, step=4)
    assert codes.shape == (length,) and scale.shape == (-(-length // 32),)
    padded = v.clone()
    padded[length:] = 0.0
    full_codes, full_scale = encode_exp_avg_sq(padded, rounding=rounding, seed=3, step=4)
    assert_same_bits(codes, full_codes[:length])
    assert_same_bits(scale, full_scale[: len(scale)])
    decoded = decode_exp_avg_sq(codes, scale)
    assert_same_bits(decoded, decode_exp_avg_sq(full_codes, full_scale)[:length])


def test_known_codes() -> None:
    """By hand: 255 * sqrt(v) / 2 is 255, 127.5 (half up: 128), 63.75, 0.5 (1), 0.004 (1), 0."""
    v = torch.tensor([4.0, 1.0, 0.25, 4 / 510**2 * 1.001, 1e-9, 0.0])
    codes, scale = encode_exp_avg_sq(v)
    assert codes.tolist() == [255, 128, 64, 1, 1, 0]
    assert patterns(scale).tolist() == [0x4000]
