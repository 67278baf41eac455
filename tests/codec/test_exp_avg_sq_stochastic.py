"""Stochastic rounding of the second moment: right on average, reruns are equal.

What is right on average is what the code is in proportion to: r = sqrt(v), or its root.
"""

from __future__ import annotations

import pytest
import torch
from bitwise import assert_same_bits, patterns
from groups import coded, group_max, random_groups, uncoded
from tolerances import EXP_AVG_SQ_CODE_STEPS, SIGMAS

from megatron_flashoptim.codec import decode_exp_avg_sq, encode_exp_avg_sq, spec
from megatron_flashoptim.codec.moments import encode_exp_avg_sq_groups
from megatron_flashoptim.codec.rounding import sqrt_fp32

GROUPS = 4096
DRAWS = 1 << spec.DRAW_BITS
ONE = 1 << spec.EXP_AVG_SQ_FRACTION_BITS

each_code = pytest.mark.parametrize("code", spec.EXP_AVG_SQ_CODES)


def _encode_many(root: torch.Tensor, code: spec.ExpAvgSqCode) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode the 32 roots in GROUPS groups; return codes (GROUPS, 32) and scales (GROUPS,)."""
    v = (root * root).repeat(GROUPS)
    codes, scale = encode_exp_avg_sq(v, code=code, rounding="stochastic", seed=1)
    return codes.view(GROUPS, 32), scale


def _mean_and_sigma(
    root: torch.Tensor, code: spec.ExpAvgSqCode
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean of what is coded, as decoded from GROUPS groups, and its standard error."""
    codes, scale = _encode_many(root, code)
    decoded = decode_exp_avg_sq(codes.flatten(), scale, code=code).double().sqrt()
    quantity = coded(decoded, code).view(GROUPS, 32)
    return quantity.mean(dim=0), quantity.std(dim=0) / GROUPS**0.5


def _coded_exactly(root: torch.Tensor, code: spec.ExpAvgSqCode) -> torch.Tensor:
    return coded((root * root).double().sqrt(), code)


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0**-40 * 1.75, 2.0**30])
@each_code
def test_codes_are_right_on_average_and_one_of_the_two_neighbours(
    code: spec.ExpAvgSqCode, scale: float
) -> None:
    """With a scale that bf16 holds, only codes are random: level l becomes floor(l) or that + 1
    with mean l, so the mean of n codes is off by sqrt(f (1 - f) / n) per sigma, f = frac(l).
    """
    level = torch.linspace(1.0, 253.9, 31)
    root = torch.cat([torch.tensor([scale]), uncoded(level / 255, code) * scale])
    codes, stored = _encode_many(root, code)
    assert (stored.double() == scale).all()
    codes = codes[:, 1:].double()
    level = coded((root * root).double().sqrt()[1:] / scale, code) * 255
    low, high = level - EXP_AVG_SQ_CODE_STEPS, level + EXP_AVG_SQ_CODE_STEPS
    assert (codes >= low.floor()).all() and (codes <= high.floor() + 1).all()
    sigma = (level.frac() * (1 - level.frac()) / GROUPS).sqrt()
    assert ((codes.mean(dim=0) - level).abs() <= SIGMAS * sigma + EXP_AVG_SQ_CODE_STEPS).all()


@each_code
def test_of_all_draws_as_many_round_up_as_the_fraction_bits_say(code: spec.ExpAvgSqCode) -> None:
    """Exact counts: the level is rounded to 15 fraction bits, of which the draw decides."""
    level = torch.tensor([1.0, 1.5, 1.0 + 2.0**-15, 7.3, 100.999, 127.25, 200.0 - 2.0**-14, 254.5])
    root = torch.cat([torch.ones(1), uncoded(level.double() / 255, code).float(), torch.zeros(23)])
    draws = torch.arange(DRAWS).unsqueeze(1).expand(-1, 32)
    codes, scale = encode_exp_avg_sq_groups(root.expand(DRAWS, 32), code=code, draw=draws)
    assert (scale == 1.0).all()
    exact = root if code == "sqrt" else sqrt_fp32(root)
    fixed = (exact.double() * 255 * ONE).round().long()
    fixed[root == 0] = 0
    expected = (fixed // ONE) + (draws >= DRAWS - 2 * (fixed % ONE))
    expected[:, 0] = 255
    assert torch.equal(codes.long(), expected)


@each_code
def test_nearest_is_the_draw_of_one_half(code: spec.ExpAvgSqCode) -> None:
    for m in random_groups():
        root = sqrt_fp32((m * m)[:1024].view(32, 32))
        half = torch.full((32, 32), 1 << (spec.DRAW_BITS - 1))
        nearest, _ = encode_exp_avg_sq_groups(root, code=code)
        codes, _ = encode_exp_avg_sq_groups(root, code=code, draw=half)
        assert_same_bits(codes, nearest)


@pytest.mark.parametrize("mantissa", [0x0001, 0x4000, 0x8000, 0xC123, 0xFFFF])
def test_scales_are_right_on_average_and_one_of_the_two_neighbours(mantissa: int) -> None:
    """A group of one positive element decodes to its scale, rounded up with probability p."""
    root = torch.zeros(32)
    root[3] = torch.tensor([0x3FA5 << 16 | mantissa], dtype=torch.int32).view(torch.float32)
    _, scale = _encode_many(root, "sqrt")
    exact = (root[3] * root[3]).double().sqrt()
    low = torch.tensor(float((0x3FA5 - 0x3F80) / 128 + 1), dtype=torch.float64)
    ulp = 2.0**-7
    assert set(scale.double().unique().tolist()) <= {low.item(), low.item() + ulp}
    p = ((exact - low) / ulp).item()
    sigma = ulp * (p * (1 - p) / GROUPS) ** 0.5
    # The root of the rounded square is off by an fp32 ulp or so.
    assert abs(scale.double().mean().item() - exact.item()) <= SIGMAS * sigma + 2.0**-23


@pytest.mark.parametrize("largest", [1.0, 1.001, 1.003, 1.0071, 1.37, 1.999, 2.0**-40 * 1.003])
@each_code
def test_roots_are_right_on_average_when_scale_and_codes_are_both_random(
    code: spec.ExpAvgSqCode, largest: float
) -> None:
    """Every element from one code step up to the lower neighbour of the scale, and the largest.

    The largest is right in r itself; its square root is low by up to ulp^2 / 32 = 2^-19, below
    what is resolved here.
    """
    generator = torch.Generator().manual_seed(0)
    root = uncoded(0.004 + 0.992 * torch.rand(32, generator=generator), code).float()
    root = root.clamp(max=0.992) * largest
    root[9] = largest
    exact = _coded_exactly(root, code)
    mean, sigma = _mean_and_sigma(root, code)
    slack = EXP_AVG_SQ_CODE_STEPS * exact[9] / 255
    assert ((mean - exact).abs() <= SIGMAS * sigma + slack).all()


@each_code
def test_documented_limit_roots_in_the_top_ulp_of_the_scale_lose_up_to_a_quarter_of_it(
    code: spec.ExpAvgSqCode,
) -> None:
    """Where the scale is rounded down to s (probability 1 - p, largest = s + p ulp), an element
    s + q ulp with 0 < q < p is clamped to s: its mean is low by (1 - p) q ulp < ulp / 4; its
    square root by half as much.
    """
    ulp = 2.0**-7 * (1.0 if code == "sqrt" else 0.5)
    root = 1.0 + torch.cat([torch.linspace(0.0, 0.5, 31), torch.tensor([0.5])]) * 2.0**-7
    exact = _coded_exactly(root, code)
    mean, sigma = _mean_and_sigma(root, code)
    loss = exact - mean
    assert (loss >= -SIGMAS * sigma - 1e-7).all()
    assert (loss <= ulp / 4 + SIGMAS * sigma + 1e-7).all()
    assert loss[29] > ulp / 5  # the limit is real
    # The largest itself loses nothing, but ulp^2 / 32 in its square root.
    assert loss[-1].abs() <= SIGMAS * sigma[-1] + 2.0**-19


@each_code
def test_roots_below_one_code_step_always_take_code_one(code: spec.ExpAvgSqCode) -> None:
    """Whatever the draw: never lost, at most one step above the exact root."""
    root = uncoded(torch.linspace(1e-4, 0.99, 32) / 255, code)
    root[0] = 1.0
    codes, _ = _encode_many(root, code)
    assert (codes[:, 1:] == 1).all()


@each_code
def test_the_largest_draw_never_carries_past_the_top_code(code: spec.ExpAvgSqCode) -> None:
    """255 in fixed point and a draw just below 1; 256 would wrap to code 0."""
    root = torch.linspace(1.0, 1.0 + 0.9 * 2.0**-7, 32).unsqueeze(0)  # up to above the scale
    draw = torch.full((1, 32), DRAWS - 1)
    codes, scale = encode_exp_avg_sq_groups(
        sqrt_fp32(root * root), code=code, draw=draw, scale_draw=torch.zeros(1).long()
    )
    assert scale.tolist() == [1.0]
    assert (codes == 255).all()


def test_same_seed_and_step_give_the_same_bits_and_others_do_not() -> None:
    v = torch.rand(3200, generator=torch.Generator().manual_seed(0))
    codes, scale = encode_exp_avg_sq(v, rounding="stochastic", seed=5, step=7)
    again, same = encode_exp_avg_sq(v, rounding="stochastic", seed=5, step=7)
    assert_same_bits(again, codes)
    assert_same_bits(same, scale)
    for seed, step in ((6, 7), (5, 8), (5 + (1 << 32), 7)):
        other, scales = encode_exp_avg_sq(v, rounding="stochastic", seed=seed, step=step)
        assert not torch.equal(other, codes)
        assert not torch.equal(scales, scale)


@each_code
def test_codes_and_scales_are_within_one_of_nearest(code: spec.ExpAvgSqCode) -> None:
    for m in random_groups():
        v = m * m
        nearest, nearest_scale = encode_exp_avg_sq(v, code=code)
        codes, scale = encode_exp_avg_sq(v, code=code, rounding="stochastic", seed=9)
        assert ((patterns(scale) - patterns(nearest_scale)).abs() <= 1).all()
        # A scale one bf16 ulp (at most 2^-7) larger or smaller moves the level by up to 2 codes.
        assert ((codes.int() - nearest.int()).abs() <= 3).all()
        assert (codes[(v == group_max(v)) & (v > 0)] == 255).all()


@each_code
def test_draws_of_codes_and_of_scales_are_independent(code: spec.ExpAvgSqCode) -> None:
    """The scale of a group and the codes of its elements have draws of their own."""
    root = torch.cat([uncoded(torch.full((31,), 100.5 / 255), code), torch.ones(1)]) / 2
    root[31] = 0.5 * (1 + 2.0**-8)
    codes, scale = _encode_many(root, code)
    scale_up = (scale.double() > 0.5).double()
    # Given the scale, the level of an element differs; compare the code with that level.
    level = coded((root * root).double().sqrt() / scale.double().unsqueeze(1), code) * 255
    code_up = (codes.double() - level)[:, :31]
    for element in range(31):
        correlation = torch.corrcoef(torch.stack([scale_up, code_up[:, element]]))[0, 1]
        assert correlation.abs() <= SIGMAS / GROUPS**0.5
