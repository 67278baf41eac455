"""Adam in exact fp32 by Transformer Engine's formula, for stock Megatron to compare with.

Without Transformer Engine or Apex, stock Megatron falls back to ``torch.optim.AdamW``, which keeps
no ``step`` in its param groups and cannot be resumed. ``use_as_megatrons_adam`` puts this
optimizer where Transformer Engine's FusedAdam would be.
"""

from __future__ import annotations

from typing import Any

import torch


class ExactAdamW(torch.optim.Optimizer):
    """FusedAdam in plain fp32; the step count lives in the param groups, ``adam_w_mode`` does not.

    Without ``adam_w_mode`` it decays weights by L2.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        **_: Any,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    # The base class's overloads return a closure's loss; Megatron gives no closure.
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            group["step"] = group.get("step", 0) + 1
            correction1 = 1 - beta1 ** group["step"]
            correction2 = 1 - beta2 ** group["step"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)
                m, v = state["exp_avg"], state["exp_avg_sq"]
                decay = group["weight_decay"] * param
                grad = param.grad if self.adam_w_mode else param.grad + decay
                m.mul_(beta1).add_(grad, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                denominator = (v / correction2).sqrt() + group["eps"]
                update = m / correction1 / denominator
                if self.adam_w_mode:
                    update += decay
                param.sub_(update, alpha=group["lr"])


def use_as_megatrons_adam() -> None:
    """Let stock Megatron in this process build ExactAdamW for ``optimizer="adam"``."""
    import megatron.core.optimizer as factory
    from megatron.core.optimizer import distrib_optimizer

    factory.Adam = ExactAdamW
    factory.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = ExactAdamW
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_TE_OPTIMIZER = True
