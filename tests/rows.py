"""Rows of the hyper-parameter table, as param groups make them."""

from __future__ import annotations

import math

from megatron_flashoptim.optim.hyper import HyperRow
from megatron_flashoptim.optim.rules import rule_of


def adam_row(
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    *,
    bias_correction: bool = True,
    optimizer: str = "flash_adamw",
) -> HyperRow:
    """Return a row of AdamW, or of another rule with its options."""
    group = {"lr": lr, "weight_decay": weight_decay, "betas": (beta1, beta2), "eps": eps}
    # Bias corrections are 1 after infinitely many steps.
    corrected = step if bias_correction else math.inf
    return HyperRow(rule_of(optimizer).columns(group, corrected), step)
