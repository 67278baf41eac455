"""The device functions of the codec equal the PyTorch reference on every kind of number.

Apart from the AdamW kernel, whose moments are only what a step can reach.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from bitwise import assert_same_bits, finite_samples, fp32, patterns, quiet

from megatron_flashoptim.codec import (
    decode_exp_avg,
    decode_exp_avg_sq,
    encode_exp_avg,
    join_master,
    moments,
    rounding,
    spec,
    split_master,
)
from megatron_flashoptim.codec.master import split_master_with_draws
from megatron_flashoptim.kernels import codec
from megatron_flashoptim.kernels.bytes import store_group_scale

GROUP = 32
TILE = 16
SQRT_STEP = tl.constexpr(moments.exp_avg_sq_step("sqrt"))
FOURTH_ROOT_STEP = tl.constexpr(moments.exp_avg_sq_step("fourth_root"))
# NaN and infinity are part of what is compared.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

LAUNCH = {"enable_fp_fusion": False}


@triton.jit
def _encode_kernel(
    value_ptr,
    draw_ptr,
    codes_ptr,
    scale_ptr,
    SQUARE: tl.constexpr,
    FOURTH_ROOT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    offsets = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    value = tl.load(value_ptr + offsets)
    if SQUARE:
        draw = tl.load(draw_ptr + offsets)
        scale_draw = tl.load(draw_ptr + group * GROUP)
        codes, scale = codec.encode_exp_avg_sq(
            tl.sqrt_rn(value),
            0.0,
            1.0,
            draw,
            scale_draw,
            FOURTH_ROOT=FOURTH_ROOT,
            STOCHASTIC=STOCHASTIC,
        )
    else:
        codes, scale = codec.encode_exp_avg(value)
    tl.store(codes_ptr + offsets, codes)
    store_group_scale(scale_ptr, group, scale, group >= 0)


@triton.jit
def _decode_kernel(
    codes_ptr,
    scale_ptr,
    value_ptr,
    SQUARE: tl.constexpr,
    FOURTH_ROOT: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    offsets = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    codes = tl.load(codes_ptr + offsets)
    scale = codec.bf16_to_fp32(tl.load(scale_ptr + group))
    if SQUARE:
        step: tl.constexpr = FOURTH_ROOT_STEP if FOURTH_ROOT else SQRT_STEP
        root = codec.decode_root(codes, scale * step, FOURTH_ROOT=FOURTH_ROOT)
        value = root * root
    else:
        value = scale[:, None] * codec.decode_exp_avg(codes)
    tl.store(value_ptr + offsets, value)


@triton.jit
def _master_kernel(
    weight_ptr,
    draw_ptr,
    high_ptr,
    correction_ptr,
    joined_ptr,
    BITS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SIZE: tl.constexpr,
):
    offsets = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    draw = tl.load(draw_ptr + offsets)
    high, correction = codec.split_master(
        tl.load(weight_ptr + offsets), draw, MASTER_BITS=BITS, STOCHASTIC=STOCHASTIC
    )
    tl.store(high_ptr + offsets, high)
    tl.store(correction_ptr + offsets, correction.to(tl.int32))
    tl.store(joined_ptr + offsets, codec.join_master(high, correction, MASTER_BITS=BITS))


@triton.jit
def _random_kernel(
    key_ptr, group_ptr, draw_ptr, scale_draw_ptr, GROUPS: tl.constexpr, GROUP: tl.constexpr
):
    row = tl.arange(0, GROUPS)
    key = tl.load(key_ptr + row).to(tl.uint32, bitcast=True)
    group = tl.load(group_ptr + row).to(tl.uint32, bitcast=True)
    group_key = codec.group_key(key, group)
    offsets = row[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    tl.store(draw_ptr + offsets, codec.element_draws(group_key, GROUP))
    tl.store(scale_draw_ptr + row, codec.scale_draws(group_key))


def _moment_groups() -> torch.Tensor:
    """Groups of one magnitude at each exponent, of mixed magnitudes, and of special values."""
    generator = torch.Generator().manual_seed(0)
    one_magnitude = []
    for exponent in range(-149, 128, 2):
        unit = torch.randn(GROUP, generator=generator).clamp(-3.9, 3.9).double() / 4
        one_magnitude.append((unit * 2.0**exponent).float())
    mixed = finite_samples(8)
    order = torch.randperm(mixed.numel(), generator=generator)[: 80 * GROUP]
    special = torch.ones(12, GROUP)
    poison = [0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC12345, 0x7F7FFFFF, 0xFF7FFFFF]
    special[:6, 5] = fp32(poison)
    special[6:] = fp32([0, 1 << 31, 1, 0x8000, 0x8001, 0x00010000]).unsqueeze(1)
    special[-1, :3] = fp32([0x00017FFF, 0x80014000, 0x00010001])  # above their subnormal scale
    groups = torch.cat([special, torch.stack(one_magnitude), mixed[order].view(-1, GROUP)])
    return groups[: len(groups) // TILE * TILE].contiguous()


def _at_rounding_boundaries(square: bool) -> torch.Tensor:
    """Return groups of values a few ulps around where the code changes, for several scales.

    There one rounding more or less in the arithmetic shows; elsewhere it rarely does.
    """
    position = torch.arange(255 if square else 127, dtype=torch.float64) + 0.5
    scales = torch.tensor([1.0, 1.0078125, 1.359375, 1.5, 1.828125, 1.9921875, 3e-9, 1.7e5])
    scales = scales.to(torch.bfloat16).double().unsqueeze(1)
    boundary = (scales * position / 255) ** 2 if square else scales * position / (254 - position)
    around = patterns(boundary.float()).unsqueeze(2) + torch.arange(-4, 5)
    rows = fp32(around.flatten()).view(len(scales), -1)
    groups = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 31)).view(len(scales), -1, 31)
    top = (scales**2 if square else scales).float().view(-1, 1, 1).expand(-1, groups.shape[1], 1)
    groups = torch.cat([top, groups], dim=2).view(-1, GROUP)
    return torch.nn.functional.pad(groups, (0, 0, 0, -len(groups) % TILE))


def _random(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 1 << 32, (count,), generator=generator)


def _draws(count: int) -> torch.Tensor:
    return _random(count) >> 16


def _as_int32(unsigned: torch.Tensor, device: str) -> torch.Tensor:
    return unsigned.to(torch.int32).to(device)


def _encode_on(
    device: str,
    groups: torch.Tensor,
    draw: torch.Tensor,
    *,
    square: bool,
    stochastic: bool,
    code: str = "sqrt",
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.uint8 if square else torch.int8
    codes = torch.full(groups.shape, 99, dtype=dtype, device=device)
    scale = torch.full((len(groups),), 99.0, dtype=torch.bfloat16, device=device)
    _encode_kernel[(len(groups) // TILE,)](
        groups.to(device),
        _as_int32(draw, device),
        codes,
        scale,
        SQUARE=square,
        FOURTH_ROOT=code == "fourth_root",
        STOCHASTIC=stochastic,
        GROUPS=TILE,
        GROUP=GROUP,
        **LAUNCH,
    )
    return codes.cpu(), scale.cpu()


def _decode_on(
    device: str, codes: torch.Tensor, scale: torch.Tensor, *, square: bool, code: str = "sqrt"
) -> torch.Tensor:
    value = torch.full((codes.numel(),), 99.0, device=device)
    _decode_kernel[(len(scale) // TILE,)](
        codes.to(device),
        scale.to(device),
        value,
        SQUARE=square,
        FOURTH_ROOT=code == "fourth_root",
        GROUPS=TILE,
        GROUP=GROUP,
        **LAUNCH,
    )
    return value.cpu()


def test_first_moment_codes_equal_the_reference(device: str) -> None:
    groups = torch.cat([_moment_groups(), _at_rounding_boundaries(square=False)])
    codes, scale = _encode_on(
        device, groups, torch.zeros(groups.numel()), square=False, stochastic=False
    )
    expected_codes, expected_scale = encode_exp_avg(groups.flatten())
    assert_same_bits(scale, expected_scale, "scales")
    assert_same_bits(codes.flatten(), expected_codes, "codes")


@pytest.mark.parametrize("code", spec.EXP_AVG_SQ_CODES)
@pytest.mark.parametrize("stochastic", [False, True])
def test_second_moment_codes_equal_the_reference(
    device: str, stochastic: bool, code: spec.ExpAvgSqCode
) -> None:
    groups = _moment_groups()
    groups = torch.where(groups.isfinite(), groups.abs(), groups)
    # Roots up to one scale ulp above the scale, where the largest draw would carry to code 256.
    near_top = torch.linspace(1.0, 1.0 + 0.9 * 2.0**-7, GROUP).square().expand(TILE, -1)
    groups = torch.cat([groups, _at_rounding_boundaries(square=True), near_top])
    draw = _draws(groups.numel()).view(groups.shape)
    draw[-TILE:] = 0xFFFF
    draw[-TILE:, 0] = 0  # rounds the scale down
    codes, scale = _encode_on(device, groups, draw, square=True, stochastic=stochastic, code=code)
    expected_codes, expected_scale = moments.encode_exp_avg_sq_groups(
        rounding.sqrt_fp32(groups),
        code=code,
        draw=draw if stochastic else None,
        scale_draw=draw[:, 0] if stochastic else None,
    )
    assert_same_bits(scale, expected_scale, "scales")
    assert_same_bits(codes, expected_codes, "codes")


@pytest.mark.parametrize("kind", ["exp_avg", *spec.EXP_AVG_SQ_CODES])
def test_decoded_moments_equal_the_reference_for_every_code(device: str, kind: str) -> None:
    """All 256 codes (-128 too: memory may hold anything) with scales of every exponent."""
    square = kind != "exp_avg"
    dtype = torch.uint8 if square else torch.int8
    scale = (finite_samples(1).abs()[::37].unique()).to(torch.bfloat16)
    if square:
        scale = scale[scale < 2.0**100]  # no root's scale is above 2^64
    scale = torch.cat([scale, torch.tensor([torch.nan, torch.inf]).to(torch.bfloat16)])
    scale = scale[: len(scale) // 2 * 2].repeat_interleave(8)
    codes = torch.arange(256).to(torch.uint8).view(dtype).repeat(len(scale) // 8)
    decoded = _decode_on(device, codes, scale, square=square, code=kind)
    if square:
        expected = decode_exp_avg_sq(codes, scale, code=kind)
    else:
        expected = decode_exp_avg(codes, scale)
    assert_same_bits(quiet(decoded), quiet(expected))


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("bits", spec.MASTER_BITS)
def test_split_and_join_equal_the_reference(device: str, bits: int, stochastic: bool) -> None:
    special = fp32([0x7FC00000, 0x7F800000, 0xFF800000])
    weight = torch.cat([finite_samples(16), special])
    size = 1 << 12
    weight = torch.nn.functional.pad(weight, (0, -weight.numel() % size))
    draw = _draws(weight.numel())
    high = torch.full(weight.shape, 99.0, dtype=torch.bfloat16, device=device)
    correction = torch.full(weight.shape, 99, dtype=torch.int32, device=device)
    joined = torch.full(weight.shape, 99.0, device=device)
    _master_kernel[(weight.numel() // size,)](
        weight.to(device),
        _as_int32(draw, device),
        high,
        correction,
        joined,
        BITS=bits,
        STOCHASTIC=stochastic,
        SIZE=size,
        **LAUNCH,
    )
    expected_high, expected = split_master_with_draws(
        weight, bits=bits, draw=draw if stochastic else None
    )
    assert_same_bits(high.cpu(), expected_high, "high")
    if expected is None:
        assert not correction.any()
    else:
        assert_same_bits(correction.cpu(), expected.to(torch.int32), "correction")
    assert_same_bits(quiet(joined.cpu()), quiet(join_master(expected_high, expected)), "joined")
    if not stochastic:
        assert_same_bits(expected_high, split_master(weight, bits=bits)[0])


def test_random_draws_equal_the_reference(device: str) -> None:
    key, group = _random(64), _random(128)[64:]
    group[:4] = torch.tensor([0, 1, (1 << 32) - 1, 1 << 31])
    draw = torch.full((64, GROUP), -1, dtype=torch.int32, device=device)
    scale_draw = torch.full((64,), -1, dtype=torch.int32, device=device)
    _random_kernel[(1,)](
        _as_int32(key, device),
        _as_int32(group, device),
        draw,
        scale_draw,
        GROUPS=64,
        GROUP=GROUP,
    )
    group_key = rounding.group_key(key, group)
    assert torch.equal(draw.cpu().long(), rounding.element_draws(group_key))
    assert torch.equal(scale_draw.cpu().long(), rounding.scale_draws(group_key))
