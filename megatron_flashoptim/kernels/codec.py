"""Triton device functions of the codec, the twins of ``megatron_flashoptim.codec``.

Bit for bit the same as the plain PyTorch reference: integer rounding of bf16, correctly rounded
reciprocals and square roots, and fused multiply-adds only where they are written, which the
reference computes alike (kernels that use these functions are launched with
``enable_fp_fusion=False``).

Tiles are ``[GROUPS, 32]``, per-group values ``[GROUPS]``. Nothing here branches, and what
is per element is kept off the slow pipes; ``docs/kernel.md`` tells why that matters.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from megatron_flashoptim.codec import spec
from megatron_flashoptim.kernels.arithmetic import (
    INTERPRETED,
    fma,
    group_maximum,
    multiply_saturated,
    reciprocal,
    square_root,
)
from megatron_flashoptim.kernels.bytes import (
    add_signed_byte,
    low_byte,
    multiply_unsigned_byte,
    second_byte,
    signed_byte_to_fp32,
    third_byte,
    unsigned_byte_to_fp32,
    upper_half,
)

EXP_AVG_MAX_CODE = tl.constexpr(float(spec.EXP_AVG_MAX_CODE))
EXP_AVG_SQ_MAX_CODE = tl.constexpr(float(spec.EXP_AVG_SQ_MAX_CODE))
LEVEL_ONE = tl.constexpr(float(1 << spec.EXP_AVG_SQ_FRACTION_BITS))
LEVEL_TOP = tl.constexpr(float(spec.EXP_AVG_SQ_MAX_CODE << spec.EXP_AVG_SQ_FRACTION_BITS))
EXP_AVG_SQ_MAX_SCALE = tl.constexpr(spec.EXP_AVG_SQ_MAX_SCALE)
BF16_MAX_FINITE = tl.constexpr(spec.BF16_MAX_FINITE)
BF16_QUIET_NAN = tl.constexpr(spec.BF16_QUIET_NAN)
MIX_MULTIPLIER_1 = tl.constexpr(spec.MIX_MULTIPLIER_1)
MIX_MULTIPLIER_2 = tl.constexpr(spec.MIX_MULTIPLIER_2)
COUNTER_MULTIPLIER = tl.constexpr(spec.COUNTER_MULTIPLIER)
PAIR_MULTIPLIER = tl.constexpr(spec.PAIR_MULTIPLIER)
DRAW_BITS = tl.constexpr(spec.DRAW_BITS)
DRAW_OF_NEAREST = tl.constexpr(spec.DRAW_OF_NEAREST)
SCALE_PAIR = tl.constexpr(spec.SCALE_PAIR)
EXP_AVG_SMALLEST = tl.constexpr(spec.EXP_AVG_SMALLEST)
EXP_AVG_LIMIT = tl.constexpr(spec.EXP_AVG_LIMIT)
# Adding it to an fp32 number in [0, 2^23) leaves the number, rounded to nearest even, in the low
# mantissa bits; with half as much again, for both signs.
TO_INTEGER = tl.constexpr(2.0**23)
TO_SIGNED_INTEGER = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def mix32(value):
    """Twin of ``codec.rounding.mix32`` on uint32 tensors."""
    value = value ^ (value >> 16)
    value = value * tl.full([], MIX_MULTIPLIER_1, tl.uint32)
    value = value ^ (value >> 15)
    value = value * tl.full([], MIX_MULTIPLIER_2, tl.uint32)
    return value ^ (value >> 16)


@triton.jit
def group_key(key, group):
    """Twin of ``codec.rounding.group_key``: uint32 key of a tensor, uint32 group numbers."""
    return mix32(group * tl.full([], COUNTER_MULTIPLIER, tl.uint32) + key)


@triton.jit
def pair_bits(group_key, pair):
    """Twin of ``codec.rounding.pair_bits``."""
    value = group_key + (pair + 1) * tl.full([], COUNTER_MULTIPLIER, tl.uint32)
    value = value ^ (value >> 16)
    value = value * tl.full([], PAIR_MULTIPLIER, tl.uint32)
    return value ^ (value >> 15)


@triton.jit
def element_draws(group_key, GROUP: tl.constexpr):
    """Twin of ``codec.rounding.element_draws``: uint32 keys [GROUPS] to int32 [GROUPS, GROUP]."""
    pair = tl.arange(0, GROUP // 2).to(tl.uint32)
    bits = pair_bits(group_key[:, None], pair[None, :])
    return tl.interleave(bits & 0xFFFF, bits >> DRAW_BITS).to(tl.int32, bitcast=True)


@triton.jit
def scale_draws(group_key):
    """Twin of ``codec.rounding.scale_draws``: uint32 keys [GROUPS] to int32 [GROUPS]."""
    pair = tl.full([], SCALE_PAIR, tl.uint32)
    return (pair_bits(group_key, pair) >> DRAW_BITS).to(tl.int32, bitcast=True)


@triton.jit
def bf16_to_fp32(bf16):
    """Widen bf16 by moving its pattern (exact, NaN payload kept)."""
    bits = bf16.to(tl.int16, bitcast=True).to(tl.int32) << 16
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def join_master(high, correction, MASTER_BITS: tl.constexpr):
    """Twin of ``codec.join_master``: bf16 and int8 or int16 to fp32."""
    bits = high.to(tl.int16, bitcast=True).to(tl.int32) << 16
    if MASTER_BITS == 24:
        bits = add_signed_byte(bits, correction.to(tl.int8))
    elif MASTER_BITS == 32:
        bits += correction.to(tl.int32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def split_master(weight, draw, MASTER_BITS: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Twin of ``codec.split_master_with_draws``: fp32 weights and int32 draws to bf16 and the
    correction (int8 or int16; int8 zeros where there is none).

    A NaN must be positive, as arithmetic on a GPU makes them.
    """
    bits = tl.minimum(weight.to(tl.int32, bitcast=True), BF16_QUIET_NAN << 16)
    if MASTER_BITS == 32:
        return upper_half(bits + 0x8000), bits.to(tl.int16)
    elif MASTER_BITS == 24:
        rounded = bits + ((draw >> 8) if STOCHASTIC else 0x80)
        # What lies below the high part, modulo 256, whichever way that is rounded.
        return upper_half(rounded + 0x8000), second_byte(rounded)
    else:
        return upper_half(bits + (draw if STOCHASTIC else 0x8000)), (bits * 0).to(tl.int8)


@triton.jit
def decode_exp_avg(code):
    """Twin of ``codec.moments.exp_avg_ratio``: int8 codes to fp32, relative to the scale."""
    value = signed_byte_to_fp32(code)
    top = tl.full([], 2.0 * EXP_AVG_MAX_CODE, tl.float32)
    return value * reciprocal(top - tl.abs(value))


@triton.jit
def encode_exp_avg(m):
    """Twin of ``codec.moments.encode_exp_avg_groups``: int8 codes, int32 scale patterns."""
    magnitude = tl.abs(m)
    largest = group_maximum(magnitude)
    bits = largest.to(tl.int32, bitcast=True)
    scale_bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    scale_bits = tl.where(largest >= EXP_AVG_SMALLEST, scale_bits, 0)
    scale_bits = tl.where(largest < EXP_AVG_LIMIT, scale_bits, BF16_QUIET_NAN)
    usable = (largest >= EXP_AVG_SMALLEST) & (largest < EXP_AVG_LIMIT)
    scale = (scale_bits << 16).to(tl.float32, bitcast=True)
    half_scale = tl.where(usable, scale * 0.5, EXP_AVG_LIMIT * 0.5)
    # Halving is exact, so that the fused operation differs in no bit.
    companded = m * reciprocal(tl.fma(magnitude, 0.5, half_scale[:, None]))
    return round_to_signed_byte(companded, EXP_AVG_MAX_CODE), scale_bits


@triton.jit
def round_to_signed_byte(x, factor: tl.constexpr):
    """Return ``x * factor``, at most 127 in magnitude, rounded to nearest even; -1 for NaN."""
    if INTERPRETED:
        level = (x.to(tl.float64) * factor + 1.5 * 2.0**52) - 1.5 * 2.0**52
        return tl.where(level == level, level, -1.0).to(tl.int8)
    else:
        level = tl.fma(x, factor, TO_SIGNED_INTEGER)
        return low_byte(level.to(tl.int32, bitcast=True))


@triton.jit
def decode_root(code, step, FOURTH_ROOT: tl.constexpr):
    """Return the root of v: uint8 codes to fp32; ``step`` fp32 ``[GROUPS]``."""
    if FOURTH_ROOT:
        level = unsigned_byte_to_fp32(code)
        return step[:, None] * (level * level)
    else:
        return multiply_unsigned_byte(step[:, None], code)


@triton.jit
def encode_exp_avg_sq(
    root,
    zero,
    unit,
    draw,
    scale_draw,
    FOURTH_ROOT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Twin of ``codec.moments.encode_exp_avg_sq_groups``: uint8 codes, int32 scale patterns.

    Args:
        root: square roots of v in units of ``unit``, a power of two; ``zero`` at least.
        zero: the root that stands for v = 0.
        unit: of ``root``.
        draw: int32 draws of the elements.
        scale_draw: int32 draws of the scales.
        FOURTH_ROOT: code the fourth root of v instead of the root.
        STOCHASTIC: use the draws.
    """
    largest = group_maximum(root)
    bits = (largest * unit).to(tl.int32, bitcast=True)
    if STOCHASTIC:
        scale_bits = (bits + scale_draw) >> 16
    else:
        scale_bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    scale_bits = tl.minimum(scale_bits, EXP_AVG_SQ_MAX_SCALE)
    scale_bits = tl.where(largest < float("inf"), scale_bits, BF16_QUIET_NAN)
    usable = (largest > zero) & (largest < float("inf"))
    scale_bits = tl.where(largest == zero, 0, scale_bits)
    inverse = reciprocal((scale_bits << 16).to(tl.float32, bitcast=True))
    top = LEVEL_TOP + TO_INTEGER
    if FOURTH_ROOT:
        x = multiply_saturated(root, tl.where(usable, inverse * unit, 0.0)[:, None])
        all_of_it = tl.full([], LEVEL_TOP, tl.float32)
        level = fma(square_root(tl.maximum(x, 2.0**-100)), all_of_it, TO_INTEGER)
    else:
        inverse = tl.where(usable, (inverse * LEVEL_TOP) * unit, 0.0)
        level = fma(root, inverse[:, None], TO_INTEGER)
    level = tl.where(root == largest[:, None], top, tl.minimum(level, top))
    # A positive root takes code 1 at least.
    level = tl.maximum(level, LEVEL_ONE + TO_INTEGER)
    positive = root > tl.where(usable, zero, float("inf"))[:, None]
    level = tl.where(positive, level, TO_INTEGER)
    fixed = level.to(tl.int32, bitcast=True) * 2
    return third_byte(fixed + (draw if STOCHASTIC else DRAW_OF_NEAREST)), scale_bits
