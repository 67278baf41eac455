"""The norm of parameters that ``--log-params-norm`` shows: of the masters, summed in fp32.

Megatron takes the norm of its main parameters with Transformer Engine's or Apex's multi-tensor
norm, or else with torch's, which rounds the norm of each bf16 tensor to bf16: 0.4 % off. The main
parameters of a flash optimizer are the bf16 weights; rounding leaves those near 1 (layernorms)
where they are while the masters move, which put the norm 0.1 % off after four steps. So each main
parameter is replaced by one fp32 number, the norm of its master, while Megatron looks: the 2-norm
of 2-norms is the 2-norm, and Megatron leaves out and sums up what it always does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from megatron_flashoptim.codec import join_master
from megatron_flashoptim.optim import BucketShard

# Attribute of a main parameter with its ``Master``.
_MASTER = "flash_master"
# Elements joined at once.
_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Master:
    """The master of the part of a parameter that this rank owns.

    Attributes:
        shard: the bucket shard it is in.
        start, end: element range in the shard.
    """

    shard: BucketShard
    start: int
    end: int

    def norm(self) -> torch.Tensor:
        """Return the L2 norm, fp32 of shape (1,) on the shard's device."""
        norms = []
        for start in range(self.start, self.end, _AT_ONCE):
            elements = slice(start, min(start + _AT_ONCE, self.end))
            master = self.shard.param[elements]
            if self.shard.correction is not None:
                master = join_master(master, self.shard.correction[elements])
            norms.append(torch.linalg.vector_norm(master, dtype=torch.float32))
        whole: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return whole.reshape(1)


def remember(param: torch.nn.Parameter, master: Master) -> None:
    """Tell the main parameter, where a parameter has one, what master it stands for."""
    main = getattr(param, "main_param", None)
    if main is not None:
        setattr(main, _MASTER, master)


@contextmanager
def norms_for_main_params(model: Any) -> Iterator[None]:
    """Let each main parameter of a flash optimizer be its master's norm meanwhile.

    Args:
        model: a model chunk or a list of them.
    """
    chunks = model if isinstance(model, list) else [model]
    held = [
        (param, param.main_param)
        for chunk in chunks
        for param in chunk.parameters()
        if hasattr(getattr(param, "main_param", None), _MASTER)
    ]
    try:
        for param, main in held:
            param.main_param = getattr(main, _MASTER).norm()
        yield
    finally:
        for param, main in held:
            param.main_param = main
