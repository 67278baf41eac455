"""Clip the gradients of each bucket by the bucket's own norm (``--flash-bucket-clip-grad``).

The norm is that of what Megatron reduces together: the bucket's gradients over the data-parallel
ranks that share it, with its parts on all tensor-parallel ranks, copies counted once. So copies of
a parameter on several ranks are scaled alike. Experts of another expert-parallel rank are another
bucket. The gradients stay as they are: the coefficient goes into the gradient scale that the step
kernel applies, right before each launch and in its stream.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_flashoptim.megatron.distrib_optimizer import FlashDistributedOptimizer
from megatron_flashoptim.megatron.grad_stats import GradRuns


class BucketClipping:
    """Sets the gradient scale of each bucket shard before it is stepped.

    Args:
        member: the optimizer whose launches it precedes.
        max_norm: what the norm of a bucket becomes at most.
    """

    def __init__(self, member: FlashDistributedOptimizer, max_norm: float) -> None:
        self._max_norm = max_norm
        self._scale = member.optimizer.table.grad_scale
        counts = functools.cache(member._counts_on_this_rank)
        grads = [shard.grad for shard in member.optimizer.shards]
        self._runs = [
            GradRuns([item for item in member.shard_params if item.shard == index], grads, counts)
            for index in range(len(grads))
        ]
        self._groups = [
            (buffer.data_parallel_group, _tensor_parallel_group(member, bucket))
            for buffer in member.buffers
            for bucket in buffer.buckets
        ]
        member.optimizer.before_launch = self._scale_bucket

    @torch.no_grad()
    def _scale_bucket(self, index: int) -> None:
        squared = torch.zeros((), dtype=torch.float32, device=self._scale.device)
        for norms in self._runs[index].norms():
            squared = squared + norms.square().sum()
        for group in self._groups[index]:
            if group.size() > 1:
                torch.distributed.all_reduce(squared, group=group)
        excess = (squared.sqrt() + 1e-6) / self._max_norm
        # A NaN norm clips nothing, as with clipping by the norm of all.
        coefficient = excess.reciprocal().clamp(max=1.0).nan_to_num(nan=1.0)
        self._scale.copy_(coefficient.expand_as(self._scale))


def _tensor_parallel_group(member: FlashDistributedOptimizer, bucket: Any) -> Any:
    """Return the ranks that hold the other parts of a bucket's parameters."""
    is_dense = getattr(bucket.params_list[0], "allreduce", True)
    # Of the process group collection given to Megatron, which may be without global groups.
    group = getattr(member, "tp_group" if is_dense else "expert_tp_group", None)
    if group is not None:
        return group
    if is_dense:
        return parallel_state.get_tensor_model_parallel_group()
    return parallel_state.get_expert_tensor_parallel_group()
