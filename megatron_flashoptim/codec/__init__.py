"""Number formats of FlashOptim: constants and the plain PyTorch reference (the oracle).

Imports torch only. See ``docs/formats.md`` for the formats and their error bounds.
"""

from megatron_flashoptim.codec.master import correction_dtype, join_master, split_master
from megatron_flashoptim.codec.moments import (
    decode_exp_avg,
    decode_exp_avg_sq,
    encode_exp_avg,
    encode_exp_avg_sq,
)
from megatron_flashoptim.codec.spec import FORMAT_VERSION, GROUP_SIZE

__all__ = [
    "FORMAT_VERSION",
    "GROUP_SIZE",
    "correction_dtype",
    "decode_exp_avg",
    "decode_exp_avg_sq",
    "encode_exp_avg",
    "encode_exp_avg_sq",
    "join_master",
    "split_master",
]
