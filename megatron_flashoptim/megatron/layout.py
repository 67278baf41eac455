"""Parameter layout: shards that begin and end at whole quantization groups.

Megatron starts parameters at multiples of 64 elements and pads bucket ends to ``lcm(dp, 128)``,
so that from dp = 8 on a data-parallel shard can begin in the middle of a group of 32. Padding
bucket ends to ``lcm(32 * dp, 128)`` (times 2^16 for ``--ddp-pad-buckets-for-high-nccl-busbw``, as
Megatron does) makes every shard a whole number of groups. Asking Megatron's own layout code for
``32 * dp`` shards gives just that.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_flashoptim.codec.spec import GROUP_SIZE
from megatron_flashoptim.megatron import versions

ComputeLayout = Callable[..., Any]


def compute_group_aligned_layout(
    compute_layout: ComputeLayout,
    params: list[torch.nn.Parameter],
    bucket_size: int | None,
    data_parallel_world_size: int,
    ddp_config: Any,
    expert_data_parallel_world_size: int | None = None,
) -> Any:
    """Return Megatron's ``FullParamLayout`` with bucket ends padded to whole groups per shard.

    Args:
        compute_layout: Megatron's ``DistributedOptimizer.compute_full_param_layout``.
        params: parameters in model order.
        bucket_size: elements per bucket, or None for a single bucket.
        data_parallel_world_size: ranks that share the optimizer state of dense parameters.
        ddp_config: Megatron's ``DistributedDataParallelConfig``.
        expert_data_parallel_world_size: the same for expert parameters.
    """
    expert_size = expert_data_parallel_world_size or data_parallel_world_size
    # A Megatron with one of patches/ may have been asked to align by itself.
    factor = GROUP_SIZE // math.gcd(GROUP_SIZE, getattr(ddp_config, "shard_alignment", 1))
    layout = compute_layout(
        params,
        bucket_size,
        factor * data_parallel_world_size,
        ddp_config,
        expert_data_parallel_world_size=factor * expert_size,
    )
    sizes = {False: data_parallel_world_size, True: expert_size}
    return type(layout)(
        layouts={
            key: versions.with_optimizer_shards(buffer_layout, sizes[key.is_expert_parallel])
            for key, buffer_layout in layout.layouts.items()
        }
    )


def wrap_layout(original: Callable[..., Any], applies: Callable[[], bool]) -> Callable[..., Any]:
    """Return what stands in for the name that decides where buckets end.

    Args:
        original: Megatron's ``compute_full_param_layout``, or its buffer class in releases where
            that decides.
        applies: whether to align; asked at every call.
    """
    aligned = (
        functools.partial(compute_group_aligned_layout, original)
        if not isinstance(original, type)
        else versions.buffer_laid_out_for(GROUP_SIZE, original)
    )

    def lay_out(*args: Any, **kwargs: Any) -> Any:
        return (aligned if applies() else original)(*args, **kwargs)

    return lay_out


@contextmanager
def group_aligned_buffers() -> Iterator[None]:
    """Let every DistributedDataParallel made meanwhile have shards of whole quantization groups.

    For code that calls megatron.core without ``install()`` and gives DDP no layout; works with
    every release.
    """
    module, path = versions.layout_name()
    owner = versions.find(module, path)
    name = path.rpartition(".")[2]
    bound = vars(owner)[name]
    aligned = wrap_layout(inspect.unwrap(getattr(owner, name)), lambda: True)
    setattr(owner, name, staticmethod(aligned) if isinstance(owner, type) else aligned)
    try:
        yield
    finally:
        setattr(owner, name, bound)


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


def check_weights(params: Iterable[torch.nn.Parameter], param_data: torch.Tensor) -> None:
    """Refuse weights that a step on DDP's param buffer would not change, or not as numbers.

    Quantized weights of Transformer Engine say bf16 and have data of another dtype elsewhere.

    Args:
        params: parameters of a bucket.
        param_data: the bucket's part of the param buffer.

    Raises:
        ValueError: names class and dtype of a weight that is no bf16 or fp32 view of the buffer.
    """
    for param in params:
        try:
            is_view = param.untyped_storage().data_ptr() == param_data.untyped_storage().data_ptr()
        except RuntimeError:  # a tensor that wraps others has no storage
            is_view = False
        if not is_view or param_data.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(
                f"flash optimizers step bf16 and fp32 weights in DDP's param buffer, and got a "
                f"{type(param).__qualname__} of {param.dtype} in a buffer of {param_data.dtype}; "
                "build the model without --fp16, and with fp8_model_init under --fp8-param-gather "
                "only"
            )


_HOW_TO_ALIGN = (
    "The DistributedDataParallel wrapper was built with another parameter layout. Build it within "
    "FlashDistributedOptimizer.group_aligned_buffers(), or with "
    "full_param_layout=FlashDistributedOptimizer.compute_full_param_layout(params, bucket_size, "
    "data_parallel_world_size, ddp_config), or call megatron_flashoptim.install() before the "
    "model is built."
)
