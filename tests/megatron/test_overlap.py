"""Communication that overlaps with computation, padded or accumulated otherwise, changes no bit.

Each option is trained twice: against flash_adamw without it, bit for bit, and against stock Adam
with it. gloo's asynchronous collectives run in threads of their own, so that weights read before
their all-gather has arrived would show here as they would on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
from follow import assert_follows, follow
from ranks import run_ranks

VIRTUAL = {"pp": 2, "vp": 2, "layers": 4, "microbatches": 2}
BUCKETS = {"bucket_size": 30_000}  # several, so that one is computed on while others travel
EARLY = {"overlap_param_gather_with_optimizer_step": True}
# Number of ranks, the model, and the option.
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "grad reduce": (2, {**BUCKETS}, {"ddp": {"overlap_grad_reduce": True}}),
    "grad reduce, param gather": (2, {**BUCKETS, "microbatches": 2}, {"overlap": True}),
    "experts": (4, {**BUCKETS, "ep": 2, "experts": 4, "layers": 1}, {"overlap": True}),
    "optimizer instances": (4, {**BUCKETS, "instances": 2, "layers": 1}, {"overlap": True}),
    "interleaved pipeline": (4, {**BUCKETS, **VIRTUAL}, {"overlap": True}),
    "interleaved pipeline, aligned param gather": (
        4,
        {**BUCKETS, **VIRTUAL},
        {"overlap": True, "ddp": {"align_param_gather": True}},
    ),
    "param gather with optimizer step": (4, VIRTUAL, {"overlap": True, "optimizer": EARLY}),
    "aligned param gather with optimizer step": (
        4,
        VIRTUAL,
        {"overlap": True, "optimizer": EARLY, "ddp": {"align_param_gather": True}},
    ),
    "buckets padded for high busbw": (
        2,
        {**BUCKETS},
        {"overlap": True, "ddp": {"pad_buckets_for_high_nccl_busbw": True}},
    ),
    "reduce-scatter with fp32 accumulation": (
        2,
        {**BUCKETS, "grads_in_fp32": False},
        {"overlap": True, "ddp": {"reduce_scatter_with_fp32_accumulation": True}},
    ),
}


def _trained(steps: int, **options: Any) -> tuple[list[float], Any]:
    """Return losses, and this rank's weights and state in model space."""
    import checkpoints
    import tiny_gpt

    # Never clipped: the norm's fp32 sum depends on where buckets end.
    options["optimizer"] = {"clip_grad": 1e9, **options.get("optimizer", {})}
    trainer = tiny_gpt.build(tiny_gpt.Setup(**options))
    return trainer.train(steps), checkpoints.in_model_space(trainer)


def _assert_same_bits(
    world_size: int, model: dict[str, Any], option: dict[str, Any], steps: int = 4
) -> None:
    from checkpoints import assert_same, joined

    plain = run_ranks(world_size, _trained, steps, **model)
    with_option = run_ranks(world_size, _trained, steps, **model, **option)
    assert [losses for losses, _ in with_option] == [losses for losses, _ in plain]
    ours, theirs = (joined([pieces for _, pieces in ranks]) for ranks in (with_option, plain))
    assert_same(ours, theirs)


@pytest.mark.parametrize("case", CASES)
def test_option_changes_no_bit(case: str) -> None:
    _assert_same_bits(*CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_option_follows_stock(case: str) -> None:
    world_size, model, option = CASES[case]
    assert_follows(follow(world_size, **model, **option), experts="experts" in model)


def test_experts_are_stepped_before_the_first_chunk_is_gathered() -> None:
    """Stock is no reference: it gathers experts of the first chunk before it steps them."""
    experts = {"ep": 2, "experts": 4}
    option = {"overlap": True, "optimizer": EARLY}
    _assert_same_bits(8, {**VIRTUAL, **experts}, option, steps=3)
