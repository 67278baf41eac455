"""Megatron's plain attention under context parallelism, for ranks without Transformer Engine.

Megatron leaves attention across context-parallel ranks to Transformer Engine. This is its
``all_gather`` way out of Megatron's own parts: each rank has queries of its part of the sequence
and gathers keys and values of all.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention


class GatheredKeyAttention(DotProductAttention):  # type: ignore[misc]
    """DotProductAttention over the keys and values of all context-parallel ranks."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        alone = copy.copy(config)  # which the base class insists on
        alone.context_parallel_size = 1
        super().__init__(alone, *args, **kwargs)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Attend from local queries (sequence, batch, heads, channels) to all keys."""
        group = parallel_state.get_context_parallel_group()
        key = gather_from_sequence_parallel_region(key, group=group)
        value = gather_from_sequence_parallel_region(value, group=group)
        return super().forward(query, key, value, *args, **kwargs)


def hides(positions: torch.Tensor, cp: int) -> torch.Tensor:
    """Return the causal mask (1, 1, queries, keys): True where a key is later than a query.

    Args:
        positions: of this rank's tokens in the sequence.
        cp: context-parallel size; keys are those of all its ranks, one after the other.
    """
    keys = positions
    if cp > 1:
        group = parallel_state.get_context_parallel_group()
        keys = positions.new_empty(cp * len(positions))
        torch.distributed.all_gather_into_tensor(keys, positions.contiguous(), group=group)
    return (keys[None, :] > positions[:, None])[None, None]
