"""Companded 8-bit codes of the Adam moments with one bf16 scale per group of 32 elements.

First moment (int8): ``scale`` is the group's largest magnitude rounded to bf16,
``x = clamp(m / scale, -1, 1)``, ``code = round(127 * 2x / (1 + |x|))``; decoded with
``z = code / 127`` as ``scale * z / (2 - |z|)``.

Second moment (uint8): ``r = sqrt(v)``, ``scale`` is the group's largest ``r`` rounded to bf16,
``code = round(255 * min(r / scale, 1))``, at least 1 where ``v > 0``; decoded as
``(scale * code / 255)^2``.

Source: companding of FlashOptim (arXiv 2602.23349), with bf16 scales, codes computed against the
stored scale, no zero code for a positive ``v``, and the group's largest element always at the
top code, which makes decode-then-encode the identity on codes and scales while the decoded
value is a normal fp32 number.

A group that holds an Inf or NaN gets a NaN scale and codes 0: it decodes to NaN, so that a
poisoned moment is never mistaken for a number. A group whose scale rounds to zero (all elements
zero, or below half the smallest bf16 subnormal) decodes to zero.

The group functions take ``(groups, 32)`` tensors; the public ones take flat tensors of any
length, whose last group may be partial. Plain PyTorch, every operation in fp32 with one
rounding, so that the Triton twins can agree bit for bit.
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
    return _from_groups(decode_exp_avg_groups(_pad_groups(codes), scale), codes.numel())


def encode_exp_avg_sq(
    v: torch.Tensor, *, rounding: spec.Rounding = "nearest", seed: int = 0, step: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode a second moment.

    Args:
        v: flat fp32 tensor of n elements, none negative.
        rounding: "nearest", or "stochastic" for codes and scales that are right on average:
            a counter-based hash of (seed, step, element offset), the same bits on every rerun.
        seed: seed of stochastic rounding.
        step: step number of stochastic rounding.

    Returns:
        ``(codes, scale)``: uint8 of n elements, bf16 of ceil(n / 32) elements.

    Raises:
        ValueError: ``v`` is not a flat fp32 tensor, or ``rounding`` is neither of the two.
    """
    if rounding not in spec.ROUNDINGS:
        raise ValueError(f"rounding must be one of {spec.ROUNDINGS}, got {rounding!r}")
    groups = _to_groups(v, "v")
    bits = scale_bits = None
    if rounding == "stochastic":
        offsets = torch.arange(groups.numel(), device=v.device).view(groups.shape)
        bits, scale_bits = (
            _rounding.random_bits(
                _rounding.tensor_key(_rounding.launch_key(seed, step, stream), 0), offset
            )
            for stream, offset in (
                (spec.STREAM_EXP_AVG_SQ, offsets),
                (spec.STREAM_EXP_AVG_SQ_SCALE, offsets[:, 0]),
            )
        )
    codes, scale = encode_exp_avg_sq_groups(
        _rounding.sqrt_fp32(groups), random=bits, scale_random=scale_bits
    )
    return _from_groups(codes, v.numel()), scale


def decode_exp_avg_sq(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Decode a second moment: flat uint8 codes (n) and bf16 scales (ceil(n / 32)) to fp32 (n).

    Raises:
        ValueError: dtypes or lengths do not fit each other.
    """
    _check_encoded(codes, torch.uint8, scale)
    return _from_groups(decode_exp_avg_sq_groups(_pad_groups(codes), scale), codes.numel())


def encode_exp_avg_groups(m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode fp32 ``(groups, 32)`` to int8 ``(groups, 32)`` and bf16 ``(groups,)``."""
    magnitude = m.abs()
    absmax_bits = _bits(magnitude).amax(dim=1, keepdim=True)
    scale_bits = _scale_bits(
        absmax_bits, _rounding.bf16_bits_nearest(absmax_bits), spec.BF16_MAX_FINITE
    )
    scale = _bf16_bits_to_fp32(scale_bits)
    factor = torch.where(scale < spec.SMALL_SCALE, spec.SMALL_SCALE_FACTOR, 1.0)
    inverse = torch.ones_like(scale) / (scale * factor)
    x = ((magnitude * factor) * inverse).clamp(max=1.0)
    # 2x / (1 + x) as x times the reciprocal of (1 + x) / 2; halving is exact.
    half_sum = 0.5 * x + 0.5
    companded = x * (torch.ones_like(x) / half_sum)
    level = torch.floor(companded * float(spec.EXP_AVG_MAX_CODE) + 0.5)
    level = torch.where(_bits(magnitude) == absmax_bits, float(spec.EXP_AVG_MAX_CODE), level)
    level = torch.where(_is_usable(scale_bits), level, 0.0)
    code = torch.where(m < 0, -level, level)
    return code.to(torch.int8), _bf16_from_bits(scale_bits).view(-1)


def decode_exp_avg_groups(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Decode int8 ``(groups, 32)`` and bf16 ``(groups,)`` to fp32 ``(groups, 32)``."""
    code = codes.to(torch.float32)
    # z / (2 - |z|) with z = code / 127, in small integers that fp32 holds exactly.
    denominator = 2.0 * spec.EXP_AVG_MAX_CODE - code.abs()
    ratio = code * (torch.ones_like(denominator) / denominator)
    return scale.to(torch.float32).unsqueeze(1) * ratio


def encode_exp_avg_sq_groups(
    root: torch.Tensor,
    *,
    random: torch.Tensor | None = None,
    scale_random: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode a second moment v given its root; stochastic where random bits are given.

    Args:
        root: fp32 ``(groups, 32)``, the correctly rounded square root of v.
        random: int64 ``(groups, 32)`` of 32 random bits, or None to round to nearest.
        scale_random: int64 ``(groups,)`` of 32 random bits, or None to round to nearest.

    Returns:
        uint8 ``(groups, 32)`` codes and bf16 ``(groups,)`` scales.
    """
    max_bits = _bits(root).amax(dim=1, keepdim=True)
    if scale_random is None:
        rounded = _rounding.bf16_bits_nearest(max_bits)
    else:
        rounded = _rounding.bf16_bits_stochastic(max_bits, scale_random.unsqueeze(1))
    scale_bits = _scale_bits(max_bits, rounded, spec.EXP_AVG_SQ_MAX_SCALE)
    scale = _bf16_bits_to_fp32(scale_bits)
    # A tensor over a tensor: PyTorch computes a number over a tensor by way of the reciprocal.
    max_code = torch.full_like(scale, float(spec.EXP_AVG_SQ_MAX_CODE))
    level = torch.minimum(root * (max_code / scale), max_code)
    if random is None:
        level = level + 0.5
    else:
        level = torch.minimum(level + _rounding.uniform_from_bits(random), max_code)
    code = torch.floor(torch.where(_bits(root) == max_bits, max_code, level))
    # A zero v would make the next update explode; see the module docstring.
    code = torch.where(root > 0, code.clamp(min=1.0), code)
    code = torch.where(_is_usable(scale_bits), code, 0.0)
    return code.to(torch.uint8), _bf16_from_bits(scale_bits).view(-1)


def decode_exp_avg_sq_groups(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Decode uint8 ``(groups, 32)`` and bf16 ``(groups,)`` to fp32 ``(groups, 32)``."""
    step = scale.to(torch.float32).unsqueeze(1) * (1.0 / spec.EXP_AVG_SQ_MAX_CODE)
    root = step * codes.to(torch.float32)
    return root * root


def _bits(value: torch.Tensor) -> torch.Tensor:
    """Return fp32 patterns with the sign removed, as int64; they order like the magnitudes."""
    return value.contiguous().view(torch.int32).to(torch.int64) & spec.FP32_ABS_MASK


def _scale_bits(absmax_bits: torch.Tensor, rounded: torch.Tensor, max_scale: int) -> torch.Tensor:
    """Return bf16 scale patterns, ``max_scale`` at most; NaN for a non-finite absmax."""
    finite = absmax_bits < spec.FP32_EXPONENT_MASK
    return torch.where(finite, rounded.clamp(max=max_scale), spec.BF16_QUIET_NAN)


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
