"""Bytes of weight, gradient and optimizer state per element, from the number formats."""

from __future__ import annotations

from megatron_flashoptim.codec.spec import GROUP_SIZE
from megatron_flashoptim.optim.rules import RULES, Rule
from megatron_flashoptim.optim.segments import GROUPS_PER_ENTRY

# Whose bytes are known, by their names as Megatron's --optimizer.
OPTIMIZERS = ("adam", *RULES)
# The table of segments: one int32 per tile of groups.
TABLE_BYTES = 4 / (GROUPS_PER_ENTRY * GROUP_SIZE)


def buffer_bytes(bf16: bool, fp32_gradients: bool) -> tuple[int, int]:
    """Return bytes per element of Megatron's param and grad buffers.

    Args:
        bf16: the model is; otherwise fp32, whose gradients are fp32 whatever is asked for.
        fp32_gradients: Megatron's default, without ``--grad-reduce-in-bf16``.
    """
    return (2, 4 if fp32_gradients else 2) if bf16 else (4, 4)


def flash_state_bytes(rule: Rule, master_bits: int, weight_bytes: int = 2) -> float:
    """Return bytes of state per element: correction, a code and a share of a scale per moment.

    Args:
        rule: the update rule.
        master_bits: 16, 24 or 32.
        weight_bytes: 2 (bf16), or 4: fp32 weights are their own masters, without correction.
    """
    correction = (master_bits - 16) / 8 if weight_bytes == 2 else 0.0
    return correction + len(rule.moments) * (1 + 2 / GROUP_SIZE)
