"""What is saved: one description, weights of after the step, tensors that a writer may remember."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_state import assert_same_state
from ranks import run_ranks
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from megatron_flashoptim import FlashOptimConfig
from megatron_flashoptim.optim import BucketShard
from megatron_flashoptim.optim.segments import Segment, SegmentTable


def _saved_before_the_gather(folder: Path, save_as: str, **options: Any) -> tuple[Any, Any]:
    """Save right after a step, as code does that knows nothing of gathers; load, compare."""
    import checkpoints
    import tiny_gpt

    trainer = tiny_gpt.build(tiny_gpt.Setup(overlap=True, bucket_size=15_000, **options))
    trainer.train(3)
    pending = [
        group.param_gather_handle is not None or not group.param_gather_dispatched
        for chunk in trainer.model
        for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)
    ]
    assert all(pending)
    gather, trainer.sync_params = trainer.sync_params, lambda: None  # type: ignore[method-assign]
    checkpoints.save(trainer, folder, save_as)
    trainer.sync_params = gather  # type: ignore[method-assign]
    saved = checkpoints.everything(trainer)
    for param in trainer.model[0].parameters():
        param.data.zero_()
    checkpoints.load(trainer, folder)
    loaded = checkpoints.everything(trainer)
    trainer.train(1)  # the gathers of the next forward pass find what they expect
    return saved, loaded


@pytest.mark.parametrize("save_as", ["dp_reshardable", "fully_reshardable"])
@pytest.mark.parametrize(
    "options",
    [{}, {"experts": 4, "ep": 2}, {"flash": FlashOptimConfig(early_param_gather=True)}],
    ids=["", "experts", "early gather"],
)
def test_weights_are_gathered_before_they_are_saved(
    megatron: None, tmp_path: Path, save_as: str, options: dict[str, Any]
) -> None:
    """Or they would be those of before the step, and the corrections beside them of after it."""
    for saved, loaded in run_ranks(2, _saved_before_the_gather, tmp_path, save_as, **options):
        assert_same_state(loaded, saved)


def _described(save_as: str, **options: Any) -> dict[str, Any]:
    """Return what a rank says that is saved."""
    import checkpoints
    import tiny_gpt

    metadata = checkpoints.metadata_of(save_as)
    checkpoints.saved_state(tiny_gpt.build(tiny_gpt.Setup(**options)), metadata)
    return metadata


@pytest.mark.parametrize("save_as", ["dp_reshardable", "fully_reshardable"])
def test_all_ranks_describe_the_same(megatron: None, save_as: str) -> None:
    """Or Megatron would warn, on each rank whose pipeline stage is another than the first's."""
    first, *others = run_ranks(4, _described, save_as, pp=2, experts=2, ep=2, moe_layers=[0, 1])
    assert "flashoptim" in first
    assert all(other == first for other in others)


def test_tensors_on_the_device_are_the_live_state() -> None:
    """A worker with ``--ckpt-assume-constant-structure`` reads them where the first save had them.

    Seen in nvidia-resiliency-ext 0.6.0, ``FileSystemWriterAsync.prepare_write_data``.
    """
    # Not in this process: after a backward pass beside torch's stand-in for a GPU, which stays
    # once there are fake tensors, no fork of it could have one.
    run_ranks(1, _save_from_a_device)


def _save_from_a_device() -> None:
    from megatron.core.dist_checkpointing import ShardedTensor

    from megatron_flashoptim.checkpoint.model_space import ModelSpace, OwnedRange
    from megatron_flashoptim.checkpoint.pieces import pieces_of

    shape = (6, 40)  # rows of no whole groups
    flat = torch.zeros(256, dtype=torch.bfloat16)
    segments = SegmentTable([Segment(0, 0, 0, 0)], 8, "cpu")
    shard = BucketShard(flat, torch.zeros_like(flat), segments)
    model = ShardedTensor.from_rank_offsets("weight", flat[:240].view(shape))
    owned = OwnedRange(pieces_of(model, shape), shape, 0, shard, 0, 240)
    with FakeTensorMode() as mode:
        for name, tensor in list(shard.state()):
            there = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            setattr(shard, name, FakeTensor(mode, there, torch.device("cuda", 0)))
        saved: Any = ModelSpace([owned], instance=0).saving({"weight"})["tensors"]
        live = {tensor.untyped_storage()._cdata for _, tensor in shard.state()}
        by_key = {sharded.key: sharded.data for sharded in saved.values()}
    assert len(by_key) == 5
    for key, data in by_key.items():
        is_live = data.untyped_storage()._cdata in live
        assert is_live != ("per_element" in key), key
        assert data.device.type == ("cuda" if is_live else "cpu"), key
