"""A bf16 model of which some parameters are fp32.

Megatron's ``Float16Module`` casts every parameter to bf16. A model that is not wrapped in it, since
its parts are made in ``params_dtype`` already (``mixed_precision_wrapper=None``), keeps in fp32
what its modules make so: ``A_log`` and ``D`` of a Mamba mixer. Those need a GPU's kernels; here it
is norms and routers. DDP gives fp32 parameters buffers of their own.
"""

from __future__ import annotations

from typing import Any

import torch


def is_kept_in_fp32(key: str) -> bool:
    """Return whether the parameter of a checkpoint's key is one of those."""
    return "norm" in key or "router" in key


def keep_norms_and_routers_in_fp32(model: Any) -> None:
    """Make norms and routers fp32 (modified in place), of values that bf16 does not have."""
    for name, param in model.named_parameters():
        if is_kept_in_fp32(name):
            param.data = param.data.to(torch.float32) * (1 + 2.0**-12)


MIXED: dict[str, Any] = {"prepare_model": keep_norms_and_routers_in_fp32}
# Without biases each param group has one dtype. Where one has both, Megatron itself cannot save
# Adam: it takes other parameters' state (an assertion on shapes in 0.19.2).
GROUPS_OF_ONE_DTYPE = {**MIXED, "transformer": {"add_bias_linear": False}}
EXPERTS: dict[str, Any] = {
    **MIXED,
    "experts": 4,
    "transformer": {"moe_router_dtype": "fp32"},
}
