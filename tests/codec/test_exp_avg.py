"""First moment codes: error bound, top code, lossless decode-then-encode, special groups."""

from __future__ import annotations

import pytest
import torch
from bitwise import assert_same_bits, bf16, patterns
from groups import (
    drawn_groups,
    every_code,
    group_max,
    per_element,
    random_groups,
    scales_within,
)
from hypothesis import given, settings
from tolerances import EXP_AVG_CODE_STEPS, EXP_AVG_DECODE_RELATIVE

from megatron_flashoptim.codec import decode_exp_avg, encode_exp_avg, spec

ALL_CODES = torch.arange(-127, 128).to(torch.int8)
NAN_SCALE = bf16([0x7FC0])
SMALLEST, LIMIT = spec.EXP_AVG_SMALLEST, spec.EXP_AVG_LIMIT
BELOW_SMALLEST = SMALLEST * (1 - 2.0**-24)
BELOW_LIMIT = LIMIT * (1 - 2.0**-24)


def _expand(position: torch.Tensor) -> torch.Tensor:
    """Return z / (2 - z) with z = position / 127 in fp64; positions between codes too."""
    return position / (254.0 - position)


def _check_error_bound(m: torch.Tensor) -> None:
    codes, scale = encode_exp_avg(m)
    decoded = decode_exp_avg(codes, scale).double().abs()
    flushed = group_max(m.abs()) < SMALLEST
    assert not decoded[flushed].any()
    m, scale = m.double().abs(), per_element(scale, m.numel())
    m, scale, codes, decoded = m[~flushed], scale[~flushed], codes[~flushed], decoded[~flushed]
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
    Groups below 2^-100 are left out: they decode to zero.
    """
    for m in random_groups():
        _check_error_bound(m)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(m=drawn_groups())
def test_error_bound_holds_for_drawn_groups(m: torch.Tensor) -> None:
    _check_error_bound(m)


def test_decode_then_encode_is_the_identity_for_every_scale_and_code() -> None:
    """All 25600 bf16 scales in [2^-100, 2^100), times all 255 codes."""
    scales = scales_within(SMALLEST, LIMIT)
    assert len(scales) == 200 * 128
    codes, scales = every_code(scales, ALL_CODES)
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


@pytest.mark.parametrize("exponent", [-99, -98, -60, -1, 0, 60, 97])
def test_largest_element_takes_the_top_code(exponent: int) -> None:
    """Whichever way its rounding to bf16 went."""
    generator = torch.Generator().manual_seed(exponent + 100)
    m = torch.rand(256, 32, generator=generator) - 0.5
    m[:, 5] = torch.cat([torch.linspace(1.0, 2.0, 129)[:128], -1.0 - torch.rand(128)])
    m = (m * 2.0**exponent).flatten()
    codes, scale = encode_exp_avg(m)
    largest = m.abs() == group_max(m.abs())
    assert largest.sum() == 256
    assert (codes[largest].abs() == 127).all()
    assert (torch.sign(codes[largest].float()) == torch.sign(m[largest])).all()
    ratio = m[largest].abs().double() / scale.double()
    assert ratio.min() < 1 - 2.0**-9 and ratio.max() > 1 + 2.0**-9


def test_scale_is_the_absmax_rounded_to_bf16() -> None:
    for m in random_groups():
        _, scale = encode_exp_avg(m)
        assert_same_bits(scale, group_max(m.abs())[::32].to(torch.bfloat16))


@pytest.mark.parametrize("largest", [0.0, -0.0, 2.0**-149, 2.0**-126, -(2.0**-101)])
def test_a_group_below_2_to_minus_100_has_scale_zero_and_codes_zero(largest: float) -> None:
    """It decodes to zeros, as a group of zeros of either sign does."""
    m = torch.full((40,), largest)
    m[3] = largest / 2
    codes, scale = encode_exp_avg(m)
    assert_same_bits(scale, bf16([0, 0]))
    assert_same_bits(codes, torch.zeros(40, dtype=torch.int8))
    assert_same_bits(decode_exp_avg(codes, scale), torch.zeros(40))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_flushing_ends_exactly_at_2_to_minus_100(sign: float) -> None:
    """By the largest magnitude itself, though one ulp below would round to a scale of 2^-100."""
    m = torch.zeros(96)
    m[5], m[37], m[69] = sign * BELOW_SMALLEST, sign * SMALLEST, sign * SMALLEST * (1 + 2.0**-23)
    codes, scale = encode_exp_avg(m)
    assert_same_bits(scale, torch.tensor([0.0, SMALLEST, SMALLEST], dtype=torch.bfloat16))
    assert codes.nonzero().flatten().tolist() == [37, 69]
    assert codes[37] == codes[69] == sign * 127
    assert decode_exp_avg(codes, scale)[37] == sign * SMALLEST


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_first_moments_from_exactly_2_to_100_on_poison_their_group(sign: float) -> None:
    m = torch.ones(160)
    highest = [BELOW_LIMIT, LIMIT, LIMIT * (1 + 2.0**-23), 3e38]
    for group, value in enumerate(highest):
        m[32 * group + 7] = sign * value
    codes, scale = encode_exp_avg(m)
    assert_same_bits(scale[1:4], NAN_SCALE.repeat(3))
    decoded = decode_exp_avg(codes, scale)
    assert decoded[32:128].isnan().all()
    assert_same_bits(decoded[128:], m[128:])
    # One ulp below, the scale rounds to 2^100 itself, and the group is a group of numbers.
    assert scale[0] == LIMIT and codes[7] == sign * 127
    assert decoded[7] == sign * LIMIT and not decoded[:7].any()


def test_documented_limit_decode_then_encode_poisons_a_scale_of_2_to_100() -> None:
    """Which rounding up to it makes of the last half bf16 ulp below; a step's beta1 leaves it."""
    codes, scale = encode_exp_avg(torch.tensor([BELOW_LIMIT]))
    _, again = encode_exp_avg(decode_exp_avg(codes, scale))
    assert_same_bits(again, NAN_SCALE)


def test_one_huge_value_leaves_tiny_ones_at_code_zero_and_their_group_alone() -> None:
    m = torch.full((96,), 1e-12)
    m[40] = -1e12
    codes, scale = encode_exp_avg(m)
    assert (codes[:32] == 127).all() and (codes[64:] == 127).all()
    assert codes[40] == -127 and codes[32:64].count_nonzero() == 1
    assert_same_bits(scale, torch.tensor([1e-12, 1e12, 1e-12], dtype=torch.bfloat16))


@pytest.mark.parametrize("poison", [torch.inf, -torch.inf, torch.nan])
def test_infinity_or_nan_poisons_its_group_only(poison: float) -> None:
    """The poisoned element has code -1, the others of its group codes that mean nothing."""
    m = torch.ones(96)
    m[50] = poison
    codes, scale = encode_exp_avg(m)
    assert_same_bits(scale[1:2], NAN_SCALE)
    assert codes[50] == -1
    decoded = decode_exp_avg(codes, scale)
    assert decoded[32:64].isnan().all()
    assert_same_bits(decoded[:32], m[:32])
    assert_same_bits(decoded[64:], m[64:])
    new_codes, new_scale = encode_exp_avg(decoded)
    assert_same_bits(new_scale, scale)
    assert (new_codes[32:64] == -1).all()
    assert_same_bits(new_codes[:32], codes[:32])


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
