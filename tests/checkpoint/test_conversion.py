"""Conversions on load: exact where they say so, within their bound where not."""

from __future__ import annotations

import pytest
import torch
from bitwise import assert_same_bits, finite_samples

from megatron_flashoptim.checkpoint.conversion import (
    SCALE_OF,
    can_convert_correction,
    convert_correction,
    decode_moment,
    encode_moment,
    regroup,
    split_beside,
)
from megatron_flashoptim.codec import join_master, split_master

# What re-encoding may add, in units of the group's new scale.
BOUND = {"exp_avg": 1 / 127, "exp_avg_sq": 1 / 255}


def test_24_to_32_bit_masters_are_exact_and_back() -> None:
    high, correction = split_master(finite_samples(), bits=24)
    assert correction is not None
    wide = convert_correction(correction, torch.int16)
    assert_same_bits(join_master(high, wide), join_master(high, correction))
    assert_same_bits(convert_correction(wide, torch.int8), correction)


def test_32_to_24_bit_masters_keep_the_weight_and_move_within_a_quantum() -> None:
    wide = torch.arange(-(2**15), 2**15).to(torch.int16)
    narrow = convert_correction(wide, torch.int8)
    error = (narrow.to(torch.int32) * 256 - wide.to(torch.int32)).abs()
    carries = wide > 127 * 256 + 127
    assert error[~carries].max() == 128, "half a quantum of 256 fp32 ulps"
    assert carries.sum() == 128 and error[carries].max() < 256
    assert (narrow[carries] == 127).all()


def test_which_masters_convert() -> None:
    convertible = {(16, 24), (16, 32), (24, 32), (32, 24), (16, 16), (24, 24), (32, 32)}
    for saved in (16, 24, 32):
        for bits in (16, 24, 32):
            assert can_convert_correction(saved, bits) is ((saved, bits) in convertible)
    with pytest.raises(ValueError, match="cannot convert"):
        convert_correction(torch.zeros(1, dtype=torch.int8), torch.int8)


def _encoded(moment: str, numel: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(numel)
    magnitude = 10.0 ** torch.randint(-12, 0, (numel,), generator=generator)
    values = torch.randn(numel, generator=generator) * magnitude
    return encode_moment(moment, values if moment == "exp_avg" else values.square())


@pytest.mark.parametrize("moment", SCALE_OF)
@pytest.mark.parametrize("numel", [32, 320, 70, 5])
def test_groups_of_one_scale_keep_their_bits(moment: str, numel: int) -> None:
    codes, scale = _encoded(moment, numel)
    scale[0] = float("nan")  # a poisoned group stays poisoned
    element_scales = scale.repeat_interleave(32)[:numel]
    new_codes, new_scale, encoded = regroup(moment, codes, element_scales)
    assert encoded == 0
    assert_same_bits(new_codes, codes)
    assert_same_bits(new_scale, scale)


@pytest.mark.parametrize("moment", SCALE_OF)
@pytest.mark.parametrize("width", [8, 20, 24, 48])
def test_groups_of_several_scales_are_encoded_again_within_the_bound(
    moment: str, width: int
) -> None:
    """Columns of 96 split over ranks: groups of the checkpoint meet in a group of the run."""
    codes, scale = _encoded(moment, 96 * 40)
    values = decode_moment(moment, codes, scale).view(40, 96)[:, :width]
    codes = codes.view(40, 96)[:, :width].reshape(-1)
    element_scales = scale.repeat_interleave(32).view(40, 96)[:, :width].reshape(-1)
    new_codes, new_scale, encoded = regroup(moment, codes, element_scales)
    assert 0 < encoded <= new_scale.numel()
    got = decode_moment(moment, new_codes, new_scale)
    want = values.reshape(-1)
    if moment == "exp_avg_sq":
        got, want = got.sqrt(), want.sqrt()
    per_element = new_scale.float().repeat_interleave(32)[: got.numel()]
    assert ((got - want).abs() <= per_element * BOUND[moment] * (1 + 2**-20)).all()
    same = (element_scales.view(torch.int16).view(-1, 8) == 0).all()
    assert not same


@pytest.mark.parametrize("bits", [24, 32])
def test_masters_split_beside_their_weights_leave_these_alone(bits: int) -> None:
    """Also where rounding would carry, one value in 512; weights of other values are replaced."""
    generator = torch.Generator().manual_seed(0)
    master = torch.randn(1 << 16, generator=generator)
    weight, _ = split_master(master, bits=32)
    high, correction = split_beside(master, weight, bits=bits)
    assert torch.equal(high, weight)
    joined = join_master(high, correction)
    quantum = torch.where(joined == 0, 1.0, joined.abs()) * (2.0**-15 if bits == 24 else 0.0)
    assert ((joined - master).abs() <= quantum).all()
    carried = split_master(master, bits=bits)[0] != weight
    assert carried.any() == (bits == 24)
    strange, correction = split_beside(master, torch.zeros_like(weight), bits=bits)
    expected, expected_correction = split_master(master, bits=bits)
    assert torch.equal(strange, expected) and torch.equal(correction, expected_correction)
