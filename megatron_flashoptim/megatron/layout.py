"""Parameter layout: shards that begin and end at whole quantization groups.

Megatron starts parameters at multiples of 64 elements and pads bucket ends to ``lcm(dp, 128)``,
so that from dp = 8 on a data-parallel shard can begin in the middle of a group of 32. Padding
bucket ends to ``lcm(32 * dp, 128)`` (times 2^16 for ``--ddp-pad-buckets-for-high-nccl-busbw``, as
Megatron does) makes every shard a whole number of groups. Asking Megatron's own layout code for
``32 * dp`` shards gives just that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer.param_layout import FullParamLayout

from megatron_flashoptim.codec.spec import GROUP_SIZE

ComputeLayout = Callable[..., FullParamLayout]


def compute_group_aligned_layout(
    compute_layout: ComputeLayout,
    params: list[torch.nn.Parameter],
    bucket_size: int | None,
    data_parallel_world_size: int,
    ddp_config: Any,
    expert_data_parallel_world_size: int | None = None,
) -> FullParamLayout:
    """Return Megatron's layout with bucket ends padded to whole groups per shard.

    Args:
        compute_layout: Megatron's ``DistributedOptimizer.compute_full_param_layout``.
        params: parameters in model order.
        bucket_size: elements per bucket, or None for a single bucket.
        data_parallel_world_size: ranks that share the optimizer state of dense parameters.
        ddp_config: Megatron's ``DistributedDataParallelConfig``.
        expert_data_parallel_world_size: the same for expert parameters.
    """
    expert_size = expert_data_parallel_world_size or data_parallel_world_size
    layout = compute_layout(
        params,
        bucket_size,
        GROUP_SIZE * data_parallel_world_size,
        ddp_config,
        expert_data_parallel_world_size=GROUP_SIZE * expert_size,
    )
    return FullParamLayout(
        layouts={
            key: dataclasses.replace(
                buffer_layout,
                num_optimizer_shards=buffer_layout.num_optimizer_shards // GROUP_SIZE,
            )
            for key, buffer_layout in layout.layouts.items()
        }
    )


def check_group_alignment(buffer: Any, data_parallel_world_size: int) -> None:
    """Refuse a buffer whose shards or parameters do not begin at whole groups.

    Args:
        buffer: Megatron's ``_ParamAndGradBuffer``.
        data_parallel_world_size: number of shards of each bucket.

    Raises:
        ValueError: names the bucket or parameter, its offset, and what to do.
    """
    for bucket in buffer.buckets:
        numel = bucket.grad_data.numel()
        if bucket.offset % GROUP_SIZE or numel % (GROUP_SIZE * data_parallel_world_size):
            raise ValueError(
                f"bucket {bucket.bucket_id} has {numel} elements at offset {bucket.offset}; over "
                f"{data_parallel_world_size} data-parallel ranks its shards would split "
                f"quantization groups of {GROUP_SIZE} elements. {_HOW_TO_ALIGN}"
            )
    for start, _, _ in buffer.param_index_map.values():
        if start % GROUP_SIZE:
            raise ValueError(
                f"a parameter begins at element {start} of its buffer, within a quantization "
                f"group of {GROUP_SIZE} elements. {_HOW_TO_ALIGN}"
            )


_HOW_TO_ALIGN = (
    "The DistributedDataParallel wrapper was built with another parameter layout. Build it with "
    "full_param_layout=FlashDistributedOptimizer.compute_full_param_layout(params, bucket_size, "
    "data_parallel_world_size, ddp_config), or call megatron_flashoptim.install() before the "
    "model is built."
)
