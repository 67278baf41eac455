"""Weights that Megatron keeps quantized (``--fp8-param-gather``): high parts of their own.

With that flag Transformer Engine's linear layers hold FP8 weights, whose codes DDP puts into a
param buffer of uint8 and gathers. They cannot be the high part of a master, so each shard of such
a buffer has a bf16 tensor of its own, 2 bytes per owned parameter, which the step changes as it
changes bf16 weights elsewhere. Then Megatron quantizes this tensor into the buffer. To
Transformer Engine it is the master weight, which it would round to bf16 in any case
(``quantize_master_weights``): the FP8 weights are those that fp32 masters would give.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core import tensor_parallel
from megatron.core.fp8_utils import dequantize_fp8_tensor

from megatron_flashoptim.megatron.grad_stats import ShardParam
from megatron_flashoptim.optim import BucketShard

if TYPE_CHECKING:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer as _Base
else:
    _Base = object


def is_quantized(buffer: Any) -> bool:
    """Return whether a buffer of DDP holds codes of weights, which Megatron makes of ours."""
    return bool(buffer.param_dtype == torch.uint8 and buffer.ddp_config.fp8_param_gather)


def main_param_of(param: torch.nn.Parameter) -> torch.Tensor:
    """Return what stands for the owned part of a quantized weight, bf16, empty until it is known.

    It has the attributes by which Megatron decides whether a parameter counts on this rank.
    """
    main = torch.empty(0, dtype=param.dtype, device=param.device)
    tensor_parallel.copy_tensor_model_parallel_attributes(main, param)
    if hasattr(param, "shared"):
        main.shared = param.shared  # type: ignore[attr-defined]  # Megatron's own attribute
    return main


class QuantizedWeights(_Base):
    """What ``FlashDistributedOptimizer`` does for quantized weights.

    Attributes:
        shard_params: where each owned parameter lies in the shards.
    """

    shard_params: list[ShardParam]

    def quantized(self) -> list[ShardParam]:
        """Return the owned parts of quantized weights, which every step asks for."""
        if self._quantized is None:
            self._quantized = [
                item
                for item in self.shard_params
                if is_quantized(self.buffers[self.model_param_gbuf_map[item.param][0]])
            ]
        return self._quantized

    _quantized: list[ShardParam] | None = None

    def make_high_parts(self, shards: list[BucketShard]) -> None:
        """Let the main parameters be views of the shards, which start from the weights."""
        self.view_high_parts(shards)
        self.read_high_parts(shards)
        for buffer in filter(is_quantized, self.buffers):
            for param in buffer.params:  # not the owned ones only: each is a whole weight
                if hasattr(param, "clear_high_precision_init_val"):
                    param.clear_high_precision_init_val()

    def view_high_parts(self, shards: list[BucketShard]) -> None:
        """Let the main parameters be views of the shards, wherever their tensors are by now."""
        for item in self.quantized():
            main: Any = item.param.main_param  # type: ignore[attr-defined]  # Megatron's own
            main.data = _high_part(item, shards)

    @torch.no_grad()
    def read_high_parts(self, shards: list[BucketShard]) -> None:
        """Take the high parts from the weights.

        They are what a weight was initialized with while Transformer Engine still has that, which
        is until this optimizer is made, else what its codes stand for.
        """
        for item in self.quantized():
            param, value = item.param, None
            if hasattr(param, "get_high_precision_init_val"):
                value = param.get_high_precision_init_val()
            if value is None:
                value = dequantize_fp8_tensor(param)
            numel = item.end - item.start
            part = value.reshape(-1)[item.param_start : item.param_start + numel]
            _high_part(item, shards).copy_(part)

    def _copy_main_params_to_model_params(self) -> None:
        """Quantize weights that Megatron keeps quantized; the step writes all others itself."""
        if not self.is_stub_optimizer and self.ddp_config.fp8_param_gather:
            super()._copy_main_params_to_model_params()

    def _get_fp8_params_and_shard_fp32_from_fp8(
        self,
    ) -> tuple[list[Any], list[torch.Tensor | None], list[int | None]]:
        """Return all quantized weights, the owned high part of each, and where it starts."""
        owned = {item.param: item for item in self.quantized()}
        params = [p for buffer in self.buffers if is_quantized(buffer) for p in buffer.params]
        items = [owned.get(param) for param in params]
        return (
            params,
            [None if item is None else _high_part(item, self.optimizer.shards) for item in items],
            [None if item is None else item.param_start for item in items],
        )


def _high_part(item: ShardParam, shards: list[BucketShard]) -> torch.Tensor:
    return shards[item.shard].param[item.start : item.end]
