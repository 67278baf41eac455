"""Inf, NaN and zero gradients, empty groups, frozen and tied parameters: Megatron's behaviour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_state import assert_same_state
from ranks import run_ranks


def _poisoned_step(flash: bool, value: float, clip_grad: float) -> dict[str, Any]:
    """Train one step, then one with a poisoned gradient element; return masks of bad weights."""
    import tiny_gpt
    from exact_adamw import use_as_megatrons_adam

    options: dict[str, Any] = {"optimizer": {"clip_grad": clip_grad}}
    if not flash:
        use_as_megatrons_adam()
        options["flash"] = None
    trainer = tiny_gpt.build(tiny_gpt.Setup(**options))
    trainer.step()
    prepare = trainer.optimizer.prepare_grads

    def poison_and_prepare() -> bool:
        trainer.model[0].buffers[0].grad_data[100] = value
        return prepare()

    trainer.optimizer.prepare_grads = poison_and_prepare
    _, norm, _ = trainer.step()
    return {
        "norm": norm,
        "bad": {name: ~tensor.isfinite() for name, tensor in trainer.weights().items()},
    }


@pytest.mark.parametrize("clip_grad", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_poisoned_gradient_poisons_the_same_weights_as_stock(
    value: float, clip_grad: float
) -> None:
    stock = run_ranks(2, _poisoned_step, False, value, clip_grad)
    flash = run_ranks(2, _poisoned_step, True, value, clip_grad)
    for ours, theirs in zip(flash, stock, strict=True):
        assert str(ours["norm"]) == str(theirs["norm"])
        assert any(mask.any() for mask in theirs["bad"].values())
        for name, mask in theirs["bad"].items():
            assert torch.equal(ours["bad"][name], mask), name


def _nan_check() -> str:
    import tiny_gpt

    trainer = tiny_gpt.build(tiny_gpt.Setup())
    trainer.model[0].ddp_config.check_for_nan_in_grad = True
    for group in trainer.model[0].bucket_groups:
        group.ddp_config.check_for_nan_in_grad = True
    with torch.no_grad():
        next(trainer.model[0].parameters())[0, 0] = float("nan")
    try:
        trainer.step()
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return ""


def test_megatrons_own_nan_check_still_fires() -> None:
    for message in run_ranks(2, _nan_check):
        assert "nan" in message.lower()


def _zero_gradient_step(weight_decay: float) -> dict[str, Any]:
    import tiny_gpt

    trainer = tiny_gpt.build(tiny_gpt.Setup(optimizer={"weight_decay": weight_decay}))
    before = trainer.weights()
    (shard,) = trainer.optimizer.chained_optimizers[0].optimizer.shards
    for chunk in trainer.model:
        chunk.zero_grad_buffer()
    ok, norm, zeros = trainer.optimizer.step()
    assert ok and float(norm) == 0.0
    assert zeros == sum(p.numel() for p in trainer.model[0].parameters())
    state = dict(shard.state())
    moments = any(tensor.any() for name, tensor in state.items() if name != "correction")
    after = trainer.weights()
    same = all(torch.equal(before[name], after[name]) for name in before)
    return {"moments": moments, "correction": bool(state["correction"].any()), "same": same}


def test_zero_gradients_without_decay_change_no_bit() -> None:
    for result in run_ranks(2, _zero_gradient_step, 0.0):
        assert result == {"moments": False, "correction": False, "same": True}


def test_zero_gradients_with_decay_change_weights_and_no_moment() -> None:
    for result in run_ranks(2, _zero_gradient_step, 0.5):
        assert result["moments"] is False
        assert result["correction"] is True


def _freeze_embedding(model: Any) -> None:
    model.embedding.word_embeddings.weight.requires_grad = False


def _freeze_all_but_norms(model: Any) -> None:
    for name, param in model.named_parameters():
        param.requires_grad = "layernorm" in name and "weight" in name


def _frozen(prepare: Any, **options: Any) -> dict[str, Any]:
    import tiny_gpt

    trainer = tiny_gpt.build(tiny_gpt.Setup(prepare_model=prepare, **options))
    before = trainer.weights()
    trainer.train(2)
    after = trainer.weights()
    frozen = [n for n, p in trainer.model[0].named_parameters() if not p.requires_grad]
    return {
        "frozen": frozen,
        "frozen_changed": [n for n in frozen if not torch.equal(before["0." + n], after["0." + n])],
        "changed": sum(not torch.equal(before[n], after[n]) for n in before),
        "owned": trainer.optimizer.owned_parameters(),
        "trained": sum(p.numel() for p in trainer.model[0].parameters() if p.requires_grad),
        "segments": [
            len(s.segments)
            for o in trainer.optimizer.chained_optimizers
            for s in o.optimizer.shards
        ],
    }


def test_frozen_parameters_stay_and_take_no_state() -> None:
    ranks = run_ranks(2, _frozen, _freeze_embedding, tied=False)
    for rank in ranks:
        assert rank["frozen"] and not rank["frozen_changed"]
        assert rank["changed"] > 5
    assert sum(rank["owned"] for rank in ranks) == ranks[0]["trained"]


def test_rank_without_parameters_in_a_bucket_steps_with_the_others() -> None:
    # Five vectors of 64 elements in a bucket padded for 8 ranks: some shards are padding only.
    ranks = run_ranks(8, _frozen, _freeze_all_but_norms)
    assert any(rank["segments"] == [0] for rank in ranks)
    assert any(rank["segments"] != [0] for rank in ranks)
    assert sum(rank["owned"] for rank in ranks) == ranks[0]["trained"]
    for rank in ranks:
        assert rank["changed"] > 0 and not rank["frozen_changed"]


def _frozen_everything(model: Any) -> None:
    for param in model.parameters():
        param.requires_grad = False


def _stage_frozen(**options: Any) -> tuple[bool, str, int]:
    """Freeze one pipeline stage whole: its optimizer has the other stage's groups, all empty."""
    import tiny_gpt
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(1, 2)
    last = parallel_state.is_pipeline_last_stage()
    prepare = _frozen_everything if last else None
    trainer = tiny_gpt.build(tiny_gpt.Setup(prepare_model=prepare, pp=2, tied=False, **options))
    assert not trainer.optimizer.is_stub_optimizer
    return last, trainer.optimizer.describe(), trainer.optimizer.owned_parameters()


def test_stage_without_trainable_parameters_is_built() -> None:
    for last, line, owned in run_ranks(2, _stage_frozen):
        assert (owned == 0) == last
        assert ("no trainable parameters" in line) == last


def _freeze_all_but_experts(model: Any) -> None:
    for param in model.parameters():
        param.requires_grad = not getattr(param, "allreduce", True)


def _stub(folder: Path) -> dict[str, Any]:
    """Train experts alone, save and go on; go on from each checkpoint too."""
    import checkpoints
    import tiny_gpt

    setup = tiny_gpt.Setup(
        prepare_model=_freeze_all_but_experts, layers=1, ep=2, experts=2, tied=False
    )
    trainer = tiny_gpt.build(setup)
    trainer.train(1)
    formats = [checkpoints.DP_RESHARDABLE, checkpoints.FULLY_RESHARDABLE, checkpoints.LEGACY]
    for name in formats:
        (folder / name).mkdir(exist_ok=True)
        torch.distributed.barrier()
        checkpoints.save(trainer, folder / name, name)
    found: dict[str, Any] = {
        "stubs": [member.is_stub_optimizer for member in trainer.optimizer.chained_optimizers],
        "losses": trainer.train(2),
        "state": checkpoints.everything(trainer),
    }
    for name in formats:
        resumed = tiny_gpt.build(setup)
        checkpoints.load(resumed, folder / name)
        found[name] = {"losses": resumed.train(2), "state": checkpoints.everything(resumed)}
    return found


def test_stub_beside_trained_experts_saves_and_resumes(tmp_path: Path) -> None:
    """A member is Megatron's stub where no rank trains any of its parameters, so on all ranks."""
    for rank in run_ranks(2, _stub, tmp_path):
        assert rank.pop("stubs") == [True, False]
        losses, state = rank.pop("losses"), rank.pop("state")
        assert state["state"] and losses[1] < losses[0]
        assert len(rank) == 3
        for name, resumed in rank.items():
            assert resumed["losses"] == losses, name
            assert_same_state(resumed["state"], state)


def _groups_without_parameters() -> list[tuple[int, int]]:
    import tiny_gpt

    trainer = tiny_gpt.build(
        tiny_gpt.Setup(pp=2, tied=False, optimizer={"decoupled_lr": 5e-3, "decoupled_min_lr": 5e-3})
    )
    trainer.train(2)
    return [(len(group["params"]), group["step"]) for group in trainer.optimizer.param_groups]


def test_param_groups_that_are_empty_on_a_rank_step_along() -> None:
    # Both stages see the groups of both; biases of the embedding group exist on neither.
    for groups in run_ranks(2, _groups_without_parameters):
        assert all(step == 2 for _, step in groups)
    assert len({len(groups) for groups in run_ranks(2, _groups_without_parameters)}) == 1


def _tied() -> dict[str, Any]:
    import tiny_gpt

    trainer = tiny_gpt.build(tiny_gpt.Setup(pp=2, tied=True))
    losses = trainer.train(4)
    weights = trainer.weights()
    (shared,) = [w for n, w in weights.items() if "word_embeddings" in n or "output_layer" in n]
    _, norm, _ = trainer.step()
    return {"losses": losses, "embedding": shared, "norm": norm}


def test_tied_embeddings_stay_equal_over_pipeline_stages() -> None:
    first, last = run_ranks(2, _tied)
    assert torch.equal(first["embedding"], last["embedding"])
    assert first["norm"] == last["norm"]


def _counts_tied_once() -> float:
    import tiny_gpt
    from exact_adamw import use_as_megatrons_adam

    use_as_megatrons_adam()
    return tiny_gpt.build(tiny_gpt.Setup(pp=2, tied=True, flash=None)).step()[1]


def _flash_norm() -> float:
    import tiny_gpt

    return tiny_gpt.build(tiny_gpt.Setup(pp=2, tied=True)).step()[1]


def test_shared_embedding_counts_once_in_the_gradient_norm() -> None:
    assert run_ranks(2, _flash_norm)[0] == pytest.approx(run_ranks(2, _counts_tied_once)[0], 2e-6)


def _loaded_as_undescribed(folder: Path, **options: Any) -> str:
    """Load with metadata of one's own, not the checkpoint's; returns what is said."""
    import checkpoints
    import tiny_gpt
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

    trainer = tiny_gpt.build(tiny_gpt.Setup(**options))
    checkpoints.save(trainer, folder, checkpoints.FULLY_RESHARDABLE)
    model = checkpoints.sharded_model(trainer)
    metadata = checkpoints.metadata_of(checkpoints.FULLY_RESHARDABLE)
    optimizer = trainer.optimizer.sharded_state_dict(model, is_loading=True, metadata=metadata)
    loaded = dist_checkpointing.load(
        {**model, "optimizer": optimizer}, str(folder), TorchDistLoadShardedStrategy()
    )
    with pytest.raises(ValueError) as refused:
        trainer.optimizer.load_state_dict(loaded["optimizer"])
    return str(refused.value)


@pytest.mark.parametrize("options", [{}, {"experts": 2, "ep": 2}], ids=["", "experts"])
def test_metadata_that_hides_flash_state_is_named(tmp_path: Path, options: dict[str, Any]) -> None:
    for message in run_ranks(2, _loaded_as_undescribed, tmp_path, **options):
        assert "holds flash optimizer state" in message
        assert "dist_checkpointing.load_content_metadata(folder)" in message
