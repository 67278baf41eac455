"""What the optimizer keeps alive: flat state beside views of Megatron's buffers, nothing else."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from ranks import run_ranks

# A step may keep this many bytes beyond the state: param group scalars, clip handles, timers.
SMALL_CHANGE = 2048


def _storages() -> dict[int, tuple[int, torch.dtype]]:
    """Return address, bytes and dtype of every live tensor, but for random states."""
    gc.collect()
    random_state = torch.get_rng_state().nbytes
    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    return {
        t.untyped_storage().data_ptr(): (t.untyped_storage().nbytes(), t.dtype)
        for t in tensors
        if t.untyped_storage().nbytes() not in (0, random_state)
    }


def _train_and_weigh(**options: Any) -> dict[str, Any]:
    import tiny_gpt

    outside: set[int] = set()
    build_optimizer = tiny_gpt.get_megatron_optimizer
    tiny_gpt.corpus()

    def note_and_build(*args: Any, **kwargs: Any) -> Any:
        outside.update(_storages())  # model, buffers, data
        return build_optimizer(*args, **kwargs)

    tiny_gpt.get_megatron_optimizer = note_and_build
    trainer = tiny_gpt.build(tiny_gpt.Setup(hidden=128, **options))
    built = set(_storages())
    trainer.step(update=False)
    outside.update(set(_storages()) - built)  # what the forward pass caches
    trainer.train(3)
    new = {key: value for key, value in _storages().items() if key not in outside}
    shards = [s for o in trainer.optimizer.chained_optimizers for s in o.optimizer.shards]
    return {
        "bytes": sum(size for size, _ in new.values()),
        "largest_fp32": max((s for s, d in new.values() if d == torch.float32), default=0),
        "padded": sum(shard.param.numel() for shard in shards),
        "owned": trainer.optimizer.owned_parameters(),
        "counted": trainer.optimizer.state_bytes(),
        "grad_dtypes": [shard.grad.dtype for shard in shards],
    }


@pytest.mark.parametrize("grads_in_fp32", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
def test_live_tensors_beside_weights_and_gradients_are_3_13_bytes_per_parameter(
    world_size: int, grads_in_fp32: bool
) -> None:
    ranks = run_ranks(world_size, _train_and_weigh, grads_in_fp32=grads_in_fp32)
    for rank in ranks:
        assert rank["bytes"] <= 3.13 * rank["padded"] + SMALL_CHANGE
        assert rank["bytes"] >= 3.125 * rank["owned"]
        assert abs(rank["bytes"] - rank["counted"]) <= SMALL_CHANGE
        # No fp32 main parameter and no main gradient: fp32 is for scalars only.
        assert rank["largest_fp32"] <= SMALL_CHANGE
        expected = torch.float32 if grads_in_fp32 else torch.bfloat16
        assert set(rank["grad_dtypes"]) == {expected}
    assert sum(rank["owned"] for rank in ranks) > 400_000


def _views() -> None:
    import tiny_gpt

    trainer = tiny_gpt.build(tiny_gpt.Setup(overlap=True, bucket_size=30_000))
    (member,) = trainer.optimizer.chained_optimizers
    (buffer,) = trainer.model[0].buffers
    assert len(buffer.buckets) > 2
    rank = torch.distributed.get_rank()
    for bucket, shard in zip(buffer.buckets, member.optimizer.shards, strict=True):
        numel = bucket.grad_data.numel() // 2
        assert shard.param.data_ptr() == bucket.param_data[rank * numel :].data_ptr()
        assert shard.grad.data_ptr() == bucket.grad_data[rank * numel :].data_ptr()
        assert shard.param.numel() == shard.grad.numel() == numel
        for name, tensor in shard.state():
            expected = numel // 32 if name.endswith("scale") else numel
            assert tensor.numel() == expected
    for item in member.shard_params:
        shard = member.optimizer.shards[item.shard]
        main = item.param.main_param
        assert main.dtype == torch.bfloat16
        assert main.data_ptr() == shard.param[item.start :].data_ptr()
        start = item.param.view(-1)[item.param_start :]
        assert main.data_ptr() == start.data_ptr()
        grad = item.param.main_grad.view(-1)[item.param_start :]
        assert grad.data_ptr() == shard.grad[item.start :].data_ptr()
        assert item.start % 32 == 0 and item.param_start % 32 == 0


def test_main_parameter_is_the_view_of_the_param_buffer_in_every_bucket() -> None:
    run_ranks(2, _views)


def _count_launches() -> tuple[int, int]:
    import tiny_gpt

    from megatron_flashoptim.optim import optimizer as flash_optimizer

    calls = []
    step = flash_optimizer.step_

    def counted(shard: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(shard)
        step(shard, *args, **kwargs)

    flash_optimizer.step_ = counted
    trainer = tiny_gpt.build(tiny_gpt.Setup(overlap=True, bucket_size=30_000))
    trainer.step()
    return len(calls), len(trainer.model[0].buffers[0].buckets)


def test_one_launch_per_bucket() -> None:
    for launches, buckets in run_ranks(2, _count_launches):
        assert launches == buckets > 2


def _no_copies() -> None:
    import tiny_gpt

    trainer = tiny_gpt.build(tiny_gpt.Setup())
    trainer.step()
    for param in trainer.model[0].parameters():
        assert param.grad is None
    for group in trainer.optimizer.param_groups:
        for view in group["params"]:
            assert view.grad is None
            assert view.dtype == torch.bfloat16


def test_no_gradient_is_copied_out_of_the_buffer() -> None:
    run_ranks(2, _no_copies)


def test_memory_planner_agrees_with_the_live_state_within_1_percent() -> None:
    from megatron_flashoptim.optim.footprint import flash_state_bytes
    from megatron_flashoptim.optim.rules import rule_of

    ranks = run_ranks(2, _train_and_weigh)
    live = sum(rank["counted"] for rank in ranks) / sum(rank["owned"] for rank in ranks)
    assert live == pytest.approx(flash_state_bytes(rule_of("flash_adamw"), 24), rel=0.01)
