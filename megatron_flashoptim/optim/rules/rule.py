"""Rule: what an optimizer computes on a tile of elements, and what it needs for that.

A rule says nothing about shards, number formats or launches. The frame around it decodes weight and
moments to fp32 before, and encodes them after; once in plain PyTorch (``optim.step``) and once in
Triton (``kernels.step``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Moments a rule may keep; names of the state tensors, too.
EXP_AVG = "exp_avg"
EXP_AVG_SQ = "exp_avg_sq"

# A hyper-parameter: a number, or an fp64 tensor of one element per row where a step is captured.
Scalar = Any


def check_decay_rates(config: Any, *names: str) -> tuple[float, ...]:
    """Return decay rates of moments, by their names in Megatron's ``OptimizerConfig``.

    Raises:
        ValueError: one at which the moment grows, or takes nothing of a gradient.
    """
    rates = tuple(getattr(config, name) for name in names)
    for name, rate in zip(names, rates, strict=True):
        if not 0.0 <= rate < 1.0:
            raise ValueError(
                f"--{name.replace('_', '-')} must be 0 or above, and below 1; got {rate}"
            )
    return rates


@dataclass(frozen=True)
class Rule:
    """An update rule.

    Attributes:
        name: value of ``--optimizer``.
        moments: state it keeps, ``(EXP_AVG,)`` or ``(EXP_AVG, EXP_AVG_SQ)``; the decay rate of the
            second moment must then be ``betas[1]`` of the param groups.
        defaults: entries of a param group beside ``lr`` and ``weight_decay``, numbers or tuples of
            numbers, by name; they go into checkpoints.
        options: from Megatron's ``OptimizerConfig`` and our ``FlashOptimConfig`` to the same
            entries. Raises ValueError for values that the rule does not take.
        columns: from a param group and its step number, from 1 up, to at most 8 numbers of which
            an fp32 table is made. Computed in fp64, of numbers or of tensors: plain arithmetic.
        reference: the update in plain PyTorch, the oracle of the Triton functions. Takes the
            columns and the gradient scale, fp32 ``(groups, 1)``; weight, gradient and first moment
            relative to its scale, fp32 ``(groups, 32)``; that scale; and where there is a second
            moment the level of its code, fp32 ``(groups, 32)``, and the root of v per level.
            Returns the weight, the first moment and where there is one the root of the second, all
            fp32; roots are in units of ``spec.STEP_UNIT`` and at least that of
            ``spec.STEP_EXP_AVG_SQ_ZERO``.
        prepare: Triton function that loads what ``update`` needs before it meets a tile. Takes
            pointers to the columns of a row and to its gradient scale; returns a tuple of scalars.
        update: Triton function of that tuple and a tile: weight and gradient, fp32, and code of the
            first moment ``[GROUPS, 32]``, its scale, fp32 ``[GROUPS]``, and where there is a second
            moment its code ``[GROUPS, 32]``, the root of v per level ``[GROUPS]`` and the constexpr
            FOURTH_ROOT. Returns what ``reference`` returns, with the same bits.
        takes_l2: whether ``OptimizerConfig.decoupled_weight_decay`` may be False.
        scale_free: whether a step stays the same when all gradients are multiplied, as Megatron's
            learning rates for muP assume.
        decoupled_adam: the ``OptimizerConfig.decoupled_weight_decay`` with which Megatron's own
            Adam takes these steps, None if it cannot. Rules that have one keep the same moments and
            take over each other's checkpoints and those of Megatron's Adam.
        own_fields: fields of ``FlashOptimConfig`` that only this rule takes.
        unlike: from Megatron's ``OptimizerConfig`` to a line for the log if Megatron's own
            optimizer of such a name would take other steps, else to an empty string.

    Raises:
        ValueError: other moments.
    """

    name: str
    moments: tuple[str, ...]
    defaults: Mapping[str, Any]
    options: Callable[[Any, Any], dict[str, Any]]
    columns: Callable[[Mapping[str, Any], Scalar], Sequence[Scalar]]
    reference: Callable[..., tuple[torch.Tensor, ...]]
    prepare: Any
    update: Any
    takes_l2: bool = False
    scale_free: bool = True
    decoupled_adam: bool | None = None
    own_fields: tuple[str, ...] = ()
    unlike: Callable[[Any], str] = lambda _: ""

    def __post_init__(self) -> None:
        if self.moments not in ((EXP_AVG,), (EXP_AVG, EXP_AVG_SQ)):
            raise ValueError(
                f"{self.name} keeps {self.moments}; a rule keeps {EXP_AVG}, with or without "
                f"{EXP_AVG_SQ}"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        # By name: Triton's functions cannot be pickled.
        from megatron_flashoptim.optim.rules import rule_of

        return rule_of, (self.name,)

    @property
    def keeps_exp_avg_sq(self) -> bool:
        """Whether there is a second moment."""
        return EXP_AVG_SQ in self.moments
