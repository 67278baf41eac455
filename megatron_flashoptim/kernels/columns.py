"""Columns of the hyper-parameter table that ``optim.hyper`` fills and the kernels read.

The first are fp32 values, the last two int32 random keys. Imports nothing, Triton included.
"""

# Factor on m / denominator: the learning rate over the bias correction of the first moment.
STEP_SIZE = 0
# Factor on the weight: the learning rate times the weight decay.
DECAY = 1
BETA1 = 2
ONE_MINUS_BETA1 = 3
SQRT_BETA2 = 4
SQRT_ONE_MINUS_BETA2 = 5
EPS = 6
INVERSE_SQRT_BIAS_CORRECTION2 = 7
KEY_EXP_AVG_SQ = 8
KEY_MASTER = 9
COLUMNS = 10
