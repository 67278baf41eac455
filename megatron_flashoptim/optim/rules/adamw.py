"""AdamW (arXiv 1711.05101), as Transformer Engine's FusedAdam with ``adam_w_mode``.

``m = b1 m + (1 - b1) g``; ``v = b2 v + (1 - b2) g^2``;
``w -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + wd w)``.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from megatron_flashoptim.codec import rounding, spec
from megatron_flashoptim.codec.rounding import fma_fp32
from megatron_flashoptim.kernels import codec
from megatron_flashoptim.kernels.arithmetic import fma, reciprocal, square_root
from megatron_flashoptim.optim.rules.rule import (
    EXP_AVG,
    EXP_AVG_SQ,
    Rule,
    Scalar,
    check_decay_rates,
)

# In the order in which ``columns`` returns them.
STEP_SIZE = tl.constexpr(0)
DECAY = tl.constexpr(1)
BETA1 = tl.constexpr(2)
REST1 = tl.constexpr(3)
ROOT_BETA2 = tl.constexpr(4)
ROOT_REST2 = tl.constexpr(5)
EPS = tl.constexpr(6)
PER_ROOT = tl.constexpr(7)

UNIT = tl.constexpr(spec.STEP_UNIT)
INVERSE_UNIT = tl.constexpr(1 / spec.STEP_UNIT)
ZERO = tl.constexpr(spec.STEP_EXP_AVG_SQ_ZERO)


def options(config: Any, flash: Any) -> dict[str, Any]:
    """Return ``betas`` and ``eps`` by Megatron's ``--adam-*``.

    Raises:
        ValueError: a decay rate of 1 or above, or a negative value.
    """
    if not 0.0 <= config.adam_eps < math.inf:
        raise ValueError(f"--adam-eps must be 0 or above; got {config.adam_eps}")
    return {
        "betas": check_decay_rates(config, "adam_beta1", "adam_beta2"),
        "eps": config.adam_eps,
    }


def columns(group: Mapping[str, Any], step: Scalar) -> Sequence[Scalar]:
    """Return step size, decay of the weight, and what the moments are multiplied by."""
    beta1, beta2 = group["betas"]
    return (
        group["lr"] / (1.0 - beta1**step),
        group["lr"] * group["weight_decay"],
        beta1,
        1.0 - beta1,
        beta2**0.5,
        (1.0 - beta2) ** 0.5,
        group["eps"],
        (1.0 - beta2**step) ** -0.5,
    )


def next_root(root: torch.Tensor, weighted: torch.Tensor) -> torch.Tensor:
    """Return the root of the sum of squares of a decayed root and a weighted gradient."""
    zero = torch.full_like(weighted, spec.STEP_EXP_AVG_SQ_ZERO)
    v = fma_fp32(root, root, fma_fp32(weighted, weighted, zero))
    return torch.where(v.isinf(), torch.nan, rounding.sqrt_fp32(v))


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
    step_size, decay, beta1, rest1, root_beta2, root_rest2, eps, per_root = hyper
    m = fma_fp32(beta1 * scale, ratio, grad * (grad_scale * rest1))
    root = (root_of_level * root_beta2) * level
    root = next_root(root, grad * (grad_scale * (root_rest2 / spec.STEP_UNIT)))
    inverse = rounding.reciprocal_fp32(fma_fp32(root, per_root * spec.STEP_UNIT, eps))
    weight = weight - fma_fp32(m * step_size, inverse, decay * weight)
    return weight, m, root


@triton.jit
def prepare(hyper, grad_scale_ptr):
    """Load the scalars; those that meet for every element meet here."""
    grad_scale = tl.load(grad_scale_ptr)
    beta1 = tl.load(hyper + BETA1)
    m_grad_scale = grad_scale * tl.load(hyper + REST1)
    root_beta2 = tl.load(hyper + ROOT_BETA2)
    root_grad_scale = grad_scale * (tl.load(hyper + ROOT_REST2) * INVERSE_UNIT)
    per_root = tl.load(hyper + PER_ROOT) * UNIT
    eps = tl.load(hyper + EPS)
    step_size = tl.load(hyper + STEP_SIZE)
    decay = tl.load(hyper + DECAY)
    return beta1, m_grad_scale, root_beta2, root_grad_scale, per_root, eps, step_size, decay


@triton.jit
def update(
    scalars, weight, g, exp_avg, scale, exp_avg_sq, root_of_level, FOURTH_ROOT: tl.constexpr
):
    """Twin of ``reference`` on a tile."""
    beta1, m_grad_scale, root_beta2, root_grad_scale, per_root, eps, step_size, decay = scalars
    root = codec.decode_root(exp_avg_sq, root_of_level * root_beta2, FOURTH_ROOT=FOURTH_ROOT)
    m = fma((scale * beta1)[:, None], codec.decode_exp_avg(exp_avg), g * m_grad_scale)
    g = g * root_grad_scale
    root = square_root(fma(root, root, fma(g, g, ZERO)))
    inverse = reciprocal(fma(root, per_root, eps))
    return weight - fma(m * step_size, inverse, decay * weight), m, root


RULE = Rule(
    name="flash_adamw",
    moments=(EXP_AVG, EXP_AVG_SQ),
    defaults={"betas": (0.9, 0.999), "eps": 1e-8},
    options=options,
    columns=columns,
    reference=reference,
    prepare=prepare,
    update=update,
    decoupled_adam=True,
)
