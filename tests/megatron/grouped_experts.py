"""Linear layers of several experts in one module, for Megatron's ``TEGroupedMLP`` on CPU ranks.

Megatron's grouped experts take any module with these arguments as their layers
(``GroupedLinearFc1Builder`` and ``GroupedLinearFc2Builder`` of its ``experts.py``). The only one it
brings is Transformer Engine's, which needs a GPU; this one multiplies expert by expert. Parameters
have the names, attributes and sharded state dict of Transformer Engine's, and all around is
Megatron's own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
)
from megatron.core.transformer.moe import experts
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

# The dimension that expert tensor parallelism divides: of the layer's output, or of its input.
COLUMN, ROW = 0, 1
# Sequential experts save an object of this name, and want it.
_EXTRA = "_extra_state"


class GroupedLinear(torch.nn.Module):
    """One weight for each local expert, ``weight0`` and so on.

    Args:
        partition_dim: ``COLUMN`` or ``ROW``.
        num_local_experts, input_size, output_size: of all expert tensor parallel ranks together.
        config: Megatron's ``TransformerConfig``.
        init_method: fills a weight.
        pg_collection: Megatron's process groups.
        bias: must be False.
        others: what says how Transformer Engine communicates.
    """

    def __init__(
        self,
        partition_dim: int,
        num_local_experts: int,
        input_size: int,
        output_size: int,
        /,
        *,
        config: Any,
        init_method: Callable[[torch.Tensor], None],
        pg_collection: Any,
        bias: bool,
        **others: Any,
    ) -> None:
        super().__init__()
        assert not bias
        self._groups, self._dim = pg_collection, partition_dim
        shape = [output_size, input_size]
        shape[partition_dim] //= pg_collection.expt_tp.size()
        apart = pg_collection.ep.size() > 1 or (
            config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        for number in range(num_local_experts):
            weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                init_method(weight)
            set_tensor_model_parallel_attributes(weight, True, partition_dim, 1)
            weight.allreduce = not apart
            self.register_parameter(f"weight{number}", weight)

    def _weights(self) -> list[torch.nn.Parameter]:
        return list(self.parameters())

    def forward(
        self, tokens: torch.Tensor, tokens_per_expert: list[int]
    ) -> tuple[torch.Tensor, None]:
        """Return each expert's product with its own tokens, and no bias."""
        parts = tokens.split([int(count) for count in tokens_per_expert])
        products = [part @ w.t() for part, w in zip(parts, self._weights(), strict=True)]
        return torch.cat(products), None

    def backward_dw(self) -> None:
        """Do nothing: weight gradients are never put off."""

    def sharded_state_dict(
        self, prefix: str, sharded_offsets: tuple[Any, ...], metadata: dict[str, Any]
    ) -> ShardedStateDict:
        """Return each weight as an expert of the tensor that sequential experts are saved as."""
        weights, ep = self._weights(), self._groups.ep
        found: ShardedStateDict = {}
        for number, weight in enumerate(weights):
            expert = (
                len(sharded_offsets),
                ep.rank() * len(weights) + number,
                ep.size() * len(weights),
            )
            name, extra = f"{number}.weight", f"{number}._extra_state"
            one = make_sharded_tensors_for_checkpoint(
                {name: weight, extra: None},
                "",
                {name: self._dim},
                (*sharded_offsets, expert),
                tp_group=self._groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            replace_prefix_for_sharding(one, f"{number}.", prefix)
            for sharded in one.values():
                sharded.replica_id = (*sharded.replica_id[:2], self._groups.expt_dp.rank())
            found[f"{prefix}weight{number}"] = one[name]
            found[f"{prefix}{_EXTRA}{number}"] = one[extra]
        return found

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        for key in [key for key in state_dict if key.startswith(prefix + _EXTRA)]:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def group_experts(layer_spec: Any) -> None:
    """Have a layer's experts be Megatron's grouped ones.

    Args:
        layer_spec: of a layer with experts, changed in place.
    """
    layers = experts.GroupedMLPSubmodules(
        linear_fc1=partial(GroupedLinear, COLUMN), linear_fc2=partial(GroupedLinear, ROW)
    )
    moe = layer_spec.submodules.mlp
    moe.keywords["submodules"].experts = partial(experts.TEGroupedMLP, submodules=layers)
