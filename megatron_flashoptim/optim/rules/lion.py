"""Lion (arXiv 2302.06675), as Emerging-Optimizers' ``Lion`` with decoupled weight decay.

``w -= lr (sign(b1 m + (1 - b1) g) + wd w)``; ``m = b2 m + (1 - b2) g``. The sign of 0 is 0.
Megatron's ``--optimizer lion`` is another optimizer: docs/rules.md.
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
from megatron_flashoptim.optim.rules.rule import EXP_AVG, Rule, Scalar, check_decay_rates

# In the order in which ``columns`` returns them.
LR = tl.constexpr(0)
DECAY = tl.constexpr(1)
BETA1 = tl.constexpr(2)
REST1 = tl.constexpr(3)
BETA2 = tl.constexpr(4)
REST2 = tl.constexpr(5)


def options(config: Any, flash: Any) -> dict[str, Any]:
    """Return ``betas`` by Megatron's ``--lion-*``.

    Raises:
        ValueError: a decay rate with which the moment grows, or takes nothing of a gradient.
    """
    return {"betas": check_decay_rates(config, "lion_beta1", "lion_beta2")}


def unlike(config: Any) -> str:
    """Return what Megatron's ``--optimizer lion``, from 0.18 on, does instead."""
    ours = config.lion_beta1, config.lion_beta2
    theirs = config.adam_beta1, config.adam_beta2
    return (
        f"flash_lion is Lion for every parameter, with betas {ours} of --lion-beta1 and "
        f"--lion-beta2; Megatron's --optimizer lion takes {theirs}, of --adam-beta1 and "
        "--adam-beta2, and Adam for word embeddings, norms and biases"
    )


def columns(group: Mapping[str, Any], step: Scalar) -> Sequence[Scalar]:
    """Return learning rate, decay of the weight, and the shares of moment and gradient."""
    beta1, beta2 = group["betas"]
    lr = group["lr"]
    return lr, lr * group["weight_decay"], beta1, 1.0 - beta1, beta2, 1.0 - beta2


def reference(
    hyper: Sequence[torch.Tensor],
    grad_scale: torch.Tensor,
    weight: torch.Tensor,
    grad: torch.Tensor,
    ratio: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Return weight and first moment, see ``Rule.reference``."""
    lr, decay, beta1, rest1, beta2, rest2, *_ = hyper
    mixed = fma_fp32(beta1 * scale, ratio, grad * (grad_scale * rest1))
    sign = torch.where(mixed == 0.0, mixed, torch.copysign(torch.ones_like(mixed), mixed))
    # torch.sign(NaN) is 0, which would hide it.
    sign = torch.where(mixed.isnan(), torch.nan, sign)
    weight = weight - fma_fp32(sign, lr, decay * weight)
    return weight, fma_fp32(beta2 * scale, ratio, grad * (grad_scale * rest2))


@triton.jit
def prepare(hyper, grad_scale_ptr):
    """Load the scalars; those that meet for every element meet here."""
    grad_scale = tl.load(grad_scale_ptr)
    return (
        tl.load(hyper + LR),
        tl.load(hyper + DECAY),
        tl.load(hyper + BETA1),
        grad_scale * tl.load(hyper + REST1),
        tl.load(hyper + BETA2),
        grad_scale * tl.load(hyper + REST2),
    )


@triton.jit
def update(scalars, weight, g, exp_avg, scale):
    """Twin of ``reference`` on a tile."""
    lr, decay, beta1, grad_share1, beta2, grad_share2 = scalars
    ratio = codec.decode_exp_avg(exp_avg)
    mixed = fma((scale * beta1)[:, None], ratio, g * grad_share1)
    # Of 0 and NaN it is what they are.
    sign = tl.where(mixed > 0.0, 1.0, tl.where(mixed < 0.0, -1.0, mixed))
    weight = weight - fma(sign, lr, decay * weight)
    return weight, fma((scale * beta2)[:, None], ratio, g * grad_share2)


RULE = Rule(
    name="flash_lion",
    moments=(EXP_AVG,),
    defaults={"betas": (0.95, 0.98)},
    options=options,
    columns=columns,
    reference=reference,
    prepare=prepare,
    update=update,
    unlike=unlike,
)
