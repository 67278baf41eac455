"""--flash-early-param-gather: the same bits, gathered within the step, each bucket once.

gloo gathers in threads of its own, so that a bucket sent before it is stepped would show here.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

BUCKETS = {"bucket_size": 10_000, "overlap": True}
ALIGNED = {"align_param_gather": True}
VIRTUAL = {"pp": 2, "vp": 2, "layers": 4, "microbatches": 2}
# Number of ranks, the model, and the fewest bucket groups of a rank that make the case one.
CASES: dict[str, tuple[int, dict[str, Any], int]] = {
    "2 ranks": (2, {**BUCKETS, "microbatches": 2}, 4),
    "4 ranks": (4, {**BUCKETS, "layers": 1}, 3),
    "experts": (4, {**BUCKETS, "ep": 2, "experts": 4, "layers": 1}, 4),
    "optimizer instances": (4, {**BUCKETS, "instances": 2, "layers": 1}, 3),
    "interleaved pipeline": (4, {**BUCKETS, **VIRTUAL}, 2),
    "interleaved pipeline, aligned, experts": (
        4,
        {**BUCKETS, **VIRTUAL, "ddp": ALIGNED, "ep": 2, "experts": 4},
        4,
    ),
}


def _build(early: bool, model: dict[str, Any]) -> Any:
    import tiny_gpt

    from megatron_flashoptim import FlashOptimConfig

    return tiny_gpt.build(tiny_gpt.Setup(flash=FlashOptimConfig(early_param_gather=early), **model))


Event = tuple[str, int]


@contextmanager
def _watched(trainer: Any) -> Iterator[list[Event]]:
    """Collect, in order, launches and dispatched gathers, by the number of the bucket group."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

    from megatron_flashoptim.optim import FlashOptimizer

    groups = _groups(trainer)
    group_of = {id(bucket): n for n, group in enumerate(groups) for bucket in group.buckets}
    number_of = {
        (id(member.optimizer), index): group_of[id(bucket)]
        for member in trainer.optimizer.chained_optimizers
        for index, bucket in enumerate(member.shard_buckets)
    }
    events: list[Event] = []
    launch, gather = FlashOptimizer.launch, _ParamAndGradBucketGroup.start_param_sync

    def watched_launch(self: Any, index: int) -> None:
        events.append(("launch", number_of[id(self), index]))
        launch(self, index)

    def watched_gather(self: Any, force_sync: bool = False) -> None:
        events.append(("forced" if force_sync else "gather", groups.index(self)))
        gather(self, force_sync)

    FlashOptimizer.launch = watched_launch
    _ParamAndGradBucketGroup.start_param_sync = watched_gather
    try:
        yield events
    finally:
        FlashOptimizer.launch = launch
        _ParamAndGradBucketGroup.start_param_sync = gather


def _groups(trainer: Any) -> list[Any]:
    return [g for c in trainer.model for g in (*c.bucket_groups, *c.expert_parallel_bucket_groups)]


def _order_of_use(trainer: Any) -> list[int]:
    """Return the bucket groups as a forward pass first uses them, seen by hooks of modules."""
    seen: list[int] = []
    number = {p: n for n, group in enumerate(_groups(trainer)) for p in group.params}

    def used(module: Any, *_: Any) -> None:
        for param in module.parameters(recurse=False):
            if number[param] not in seen:
                seen.append(number[param])

    modules = [module for chunk in trainer.model for module in chunk.module.modules()]
    handles = [module.register_forward_pre_hook(used) for module in modules]
    trainer.step()
    for handle in handles:
        handle.remove()
    return seen


def _trained(early: bool, model: dict[str, Any]) -> dict[str, Any]:
    """Train four steps; with a skipped one and an evaluation's gather among them."""
    import checkpoints

    # DDP's sign that somebody else dispatches what it would.
    warnings.filterwarnings("error", message=".*all-gather operation has already been dispatched")
    trainer = _build(early, model)
    in_use = _order_of_use(trainer)
    with _watched(trainer) as events:
        steps, forwards, losses, waits_only = [], [], [], []
        for number in range(3):
            del events[:]
            losses.append(trainer.step(update=False)[0])
            forwards.append(list(events))
            del events[:]
            skipped = number == 1
            for member in trainer.optimizer.chained_optimizers:
                member.config.grad_norm_skip_threshold = 0.0 if skipped else float("inf")
            success, _, _ = trainer.optimizer.step()
            assert success is not skipped
            steps.append(list(events))
            waits_only.append(trainer.model[0].overlap_param_gather_with_optimizer_step)
        trainer.sync_params()  # as before an evaluation
        del events[:]
        losses.append(trainer.step(update=False)[0])
        forwards.append(list(events))
    return {
        "losses": losses,
        "forwards": forwards,
        "steps": steps,
        "forward pass only waits": waits_only,
        "in use": in_use,
        "state": checkpoints.in_model_space(trainer),
    }


@cache
def _runs(case: str, early: bool) -> list[dict[str, Any]]:
    world_size, model, _ = CASES[case]
    return run_ranks(world_size, _trained, early, model)


@pytest.mark.parametrize("case", CASES)
def test_early_gather_changes_no_bit(case: str) -> None:
    from checkpoints import assert_same, joined

    early, late = _runs(case, True), _runs(case, False)
    assert [rank["losses"] for rank in early] == [rank["losses"] for rank in late]
    assert_same(*(joined([rank["state"] for rank in ranks]) for ranks in (early, late)))


@pytest.mark.parametrize("case", CASES)
def test_a_group_is_gathered_once_behind_its_launches_in_the_order_of_use(case: str) -> None:
    for early, late in zip(_runs(case, True), _runs(case, False), strict=True):
        every = sorted(early["in use"])
        assert len(every) >= CASES[case][2]
        for step in (0, 2):
            events = early["steps"][step]
            gathers = [group for what, group in events if what == "gather"]
            assert sorted(gathers) == every
            # Of a dense and an expert bucket, or of two chunks, either may come first.
            if case in ("2 ranks", "4 ranks", "optimizer instances"):
                assert gathers == early["in use"]
            assert events == _each_behind_its_launches(events)
            assert {what for what, _ in late["steps"][step]} == {"launch"}
        # Forward passes: after a step, after a step, after the skipped one, after an evaluation.
        for forward in (0, 1, 3):
            assert early["forwards"][forward] == []
            gathered = [group for what, group in late["forwards"][forward] if what == "gather"]
            # An aligned schedule gathers again what the evaluation had gathered.
            kept = forward == 3 and "aligned" not in case
            assert sorted(gathered) == ([] if kept else every)


def _each_behind_its_launches(events: list[Event]) -> list[Event]:
    """Return the events of a step so that all launches of a group come right before its gather."""
    ordered: list[Event] = []
    for what, group in events:
        if what == "gather":
            ordered += [event for event in events if event == ("launch", group)]
            ordered.append((what, group))
    return ordered


@pytest.mark.parametrize("case", CASES)
def test_a_skipped_step_gathers_nothing_and_leaves_it_to_the_forward_pass(case: str) -> None:
    for early, late in zip(_runs(case, True), _runs(case, False), strict=True):
        assert early["steps"][1] == []
        # Else the forward pass would gather one bucket at a time, as it comes to it.
        assert early["forward pass only waits"] == [True, False, True]
        assert late["forward pass only waits"] == [False, False, False]
        assert early["forwards"][2] == late["forwards"][2]
        assert sorted(group for _, group in early["forwards"][2]) == sorted(early["in use"])


def _several_buckets_in_a_group() -> list[Event]:
    """One bucket group of an fp32 and a bf16 buffer, whose gathers Megatron coalesces."""
    import torch

    def in_fp32(model: Any) -> None:
        for name, param in model.named_parameters():
            if "layernorm" in name:
                param.data = param.data.float()

    def follow_the_input(model: Any) -> None:
        in_fp32(model)
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.register_forward_pre_hook(lambda _, args: (args[0].float(),))
                module.register_forward_hook(lambda *args: args[2].to(torch.bfloat16))

    model = {
        "overlap": True,
        "pp": 2,
        "vp": 2,
        "layers": 4,
        "microbatches": 2,
        "prepare_model": follow_the_input,
    }
    trainer = _build(True, model)
    trainer.step()
    with _watched(trainer) as events:
        trainer.step()
        trainer.step()
    return events


def test_a_group_of_several_buckets_is_gathered_behind_the_last() -> None:
    for events in run_ranks(2, _several_buckets_in_a_group):
        launches = [number for what, number in events if what == "launch"]
        half = len(events) // 2
        assert events[:half] == events[half:]
        assert len(launches) > 2 * len(set(launches)), "a group must have several buckets"
        assert events[:half] == _each_behind_its_launches(events[:half])


def _resumed(early: bool, load: bool, folder: Path) -> dict[str, Any]:
    import checkpoints

    trainer = _build(early, CASES["2 ranks"][1])
    if load:
        checkpoints.load(trainer, folder)
    else:
        trainer.train(2)
        checkpoints.save(trainer, folder)
    return {"losses": trainer.train(2), **checkpoints.everything(trainer)}


def test_saved_with_gathers_in_flight_and_resumed_with_the_same_bits(tmp_path: Path) -> None:
    """Resumed without early gather from a checkpoint with it: nothing of it is saved."""
    import torch

    went_on = run_ranks(2, _resumed, True, False, tmp_path)
    for early in (True, False):
        for ours, expected in zip(
            run_ranks(2, _resumed, early, True, tmp_path), went_on, strict=True
        ):
            assert ours["losses"] == expected["losses"]
            for kind in ("weights", "state"):
                for name, tensor in expected[kind].items():
                    assert torch.equal(ours[kind][name], tensor), name


def test_megatrons_training_loop_trains_evaluates_and_saves_the_same(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first iteration has no forward hooks; it logs the norm of weights in flight."""
    from pretraining import pretrain, saved_tensors

    from megatron_flashoptim.megatron.early_gather import EarlyGather

    launch_and_gather = EarlyGather.launch_and_gather

    def recorded(self: Any) -> None:
        with open(tmp_path / "steps", "a") as file:
            file.write("step\n")
        launch_and_gather(self)

    monkeypatch.setattr(EarlyGather, "launch_and_gather", recorded)  # in the forks, too
    flags = """--optimizer flash_adamw --overlap-grad-reduce --overlap-param-gather
    --ddp-bucket-size 10000 --train-iters 6 --eval-interval 2 --save-interval 3""".split()
    late, early = tmp_path / "late", tmp_path / "early"
    printed = [
        pretrain(corpus, *flags, "--save", str(late)),
        pretrain(corpus, *flags, "--save", str(early), "--flash-early-param-gather"),
    ]
    assert printed[0].keys() >= {2, 4, 6}
    assert printed[0] == printed[1]
    assert (tmp_path / "steps").read_text().count("step") == 2 * 6, "on both ranks, in one run"
    ours, theirs = (saved_tensors(folder / "iter_0000006") for folder in (early, late))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert (tensor == theirs[key]).all(), key


def _stepped_twice() -> bool:
    """Step again before any forward pass has waited for the gathers; as with unused weights."""
    import torch

    trainer = _build(True, BUCKETS)
    twin = {}
    trainer.step()
    assert all(group.param_gather_handle is not None for group in _groups(trainer))
    assert trainer.optimizer.step()[0]
    for name, weight in trainer.weights().items():
        others = [torch.empty_like(weight) for _ in range(2)]
        torch.distributed.all_gather(others, weight)
        twin[name] = torch.equal(*others)
    return bool(twin) and all(twin.values())


def test_a_step_waits_for_gathers_that_no_forward_pass_has_waited_for() -> None:
    assert run_ranks(2, _stepped_twice) == [True, True]


REFUSED: dict[str, dict[str, Any]] = {
    "add --overlap-param-gather": {},
    "--overlap-param-gather-with-optimizer-step": {
        "overlap": True,
        "optimizer": {"overlap_param_gather_with_optimizer_step": True},
    },
    "--optimizer-cuda-graph": {
        "overlap": True,
        "optimizer": {"optimizer_cuda_graph": True, "log_num_zeros_in_grad": False},
    },
    "--cuda-graph-impl": {"overlap": True, "transformer": {"cuda_graph_impl": "full_iteration"}},
}


def _timed_launches() -> list[bool]:
    """Return for each launch of a step whether the timer of the inner step was running."""
    from megatron.core.timers import Timers

    from megatron_flashoptim.optim import FlashOptimizer

    trainer = _build(True, BUCKETS)
    timers = trainer.optimizer.config.timers = Timers(1, "minmax")
    launch, running = FlashOptimizer.launch, []

    def watched(self: Any, index: int) -> None:
        running.append(timers("optimizer-inner-step")._started)
        launch(self, index)

    FlashOptimizer.launch = watched
    trainer.step()
    FlashOptimizer.launch = launch
    return running


def test_launches_are_within_the_timer_of_the_inner_step() -> None:
    for running in run_ranks(2, _timed_launches):
        assert len(running) >= 4 and all(running)


def _refusal(model: dict[str, Any]) -> str:
    try:
        _build(True, model)
    except ValueError as problem:
        return str(problem)
    return ""


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_gathered_early_is_refused(message: str) -> None:
    (problem,) = run_ranks(1, _refusal, REFUSED[message])
    assert problem.startswith("--flash-early-param-gather cannot be used with ")
    assert message in problem
