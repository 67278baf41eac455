"""Replicas of a parameter stay equal bit for bit, under stochastic rounding too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks

from megatron_flashoptim import FlashOptimConfig

STOCHASTIC = FlashOptimConfig(rounding="stochastic", master_rounding="stochastic")


def _replicated_state(**options: Any) -> dict[str, Any]:
    """Train and return weight, correction and moments of parameters that tp does not split."""
    import tiny_gpt

    trainer = tiny_gpt.build(tiny_gpt.Setup(**options))
    trainer.train(6)
    (member,) = trainer.optimizer.chained_optimizers
    names = {p: n for n, p in trainer.model[0].named_parameters()}
    state = {}
    for item in member.shard_params:
        if getattr(item.param, "tensor_model_parallel", False) and options.get("tp", 1) > 1:
            continue
        shard = member.optimizer.shards[item.shard]
        elements = slice(item.start, item.end)
        groups = slice(item.start // 32, -(-item.end // 32))
        for name, tensor in [("param", shard.param), *shard.state()]:
            part = groups if name.endswith("scale") else elements
            state[names[item.param], item.param_start, name] = tensor[part].clone()
    return state


def _assert_equal(ours: dict[Any, torch.Tensor], theirs: dict[Any, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and ours
    for key, tensor in ours.items():
        assert torch.equal(tensor.view(torch.uint8), theirs[key].view(torch.uint8)), key


@pytest.mark.parametrize("case", ["stochastic", "beta2 0.999"])
def test_parameters_that_tensor_parallelism_copies_stay_equal(case: str) -> None:
    options: dict[str, Any] = {"tp": 2}
    if case == "stochastic":
        options["flash"] = STOCHASTIC
    else:
        options["optimizer"] = {"adam_beta2": 0.999}  # Megatron's default: auto is stochastic
    first, second = run_ranks(2, _replicated_state, **options)
    assert any("norm" in name for name, _, _ in first)
    _assert_equal(first, second)


def test_tied_embeddings_of_two_stages_stay_equal() -> None:
    embeddings = [
        {
            (start, kind): tensor
            for (name, start, kind), tensor in rank.items()
            if "word_embeddings" in name or "output_layer" in name
        }
        for rank in run_ranks(2, _replicated_state, pp=2, tied=True, flash=STOCHASTIC)
    ]
    _assert_equal(*embeddings)


def test_optimizer_instances_stay_equal() -> None:
    """Two instances of two ranks: ranks 0 and 2 own the same shard, and 1 and 3."""
    ranks = run_ranks(4, _replicated_state, instances=2, flash=STOCHASTIC)
    _assert_equal(ranks[0], ranks[2])
    _assert_equal(ranks[1], ranks[3])
    assert ranks[0].keys() != ranks[1].keys()
