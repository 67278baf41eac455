"""State and gradient buffers away during RL inference, as Megatron's RL loop moves them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks


def _state(trainer: Any) -> list[torch.Tensor]:
    return [
        tensor
        for member in trainer.optimizer.chained_optimizers
        for shard in member.optimizer.shards
        for _, tensor in shard.state()
    ]


def _train_around_inference(options: dict[str, Any], offloads: bool) -> dict[str, Any]:
    import tiny_gpt

    trainer = tiny_gpt.build(tiny_gpt.Setup(**options))
    trainer.train(2)
    if offloads:
        before, weights = [tensor.clone() for tensor in _state(trainer)], trainer.weights()
        allocated = torch.cuda.memory_allocated()
        # The order of megatron.rl: gradients, then optimizer; back in the same order.
        for chunk in trainer.model:
            if hasattr(chunk, "offload_grad_buffers"):  # from 0.18 on
                chunk.offload_grad_buffers()
        trainer.optimizer.offload_to_cpu()
        assert {tensor.device.type for tensor in _state(trainer)} == {"cpu"}
        if torch.cuda.is_available():
            freed = allocated - torch.cuda.memory_allocated()
            assert freed >= sum(tensor.nbytes for tensor in before)
        for name, weight in trainer.weights().items():
            assert torch.equal(weight, weights[name]), "inference uses the weights"
        with pytest.raises(RuntimeError, match="to the CPU; call optimizer"):
            trainer.optimizer.step()
        for chunk in trainer.model:
            if hasattr(chunk, "restore_grad_buffers"):
                chunk.restore_grad_buffers()
        trainer.optimizer.restore_from_cpu()
        assert all(map(torch.equal, before, _state(trainer)))
        assert {t.device for t in _state(trainer)} == {p.device for p in weights.values()}
    losses = trainer.train(2)
    steps = [group["step"] for group in trainer.optimizer.param_groups]
    return {"losses": losses, "state": [*trainer.weights().values(), *_state(trainer)], "at": steps}


@pytest.mark.parametrize(
    "options",
    [{}, {"experts": 4, "ep": 2, "overlap": True}],
    ids=["dense", "experts, overlap"],
)
def test_training_goes_on_bitwise_after_offload_and_restore(options: dict[str, Any]) -> None:
    stayed = run_ranks(2, _train_around_inference, options, offloads=False)
    moved = run_ranks(2, _train_around_inference, options, offloads=True)
    for there, back in zip(stayed, moved, strict=True):
        assert there["losses"] == back["losses"] and there["at"] == back["at"]
        assert all(map(torch.equal, there["state"], back["state"]))
