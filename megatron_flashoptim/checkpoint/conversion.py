"""Conversion of state between formats: correction widths, and groups cut another way.

Corrections: 24 to 32 bits is exact, 16 to 24 or 32 bits too (the weight alone is the master). From
32 to 24 bits a correction is rounded to nearest; one that would carry into the bf16 weight
(above 127.5 quanta) stays at 127, so that the weights of the checkpoint stay as they are. The
master moves by at most half a 24-bit quantum, or by less than one where it would have carried.

Groups: the 32 elements of a group may come from groups of the checkpoint with other scales. Where
all carry one scale, codes and scale are kept bit for bit. Otherwise the group is decoded, exactly,
and encoded again to nearest: the first moment moves by at most ``scale / 127``, the root of the
second by at most ``scale / 255`` (twice that with the "fourth_root" code), with ``scale`` the
group's new one.
"""

from __future__ import annotations

import torch

from megatron_flashoptim.codec import (
    decode_exp_avg,
    decode_exp_avg_sq,
    encode_exp_avg,
    encode_exp_avg_sq,
    split_master,
)
from megatron_flashoptim.codec.spec import GROUP_SIZE, ExpAvgSqCode
from megatron_flashoptim.optim.shard import EXP_AVG, MOMENTS

# Moment and its scale, by name of the state.
SCALE_OF = {moment: scale for moment, (_, scale) in MOMENTS.items()}


def can_convert_correction(saved_bits: int, bits: int) -> bool:
    """Return whether masters of ``saved_bits`` load into a run with ``bits``."""
    return saved_bits == bits or bits > 16


def convert_correction(saved: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return corrections of one width (int8 or int16) in the other.

    Raises:
        ValueError: the dtypes are not int8 and int16, in either order.
    """
    if (saved.dtype, dtype) == (torch.int8, torch.int16):
        return saved.to(torch.int16) << 8
    if (saved.dtype, dtype) == (torch.int16, torch.int8):
        rounded = (saved.to(torch.int32) + 0x80) >> 8
        return rounded.clamp(max=127).to(torch.int8)
    raise ValueError(f"cannot convert a correction from {saved.dtype} to {dtype}")


def split_beside(
    master: torch.Tensor, high: torch.Tensor, *, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split masters, keeping bf16 weights that hold them already.

    Rounding a master of more bits could carry into the weight, which other ranks hold too. So a
    weight within half its ulp of the master stays, and the correction stops short of the carry.

    Args:
        master: fp32 masters.
        high: bf16 weights of the same shape.
        bits: 24 or 32.

    Returns:
        ``(high, correction)``: bf16, and int8 or int16, of the shape of ``master``.
    """
    split_high, split_correction = split_master(master, bits=bits)
    assert split_correction is not None
    shift, half, most = (8, 0x80, 127) if bits == 24 else (0, 0, 0x7FFF)
    pattern = high.contiguous().view(torch.int16).to(torch.int64) << 16
    rest = master.contiguous().view(torch.int32).to(torch.int64) - pattern
    keeps = (rest >= -0x8000) & (rest <= 0x7FFF + half) & master.isfinite()
    correction = torch.where(keeps, ((rest + half) >> shift).clamp(max=most), split_correction)
    return torch.where(keeps, high, split_high), correction.to(split_correction.dtype)


def regroup(
    moment: str,
    codes: torch.Tensor,
    element_scales: torch.Tensor,
    *,
    code: ExpAvgSqCode = "sqrt",
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return codes and scales of whole groups, given one scale for each element.

    Args:
        moment: name of the moment.
        codes: flat int8 or uint8 codes, n elements, the first at the start of a group.
        element_scales: flat bf16, n elements: the scale each code was encoded with.
        code: of the second moment.

    Returns:
        ``(codes, scale, encoded)``: codes (n), bf16 scales (ceil(n / 32)) and the number of
        groups that had several scales and were encoded again.
    """
    numel = codes.numel()
    missing = -numel % GROUP_SIZE
    if missing:
        codes = torch.cat([codes, codes.new_zeros(missing)])
        element_scales = torch.cat([element_scales, element_scales[-1:].expand(missing)])
    grouped = codes.view(-1, GROUP_SIZE).clone()
    scales = element_scales.view(-1, GROUP_SIZE)
    # Patterns, not values: a NaN scale is the same as itself here.
    patterns = scales.contiguous().view(torch.int16)
    mixed = (patterns != patterns[:, :1]).any(dim=1).nonzero().flatten()
    scale = scales[:, 0].clone()
    if mixed.numel():
        values = _decode_elements(moment, grouped[mixed], scales[mixed], code)
        new_codes, new_scale = encode_moment(moment, values.view(-1), code=code)
        grouped[mixed] = new_codes.view(-1, GROUP_SIZE)
        scale[mixed] = new_scale
    return grouped.view(-1)[:numel], scale, mixed.numel()


def decode_elements(
    moment: str,
    codes: torch.Tensor,
    element_scales: torch.Tensor,
    *,
    code: ExpAvgSqCode = "sqrt",
) -> torch.Tensor:
    """Decode flat codes (n) with a scale for each element (n) to fp32, exactly."""
    missing = -codes.numel() % GROUP_SIZE
    padded = torch.nn.functional.pad(codes, (0, missing)).view(-1, GROUP_SIZE)
    scales = torch.cat([element_scales, element_scales[-1:].expand(missing)])
    values = _decode_elements(moment, padded, scales.view(-1, GROUP_SIZE), code)
    return values.view(-1)[: codes.numel()]


def _decode_elements(
    moment: str, codes: torch.Tensor, scales: torch.Tensor, code: ExpAvgSqCode
) -> torch.Tensor:
    """Decode ``(groups, 32)`` codes with a scale for each, one distinct scale after another."""
    patterns = scales.contiguous().view(torch.int16)
    values = torch.zeros(codes.shape, dtype=torch.float32, device=codes.device)
    left = torch.ones_like(codes, dtype=torch.bool)
    while left.any():
        first = left.to(torch.uint8).argmax(dim=1, keepdim=True)
        same = left & (patterns == patterns.gather(1, first))
        chosen = scales.gather(1, first).flatten()
        decoded = decode_moment(moment, codes.reshape(-1), chosen, code=code).view(codes.shape)
        values = torch.where(same, decoded, values)
        left &= ~same
    return values


def decode_moment(
    moment: str, codes: torch.Tensor, scale: torch.Tensor, *, code: ExpAvgSqCode = "sqrt"
) -> torch.Tensor:
    """Decode flat codes (n) and scales (ceil(n / 32)) of a moment by its name to fp32."""
    if moment == EXP_AVG:
        return decode_exp_avg(codes, scale)
    return decode_exp_avg_sq(codes, scale, code=code)


def encode_moment(
    moment: str, values: torch.Tensor, *, code: ExpAvgSqCode = "sqrt"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode a flat fp32 moment by its name, to nearest."""
    return encode_exp_avg(values) if moment == EXP_AVG else encode_exp_avg_sq(values, code=code)
