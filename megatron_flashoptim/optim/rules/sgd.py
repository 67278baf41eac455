"""SGD with momentum, as ``torch.optim.SGD`` with dampening 0; weight decay decoupled or L2.

``g += wd w`` (L2 only); ``m = mu m + g``; ``d = g + mu m`` (Nesterov) or ``d = m``;
``w -= lr (d + wd w)`` (decoupled) or ``w -= lr d``. torch sets ``m = g`` in the first step,
which is the same from ``m = 0``.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from megatron_flashoptim.codec.rounding import fma_fp32
from megatron_flashoptim.kernels import codec
from megatron_flashoptim.kernels.arithmetic import fma
from megatron_flashoptim.optim.rules.rule import EXP_AVG, Rule, Scalar

# In the order in which ``columns`` returns them.
LR = tl.constexpr(0)
DECAY = tl.constexpr(1)
L2 = tl.constexpr(2)
MOMENTUM = tl.constexpr(3)
MOMENT_SHARE = tl.constexpr(4)
GRAD_SHARE = tl.constexpr(5)


def options(config: Any, flash: Any) -> dict[str, Any]:
    """Return ``momentum`` by Megatron's ``--sgd-momentum``, and what kind of steps are taken.

    Raises:
        ValueError: a momentum that keeps nothing or grows.
    """
    if not 0.0 < config.sgd_momentum < 1.0:
        raise ValueError(
            "--sgd-momentum must be above 0 and below 1 with --optimizer flash_sgd, whose state is "
            f"the momentum; got {config.sgd_momentum}"
        )
    return {
        "momentum": config.sgd_momentum,
        "nesterov": flash.sgd_nesterov,
        "decoupled_weight_decay": config.decoupled_weight_decay,
    }


def unlike(config: Any) -> str:
    """Return what Megatron's ``--optimizer sgd`` does instead, where weights decay."""
    if not (config.decoupled_weight_decay and config.weight_decay):
        return ""
    return (
        "flash_sgd decays weights apart from the gradient; Megatron's --optimizer sgd does within "
        "it (L2), as this with --no-decoupled-weight-decay"
    )


def columns(group: Mapping[str, Any], step: Scalar) -> Sequence[Scalar]:
    """Return learning rate, both kinds of decay, momentum, and what the direction is made of."""
    lr, decay, momentum = group["lr"], group["weight_decay"], group["momentum"]
    # 0 or 1
    nesterov, decoupled = group["nesterov"], group["decoupled_weight_decay"]
    return (
        lr,
        lr * decay * decoupled,
        decay * (1 - decoupled),
        momentum,
        momentum * nesterov + (1 - nesterov),
        nesterov,
    )


def reference(
    hyper: Sequence[torch.Tensor],
    grad_scale: torch.Tensor,
    weight: torch.Tensor,
    grad: torch.Tensor,
    ratio: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Return weight and momentum, see ``Rule.reference``."""
    lr, decay, l2, momentum, moment_share, grad_share, *_ = hyper
    grad = fma_fp32(weight, l2, grad * grad_scale)
    m = fma_fp32(momentum * scale, ratio, grad)
    direction = fma_fp32(m, moment_share, grad * grad_share)
    return weight - fma_fp32(direction, lr, decay * weight), m


@triton.jit
def prepare(hyper, grad_scale_ptr):
    """Load the scalars."""
    return (
        tl.load(grad_scale_ptr),
        tl.load(hyper + LR),
        tl.load(hyper + DECAY),
        tl.load(hyper + L2),
        tl.load(hyper + MOMENTUM),
        tl.load(hyper + MOMENT_SHARE),
        tl.load(hyper + GRAD_SHARE),
    )


@triton.jit
def update(scalars, weight, g, exp_avg, scale):
    """Twin of ``reference`` on a tile."""
    grad_scale, lr, decay, l2, momentum, moment_share, grad_share = scalars
    g = fma(weight, l2, g * grad_scale)
    m = fma((scale * momentum)[:, None], codec.decode_exp_avg(exp_avg), g)
    direction = fma(m, moment_share, g * grad_share)
    return weight - fma(direction, lr, decay * weight), m


RULE = Rule(
    name="flash_sgd",
    moments=(EXP_AVG,),
    defaults={"momentum": 0.9, "nesterov": False, "decoupled_weight_decay": True},
    options=options,
    columns=columns,
    reference=reference,
    prepare=prepare,
    update=update,
    takes_l2=True,
    scale_free=False,
    own_fields=("sgd_nesterov",),
    unlike=unlike,
)
