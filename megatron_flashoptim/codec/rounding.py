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


def launch_key(seed: int, step: int, stream: int) -> int:
    """Return the 32-bit key of one random stream of one step.

    Args:
        seed: any integer; 64 bits are used.
        step: number of the optimizer step.
        stream: one of the ``STREAM_*`` constants of ``codec.spec``.
    """
    folded = mix32(seed) ^ mix32((seed >> 32) + 1)
    return mix32(mix32(folded + step * spec.COUNTER_MULTIPLIER) + stream * spec.STREAM_MULTIPLIER)


def tensor_key(key: int, tensor_id: int) -> int:
    """Return the key of one tensor within a stream (``tensor_id`` 0 for a lone tensor)."""
    return mix32(key ^ tensor_id)


def random_bits(key: int | torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return 32 random bits per element, a pure function of key and element offset.

    Args:
        key: key of the tensor (``tensor_key``), or an int64 tensor broadcastable to ``offsets``.
        offsets: int64 tensor, element offsets counted from the tensor's first element.

    Returns:
        int64 tensor like ``offsets`` with values in [0, 2^32).
    """
    value = (offsets * spec.COUNTER_MULTIPLIER + key) & _MASK32
    value = value ^ (value >> 16)
    value = (value * spec.MIX_MULTIPLIER_1) & _MASK32
    value = value ^ (value >> 15)
    # The product of two 32-bit values can wrap int64; its low 32 bits are right all the same.
    value = (value * spec.MIX_MULTIPLIER_2) & _MASK32
    return value ^ (value >> 16)


def uniform_from_bits(bits: torch.Tensor) -> torch.Tensor:
    """Return fp32 values in [0, 1) made of the top 24 of 32 random bits (int64 tensor)."""
    return (bits >> 8).to(torch.float32) * spec.UNIFORM_STEP


def bf16_bits_nearest(bits: torch.Tensor) -> torch.Tensor:
    """Round non-negative finite fp32 bit patterns to bf16 patterns, ties to even.

    Args:
        bits: int64 tensor of fp32 patterns in [0, 0x7F800000).

    Returns:
        int64 tensor of bf16 patterns; a value beyond the largest bf16 becomes 0x7F80 (inf).
    """
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


def bf16_bits_stochastic(bits: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """Round non-negative finite fp32 patterns to bf16 patterns, up with probability = remainder.

    Args:
        bits: int64 tensor of fp32 patterns in [0, 0x7F800000).
        random: int64 tensor of 32 random bits per element; the top 16 are used.
    """
    return (bits + (random >> 16)) >> 16


def sqrt_fp32(value: torch.Tensor) -> torch.Tensor:
    """Return the correctly rounded fp32 square root.

    PyTorch's own fp32 ``sqrt`` is not correctly rounded on every CPU; rounding the fp64 root to
    fp32 is (Figueroa, "When is double rounding innocuous?", 1995).
    """
    return value.to(torch.float64).sqrt().to(torch.float32)
