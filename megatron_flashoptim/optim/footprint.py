"""Bytes of optimizer state per element, from the number formats."""

from __future__ import annotations

from megatron_flashoptim.codec.spec import GROUP_SIZE
from megatron_flashoptim.optim.rules import RULES, Rule
from megatron_flashoptim.optim.segments import GROUPS_PER_ENTRY

# Whose bytes are known, by their names as Megatron's --optimizer.
OPTIMIZERS = ("adam", *RULES)
# The table of segments: one int32 per tile of groups.
TABLE_BYTES = 4 / (GROUPS_PER_ENTRY * GROUP_SIZE)


def flash_state_bytes(rule: Rule, master_bits: int) -> float:
    """Return bytes of state per element: correction, a code and a share of a scale per moment.

    Args:
        rule: the update rule.
        master_bits: 16, 24 or 32; 16 for fp32 weights, which have no correction.
    """
    return (master_bits - 16) / 8 + len(rule.moments) * (1 + 2 / GROUP_SIZE)
