"""Columns of the hyper-parameter table that ``optim.hyper`` fills and the kernels read.

The first are fp32 values, each update rule's own; the last two are int32 random keys. Imports
nothing, Triton included.
"""

VALUES = 8
KEY_EXP_AVG_SQ = 8
KEY_MASTER = 9
COLUMNS = 10
