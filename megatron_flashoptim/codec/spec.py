"""Constants of the number formats, and the reason for each.

Everything that is stored by an optimizer, in memory or in a checkpoint, follows from these
values; changing one is a new ``FORMAT_VERSION``.
"""

from __future__ import annotations

from typing import Final, Literal

FORMAT_VERSION: Final = 1

# Elements that share one scale. 32 int8 codes and a bf16 scale cost 1.0625 bytes per element;
# a group is one warp wide, so its maximum is a single warp reduction.
GROUP_SIZE: Final = 32

# Largest code of the first moment (symmetric int8: -128 is never written).
EXP_AVG_MAX_CODE: Final = 127
# Largest code of the second moment (uint8).
EXP_AVG_SQ_MAX_CODE: Final = 255

# Scales of the first moment below 2^-64 are multiplied by 2^64, with their elements, before the
# codes are computed: the inverse of a subnormal scale would overflow.
SMALL_SCALE: Final = 2.0**-64
SMALL_SCALE_FACTOR: Final = 2.0**64

# Bits of the master weight: bf16 (16), bf16 + int8 correction (24), bf16 + int16 correction (32).
MASTER_BITS: Final = (16, 24, 32)
MasterBits = Literal[16, 24, 32]

Rounding = Literal["nearest", "stochastic"]
ROUNDINGS: Final = ("nearest", "stochastic")

# IEEE-754 bit patterns used by the integer arithmetic on fp32 and bf16 values.
FP32_EXPONENT_MASK: Final = 0x7F800000
FP32_ABS_MASK: Final = 0x7FFFFFFF
# A NaN made quiet and cut to what bf16 holds of it: rounding could carry the rest into the sign.
NAN_QUIET_BIT: Final = 0x00400000
NAN_HIGH_MASK: Final = -0x10000
BF16_MAX_FINITE: Final = 0x7F7F
BF16_QUIET_NAN: Final = 0x7FC0
# Largest scale of the second moment, the bf16 below 2^64: its square is finite.
EXP_AVG_SQ_MAX_SCALE: Final = 0x5F7F

# Counter-based random bits: stream numbers keep the draws of one element independent.
STREAM_EXP_AVG_SQ: Final = 0
STREAM_EXP_AVG_SQ_SCALE: Final = 1
STREAM_MASTER: Final = 2

# Bijective 32-bit mixer (two multiply-xorshift rounds; constants of Wellons' "lowbias32") and
# two odd constants that spread counters before mixing (2^32 / golden ratio, 2^32 * (sqrt(2)-1)).
MIX_MULTIPLIER_1: Final = 0x7FEB352D
MIX_MULTIPLIER_2: Final = 0x846CA68B
# One step of a uniform fp32 number in [0, 1) made of 24 random bits.
UNIFORM_STEP: Final = 2.0**-24
COUNTER_MULTIPLIER: Final = 0x9E3779B1
STREAM_MULTIPLIER: Final = 0x6A09E667
