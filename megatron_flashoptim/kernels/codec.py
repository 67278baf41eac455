"""Triton device functions of the codec, the twins of ``megatron_flashoptim.codec``.

Bit for bit the same as the plain PyTorch reference: integer rounding of bf16, correctly rounded
division and square root, and no fused multiply-add but where it changes no bit (kernels that use
these functions are launched with ``enable_fp_fusion=False``).

Tiles are ``[GROUPS, 32]``; per-group values are ``[GROUPS, 1]``.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from megatron_flashoptim.codec import spec

EXP_AVG_MAX_CODE = tl.constexpr(float(spec.EXP_AVG_MAX_CODE))
EXP_AVG_SQ_MAX_CODE = tl.constexpr(float(spec.EXP_AVG_SQ_MAX_CODE))
INVERSE_EXP_AVG_SQ_MAX_CODE = tl.constexpr(1.0 / spec.EXP_AVG_SQ_MAX_CODE)
FP32_EXPONENT_MASK = tl.constexpr(spec.FP32_EXPONENT_MASK)
FP32_ABS_MASK = tl.constexpr(spec.FP32_ABS_MASK)
EXP_AVG_SQ_MAX_SCALE = tl.constexpr(spec.EXP_AVG_SQ_MAX_SCALE)
BF16_MAX_FINITE = tl.constexpr(spec.BF16_MAX_FINITE)
NAN_QUIET_BIT = tl.constexpr(spec.NAN_QUIET_BIT)
NAN_HIGH_MASK = tl.constexpr(spec.NAN_HIGH_MASK)
BF16_QUIET_NAN = tl.constexpr(spec.BF16_QUIET_NAN)
MIX_MULTIPLIER_1 = tl.constexpr(spec.MIX_MULTIPLIER_1)
MIX_MULTIPLIER_2 = tl.constexpr(spec.MIX_MULTIPLIER_2)
COUNTER_MULTIPLIER = tl.constexpr(spec.COUNTER_MULTIPLIER)
UNIFORM_STEP = tl.constexpr(spec.UNIFORM_STEP)
SMALL_SCALE = tl.constexpr(spec.SMALL_SCALE)
SMALL_SCALE_FACTOR = tl.constexpr(spec.SMALL_SCALE_FACTOR)
# Triton's interpreter runs no inline assembly and does not fuse ``tl.fma``.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def mix32(value):
    """Twin of ``codec.rounding.mix32`` on uint32 tensors."""
    value = value ^ (value >> 16)
    value = value * tl.full([], MIX_MULTIPLIER_1, tl.uint32)
    value = value ^ (value >> 15)
    value = value * tl.full([], MIX_MULTIPLIER_2, tl.uint32)
    return value ^ (value >> 16)


@triton.jit
def random_bits(key, offsets):
    """Twin of ``codec.rounding.random_bits``: 32 bits from a uint32 key and uint32 offsets."""
    return mix32(offsets * tl.full([], COUNTER_MULTIPLIER, tl.uint32) + key)


@triton.jit
def uniform_from_bits(bits):
    """Twin of ``codec.rounding.uniform_from_bits``."""
    return (bits >> 8).to(tl.int32).to(tl.float32) * UNIFORM_STEP


@triton.jit
def bf16_to_fp32(bf16):
    """Widen bf16 by moving its pattern (exact, NaN payload kept)."""
    bits = bf16.to(tl.int16, bitcast=True).to(tl.int32) << 16
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def bf16_from_bits(bits):
    """Return bf16 from its pattern in an int32."""
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def join_master(high, correction, MASTER_BITS: tl.constexpr):
    """Twin of ``codec.join_master``: bf16 and int8 or int16 to fp32."""
    bits = high.to(tl.int16, bitcast=True).to(tl.int32) << 16
    if MASTER_BITS == 24:
        bits += correction.to(tl.int32) << 8
    elif MASTER_BITS == 32:
        bits += correction.to(tl.int32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def split_master(weight, random, MASTER_BITS: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Twin of ``codec.split_master``: fp32 to a bf16 high part and an int32 correction."""
    bits = weight.to(tl.int32, bitcast=True)
    bits = tl.where(weight == weight, bits, (bits | NAN_QUIET_BIT) & NAN_HIGH_MASK)
    if MASTER_BITS == 32:
        high = (bits + 0x8000) >> 16
        correction = bits - (high << 16)
    elif MASTER_BITS == 24:
        if STOCHASTIC:
            bits24 = (bits + (random >> 24).to(tl.int32)) >> 8
        else:
            bits24 = (bits + 0x80) >> 8
        high = (bits24 + 0x80) >> 8
        correction = bits24 - (high << 8)
    else:
        if STOCHASTIC:
            high = (bits + (random >> 16).to(tl.int32)) >> 16
        else:
            high = (bits + 0x8000) >> 16
        correction = high * 0
    return bf16_from_bits(high), correction


@triton.jit
def reciprocal(value):
    """Return the correctly rounded reciprocal of values in [1/2, 1] or of integers up to 254.

    One Newton step on the hardware's estimate, without the branch for extreme operands that a
    division has. ``tests/kernels`` compare it with division for every such value on a GPU.
    """
    if INTERPRETED:
        return tl.div_rn(tl.full(value.shape, 1.0, tl.float32), value)
    else:
        estimate = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [value], tl.float32, is_pure=True, pack=1
        )
        return tl.fma(estimate, tl.fma(-value, estimate, 1.0), estimate)


@triton.jit
def abs_bits(value):
    """Return fp32 patterns with the sign removed; they order like the magnitudes."""
    return value.to(tl.int32, bitcast=True) & FP32_ABS_MASK


@triton.jit
def group_scale(max_bits, random, MAX_SCALE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Round a group's largest pattern to a bf16 scale pattern; NaN where it is not finite."""
    if STOCHASTIC:
        rounded = (max_bits + (random >> 16).to(tl.int32)) >> 16
    else:
        rounded = (max_bits + 0x7FFF + ((max_bits >> 16) & 1)) >> 16
    rounded = tl.minimum(rounded, MAX_SCALE)
    return tl.where(max_bits < FP32_EXPONENT_MASK, rounded, BF16_QUIET_NAN)


@triton.jit
def decode_exp_avg(code, scale):
    """Twin of ``codec.moments.decode_exp_avg_groups``; ``scale`` fp32 ``[GROUPS, 1]``."""
    value = code.to(tl.float32)
    ratio = value * reciprocal(-tl.abs(value) + 2.0 * EXP_AVG_MAX_CODE)
    return scale * ratio


@triton.jit
def encode_exp_avg(m):
    """Twin of ``codec.moments.encode_exp_avg_groups``: int8 codes, int32 scale patterns."""
    magnitude = tl.abs(m)
    bits = abs_bits(m)
    max_bits = tl.max(bits, axis=1, keep_dims=True)
    scale_bits = group_scale(max_bits, max_bits, MAX_SCALE=BF16_MAX_FINITE, STOCHASTIC=False)
    scale = (scale_bits << 16).to(tl.float32, bitcast=True)
    factor = tl.where(scale < SMALL_SCALE, SMALL_SCALE_FACTOR, 1.0)
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale * factor)
    x = tl.minimum((magnitude * factor) * inverse, 1.0)
    # Halving is exact, so that the fused operation differs in no bit.
    companded = x * reciprocal(tl.fma(x, 0.5, 0.5))
    level = companded * EXP_AVG_MAX_CODE + 0.5
    level = tl.where(bits == max_bits, EXP_AVG_MAX_CODE, level)
    level = tl.where((scale_bits > 0) & (scale_bits <= BF16_MAX_FINITE), level, 0.0)
    # Conversion truncates: floor of the magnitude.
    level = tl.where(m < 0, -level, level)
    return level.to(tl.int32).to(tl.int8), scale_bits


@triton.jit
def decode_exp_avg_sq(code, scale):
    """Twin of ``codec.moments.decode_exp_avg_sq_groups``; ``scale`` fp32 ``[GROUPS, 1]``."""
    root = (scale * INVERSE_EXP_AVG_SQ_MAX_CODE) * code.to(tl.float32)
    return root * root


@triton.jit
def encode_exp_avg_sq(root, random, scale_random, STOCHASTIC: tl.constexpr):
    """Twin of ``codec.moments.encode_exp_avg_sq_groups``: uint8 codes, int32 scale patterns."""
    bits = abs_bits(root)
    max_bits = tl.max(bits, axis=1, keep_dims=True)
    scale_bits = group_scale(
        max_bits, scale_random, MAX_SCALE=EXP_AVG_SQ_MAX_SCALE, STOCHASTIC=STOCHASTIC
    )
    scale = (scale_bits << 16).to(tl.float32, bitcast=True)
    per_scale = tl.div_rn(tl.full(scale.shape, EXP_AVG_SQ_MAX_CODE, tl.float32), scale)
    level = tl.minimum(root * per_scale, EXP_AVG_SQ_MAX_CODE)
    if STOCHASTIC:
        level = tl.minimum(level + uniform_from_bits(random), EXP_AVG_SQ_MAX_CODE)
    else:
        level = level + 0.5
    level = tl.where(bits == max_bits, EXP_AVG_SQ_MAX_CODE, level)
    # Conversion truncates, which is floor here; a positive root takes code 1 at least.
    code = tl.maximum(level.to(tl.int32), tl.minimum(bits, 1))
    code = tl.where((scale_bits > 0) & (scale_bits <= BF16_MAX_FINITE), code, 0)
    return code.to(tl.uint8), scale_bits
