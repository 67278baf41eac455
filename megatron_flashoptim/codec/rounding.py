"""Deterministic rounding: integer bf16 rounding and counter-based random bits.

All functions give the same bits on every device. They are plain PyTorch and favour clarity;
the compiled twins live in ``megatron_flashoptim.kernels.codec``.
"""

from __future__ import annotations

import torch

from megatron_flashoptim.codec import spec

_MASK32 = 0xFFFFFFFF


def mix32(value: int) -> int:
    """Return a bijective, well mixed 32-bit hash of a 32-bit integer."""
    value &= _MASK32
    value ^= value >> 16
    value = (value * spec.MIX_MULTIPLIER_1) & _MASK32
    value ^= value >> 15
    value = (value * spec.MIX_MULTIPLIER_2) & _MASK32
    return value ^ (value >> 16)


def mix32_tensor(value: torch.Tensor) -> torch.Tensor:
    """Return ``mix32`` of each element of an int64 tensor with values in [0, 2^32)."""
    value = value ^ (value >> 16)
    value = (value * spec.MIX_MULTIPLIER_1) & _MASK32
    value = value ^ (value >> 15)
    # The product of two 32-bit values can wrap int64; its low 32 bits are right all the same.
    value = (value * spec.MIX_MULTIPLIER_2) & _MASK32
    return value ^ (value >> 16)


def launch_key(seed: int, step: int, stream: int) -> int:
    """Return the 32-bit key of one random stream of one step.

    Args:
        seed: any integer; 64 bits are used.
        step: number of the optimizer step.
        stream: one of the ``STREAM_*`` constants of ``codec.spec``.
    """
    folded = mix32(seed) ^ mix32((seed >> 32) + 1)
    return mix32(mix32(folded + step * spec.COUNTER_MULTIPLIER) + stream * spec.STREAM_MULTIPLIER)


def launch_keys(seed: int, step: torch.Tensor, stream: int) -> torch.Tensor:
    """Return ``launch_key`` for an int64 tensor of steps, computed where that lives."""
    folded = mix32(seed) ^ mix32((seed >> 32) + 1)
    mixed = mix32_tensor((step * spec.COUNTER_MULTIPLIER + folded) & _MASK32)
    return mix32_tensor((mixed + stream * spec.STREAM_MULTIPLIER) & _MASK32)


def tensor_key(key: int, tensor_id: int) -> int:
    """Return the key of one tensor within a stream (``tensor_id`` 0 for a lone tensor)."""
    return key ^ tensor_id


def group_key(key: int | torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Return the key of each quantization group of a tensor.

    Args:
        key: key of the tensor (``tensor_key``), or an int64 tensor broadcastable to ``group``.
        group: int64 tensor, group numbers counted from the tensor's first group.

    Returns:
        int64 tensor like ``group`` with values in [0, 2^32).
    """
    return mix32_tensor((group * spec.COUNTER_MULTIPLIER + key) & _MASK32)


def pair_bits(group_key: torch.Tensor, pair: torch.Tensor) -> torch.Tensor:
    """Return 32 random bits for each pair of elements of a group.

    One round of the mixer suffices on top of the two that made the group's key.

    Args:
        group_key: int64, broadcastable to ``pair``.
        pair: int64, number of the pair in its group.
    """
    value = (group_key + (pair + 1) * spec.COUNTER_MULTIPLIER) & _MASK32
    value = value ^ (value >> 16)
    value = (value * spec.PAIR_MULTIPLIER) & _MASK32
    return value ^ (value >> 15)


def element_draws(group_key: torch.Tensor) -> torch.Tensor:
    """Return the 16-bit draws of the elements of each group.

    Args:
        group_key: int64 ``(groups,)``.

    Returns:
        int64 ``(groups, 32)`` in [0, 2^16): an even element has the low half of its pair's bits,
        an odd one the high half.
    """
    lane = torch.arange(spec.GROUP_SIZE, device=group_key.device)
    bits = pair_bits(group_key.unsqueeze(1), lane // 2)
    return (bits >> (spec.DRAW_BITS * (lane % 2))) & 0xFFFF


def scale_draws(group_key: torch.Tensor) -> torch.Tensor:
    """Return the 16-bit draw of each group's scale: int64 ``(groups,)`` to ``(groups,)``."""
    pair = torch.full_like(group_key, spec.SCALE_PAIR)
    return pair_bits(group_key, pair) >> spec.DRAW_BITS


def bf16_bits_nearest(bits: torch.Tensor) -> torch.Tensor:
    """Round non-negative finite fp32 bit patterns to bf16 patterns, ties to even.

    Args:
        bits: int64 tensor of fp32 patterns in [0, 0x7F800000).

    Returns:
        int64 tensor of bf16 patterns; a value beyond the largest bf16 becomes 0x7F80 (inf).
    """
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


def bf16_bits_stochastic(bits: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
    """Round non-negative finite fp32 patterns to bf16 patterns, up with probability = remainder.

    Args:
        bits: int64 tensor of fp32 patterns in [0, 0x7F800000).
        draw: int64 tensor of 16 random bits per element.
    """
    return (bits + draw) >> 16


def _rounded_to_odd(
    product: torch.Tensor, addend: torch.Tensor, total: torch.Tensor
) -> torch.Tensor:
    """Return fp64 sums rounded to odd, which rounded to fp32 are right (Boldo, Melquiond, 2008).

    Args:
        product: one summand.
        addend: the other.
        total: their sum, rounded to nearest; where it is inexact and even, its odd neighbour on
            the side of the exact sum is returned.
    """
    rest = total - product
    error = (product - (total - rest)) + (addend - rest)
    pattern = total.view(torch.int64)
    away = torch.where((error > 0) == (total > 0), 1, -1)
    odd = torch.where((error != 0) & (pattern % 2 == 0), pattern + away, pattern)
    return torch.where(total.isfinite(), odd.view(torch.float64), total)


def fma_fp32(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Return ``x * y + z`` of fp32 tensors, rounded once, as a GPU's fused multiply-add."""
    product = x.to(torch.float64) * y.to(torch.float64)  # exact
    addend = z.to(torch.float64)
    total = product + addend
    # fp64 rounded once already. Rounding again to fp32 can differ only where that lands half way
    # between two fp32 numbers, which is rare, or on a subnormal.
    doubtful = (total.view(torch.int64) & 0x1FFFFFFF) == 0x10000000
    doubtful |= total.abs() < 2.0**-126
    if doubtful.any():
        parts = (part.expand_as(total)[doubtful] for part in (product, addend, total))
        total[doubtful] = _rounded_to_odd(*parts)
    return total.to(torch.float32)


def reciprocal_fp32(value: torch.Tensor) -> torch.Tensor:
    """Return the correctly rounded reciprocal of positive fp32 values; 0 where it is subnormal."""
    inverse = torch.ones_like(value) / value
    return torch.where(inverse < 2.0**-126, 0.0, inverse)


def sqrt_fp32(value: torch.Tensor) -> torch.Tensor:
    """Return the correctly rounded fp32 square root.

    PyTorch's own fp32 ``sqrt`` is not correctly rounded on every CPU; rounding the fp64 root to
    fp32 is (Figueroa, "When is double rounding innocuous?", 1995).
    """
    return value.to(torch.float64).sqrt().to(torch.float32)
