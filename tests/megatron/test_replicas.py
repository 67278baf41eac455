"""Replicas of a parameter stay equal bit for bit, under stochastic rounding too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mixed_precision import MIXED
from ranks import run_ranks

from megatron_flashoptim import FlashOptimConfig

STOCHASTIC = FlashOptimConfig(rounding="stochastic", master_rounding="stochastic")


def _everything(counts: Callable[[torch.nn.Parameter], bool], **options: Any) -> dict[Any, Any]:
    """Train and return weight, correction and moments of what counts, by place and name."""
    import tiny_gpt

    trainer = tiny_gpt.build(tiny_gpt.Setup(**options))
    trainer.train(6)
    names = {
        param: "shared_embedding"
        if getattr(param, "shared_embedding", False)
        else f"{chunk}.{name}"
        for chunk, module in enumerate(trainer.model)
        for name, param in module.named_parameters()
    }
    state = {}
    for member in trainer.optimizer.chained_optimizers:
        for item in member.shard_params:
            if not counts(item.param):
                continue
            shard = member.optimizer.shards[item.shard]
            elements = slice(item.start, item.end)
            groups = slice(item.start // 32, -(-item.end // 32))
            for name, tensor in [("param", shard.param), *shard.state()]:
                part = groups if name.endswith("scale") else elements
                state[names[item.param], item.param_start, name] = tensor[part].clone()
    return state


def _is_copied_by_tensor_parallelism(param: torch.nn.Parameter) -> bool:
    is_expert = not getattr(param, "allreduce", True)
    return not is_expert and not getattr(param, "tensor_model_parallel", False)


def _is_shared_embedding(param: torch.nn.Parameter) -> bool:
    return bool(getattr(param, "shared_embedding", False))


def _assert_equal(ours: dict[Any, torch.Tensor], theirs: dict[Any, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and ours
    for key, tensor in ours.items():
        assert torch.equal(tensor.view(torch.uint8), theirs[key].view(torch.uint8)), key


SP = {"tp": 2, "sequence_parallel": True}
COPIES: dict[str, dict[str, Any]] = {
    "stochastic": {"tp": 2, "flash": STOCHASTIC},
    "beta2 0.999": {"tp": 2, "optimizer": {"adam_beta2": 0.999}},  # for which auto is stochastic
    "sequence parallel": {**SP, "flash": STOCHASTIC},
    "sequence parallel, fp32 norms": {**SP, **MIXED, "flash": STOCHASTIC},
    "sequence parallel, whole experts": {
        **SP,
        **{"ep": 2, "etp": 1, "experts": 4, "flash": STOCHASTIC},
    },
}


@pytest.mark.parametrize("case", COPIES)
def test_parameters_that_tensor_parallelism_copies_stay_equal(case: str) -> None:
    first, second = run_ranks(2, _everything, _is_copied_by_tensor_parallelism, **COPIES[case])
    assert any("norm" in name for name, _, _ in first)
    _assert_equal(first, second)


VIRTUAL = {"vp": 2, "layers": 4, "microbatches": 2}
SHARED: dict[str, dict[str, Any]] = {
    "tied": {},
    "tied, virtual stages": VIRTUAL,
    "untied, copied for prediction heads": {"mtp": 1, "tied": False, **VIRTUAL},
}


@pytest.mark.parametrize("case", SHARED)
def test_embeddings_shared_by_two_stages_stay_equal(case: str) -> None:
    options = {"pp": 2, "flash": STOCHASTIC, **SHARED[case]}
    _assert_equal(*run_ranks(2, _everything, _is_shared_embedding, **options))


@pytest.mark.parametrize("experts", [{}, {"ep": 2, "experts": 4}], ids=["dense", "experts"])
def test_optimizer_instances_stay_equal(experts: dict[str, Any]) -> None:
    """Two instances of two ranks: ranks 0 and 2 own the same shard, and 1 and 3."""
    options = {"instances": 2, "flash": STOCHASTIC, "layers": 1, **experts}
    ranks = run_ranks(4, _everything, lambda _: True, **options)
    _assert_equal(ranks[0], ranks[2])
    _assert_equal(ranks[1], ranks[3])
    assert ranks[0].keys() != ranks[1].keys()
    assert any("local_experts" in name for name, _, _ in ranks[0]) == bool(experts)
