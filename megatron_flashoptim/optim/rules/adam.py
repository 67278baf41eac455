"""Adam with L2 regularization (arXiv 1412.6980), as ``torch.optim.Adam`` and TE's FusedAdam without
``adam_w_mode``: weight decay is a part of the gradient, and so of both moments.

``g += wd w``; ``m = b1 m + (1 - b1) g``; ``v = b2 v + (1 - b2) g^2``;
``w -= lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)``.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from megatron_flashoptim.codec import rounding, spec
from megatron_flashoptim.codec.rounding import fma_fp32
from megatron_flashoptim.kernels import codec
from megatron_flashoptim.kernels.arithmetic import fma, reciprocal, square_root
from megatron_flashoptim.optim.rules import adamw
from megatron_flashoptim.optim.rules.adamw import (
    BETA1,
    DECAY,
    EPS,
    INVERSE_UNIT,
    PER_ROOT,
    REST1,
    ROOT_BETA2,
    ROOT_REST2,
    STEP_SIZE,
    UNIT,
    ZERO,
)
from megatron_flashoptim.optim.rules.rule import EXP_AVG, EXP_AVG_SQ, Rule, Scalar

# Where AdamW's ``columns`` have the decay of the weight.
WEIGHT_DECAY = DECAY


def unlike(config: Any) -> str:
    """Return what Megatron's ``--optimizer adam`` does instead, where weights decay."""
    if not (config.decoupled_weight_decay and config.weight_decay):
        return ""
    return (
        "flash_adam decays weights within the gradient (L2); Megatron's --optimizer adam does "
        "apart from it, as flash_adamw"
    )


def columns(group: Mapping[str, Any], step: Scalar) -> Sequence[Scalar]:
    """Return AdamW's, with the weight decay as it is: the learning rate comes after the moments."""
    step_size, _, *rest = adamw.columns(group, step)
    return (step_size, group["weight_decay"], *rest)


def reference(
    hyper: Sequence[torch.Tensor],
    grad_scale: torch.Tensor,
    weight: torch.Tensor,
    grad: torch.Tensor,
    ratio: torch.Tensor,
    scale: torch.Tensor,
    level: torch.Tensor,
    root_of_level: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Return weight, first moment and root of the second, see ``Rule.reference``."""
    step_size, weight_decay, beta1, rest1, root_beta2, root_rest2, eps, per_root = hyper
    grad = fma_fp32(weight_decay, weight, grad * grad_scale)
    m = fma_fp32(beta1 * scale, ratio, grad * rest1)
    root = adamw.next_root(
        (root_of_level * root_beta2) * level, grad * (root_rest2 / spec.STEP_UNIT)
    )
    inverse = rounding.reciprocal_fp32(fma_fp32(root, per_root * spec.STEP_UNIT, eps))
    return weight - (m * step_size) * inverse, m, root


@triton.jit
def prepare(hyper, grad_scale_ptr):
    """Load the scalars."""
    return (
        tl.load(grad_scale_ptr),
        tl.load(hyper + WEIGHT_DECAY),
        tl.load(hyper + BETA1),
        tl.load(hyper + REST1),
        tl.load(hyper + ROOT_BETA2),
        tl.load(hyper + ROOT_REST2) * INVERSE_UNIT,
        tl.load(hyper + PER_ROOT) * UNIT,
        tl.load(hyper + EPS),
        tl.load(hyper + STEP_SIZE),
    )


@triton.jit
def update(
    scalars, weight, g, exp_avg, scale, exp_avg_sq, root_of_level, FOURTH_ROOT: tl.constexpr
):
    """Twin of ``reference`` on a tile."""
    grad_scale, weight_decay, beta1, rest1, root_beta2, root_rest2, per_root, eps, step_size = (
        scalars
    )
    g = fma(weight, weight_decay, g * grad_scale)
    root = codec.decode_root(exp_avg_sq, root_of_level * root_beta2, FOURTH_ROOT=FOURTH_ROOT)
    m = fma((scale * beta1)[:, None], codec.decode_exp_avg(exp_avg), g * rest1)
    g = g * root_rest2
    root = square_root(fma(root, root, fma(g, g, ZERO)))
    inverse = reciprocal(fma(root, per_root, eps))
    return weight - (m * step_size) * inverse, m, root


RULE = Rule(
    name="flash_adam",
    moments=(EXP_AVG, EXP_AVG_SQ),
    defaults=adamw.RULE.defaults,
    options=adamw.options,
    columns=columns,
    reference=reference,
    prepare=prepare,
    update=update,
    takes_l2=True,
    decoupled_adam=False,
    unlike=unlike,
)
