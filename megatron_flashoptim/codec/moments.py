"""Companded 8-bit codes of the Adam moments with one bf16 scale per group of 32 elements.

First moment (int8): ``scale`` is the group's largest magnitude rounded to bf16,
``x = clamp(m / scale, -1, 1)``, ``code = round(127 * 2x / (1 + |x|))``; decoded with
``z = code / 127`` as ``scale * z / (2 - |z|)``.

Second moment (uint8): ``r = sqrt(v)``, ``scale`` is the group's largest ``r`` rounded to bf16,
``code = round(255 * min(r / scale, 1))``, at least 1 where ``v > 0``; decoded as
``(scale * code / 255)^2``. The "fourth_root" code is ``round(255 * sqrt(min(r / scale, 1)))``,
decoded as ``(scale * (code / 255)^2)^2``.

Source: companding of FlashOptim (arXiv 2602.23349), with bf16 scales, codes computed against the
stored scale, no zero code for a positive ``v``, and the group's largest element always at the
top code, which makes decode-then-encode the identity on codes and scales while the decoded
value is a normal fp32 number.

A group that holds an Inf or NaN, or a first moment of 2^100 or more, gets a NaN scale: it decodes
to NaN, so that a poisoned moment is never mistaken for a number. A group whose first moments are
all below 2^-100 gets scale 0 and codes 0, as does one of zeros.

The group functions take ``(groups, 32)`` tensors; the public ones take flat tensors of any
length, whose last group may be partial. Plain PyTorch with the bits of the Triton twins: every
operation is in fp32 and rounded once, but for products that become codes. Those are exact in fp64,
as they are within a fused multiply-add. The first moment's is rounded to the code at once. The
second moment's is rounded twice: to nearest even in steps of 2^-15 of a code, and from there, in
integers, half up or by the draw.
"""

from __future__ import annotations

import torch

from megatron_flashoptim.codec import rounding as _rounding
from megatron_flashoptim.codec import spec


def encode_exp_avg(m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode a first moment.

    Args:
        m: flat fp32 tensor of n elements.

    Returns:
        ``(codes, scale)``: int8 of n elements in [-127, 127], bf16 of ceil(n / 32) elements.

    Raises:
        ValueError: ``m`` is not a flat fp32 tensor.
    """
    codes, scale = encode_exp_avg_groups(_to_groups(m, "m"))
    return _from_groups(codes, m.numel()), scale


def decode_exp_avg(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Decode a first moment: flat int8 codes (n) and bf16 scales (ceil(n / 32)) to fp32 (n).

    Raises:
        ValueError: dtypes or lengths do not fit each other.
    """
    _check_encoded(codes, torch.int8, scale)
    decoded = scale.to(torch.float32).unsqueeze(1) * exp_avg_ratio(_pad_groups(codes))
    return _from_groups(decoded, codes.numel())


def encode_exp_avg_sq(
    v: torch.Tensor,
    *,
    code: spec.ExpAvgSqCode = "sqrt",
    rounding: spec.Rounding = "nearest",
    seed: int = 0,
    step: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode a second moment.

    Args:
        v: flat fp32 tensor of n elements, none negative.
        code: "sqrt" (the paper's) or "fourth_root".
        rounding: "nearest", or "stochastic" for codes and scales that are right on average:
            a counter-based hash of (seed, step, element offset), the same bits on every rerun.
        seed: seed of stochastic rounding.
        step: step number of stochastic rounding.

    Returns:
        ``(codes, scale)``: uint8 of n elements, bf16 of ceil(n / 32) elements.

    Raises:
        ValueError: ``v`` is not a flat fp32 tensor, or ``code`` or ``rounding`` is none of the
            above.
    """
    _check_code(code)
    if rounding not in spec.ROUNDINGS:
        raise ValueError(f"rounding must be one of {spec.ROUNDINGS}, got {rounding!r}")
    groups = _to_groups(v, "v")
    draw = scale_draw = None
    if rounding == "stochastic":
        key = _rounding.tensor_key(_rounding.launch_key(seed, step, spec.STREAM_EXP_AVG_SQ), 0)
        keys = _rounding.group_key(key, torch.arange(len(groups), device=v.device))
        draw, scale_draw = _rounding.element_draws(keys), _rounding.scale_draws(keys)
    codes, scale = encode_exp_avg_sq_groups(
        _rounding.sqrt_fp32(groups), code=code, draw=draw, scale_draw=scale_draw
    )
    return _from_groups(codes, v.numel()), scale


def decode_exp_avg_sq(
    codes: torch.Tensor, scale: torch.Tensor, *, code: spec.ExpAvgSqCode = "sqrt"
) -> torch.Tensor:
    """Decode a second moment: flat uint8 codes (n) and bf16 scales (ceil(n / 32)) to fp32 (n).

    Raises:
        ValueError: dtypes or lengths do not fit each other, or ``code`` is unknown.
    """
    _check_code(code)
    _check_encoded(codes, torch.uint8, scale)
    step = scale.to(torch.float32).unsqueeze(1) * exp_avg_sq_step(code)
    root = step * exp_avg_sq_level(_pad_groups(codes), code=code)
    return _from_groups(root * root, codes.numel())


def encode_exp_avg_groups(m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode fp32 ``(groups, 32)`` to int8 ``(groups, 32)`` and bf16 ``(groups,)``."""
    magnitude = m.abs()
    absmax_bits = _bits(magnitude).amax(dim=1, keepdim=True)
    absmax = absmax_bits.to(torch.int32).view(torch.float32)
    scale_bits = _rounding.bf16_bits_nearest(absmax_bits)
    scale_bits = torch.where(absmax >= spec.EXP_AVG_SMALLEST, scale_bits, 0)
    overflow = ~(absmax < spec.EXP_AVG_LIMIT)
    scale_bits = torch.where(overflow, spec.BF16_QUIET_NAN, scale_bits)
    usable = (scale_bits > 0) & ~overflow
    # An unusable group takes the largest scale, next to which its elements have code 0.
    scale = torch.where(usable, _bf16_bits_to_fp32(scale_bits), spec.EXP_AVG_LIMIT)
    # x = m / scale; 2x / (1 + |x|) as m times the reciprocal of (scale + |m|) / 2.
    companded = m * _rounding.reciprocal_fp32(0.5 * magnitude + 0.5 * scale)
    level = torch.round(companded.to(torch.float64) * float(spec.EXP_AVG_MAX_CODE))
    code = torch.where(level.isnan(), -1.0, level)
    return code.to(torch.int8), _bf16_from_bits(scale_bits).view(-1)


def exp_avg_ratio(codes: torch.Tensor) -> torch.Tensor:
    """Return the first moment over its scale: int8 codes to fp32 of the same shape."""
    code = codes.to(torch.float32)
    # z / (2 - |z|) with z = code / 127, in small integers that fp32 holds exactly.
    return code * _rounding.reciprocal_fp32(2.0 * spec.EXP_AVG_MAX_CODE - code.abs())


def encode_exp_avg_sq_groups(
    root: torch.Tensor,
    *,
    code: spec.ExpAvgSqCode = "sqrt",
    draw: torch.Tensor | None = None,
    scale_draw: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode a second moment v given its root; stochastic where draws are given.

    Args:
        root: fp32 ``(groups, 32)``, the correctly rounded square root of v.
        code: "sqrt" or "fourth_root".
        draw: int64 ``(groups, 32)`` of 16 random bits, or None to round to nearest, half up.
        scale_draw: int64 ``(groups,)`` of 16 random bits, or None to round to nearest even.

    Returns:
        uint8 ``(groups, 32)`` codes and bf16 ``(groups,)`` scales.
    """
    max_bits = _bits(root).amax(dim=1, keepdim=True)
    if scale_draw is None:
        rounded = _rounding.bf16_bits_nearest(max_bits)
    else:
        rounded = _rounding.bf16_bits_stochastic(max_bits, scale_draw.unsqueeze(1))
    scale_bits = _scale_bits(max_bits, rounded, spec.EXP_AVG_SQ_MAX_SCALE)
    scale = _bf16_bits_to_fp32(scale_bits)
    usable = _is_usable(scale_bits)
    inverse = torch.where(usable, torch.ones_like(scale) / scale, 0.0)
    one = 1 << spec.EXP_AVG_SQ_FRACTION_BITS
    top = spec.EXP_AVG_SQ_MAX_CODE * one
    if code == "sqrt":
        level = root.to(torch.float64) * (inverse * float(top))
    else:
        level = _rounding.sqrt_fp32((root * inverse).clamp(max=1.0)).to(torch.float64) * top
    level = torch.where(_bits(root) == max_bits, top, torch.round(level).clamp(max=top))
    # A zero v would make the next update explode; see the module docstring.
    level = torch.where((root > 0) & usable, level.clamp(min=one), 0.0)
    fixed = level.to(torch.int64)
    # In fixed point; the draw has one bit more below the code than the level has.
    codes = (2 * fixed + (spec.DRAW_OF_NEAREST if draw is None else draw)) >> spec.DRAW_BITS
    return codes.to(torch.uint8), _bf16_from_bits(scale_bits).view(-1)


def exp_avg_sq_level(codes: torch.Tensor, *, code: spec.ExpAvgSqCode) -> torch.Tensor:
    """Return the root of v in steps: uint8 codes to fp32 of the same shape (exact)."""
    level = codes.to(torch.float32)
    return level if code == "sqrt" else level * level


def exp_avg_sq_step(code: spec.ExpAvgSqCode) -> float:
    """Return the step of ``exp_avg_sq_level`` relative to the scale."""
    return 1.0 / spec.EXP_AVG_SQ_MAX_CODE ** (1 if code == "sqrt" else 2)


def _bits(value: torch.Tensor) -> torch.Tensor:
    """Return fp32 patterns with the sign removed, as int64; they order like the magnitudes."""
    return value.contiguous().view(torch.int32).to(torch.int64) & spec.FP32_ABS_MASK


def _scale_bits(absmax_bits: torch.Tensor, rounded: torch.Tensor, max_scale: int) -> torch.Tensor:
    """Return bf16 scale patterns, ``max_scale`` at most; NaN for a non-finite absmax."""
    finite = absmax_bits < spec.FP32_EXPONENT_MASK
    return torch.where(finite, rounded.clamp(max=max_scale), spec.BF16_QUIET_NAN)


def _check_code(code: str) -> None:
    if code not in spec.EXP_AVG_SQ_CODES:
        raise ValueError(f"code must be one of {spec.EXP_AVG_SQ_CODES}, got {code!r}")


def _is_usable(scale_bits: torch.Tensor) -> torch.Tensor:
    return (scale_bits > 0) & (scale_bits <= spec.BF16_MAX_FINITE)


def _bf16_bits_to_fp32(bits: torch.Tensor) -> torch.Tensor:
    return (bits << 16).to(torch.int32).view(torch.float32)


def _bf16_from_bits(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int16).view(torch.bfloat16)


def _to_groups(flat: torch.Tensor, name: str) -> torch.Tensor:
    if flat.dim() != 1 or flat.dtype != torch.float32:
        raise ValueError(f"{name} must be a flat fp32 tensor, got {flat.dtype} {flat.shape}")
    return _pad_groups(flat)


def _pad_groups(flat: torch.Tensor) -> torch.Tensor:
    missing = -flat.numel() % spec.GROUP_SIZE
    return torch.nn.functional.pad(flat, (0, missing)).view(-1, spec.GROUP_SIZE)


def _from_groups(groups: torch.Tensor, numel: int) -> torch.Tensor:
    return groups.reshape(-1)[:numel]


def _check_encoded(codes: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> None:
    groups = -(-codes.numel() // spec.GROUP_SIZE)
    if codes.dim() != 1 or codes.dtype != dtype:
        raise ValueError(f"codes must be a flat {dtype} tensor, got {codes.dtype} {codes.shape}")
    if scale.dtype != torch.bfloat16 or scale.shape != (groups,):
        raise ValueError(
            f"{codes.numel()} codes need bf16 scales of shape ({groups},), "
            f"got {scale.dtype} {tuple(scale.shape)}"
        )
