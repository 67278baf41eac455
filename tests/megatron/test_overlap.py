"""Communication that overlaps with computation, padded or accumulated otherwise, changes no bit.

Each option is trained twice: against flash_adamw without it, bit for bit, and against stock Adam
with it. gloo's asynchronous collectives run in threads of their own, so that weights read before
their all-gather has arrived would show here as they would on a GPU.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from follow import assert_follows, follow
from ranks import run_ranks

VIRTUAL = {"pp": 2, "vp": 2, "layers": 4, "microbatches": 2}
BUCKETS = {"bucket_size": 30_000}  # several, so that one is computed on while others travel
EARLY = {"overlap_param_gather_with_optimizer_step": True}
# Number of ranks, the model, the option, and which of ``_facts`` it changes.
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], str]] = {
    "grad reduce": (2, BUCKETS, {"ddp": {"overlap_grad_reduce": True}}, "buckets"),
    "grad reduce, param gather": (
        2,
        {**BUCKETS, "microbatches": 2},
        {"overlap": True},
        "gathers in the forward pass",
    ),
    "experts": (
        4,
        {**BUCKETS, "ep": 2, "experts": 4, "layers": 1},
        {"overlap": True},
        "gathers in the forward pass",
    ),
    "optimizer instances": (
        4,
        {**BUCKETS, "instances": 2, "layers": 1},
        {"overlap": True},
        "buckets",
    ),
    "interleaved pipeline": (4, {**BUCKETS, **VIRTUAL}, {"overlap": True}, "buckets"),
    "interleaved pipeline, aligned param gather": (
        4,
        {**BUCKETS, **VIRTUAL},
        {"overlap": True, "ddp": {"align_param_gather": True}},
        "gathers by the schedule",
    ),
    "param gather with optimizer step": (
        4,
        VIRTUAL,
        {"overlap": True, "optimizer": EARLY},
        "chunks in flight after a step",
    ),
    "aligned param gather with optimizer step": (
        4,
        VIRTUAL,
        {"overlap": True, "optimizer": EARLY, "ddp": {"align_param_gather": True}},
        "chunks in flight after a step",
    ),
    "buckets padded for high busbw": (
        2,
        BUCKETS,
        {"overlap": True, "ddp": {"pad_buckets_for_high_nccl_busbw": True}},
        "padded to 2^16",
    ),
    "reduce-scatter with fp32 accumulation": (
        2,
        {**BUCKETS, "grads_in_fp32": False},
        {"overlap": True, "ddp": {"reduce_scatter_with_fp32_accumulation": True}},
        "reduce-scatter",
    ),
    # Gradients of experts are scaled before the collective then. All factors are powers of 2.
    "average in the collective": (
        4,
        {"ep": 2, "experts": 4, "layers": 1},
        {"ddp": {"average_in_collective": True}},
        "scaling before the collective",
    ),
}


def _facts(trainer: Any) -> dict[str, Any]:
    """Return what shows that an option is in force, after a step."""
    from megatron.core.distributed import param_and_grad_buffer

    groups = [c.bucket_groups + c.expert_parallel_bucket_groups for c in trainer.model]
    sizes = [b.grad_data.numel() for chunk in groups for g in chunk for b in g.buckets]
    return {
        "buckets": len(sizes),
        "padded to 2^16": all(size % 2**16 == 0 for size in sizes),
        "scaling before the collective": trainer.model[0].buffers[0].gradient_scaling_factor,
        "gathers in the forward pass": trainer.model[0].use_forward_hook,
        "gathers by the schedule": trainer.model[0].config.param_sync_func is not None,
        "chunks in flight after a step": [
            any(group.param_gather_handle is not None for group in chunk) for chunk in groups
        ],
        "reduce-scatter": param_and_grad_buffer.dist_reduce_scatter_func.__name__,
    }


def _trained(steps: int, **options: Any) -> tuple[list[float], Any, dict[str, Any]]:
    """Return losses, this rank's weights and state in model space, and facts."""
    import checkpoints
    import tiny_gpt

    # Never clipped: the norm's fp32 sum depends on where buckets end.
    options["optimizer"] = {"clip_grad": 1e9, **options.get("optimizer", {})}
    trainer = tiny_gpt.build(tiny_gpt.Setup(**options))
    losses, facts = trainer.train(steps), _facts(trainer)
    return losses, checkpoints.in_model_space(trainer), facts


@cache
def _without_option(world_size: int, steps: int, model: tuple[tuple[str, Any], ...]) -> list[Any]:
    return run_ranks(world_size, _trained, steps, **dict(model))


def _assert_same_bits(
    world_size: int, model: dict[str, Any], option: dict[str, Any], fact: str, steps: int = 4
) -> None:
    from checkpoints import assert_same, joined

    plain = _without_option(world_size, steps, tuple(sorted(model.items())))
    with_option = run_ranks(world_size, _trained, steps, **model, **option)
    assert with_option[0][2][fact] != plain[0][2][fact], "the option must be in force"
    assert [losses for losses, _, _ in with_option] == [losses for losses, _, _ in plain]
    ours, theirs = (joined([pieces for _, pieces, _ in ranks]) for ranks in (with_option, plain))
    assert_same(ours, theirs)


@pytest.mark.parametrize("case", CASES)
def test_option_changes_no_bit(case: str) -> None:
    _assert_same_bits(*CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_option_follows_stock(case: str) -> None:
    world_size, model, option, _ = CASES[case]
    assert_follows(follow(world_size, **model, **option), experts="experts" in model)


def test_gradients_accumulated_in_fp32_beside_bf16_buffers_follow_stock() -> None:
    """Bits change here: that is what the option is for."""
    patterns = {"param_name_patterns_for_fp32_local_accumulation": ("*linear*",)}
    model = {**BUCKETS, "grads_in_fp32": False, "microbatches": 4}
    (with_option, _, _), *_ = run_ranks(2, _trained, 3, **model, ddp=patterns)
    (without, _, _), *_ = run_ranks(2, _trained, 3, **model)
    assert with_option[1:] != without[1:], "the option must be in force"
    assert_follows(follow(2, **model, overlap=True, ddp=patterns))


def test_experts_are_stepped_before_the_first_chunk_is_gathered() -> None:
    """Stock is no reference: it gathers experts of the first chunk before it steps them."""
    experts = {"ep": 2, "experts": 4}
    option = {"overlap": True, "optimizer": EARLY}
    fact = "chunks in flight after a step"
    _assert_same_bits(8, {**VIRTUAL, **experts}, option, fact, steps=3)
