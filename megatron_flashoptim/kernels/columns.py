"""Columns of the hyper-parameter table that ``optim.hyper`` fills and the kernels read.

The first are fp32 values, the last three int32 random keys. Imports nothing, Triton included.
"""

LR = 0
WEIGHT_DECAY = 1
BETA1 = 2
ONE_MINUS_BETA1 = 3
BETA2 = 4
ONE_MINUS_BETA2 = 5
EPS = 6
INVERSE_BIAS_CORRECTION1 = 7
INVERSE_SQRT_BIAS_CORRECTION2 = 8
KEY_EXP_AVG_SQ = 9
KEY_EXP_AVG_SQ_SCALE = 10
KEY_MASTER = 11
COLUMNS = 12
