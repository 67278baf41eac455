"""First moment codes: error bound, top code, lossless decode-then-encode, special groups."""

from __future__ import annotations

import pytest
import torch
from bitwise import assert_same_bits, bf16, fp32, patterns
from groups import ALL_SCALES, drawn_groups, every_code, group_max, per_element, random_groups
from hypothesis import given, settings
from tolerances import EXP_AVG_CODE_STEPS, EXP_AVG_DECODE_RELATIVE

from megatron_flashoptim.codec import decode_exp_avg, encode_exp_avg

ALL_CODES = torch.arange(-127, 128).to(torch.int8)
NAN_SCALE = bf16([0x7FC0])


def _expand(position: torch.Tensor) -> torch.Tensor:
    """Return z / (2 - z) with z = position / 127 in fp64; positions between codes too."""
    return position / (254.0 - position)


def _check_error_bound(m: torch.Tensor) -> None:
    codes, scale = encode_exp_avg(m)
    decoded = decode_exp_avg(codes, scale).double().abs()
    m, scale = m.double().abs(), per_element(scale, m.numel())
    code = codes.double().abs()
    half = 0.5 + EXP_AVG_CODE_STEPS
    assert (m >= scale * _expand((code - half).clamp(min=0.0))).all()
    assert (m <= scale * _expand(code + half)).all()
    step_up = scale * (_expand(code + half) - _expand(code))
    assert ((decoded - m).abs() <= step_up + EXP_AVG_DECODE_RELATIVE * decoded).all()


def test_error_is_at_most_half_a_code_step_of_the_companding() -> None:
    """Bound from the format: every |m| lies within half a code of its code q, in code space.

    Position p in code space stands for scale * E(p), E(p) = (p/127) / (2 - p/127), increasing
    and convex. Rounding to the nearest code leaves |m| in [scale E(q - 1/2), scale E(q + 1/2)],
    so |decoded - |m|| <= scale (E(q + 1/2) - E(q)): from scale/507 at code 0 to scale/126.5 at
    code 127. Codes are taken against the stored scale, so rounding the scale costs something at
    the top only: the largest element lies up to 2^-8 (half a bf16 ulp) above or below the scale,
    which is within the half step of code 127 on either side (1/126.5 above, 1/128.5 below).
    """
    for m in random_groups():
        _check_error_bound(m)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(m=drawn_groups())
def test_error_bound_holds_for_drawn_groups(m: torch.Tensor) -> None:
    _check_error_bound(m)


def test_decode_then_encode_is_the_identity_for_every_scale_and_code() -> None:
    """All 32639 finite bf16 scales, subnormal ones included, times all 255 codes."""
    codes, scales = every_code(ALL_SCALES, ALL_CODES)
    new_codes, new_scales = encode_exp_avg(decode_exp_avg(codes, scales))
    assert_same_bits(new_codes, codes, "codes")
    assert_same_bits(new_scales, scales, "scales")


def test_encode_then_decode_is_idempotent() -> None:
    for m in random_groups():
        once = decode_exp_avg(*encode_exp_avg(m))
        assert_same_bits(decode_exp_avg(*encode_exp_avg(once)), once)


def test_decoded_values_increase_with_the_code() -> None:
    codes = torch.arange(-127, 128).to(torch.int8)
    decoded = decode_exp_avg(codes, torch.full((8,), 3.0, dtype=torch.bfloat16))
    assert (decoded.diff() > 0).all()
    assert_same_bits(decoded[128:], -decoded[:127].flip(0))
    assert decoded[-1] == 3.0


@pytest.mark.parametrize("decade", [-45, -44, -43, -42, -41, -40, -39, -38, -20, 0, 20, 38])
def test_largest_element_takes_the_top_code(decade: int) -> None:
    """Also with subnormal scales, where the scale may be twice the element it came from."""
    generator = torch.Generator().manual_seed(decade + 100)
    m = (torch.randn(256 * 32, generator=generator).double() / 5 * 10.0**decade).float()
    codes, scale = encode_exp_avg(m)
    largest = (m.abs() == group_max(m.abs())) & (per_element(scale, m.numel()) > 0)
    assert (codes[largest].abs() == 127).all()
    assert (torch.sign(codes[largest].float()) == torch.sign(m[largest])).all()
    if decade >= -38:
        assert largest.sum() >= 256


def test_scale_is_the_absmax_rounded_to_bf16() -> None:
    for m in random_groups():
        _, scale = encode_exp_avg(m)
        assert_same_bits(scale, group_max(m.abs())[::32].to(torch.bfloat16))


def test_largest_finite_scale_is_kept_where_rounding_would_overflow() -> None:
    m = fp32([0x7F7FFFFF, 0xFF7FFFFF, 0x7F000000])
    codes, scale = encode_exp_avg(m)
    assert_same_bits(scale, bf16([0x7F7F]))
    assert codes[:2].tolist() == [127, -127]
    assert decode_exp_avg(codes, scale).isfinite().all()


@pytest.mark.parametrize("pattern", [0x00000000, 0x80000000, 0x00000001, 0x00008000])
def test_scale_zero_means_codes_zero(pattern: int) -> None:
    """Zeros of both signs, and what rounds to a zero scale: at most half a bf16 subnormal."""
    codes, scale = encode_exp_avg(fp32([pattern]).repeat(40))
    assert_same_bits(scale, bf16([0, 0]))
    assert_same_bits(codes, torch.zeros(40, dtype=torch.int8))
    assert_same_bits(decode_exp_avg(codes, scale), torch.zeros(40))


def test_smallest_scale_that_is_not_zero() -> None:
    codes, scale = encode_exp_avg(fp32([0x00008001, 0x80008001, 0]))
    assert_same_bits(scale, bf16([1]))
    assert codes.tolist() == [127, -127, 0]


def test_elements_above_a_subnormal_scale_are_clamped_to_the_top_code() -> None:
    """1.5 of the smallest bf16 rounds down to 1: elements between are up to half above the scale,
    where 2x / (1 + x) exceeds 1 by a fifth.
    """
    codes, scale = encode_exp_avg(fp32([0x00017FFF, 0x80014000, 0x00010001, 0x8000F000]))
    assert_same_bits(scale, bf16([1]))
    assert codes.tolist() == [127, -127, 127, -123]


def test_one_huge_value_leaves_tiny_ones_at_code_zero_and_their_group_alone() -> None:
    m = torch.full((96,), 1e-12)
    m[40] = -1e12
    codes, scale = encode_exp_avg(m)
    assert (codes[:32] == 127).all() and (codes[64:] == 127).all()
    assert codes[40] == -127 and codes[32:64].count_nonzero() == 1
    assert_same_bits(scale, torch.tensor([1e-12, 1e12, 1e-12], dtype=torch.bfloat16))


@pytest.mark.parametrize("poison", [torch.inf, -torch.inf, torch.nan])
def test_infinity_or_nan_poisons_its_group_only(poison: float) -> None:
    m = torch.ones(96)
    m[50] = poison
    codes, scale = encode_exp_avg(m)
    assert_same_bits(scale[1:2], NAN_SCALE)
    assert not codes[32:64].any()
    decoded = decode_exp_avg(codes, scale)
    assert decoded[32:64].isnan().all()
    assert_same_bits(decoded[:32], m[:32])
    assert_same_bits(decoded[64:], m[64:])
    new_codes, new_scale = encode_exp_avg(decoded)
    assert_same_bits(new_codes, codes)
    assert_same_bits(new_scale, scale)


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 95])
def test_a_partial_last_group_is_encoded_as_if_zeros_followed(length: int) -> None:
    m = torch.randn(96, generator=torch.Generator().manual_seed(length))
    codes, scale = encode_exp_avg(m[:length])
    assert codes.shape == (length,) and scale.shape == (-(-length // 32),)
    padded = m.clone()
    padded[length:] = 0.0
    full_codes, full_scale = encode_exp_avg(padded)
    assert_same_bits(codes, full_codes[:length])
    assert_same_bits(scale, full_scale[: len(scale)])
    decoded = decode_exp_avg(codes, scale)
    assert_same_bits(decoded, decode_exp_avg(full_codes, full_scale)[:length])


def test_negated_moments_have_negated_codes() -> None:
    for m in random_groups():
        codes, scale = encode_exp_avg(m)
        negated, same_scale = encode_exp_avg(-m)
        assert_same_bits(negated, -codes)
        assert_same_bits(same_scale, scale)
        assert (codes != -128).all()


def test_known_codes() -> None:
    """By hand: 127 * 2x/(1+x) for x = 1, 1/2, 1/4, 1/127 is 127, 84.67, 50.8, 1.98."""
    codes, scale = encode_exp_avg(torch.tensor([2.0, 1.0, -0.5, 2 / 127, -1 / 4096]))
    assert codes.tolist() == [127, 85, -51, 2, 0]
    assert patterns(scale).tolist() == [0x4000]
