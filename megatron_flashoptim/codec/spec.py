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

# A group's first moments are stored as zeros if the largest is below 2^-100, as NaN if it is 2^100
# or more: between them neither a scale nor its reciprocal nor a quotient is subnormal.
EXP_AVG_SMALLEST: Final = 2.0**-100
EXP_AVG_LIMIT: Final = 2.0**100

# A step computes second moments in units of (2^-24)^2: gradients are multiplied by 2^24 on the way
# in, so that neither the square of a small gradient nor its root's remainder is subnormal.
STEP_UNIT: Final = 2.0**-24
# Added to every second moment, in those units: its root is exact without a branch for zero, and
# is the root of this number, 2^-74 in plain units, where the moment is zero or next to it.
STEP_EXP_AVG_SQ_ZERO: Final = 2.0**-100

# Code of the root r of the second moment relative to the group's largest: in proportion to r (the
# paper's), or to the square root of r, which spends more codes on small elements.
EXP_AVG_SQ_CODES: Final = ("sqrt", "fourth_root")
ExpAvgSqCode = Literal["sqrt", "fourth_root"]

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
STREAM_MASTER: Final = 1

# Bijective 32-bit mixer (two multiply-xorshift rounds; constants of Wellons' "lowbias32") and
# two odd constants that spread counters before mixing (2^32 / golden ratio, 2^32 * (sqrt(2)-1)).
MIX_MULTIPLIER_1: Final = 0x7FEB352D
MIX_MULTIPLIER_2: Final = 0x846CA68B
COUNTER_MULTIPLIER: Final = 0x9E3779B1
STREAM_MULTIPLIER: Final = 0x6A09E667
# Multiplier of the single round that follows for each pair of elements (the second one of a later
# "lowbias32"). With MIX_MULTIPLIER_1 there, draws of one group correlated by 0.009; with this one
# by less than 0.001.
PAIR_MULTIPLIER: Final = 0xD35A2D97
# Elements draw 16 bits each, two from one hash: 2^-16 of a code step is finer than what a small
# second moment loses in a step, and half the hashes make rounding nearly free.
DRAW_BITS: Final = 16
# The draw that rounds to nearest, half up.
DRAW_OF_NEAREST: Final = 1 << (DRAW_BITS - 1)
# Number of the draw of a group's scale, after the pairs 0 to 15 of its elements.
SCALE_PAIR: Final = GROUP_SIZE // 2
# Codes of the second moment are rounded in fixed point, with this many bits below the code: with
# the 8 of the code they fill an fp32 mantissa.
EXP_AVG_SQ_FRACTION_BITS: Final = 15
