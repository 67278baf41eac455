"""Rows of the hyper-parameter table, as param groups make them, and options for such groups."""

from __future__ import annotations

import math
from typing import Any

from megatron_flashoptim.optim.hyper import HyperRow
from megatron_flashoptim.optim.rules import rule_of

LION_OPTIONS: list[dict[str, Any]] = [
    {"betas": betas} for betas in ((0.95, 0.98), (0.9, 0.99), (0.0, 0.5))
]
SGD_OPTIONS: list[dict[str, Any]] = [
    {"momentum": 0.9, "nesterov": False, "decoupled_weight_decay": True},
    {"momentum": 0.5, "nesterov": True, "decoupled_weight_decay": True},
    {"momentum": 0.99, "nesterov": True, "decoupled_weight_decay": False},
]
# Every rule beside the two of Adam, by name: three param groups of options, as far apart as one
# would set them.
RULE_OPTIONS = {"flash_lion": LION_OPTIONS, "flash_sgd": SGD_OPTIONS}


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
