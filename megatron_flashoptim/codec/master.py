"""Master weight: a bf16 high part (the model weight itself) and an integer correction.

With ``b`` the fp32 bit pattern read as a 32-bit integer:

- 24 bits: ``b24 = (b + 0x80) >> 8``, ``high = (b24 + 0x80) >> 8``,
  ``correction = b24 - (high << 8)`` in [-128, 127] (int8);
- 32 bits: ``high = (b + 0x8000) >> 16``, ``correction = b - (high << 16)`` (int16);
- 16 bits: ``high`` alone, rounded stochastically.

Integer arithmetic on the pattern is monotone, carries across binades, and makes join-then-split
the identity, so that an update of zero changes no bit. Inf and NaN stay in ``high`` with
correction 0 (a NaN quiet, with its sign). A finite weight whose bf16 rounding overflows has
``high`` = inf, as bf16 rounding gives, and is still reconstructed exactly through its correction.
"""

from __future__ import annotations

import torch

from megatron_flashoptim.codec import rounding as _rounding
from megatron_flashoptim.codec import spec

CORRECTION_DTYPE: dict[int, torch.dtype | None] = {16: None, 24: torch.int8, 32: torch.int16}


def correction_dtype(bits: int) -> torch.dtype | None:
    """Return the dtype of the correction tensor (None for 16-bit masters).

    Raises:
        ValueError: ``bits`` is none of 16, 24, 32.
    """
    if bits not in CORRECTION_DTYPE:
        raise ValueError(f"master bits must be one of {spec.MASTER_BITS}, got {bits!r}")
    return CORRECTION_DTYPE[bits]


def split_master(
    weight: torch.Tensor,
    *,
    bits: int = 24,
    rounding: spec.Rounding = "nearest",
    seed: int = 0,
    step: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Split an fp32 master weight into its bf16 high part and its correction.

    Args:
        weight: fp32 tensor of any shape.
        bits: 16, 24 or 32.
        rounding: "nearest" (half up in magnitude), or "stochastic": the bits below the kept ones
            round up with a probability equal to their value. Has no effect at 32 bits.
        seed: seed of stochastic rounding.
        step: step number of stochastic rounding.

    Returns:
        ``(high, correction)``: bf16 and int8 (24 bits) or int16 (32 bits) tensors of the shape
        of ``weight``; ``correction`` is None for 16 bits.

    Raises:
        ValueError: ``weight`` is not fp32, or ``bits`` or ``rounding`` is none of the above.
    """
    if weight.dtype != torch.float32:
        raise ValueError(f"split_master takes an fp32 weight, got {weight.dtype}")
    if rounding not in spec.ROUNDINGS:
        raise ValueError(f"rounding must be one of {spec.ROUNDINGS}, got {rounding!r}")
    draw = None
    if rounding == "stochastic":
        key = _rounding.tensor_key(_rounding.launch_key(seed, step, spec.STREAM_MASTER), 0)
        groups = torch.arange(-(-weight.numel() // spec.GROUP_SIZE), device=weight.device)
        draws = _rounding.element_draws(_rounding.group_key(key, groups))
        draw = draws.flatten()[: weight.numel()].view(weight.shape)
    return split_master_with_draws(weight, bits=bits, draw=draw)


def split_master_with_draws(
    weight: torch.Tensor, *, bits: int, draw: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Split an fp32 master weight given the 16-bit draw (int64) of each element, or None."""
    dtype = correction_dtype(bits)
    # Signed arithmetic: the sign bit is the top bit, so magnitudes carry exactly as unsigned.
    pattern = weight.contiguous().view(torch.int32).to(torch.int64)
    quiet = (pattern | spec.NAN_QUIET_BIT) & spec.NAN_HIGH_MASK
    pattern = torch.where(weight.isnan(), quiet, pattern)
    if bits == 32:
        high = (pattern + 0x8000) >> 16
        correction = pattern - (high << 16)
    elif bits == 24:
        pattern24 = (pattern + (0x80 if draw is None else draw >> 8)) >> 8
        high = (pattern24 + 0x80) >> 8
        correction = pattern24 - (high << 8)
    else:
        high = (pattern + (0x8000 if draw is None else draw)) >> 16
        correction = torch.zeros_like(high)
    high_bf16 = high.to(torch.int16).view(torch.bfloat16)
    return high_bf16, None if dtype is None else correction.to(dtype)


def join_master(high: torch.Tensor, correction: torch.Tensor | None) -> torch.Tensor:
    """Join the bf16 high part and its correction to the fp32 master weight.

    Args:
        high: bf16 tensor of any shape.
        correction: int8 (24-bit master) or int16 (32-bit) tensor of the same shape, or None
            (16-bit master: the high part is the master).

    Returns:
        fp32 tensor of the shape of ``high``.

    Raises:
        ValueError: ``high`` is not bf16, or ``correction`` has another dtype or shape.
    """
    if high.dtype != torch.bfloat16:
        raise ValueError(f"the high part must be bf16, got {high.dtype}")
    if correction is None:
        return high.to(torch.float32)
    if correction.shape != high.shape:
        raise ValueError(f"shapes differ: high {high.shape}, correction {correction.shape}")
    shift = {torch.int8: 8, torch.int16: 0}.get(correction.dtype)
    if shift is None:
        raise ValueError(f"the correction must be int8 or int16, got {correction.dtype}")
    pattern = high.contiguous().view(torch.int16).to(torch.int64) << 16
    pattern = pattern + (correction.to(torch.int64) << shift)
    return pattern.to(torch.int32).view(torch.float32)
