"""--flash-gradient-release: the same bits, in memory for a few buckets.

The pool is real memory behind addresses of several buckets, on CPU ranks too. Whatever a bucket
leaves in its slot is overwritten with NaN as soon as it is stepped, so that nothing can have read
it again, nor have counted on zeros.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from mixed_precision import MIXED
from ranks import run_ranks

OVERLAP = {"bucket_size": 10_000, "overlap": True}
ONLY_REDUCE = {"bucket_size": 10_000, "ddp": {"overlap_grad_reduce": True}}
CLIPPED = {"bucket_clip_grad": 0.2}
RECOMPUTED = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def _fuses_accumulation(model: Any) -> None:
    """Have linear layers write main_grad in their backward functions, as with Apex on a GPU.

    What Apex's extension computes there is computed by torch; the rest is Megatron's.
    """
    import types

    from megatron.core.tensor_parallel import layers

    def accumulate(total_input: Any, grad_output: Any, main_grad: Any) -> None:
        main_grad.add_(grad_output.t().matmul(total_input))

    layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(
        wgrad_gemm_accum_fp32=accumulate, wgrad_gemm_accum_fp16=accumulate
    )
    model.config.gradient_accumulation_fusion = True
    for module in model.modules():
        if hasattr(module, "gradient_accumulation_fusion"):
            module.gradient_accumulation_fusion = True


FUSED = {"prepare_model": _fuses_accumulation}
# Number of ranks, the model, and fields of FlashOptimConfig.
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "1 rank": (1, {**ONLY_REDUCE, "grads_in_fp32": False}, {}),
    "1 rank, param gather": (1, OVERLAP, {}),
    "2 ranks": (2, ONLY_REDUCE, {}),
    "2 ranks, untied, recomputed": (
        2,
        {**OVERLAP, "tied": False, "transformer": RECOMPUTED},
        {"master_bits": 16, "master_rounding": "stochastic", "rounding": "stochastic"},
    ),
    "2 ranks, param gather": (2, {**OVERLAP, "layers": 3}, {"release_slots": 2}),
    "2 ranks, clipped by bucket": (2, OVERLAP, CLIPPED),
    "experts, clipped by bucket": (2, {**OVERLAP, "ep": 2, "experts": 4}, CLIPPED),
    "tensor parallel, clipped by bucket": (2, {**ONLY_REDUCE, "tp": 2}, CLIPPED),
    "context parallel": (2, {**OVERLAP, "cp": 2}, {}),
    "optimizer instances": (2, {**OVERLAP, "instances": 2}, {}),
    "fused accumulation": (2, {**OVERLAP, **FUSED}, {"release_slots": 2}),
    "fused accumulation, recomputed, multi-token prediction": (
        1,
        {**ONLY_REDUCE, **FUSED, "mtp": 1, "transformer": RECOMPUTED},
        {},
    ),
    "fp32 norms": (1, {**ONLY_REDUCE, **MIXED, "grads_in_fp32": False}, {}),
    "multi-token prediction": (1, {**ONLY_REDUCE, "mtp": 1}, {}),
}
SMOKE = "2 ranks, param gather"
STEPS = 3


def _build(release: bool, model: dict[str, Any], flash: dict[str, Any]) -> Any:
    import tiny_gpt

    from megatron_flashoptim import FlashOptimConfig

    if not release:
        flash = {key: flash[key] for key in flash if key != "release_slots"}
    config = FlashOptimConfig(gradient_release=release, **flash)
    return tiny_gpt.build(tiny_gpt.Setup(flash=config, optimizer={"clip_grad": 0.0}, **model))


def _watched(release: Any) -> dict[str, list[int]]:
    """Poison what is stepped; note what was open, and stepped when the backward pass had ended."""
    import torch

    from megatron_flashoptim.megatron.release.bucket_group import State

    seen: dict[str, list[int]] = {"open": [], "stepped by then": []}
    step, open_, finish = release._step, release._open, release._finish_reduce

    def poisoned_step(entry: Any) -> None:
        step(entry)
        for bucket in entry.group.buckets:
            bucket.grad_data.fill_(torch.nan)

    def counted_open(entry: Any) -> None:
        open_(entry)
        seen["open"].append(sum(entry.state is State.OPEN for entry in release.groups))

    def counted_finish(entry: Any, force_all_reduce: bool = False) -> None:
        if entry is release.groups[0]:
            states = [entry.state for entry in release.groups]
            seen["stepped by then"].append(states.count(State.STEPPED))
        finish(entry, force_all_reduce)

    release._step, release._open = poisoned_step, counted_open
    for entry in release.groups:
        entry.group.finish_grad_sync = lambda force_all_reduce=False, entry=entry: counted_finish(
            entry, force_all_reduce
        )
    return seen


def _trained(release: bool, case: str) -> dict[str, Any]:
    import checkpoints

    _, model, flash = CASES[case]
    trainer = _build(release, model, flash)
    seen = _watched(trainer.optimizer.release) if release else {}
    found = {
        "steps": [trainer.step() for _ in range(STEPS)],
        "state": checkpoints.in_model_space(trainer),
        "everything": checkpoints.everything(trainer),
    }
    if release:
        pool = trainer.optimizer.release.pool
        regions = [r for entry in trainer.optimizer.release.groups for r in entry.regions]
        found["memory"] = {
            **seen,
            "buckets": len(regions),
            "whole": sum(region.nbytes for region in regions),
            "largest": max(region.num_chunks for region in regions) * pool.memory.chunk_bytes,
            "slots": len(pool.slots),
            "pool": pool.memory.nbytes,
            # On a GPU the pool's own count must do.
            "allocated": os.fstat(pool.memory.file).st_blocks * 512
            if hasattr(pool.memory, "file")
            else pool.memory.nbytes,
        }
    return found


def _both(case: str) -> dict[bool, dict[str, Any]]:
    """Train with and without release, one after the other in the same ranks."""
    return {release: _trained(release, case) for release in (True, False)}


@cache
def _runs(case: str) -> list[dict[bool, dict[str, Any]]]:
    return run_ranks(CASES[case][0], _both, case)


@pytest.mark.parametrize(
    "case",
    # One with every release of Megatron.
    [pytest.param(case, marks=pytest.mark.smoke if case == SMOKE else ()) for case in CASES],
)
def test_gradient_release_changes_no_bit(case: str) -> None:
    """Weights, masters, moments, losses, norms and zero counts; replicas stay equal."""
    from checkpoint_state import assert_same_state
    from checkpoints import joined

    for rank in _runs(case):
        assert rank[True]["steps"] == rank[False]["steps"]
        assert_same_state(rank[True]["everything"], rank[False]["everything"])
    joined([rank[True]["state"] for rank in _runs(case)])


@pytest.mark.parametrize("case", CASES)
def test_gradients_take_the_memory_of_a_few_buckets(case: str) -> None:
    for rank in _runs(case):
        memory = rank[True]["memory"]
        wanted = CASES[case][2].get("release_slots", 3)
        assert memory["buckets"] > wanted
        # The pool grows only for buckets that are open at the same time.
        assert memory["slots"] == max(wanted, *memory["open"])
        assert memory["pool"] <= memory["slots"] * memory["largest"]
        assert memory["allocated"] == memory["pool"], "memory of the system, not of a count"
        assert memory["pool"] < memory["whole"]
        # On CPU ranks the last one is put off until here.
        assert set(memory["stepped by then"]) <= {memory["buckets"] - 1, memory["buckets"]}
        assert len(memory["stepped by then"]) == STEPS


def _left_before_reductions(model: dict[str, Any], flash: dict[str, Any]) -> list[int]:
    """Return how many reduced buckets were not stepped yet when each reduction was dispatched."""
    import functools

    trainer = _build(True, model, flash)
    release = trainer.optimizer.release
    left: list[int] = []
    for entry in release.groups:
        start = entry.group.start_grad_sync.args[1]

        def counted(force_all_reduce: bool = False, start: Any = start) -> None:
            left.append(len(release._reduced))
            start(force_all_reduce=force_all_reduce)

        entry.group.start_grad_sync = functools.partial(release._reduce, entry, counted)
    trainer.step()
    assert len(left) == len(release.groups) > 3
    return left


def test_what_waits_for_collectives_is_stepped_before_the_next_reduction() -> None:
    """An all-reduce of norms, or of instances, would wait for that reduction otherwise."""
    instances = {**OVERLAP, "instances": 2}
    for ranks, model, flash in ((1, OVERLAP, CLIPPED), (2, instances, {})):
        for left in run_ranks(ranks, _left_before_reductions, model, flash):
            assert set(left) == {0}
    (beside,) = run_ranks(1, _left_before_reductions, OVERLAP, {})
    assert max(beside) == 1


def _trained_with(
    release: bool, model: dict[str, Any], prepare: Callable[[Any], None] = lambda trainer: None
) -> Any:
    import checkpoints

    trainer = _build(release, model, {})
    prepare(trainer)
    return [trainer.step() for _ in range(2)], checkpoints.everything(trainer)


def _assert_same(released: Any, plain: Any) -> None:
    from checkpoint_state import assert_same_state

    assert released[0] == plain[0]
    assert_same_state(released[1], plain[1])


def _does_not_finalize(trainer: Any) -> None:
    trainer.model[0].config.finalize_model_grads_func = None


def test_the_last_bucket_is_stepped_where_nobody_finalizes_gradients() -> None:
    one_bucket = {**ONLY_REDUCE, "bucket_size": 10**9}
    (released,) = run_ranks(1, _trained_with, True, one_bucket, _does_not_finalize)
    (plain,) = run_ranks(1, _trained_with, False, one_bucket)
    _assert_same(released, plain)


def _without_an_end() -> Any:
    trainer = _build(True, ONLY_REDUCE, {})
    _does_not_finalize(trainer)
    trainer.step(update=False)
    return trainer.optimizer.release.partial_step()


def test_a_whole_backward_pass_that_nobody_finalized_is_not_half_an_update() -> None:
    (problem,) = run_ranks(1, _without_an_end)
    assert "has stepped every bucket, and no optimizer.step() came after it" in problem


def _halves_gradients(trainer: Any) -> None:
    def halve(param: Any) -> None:
        param.grad.mul_(0.5)

    for param in trainer.model[0].parameters():
        param.register_post_accumulate_grad_hook(halve)


def _makes_embeddings_sparse(trainer: Any) -> None:
    import functools
    import types

    from megatron.core.tensor_parallel import layers

    functional = types.SimpleNamespace(**vars(layers.F))
    functional.embedding = functools.partial(layers.F.embedding, sparse=True)
    layers.F = functional
    layouts: set[Any] = set()
    weight = trainer.model[0].module.embedding.word_embeddings.weight
    weight.register_hook(lambda gradient: layouts.add(gradient.layout))
    step = trainer.step

    def sparse_step() -> Any:
        found = step()
        assert len(layouts) == 1 and "sparse" in str(layouts)
        return found

    trainer.step = sparse_step


@pytest.mark.parametrize("change", [_halves_gradients, _makes_embeddings_sparse])
def test_gradients_of_other_kinds_are_those_without_release(change: Any) -> None:
    """Changed by hooks that come after the release's own; of another layout."""
    untied = {**ONLY_REDUCE, "tied": False}
    (released,) = run_ranks(1, _trained_with, True, untied, change)
    (plain,) = run_ranks(1, _trained_with, False, untied, change)
    _assert_same(released, plain)
    if change is _halves_gradients:
        (without,) = run_ranks(1, _trained_with, False, untied)
        assert plain[0] != without[0]


def test_clipping_by_bucket_clips_each_bucket_by_its_own_norm() -> None:
    """A bound that no bucket reaches changes nothing; one that all exceed scales the gradient."""
    ((loose, tight, plain),) = run_ranks(1, _first_moments)
    assert loose["moments"] == plain["moments"]
    assert len(set(plain["norms"])) == len(plain["norms"]) > 3
    for before, after in zip(plain["norms"], tight["norms"], strict=True):
        # Of the first moment after one step: a tenth of the gradient, in 8 bits.
        assert before > 1.5 * 0.1 * 0.01
        assert after == pytest.approx(0.1 * 0.01, rel=0.02)
    assert tight["grad norm"] == plain["grad norm"], "the norm that is logged is not clipped"


def _first_moments() -> list[dict[str, Any]]:
    from megatron_flashoptim.codec import decode_exp_avg

    found = []
    for bound in (1e3, 0.01, 0.0):
        trainer = _build(False, ONLY_REDUCE, {"bucket_clip_grad": bound})
        norm = trainer.step()[1]
        (member,) = trainer.optimizer.chained_optimizers
        decoded = [decode_exp_avg(s.exp_avg, s.exp_avg_scale) for s in member.optimizer.shards]
        found.append(
            {
                "grad norm": norm,
                "norms": [float(m.norm()) for m in decoded],
                "moments": [m.tolist() for m in decoded],
            }
        )
    return found


def _coefficients(model: dict[str, Any]) -> tuple[float, list[float]]:
    from megatron_flashoptim.megatron import bucket_clipping

    bucket_clipping.parallel_state = None  # groups are the optimizer's, which may have its own
    trainer = _build(False, model, CLIPPED)
    norm = trainer.step()[1]
    (member,) = trainer.optimizer.chained_optimizers
    assert len(member.optimizer.shards) == 1
    return norm, member.optimizer.table.grad_scale.tolist()


@pytest.mark.parametrize("model", [{"tp": 2}, {}], ids=["tensor parallel", "data parallel"])
def test_of_a_single_bucket_the_norm_is_that_of_all_gradients(model: dict[str, Any]) -> None:
    """Copies on tensor-parallel ranks are counted once, shards on data-parallel ones all."""
    for norm, coefficients in run_ranks(2, _coefficients, model):
        assert norm > 1.0
        expected = CLIPPED["bucket_clip_grad"] / (norm + 1e-6)
        assert coefficients == pytest.approx([expected] * len(coefficients), rel=1e-5)


def test_megatrons_training_loop_saves_with_release_and_goes_on_without_it_the_same(
    corpus: Path, tmp_path: Path
) -> None:
    """Two iterations with release; two more with it, or resumed without: all tensors agree."""
    from pretraining import pretrain, saved_tensors

    flags = """--optimizer flash_adamw --overlap-grad-reduce --overlap-param-gather --clip-grad 0
    --ddp-bucket-size 10000 --rerun-mode disabled --train-iters 4 --eval-interval 2
    --save-interval 2 --flash-bucket-clip-grad 0.5""".split()
    released, resumed = tmp_path / "released", tmp_path / "resumed"
    trained = pretrain(corpus, *flags, "--flash-gradient-release", "--save", str(released))
    assert trained.keys() == {1, 2, 4}
    (released / "latest_checkpointed_iteration.txt").write_text("2")
    going_on = pretrain(corpus, *flags, "--load", str(released), "--save", str(resumed))
    assert going_on.keys() == {3, 4} and going_on[4] == trained[4]
    ours, theirs = (saved_tensors(folder / "iter_0000004") for folder in (released, resumed))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert (tensor == theirs[key]).all(), key
