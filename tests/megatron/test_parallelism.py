"""Every way Megatron splits a model: flash_adamw follows stock Adam on the same data.

Attention across context-parallel ranks is Transformer Engine's, which needs a GPU; here keys and
values are gathered (``context_parallel.py``), and layers of grouped experts multiply expert by
expert (``grouped_experts.py``); all else is Megatron's. With expert tensor parallelism tokens are
padded to a capacity, since gloo gathers equal sizes only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from follow import assert_follows, differences, follow
from mixed_precision import EXPERTS as MIXED_EXPERTS
from mixed_precision import MIXED
from ranks import run_ranks

SP = {"tp": 2, "sequence_parallel": True}
MTP = {"mtp": 1, "transformer": {"mtp_detach_heads": True}}  # which makes a norm group of its own
PADDED = {"moe_expert_capacity_factor": 2.0, "moe_pad_expert_input_to_capacity": True}


def _freeze_embedding(model: Any) -> None:
    model.embedding.requires_grad_(False)


def _freeze_first_stage(model: Any) -> None:
    if model.pre_process:
        model.requires_grad_(False)


def _freeze_mlps(model: Any) -> None:
    for name, param in model.named_parameters():
        if "linear_fc" in name:
            param.requires_grad_(False)


def _starve_expert(model: Any) -> None:
    """Let expert 3 get no token: its logit is never above those of experts 0 and 1."""
    for name, param in model.named_parameters():
        if name.endswith("router.weight"):
            with torch.no_grad():
                param[1] = -param[0]
                param[3] = param[0] * 0.01


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "data": (2, {}),
    "tensor and sequence": (2, {**SP}),
    "pipeline, tied embeddings": (2, {"pp": 2, "microbatches": 2}),
    "interleaved pipeline": (2, {"pp": 2, "vp": 2, "layers": 4, "microbatches": 2}),
    "tensor and interleaved pipeline": (
        4,
        {**SP, "pp": 2, "vp": 2, "layers": 4, "microbatches": 2},
    ),
    "data and context": (4, {"cp": 2}),
    "expert": (2, {"ep": 2, "experts": 4, "swiglu": True}),
    "experts of which one gets no token": (
        2,
        {"ep": 2, "experts": 4, "prepare_model": _starve_expert},
    ),
    "expert and interleaved pipeline": (
        4,
        {"pp": 2, "vp": 2, "layers": 4, "ep": 2, "experts": 4, "microbatches": 2},
    ),
    "dense stage, expert stage": (
        4,
        {"pp": 2, "ep": 2, "experts": 4, "moe_layers": [0, 1], "microbatches": 2},
    ),
    "grouped experts": (2, {"ep": 2, "experts": 4, "swiglu": True, "grouped": True}),
    "tensor, expert and expert tensor, grouped": (
        4,
        {**SP, "ep": 2, "etp": 2, "experts": 4, "grouped": True, "transformer": PADDED},
    ),
    "tensor, whole experts": (2, {**SP, "ep": 2, "etp": 1, "experts": 4}),
    "tensor, expert and expert tensor": (
        4,
        {**SP, "ep": 2, "etp": 2, "experts": 4, "transformer": PADDED},
    ),
    "fp32 norms, tensor and sequence": (2, {**SP, **MIXED}),
    "fp32 norms and routers, expert": (2, {**MIXED_EXPERTS, "ep": 2}),
    "optimizer instances": (4, {"instances": 2, "ep": 2, "experts": 4}),
    "frozen embedding": (2, {"tied": False, "prepare_model": _freeze_embedding}),
    "frozen MLPs, tensor and sequence": (2, {**SP, "prepare_model": _freeze_mlps}),
    "frozen pipeline stage": (
        2,
        {"pp": 2, "tied": False, "microbatches": 2, "prepare_model": _freeze_first_stage},
    ),
    "multi-token prediction, tensor and sequence": (2, {**SP, **MTP}),
    "multi-token prediction, pipeline, untied": (
        2,
        {**MTP, "pp": 2, "microbatches": 2, "tied": False},
    ),
    "multi-token prediction, interleaved pipeline": (
        2,
        {**MTP, "pp": 2, "vp": 2, "layers": 4, "microbatches": 2},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_norms_and_state_follow_stock(case: str) -> None:
    world_size, options = CASES[case]
    assert_follows(follow(world_size, **options), experts="experts" in options)


# Faults. Each replaces a method on purpose, which type checkers are told to ignore.


def _count_every_parameter() -> None:
    from megatron_flashoptim.megatron.distrib_optimizer import FlashDistributedOptimizer

    FlashDistributedOptimizer._counts_on_this_rank = lambda *_: True  # type: ignore[method-assign]


def _clip_nothing() -> None:
    from megatron_flashoptim.megatron.distrib_optimizer import FlashDistributedOptimizer

    FlashDistributedOptimizer.scale_to_norm = lambda *_: None  # type: ignore[method-assign]


def _clip_by_the_main_norm_alone() -> None:
    from megatron_flashoptim.megatron.chained import FlashChainedOptimizer

    FlashChainedOptimizer._compute_grad_norms_by_group = lambda *_: {}


def _put_all_in_the_main_norm() -> None:
    from megatron_flashoptim.megatron import versions

    versions.separate_grad_norm_groups = lambda: ()  # type: ignore[assignment]


def _keep_norms_local() -> None:
    from megatron_flashoptim.megatron.chained import FlashChainedOptimizer

    def local(chain: Any, norm_group: Any) -> torch.Tensor:
        members = chain.chained_optimizers
        return torch.stack([m.squared_grad_norm(norm_group) for m in members]).sum().sqrt()

    FlashChainedOptimizer._get_grad_norm_for_group = local  # type: ignore[method-assign]


def _decay_all_as_the_first_group() -> None:
    from megatron_flashoptim.optim import FlashOptimizer

    attach = FlashOptimizer.attach

    def one_group(self: Any, shards: Any, row_groups: Any, device: Any) -> None:
        attach(self, shards, [row_groups[0]] * len(row_groups), device)

    FlashOptimizer.attach = one_group  # type: ignore[method-assign]


def _scale_gradients_of_experts() -> None:
    from megatron_flashoptim.megatron.distrib_optimizer import FlashDistributedOptimizer

    reset = FlashDistributedOptimizer._copy_model_grads_to_main_grads

    def scaled(self: Any) -> None:
        reset(self)
        if any(not getattr(item.param, "allreduce", True) for item in self.shard_params):
            self.optimizer.table.grad_scale.mul_(1.25)

    FlashDistributedOptimizer._copy_model_grads_to_main_grads = scaled  # type: ignore[method-assign]


def _step_the_first_member_alone() -> None:
    from megatron_flashoptim.megatron.chained import FlashChainedOptimizer

    def first(self: Any) -> bool:
        return bool(self.chained_optimizers[0].step_with_ready_grads())

    FlashChainedOptimizer.step_with_ready_grads = first


def _forget_the_first_moment() -> None:
    from megatron_flashoptim.optim import FlashOptimizer

    step = FlashOptimizer.step

    def forgetful(self: Any, closure: None = None) -> None:
        for shard in self.shards:
            shard.exp_avg.zero_()
        step(self, closure)

    FlashOptimizer.step = forgetful  # type: ignore[method-assign]


FAULTS: dict[str, tuple[Callable[[], None], str, str]] = {
    "norms of tensor-parallel duplicates": (
        _count_every_parameter,
        "tensor and sequence",
        "norms at step 1",
    ),
    "tied embeddings counted twice": (
        _count_every_parameter,
        "pipeline, tied embeddings",
        "norms at step 1",
    ),
    "norm of one stage": (_keep_norms_local, "interleaved pipeline", "norms at step 1"),
    "no clipping": (_clip_nothing, "frozen embedding", "exp_avg"),
    "prediction heads clipped by the main norm": (
        _clip_by_the_main_norm_alone,
        "multi-token prediction, tensor and sequence",
        "exp_avg of 0.module.mtp",
    ),
    "prediction heads in the main norm": (
        _put_all_in_the_main_norm,
        "multi-token prediction, tensor and sequence",
        "norms at step 1",
    ),
    "weight decay on norms": (_decay_all_as_the_first_group, "data", "update"),
    "experts scaled by 5/4": (_scale_gradients_of_experts, "expert", "exp_avg"),
    "experts never stepped": (_step_the_first_member_alone, "expert", "exp_avg"),
    "no first moment": (_forget_the_first_moment, "data", "exp_avg"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_optimizer_does_not_follow(fault: str) -> None:
    break_flash, case, kind = FAULTS[fault]
    world_size, options = CASES[case]
    ranks = follow(world_size, break_flash, **options)
    found = differences(ranks, experts="experts" in options)
    assert any(line.startswith(kind) for line in found), found


def _loss(**options: Any) -> float:
    import tiny_gpt

    loss, _, _ = tiny_gpt.build(tiny_gpt.Setup(**options)).step(update=False)
    return loss


def test_context_parallel_ranks_see_the_whole_sequence() -> None:
    """The tests' own attention is right: the loss is that of one rank, up to bf16."""
    (alone,) = run_ranks(1, _loss)
    for split in run_ranks(2, _loss, cp=2):
        assert split == pytest.approx(alone, rel=1e-4)
