"""Stochastic rounding of the second moment: the root is right on average, reruns are equal."""

from __future__ import annotations

import pytest
import torch
from bitwise import assert_same_bits, patterns
from groups import group_max, random_groups
from tolerances import EXP_AVG_SQ_CODE_STEPS, SIGMAS

from megatron_flashoptim.codec import decode_exp_avg_sq, encode_exp_avg_sq
from megatron_flashoptim.codec.moments import encode_exp_avg_sq_groups
from megatron_flashoptim.codec.rounding import sqrt_fp32

GROUPS = 4096


def _encode_many(root: torch.Tensor, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode the 32 roots in GROUPS groups; return codes (GROUPS, 32) and scales (GROUPS,)."""
    v = (root * root).repeat(GROUPS)
    codes, scale = encode_exp_avg_sq(v, rounding="stochastic", seed=1, step=step)
    return codes.view(GROUPS, 32), scale


def _mean_root_and_sigma(root: torch.Tensor, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = _encode_many(root, step)
    decoded = decode_exp_avg_sq(codes.flatten(), scale).double().sqrt().view(GROUPS, 32)
    return decoded.mean(dim=0), decoded.std(dim=0) / GROUPS**0.5


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0**-40 * 1.75, 2.0**30])
def test_codes_are_right_on_average_and_one_of_the_two_neighbours(scale: float) -> None:
    """With a scale that bf16 holds, only codes are random: level l becomes floor(l) or that + 1
    with mean l, so the mean of n codes is off by sqrt(f (1 - f) / n) per sigma, f = frac(l).
    """
    level = torch.linspace(1.0, 253.9, 31)
    root = torch.cat([torch.tensor([scale]), level * (scale / 255)])
    codes, stored = _encode_many(root)
    assert (stored.double() == scale).all()
    codes = codes[:, 1:].double()
    level = (root * root).double().sqrt()[1:] * 255 / scale
    low, high = level - EXP_AVG_SQ_CODE_STEPS, level + EXP_AVG_SQ_CODE_STEPS
    assert (codes >= low.floor()).all() and (codes <= high.floor() + 1).all()
    sigma = (level.frac() * (1 - level.frac()) / GROUPS).sqrt()
    assert ((codes.mean(dim=0) - level).abs() <= SIGMAS * sigma + EXP_AVG_SQ_CODE_STEPS).all()


@pytest.mark.parametrize("mantissa", [0x0001, 0x4000, 0x8000, 0xC123, 0xFFFF])
def test_scales_are_right_on_average_and_one_of_the_two_neighbours(mantissa: int) -> None:
    """A group of one positive element decodes to its scale, rounded up with probability p."""
    root = torch.zeros(32)
    root[3] = torch.tensor([0x3FA5 << 16 | mantissa], dtype=torch.int32).view(torch.float32)
    _, scale = _encode_many(root)
    exact = (root[3] * root[3]).double().sqrt()
    low = torch.tensor(float((0x3FA5 - 0x3F80) / 128 + 1), dtype=torch.float64)
    ulp = 2.0**-7
    assert set(scale.double().unique().tolist()) <= {low.item(), low.item() + ulp}
    p = ((exact - low) / ulp).item()
    sigma = ulp * (p * (1 - p) / GROUPS) ** 0.5
    # The root of the rounded square is off by an fp32 ulp or so.
    assert abs(scale.double().mean().item() - exact.item()) <= SIGMAS * sigma + 2.0**-23


@pytest.mark.parametrize("largest", [1.0, 1.001, 1.003, 1.0071, 1.37, 1.999, 2.0**-50 * 1.003])
def test_roots_are_right_on_average_when_scale_and_codes_are_both_random(largest: float) -> None:
    """Every element from one code step up to the lower neighbour of the scale, and the largest."""
    generator = torch.Generator().manual_seed(0)
    root = (0.004 + 0.988 * torch.rand(32, generator=generator)) * largest
    root[9] = largest
    exact = (root * root).double().sqrt()
    mean, sigma = _mean_root_and_sigma(root)
    slack = EXP_AVG_SQ_CODE_STEPS * largest / 255
    assert ((mean - exact).abs() <= SIGMAS * sigma + slack).all()


def test_documented_limit_roots_in_the_top_ulp_of_the_scale_lose_up_to_a_quarter_of_it() -> None:
    """Where the scale is rounded down to s (probability 1 - p, largest = s + p ulp), an element
    s + q ulp with 0 < q < p is clamped to s: its mean is low by (1 - p) q ulp < ulp / 4.
    """
    ulp = 2.0**-7
    root = torch.cat([torch.linspace(1.0, 1.0 + 0.5 * ulp, 31), torch.tensor([1.0 + 0.5 * ulp])])
    exact = (root * root).double().sqrt()
    mean, sigma = _mean_root_and_sigma(root)
    loss = exact - mean
    assert (loss >= -SIGMAS * sigma - 1e-7).all()
    assert (loss <= ulp / 4 + SIGMAS * sigma + 1e-7).all()
    assert loss[29] > ulp / 5  # the limit is real
    assert loss[-1].abs() <= SIGMAS * sigma[-1] + 1e-7  # the largest itself loses nothing


def test_roots_below_one_code_step_are_never_lost() -> None:
    """They take code 1, or 0 + 1 by chance: on average at most one step above the exact root."""
    root = torch.linspace(1e-4, 0.99, 32) / 255
    root[0] = 1.0
    mean, _ = _mean_root_and_sigma(root)
    assert ((mean[1:] * 255 - 1.0).abs() <= 1e-6).all()


def test_the_largest_draw_never_carries_past_the_top_code() -> None:
    """255 + (1 - 2^-24) is 256 in fp32, which would wrap to code 0."""
    root = torch.linspace(1.0, 1.0 + 0.9 * 2.0**-7, 32).unsqueeze(0)  # up to above the scale
    draws = torch.full((1, 32), 0xFFFFFFFF)
    codes, scale = encode_exp_avg_sq_groups(
        sqrt_fp32(root * root), random=draws, scale_random=torch.zeros(1).long()
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


def test_codes_and_scales_are_within_one_of_nearest() -> None:
    for m in random_groups():
        v = m * m
        nearest, nearest_scale = encode_exp_avg_sq(v)
        codes, scale = encode_exp_avg_sq(v, rounding="stochastic", seed=9)
        assert ((patterns(scale) - patterns(nearest_scale)).abs() <= 1).all()
        # A scale one bf16 ulp (at most 2^-7) larger or smaller moves the level by up to 2 codes.
        assert ((codes.int() - nearest.int()).abs() <= 3).all()
        assert (codes[(v == group_max(v)) & (v > 0)] == 255).all()


def test_draws_of_codes_and_of_scales_are_independent() -> None:
    """The scale of a group and the code of its first element come from different streams."""
    root = torch.zeros(32)
    root[0], root[1] = 0.5 * 100.5 / 255, 0.5 * (1 + 2.0**-8)
    codes, scale = _encode_many(root)
    scale_up = (scale.double() > 0.5).double()
    # Given the scale, the level of element 0 differs; compare the code with that level.
    level = 0.5 * 100.5 / scale.double()
    code_up = codes[:, 0].double() - level
    correlation = torch.corrcoef(torch.stack([scale_up, code_up]))[0, 1]
    assert correlation.abs() <= SIGMAS / GROUPS**0.5
