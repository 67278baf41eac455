"""Bytes of optimizer state per element, from the number formats."""

from __future__ import annotations

from megatron_flashoptim.codec.spec import GROUP_SIZE
from megatron_flashoptim.optim.segments import GROUPS_PER_ENTRY

# The table of segments: one int32 per tile of groups.
TABLE_BYTES = 4 / (GROUPS_PER_ENTRY * GROUP_SIZE)


def flash_state_bytes(master_bits: int) -> float:
    """Return bytes of state per element: correction, two codes, two bf16 scales per group."""
    return (master_bits - 16) / 8 + 2 + 2 * 2 / GROUP_SIZE
