"""Shards are whole quantization groups for every data-parallel size."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks


def _params(shapes: list[tuple[int, ...]], shared: int | None = None) -> list[Any]:
    params = [torch.nn.Parameter(torch.empty(s, dtype=torch.bfloat16)) for s in shapes]
    if shared is not None:
        params[shared].shared_embedding = True
    return params


SHAPES = [(257, 64), (64,), (192, 64), (192,), (7, 13), (3,), (256, 64), (1,), (33, 31)]


@pytest.mark.parametrize("dp", [1, 2, 3, 4, 8, 24, 48, 1000])
@pytest.mark.parametrize("bucket_size", [None, 5000])
@pytest.mark.parametrize("high_busbw", [False, True])
def test_shards_and_parameters_begin_at_whole_groups(
    dp: int, bucket_size: int | None, high_busbw: bool
) -> None:
    from megatron_flashoptim import FlashDistributedOptimizer

    config = SimpleNamespace(grad_reduce_in_fp32=True, pad_buckets_for_high_nccl_busbw=high_busbw)
    params = _params(SHAPES, shared=0)
    full = FlashDistributedOptimizer.compute_full_param_layout(params, bucket_size, dp, config)
    (layout,) = full.layouts.values()
    assert layout.num_optimizer_shards == dp
    assert set(layout.param_index_map) == set(params)
    for start, end in layout.bucket_indices:
        assert start % 32 == 0 and (end - start) % (32 * dp) == 0
        if high_busbw:
            assert (end - start) % 2**16 == 0
    ends = 0
    for start, end, bucket in sorted(layout.param_index_map.values()):
        first, last = layout.bucket_indices[bucket]
        assert start % 32 == 0 and first <= start < end <= last
        assert start >= ends
        ends = end


def test_layout_for_one_rank_is_megatrons_own() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from megatron_flashoptim import FlashDistributedOptimizer

    config = SimpleNamespace(grad_reduce_in_fp32=True, pad_buckets_for_high_nccl_busbw=False)
    params = _params(SHAPES)
    layouts = [
        next(iter(c.compute_full_param_layout(params, 5000, 1, config).layouts.values()))
        for c in (DistributedOptimizer, FlashDistributedOptimizer)
    ]
    assert layouts[0] == layouts[1]


def test_expert_buffers_are_padded_by_their_own_parallel_size() -> None:
    from megatron_flashoptim import FlashDistributedOptimizer

    config = SimpleNamespace(grad_reduce_in_fp32=True, pad_buckets_for_high_nccl_busbw=False)
    params = _params(SHAPES)
    for param in params[:4]:
        param.allreduce = False
    full = FlashDistributedOptimizer.compute_full_param_layout(
        params, None, 24, config, expert_data_parallel_world_size=8
    )
    sizes = {key.is_expert_parallel: layout for key, layout in full.layouts.items()}
    assert sizes[True].num_optimizer_shards == 8
    assert sizes[False].num_optimizer_shards == 24
    assert sizes[True].bucket_indices[-1][1] % (32 * 8) == 0
    assert sizes[False].bucket_indices[-1][1] % (32 * 24) == 0


def _build_with_foreign_layout() -> str:
    import tiny_gpt

    try:
        # Odd sizes, so that Megatron's own padding does not align by luck at dp = 8.
        tiny_gpt.build(tiny_gpt.Setup(foreign_layout=True, hidden=72, layers=1))
    except ValueError as problem:
        return str(problem)
    return ""


@pytest.mark.smoke
def test_foreign_layout_that_splits_groups_is_refused_with_what_to_do() -> None:
    for message in run_ranks(8, _build_with_foreign_layout):
        assert "would split quantization groups of 32 elements" in message
        assert "full_param_layout=FlashDistributedOptimizer.compute_full_param_layout" in message


def _train_at_dp(world_size: int) -> list[float]:
    import tiny_gpt

    return tiny_gpt.build(tiny_gpt.Setup(hidden=72, layers=1)).train(2)


@pytest.mark.smoke
def test_own_layout_trains_at_dp_8() -> None:
    assert all(len(losses) == 2 for losses in run_ranks(8, _train_at_dp, 8))


def _train_without_a_layout(installed: bool) -> list[float]:
    import tiny_gpt

    import megatron_flashoptim
    from megatron_flashoptim import FlashDistributedOptimizer
    from megatron_flashoptim.megatron import versions

    if installed:
        megatron_flashoptim.install()
    module, path = versions.layout_name()
    owner, name = versions.find(module, path), path.rpartition(".")[2]
    before = vars(owner)[name]
    with FlashDistributedOptimizer.group_aligned_buffers():
        # No layout is given to DDP.
        trainer = tiny_gpt.build(tiny_gpt.Setup(foreign_layout=True, hidden=72, layers=1))
    assert vars(owner)[name] is before
    return trainer.train(2)


@pytest.mark.smoke
def test_group_aligned_buffers_lay_out_what_megatron_core_is_given_no_layout_for() -> None:
    given = run_ranks(8, _train_at_dp, 8)
    assert run_ranks(8, _train_without_a_layout, False) == given
    assert run_ranks(8, _train_without_a_layout, True) == given
