"""--flash-gradient-release: what it refuses, and a backward pass that breaks in the middle."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_gradient_release import ONLY_REDUCE, OVERLAP, _build, _fuses_accumulation

MODEL = {**ONLY_REDUCE, "layers": 1}


class _Broken(Exception):
    """What the tests raise in a backward pass."""


def _raised(body: Callable[[], Any]) -> str:
    """Return type and message of what a call raises; empty if nothing."""
    try:
        body()
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return ""


@contextmanager
def _breaking(trainer: Any, bucket: int | None = None) -> Iterator[None]:
    """Break backward passes in a bucket, or at a parameter of the middle."""
    (chunk,) = trainer.model
    param = next(p for name, p in chunk.named_parameters() if "linear_qkv.weight" in name)
    if bucket is not None:
        param = next(iter(trainer.optimizer.release.groups[bucket].names))

    def fail(_: Any) -> None:
        raise _Broken("here")

    handle = param.register_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def _stepped(trainer: Any) -> list[bool]:
    """Return for each shard whether its bucket has been stepped in this iteration."""
    from megatron_flashoptim.megatron.release.bucket_group import State

    state_of = {launch: e.state for e in trainer.optimizer.release.groups for launch in e.launches}
    (member,) = trainer.optimizer.chained_optimizers
    return [state_of[member, index] is State.STEPPED for index in range(len(member.shard_buckets))]


def _shards(trainer: Any) -> list[list[Any]]:
    (member,) = trainer.optimizer.chained_optimizers
    return [
        [shard.param.clone(), *(tensor.clone() for _, tensor in shard.state())]
        for shard in member.optimizer.shards
    ]


def _changed(before: list[list[Any]], after: list[list[Any]]) -> list[bool]:
    return [
        any((one != other).any() for one, other in zip(*shards, strict=True))
        for shards in zip(before, after, strict=True)
    ]


def _broken(folder: Path) -> dict[str, Any]:
    """Break the second step; be refused; load the state of after the first and train on.

    What it must come to is that of a trainer which leaves finalizing to ``optimizer.step()``.
    """
    import checkpoints

    model = {**MODEL, **OVERLAP}
    trainer = _build(True, model, {})
    trainer.step()
    checkpoints.save(trainer, folder)
    whole = _build(True, model, {})
    checkpoints.load(whole, folder)
    whole.model[0].config.finalize_model_grads_func = None
    expected = [whole.step() for _ in range(2)], checkpoints.everything(whole)
    before = _shards(trainer)
    with _breaking(trainer):
        broken = _raised(trainer.step)
    stepped = _stepped(trainer)
    changed = _changed(before, _shards(trainer))
    refused = {
        "step": _raised(trainer.optimizer.step),
        "next": _raised(trainer.step),
        "save": _raised(lambda: checkpoints.save(trainer, folder / "other")),
        "legacy": _raised(lambda: checkpoints.save(trainer, folder / "other", checkpoints.LEGACY)),
    }
    unchanged = not any(_changed(_shards(trainer), _shards(trainer)))
    checkpoints.load(trainer, folder)
    early: list[Any] = []
    with _breaking(trainer, bucket=1):
        early.append(_raised(trainer.step))
    states = [entry.state.name for entry in trainer.optimizer.release.groups]
    early += [states.count("REDUCED"), states.count("STEPPED")]
    loaded = [trainer.step() for _ in range(2)], checkpoints.everything(trainer)
    return {
        "broken": broken,
        "early": early,
        "stepped": stepped,
        "changed": changed,
        "refused": refused,
        "unchanged": unchanged,
        "expected": expected,
        "loaded": loaded,
    }


def test_a_half_applied_update_is_seen_refused_and_undone_by_loading(tmp_path: Path) -> None:
    from checkpoint_state import assert_same_state

    for rank in run_ranks(2, _broken, tmp_path):
        assert rank["broken"] == "_Broken: here"
        assert rank["changed"] == rank["stepped"]
        assert any(rank["stepped"]) and not all(rank["stepped"])
        count = f"{sum(rank['stepped'])} of {len(rank['stepped'])} buckets stepped"
        for problem in rank["refused"].values():
            assert problem.startswith("RuntimeError: --flash-gradient-release: a backward pass")
            assert count in problem
        assert "--flash-accept-partial-step" in rank["refused"]["next"]
        assert "--flash-accept-partial-step" in rank["refused"]["step"]
        assert "not saved" in rank["refused"]["save"]
        # A bucket was reduced and none stepped, so that training goes on from before.
        assert rank["early"] == ["_Broken: here", 1, 0]
        assert rank["loaded"][0] == rank["expected"][0]
        assert_same_state(rank["loaded"][1], rank["expected"][1])


def _accepted() -> dict[str, Any]:
    warnings: list[str] = []
    logging.disable(logging.NOTSET)
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("megatron_flashoptim").addHandler(handler)
    trainer = _build(True, MODEL, {"accept_partial_step": True})
    whole = _build(True, MODEL, {})
    trainer.step()
    whole.step()
    with _breaking(trainer):
        _raised(trainer.step)
    dispatched = [e.state.name in ("REDUCED", "STEPPED") for e in trainer.optimizer.release.groups]
    before = _shards(trainer)
    whole.step()
    kept = [not c for c in _changed(_shards(trainer), _shards(whole))]
    for chunk in trainer.model:
        chunk.zero_grad_buffer()
    gathered = [
        torch.equal(bucket.param_data, other.param_data)
        for bucket, other in zip(
            *(t.optimizer.chained_optimizers[0].shard_buckets for t in (trainer, whole)),
            strict=True,
        )
    ]
    taken = [not c for c in _changed(_shards(trainer), _shards(whole))]
    losses = [trainer.step()[0] for _ in range(3)]
    (member,) = trainer.optimizer.chained_optimizers
    return {
        "dispatched": dispatched,
        "kept": kept,
        "gathered": gathered,
        "taken": taken,
        "changed": _changed(before, _shards(trainer)),
        "losses": losses,
        "step": [group["step"] for group in member.optimizer.param_groups],
        "warnings": warnings,
    }


def test_training_goes_on_from_half_an_update_if_told_to() -> None:
    """Buckets that were reduced have the update of the whole step, the others miss it."""
    for rank in run_ranks(2, _accepted):
        (warning,) = rank["warnings"]
        assert "half an update. Training goes on" in warning
        assert any(rank["dispatched"]) and not all(rank["dispatched"])
        assert rank["taken"] == rank["gathered"] == rank["dispatched"]
        assert rank["losses"][2] < rank["losses"][0]
        assert all(rank["changed"])
        assert set(rank["step"]) == {5}


def _unused(model: Any) -> None:
    model.unused = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))


def _reads_late_weights_early(model: Any) -> None:
    """Let the first layer's backward read a weight whose own gradient comes before."""
    weight = model.decoder.final_layernorm.weight

    def hook(_: Any, __: Any, output: Any) -> Any:
        return output * weight.detach()

    model.embedding.register_forward_hook(hook)


def _fuses_elsewhere(model: Any) -> None:
    """Let the final norm write the gradient of a weight that another module has."""
    from megatron.core.parallel_state import get_tensor_model_parallel_group
    from megatron.core.tensor_parallel import layers

    _fuses_accumulation(model)
    weight = model.embedding.word_embeddings.weight

    def hook(_: Any, __: Any, output: Any) -> Any:
        logits = layers.linear_with_grad_accumulation_and_async_allreduce(
            output,
            weight,
            None,
            gradient_accumulation_fusion=True,
            allreduce_dgrad=False,
            sequence_parallel=False,
            tp_group=get_tensor_model_parallel_group(),
        )
        return output + logits.mean()

    model.decoder.final_layernorm.register_forward_hook(hook)
    # Where nothing has been mapped yet, a write is a fault; here only the sign is left of it.
    layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32 = lambda *_: None


def _with_nan(model: Any) -> None:
    weight = model.decoder.layers[0].self_attention.linear_proj.weight
    weight.register_hook(lambda grad: grad * float("nan"))


def _twice(trainer: Any) -> None:
    """Run two backward passes in one iteration, as schedules without no_sync do."""
    trainer.step(update=False)
    trainer.model[0].zero_grad_buffer = lambda: None
    trainer.step(update=False)


def _fused_twice(trainer: Any) -> None:
    """Run two backward passes, the second one not to write any gradient."""
    from megatron.core.tensor_parallel import layers

    def write(*_: Any) -> None:
        raise _Broken("a gradient is written")

    trainer.step(update=False)
    trainer.model[0].zero_grad_buffer = lambda: None
    kernels = layers.fused_weight_gradient_mlp_cuda
    kernels.wgrad_gemm_accum_fp32 = kernels.wgrad_gemm_accum_fp16 = write
    trainer.step(update=False)


def _late() -> dict[str, str]:
    """Return what gradients raise that come to a bucket which a broken pass has left open."""
    trainer = _build(True, MODEL, {})
    with _breaking(trainer):
        _raised(trainer.step)
    entry = next(e for e in trainer.optimizer.release.groups if e.state.name == "OPEN")
    param = next(p for p, name in entry.names.items() if name not in entry.arrived)

    def come() -> str:
        return _raised(lambda: param.sum().backward())

    with trainer.model[0].no_sync():
        problems = {"late micro-batch": come()}
    param.grad_added_to_main_grad = True  # as a layer says that has fused accumulation
    problems["late fused"] = come()
    param.grad_added_to_main_grad = False
    return {**problems, "late": come(), "late twice": come()}


def _problems() -> dict[str, str]:
    """Return what each fault of a caller or of a model raises."""
    import tiny_gpt
    from megatron.core.distributed import DistributedDataParallel

    from megatron_flashoptim import FlashDistributedOptimizer, FlashOptimConfig

    def train(more: dict[str, Any], body: Callable[[Any], Any] = lambda t: t.step()) -> str:
        trainer = _build(True, {**MODEL, **more}, {})
        return _raised(lambda: body(trainer))

    def build(released: bool) -> None:
        setup = tiny_gpt.Setup(
            flash=FlashOptimConfig(gradient_release=not released),
            optimizer={"clip_grad": 0.0},
            **MODEL,
        )
        wrapped = tiny_gpt._bucketed if not released else _within(tiny_gpt._bucketed)
        original, tiny_gpt._wrapped = tiny_gpt._wrapped, wrapped
        try:
            tiny_gpt.build(setup)
        finally:
            tiny_gpt._wrapped = original

    def _within(function: Any) -> Any:
        def within(*args: Any) -> Any:
            with FlashDistributedOptimizer.released_buffers():
                return function(*args)

        return within

    def no_optimizer() -> None:
        trainer = _build(True, MODEL, {})
        module = torch.nn.Linear(32, 32, bias=False, dtype=torch.bfloat16)
        with FlashDistributedOptimizer.released_buffers():
            wrapped = DistributedDataParallel(
                trainer.model[0].config, trainer.model[0].ddp_config, module
            )
        wrapped.zero_grad_buffer()
        wrapped(torch.ones(1, 32, dtype=torch.bfloat16)).sum().backward()

    nan = {"prepare_model": _with_nan, "ddp": {**MODEL["ddp"], "check_for_nan_in_grad": True}}
    return {
        "micro-batches": train({"microbatches": 2}),
        "two passes": train({}, _twice),
        "two fused passes": train({"prepare_model": _fuses_accumulation}, _fused_twice),
        "no pass": train({}, lambda trainer: trainer.optimizer.step()),
        "no step": train({}, lambda t: [t.step(update=False) for _ in range(2)]),
        "unused": train({"prepare_model": _unused}),
        "late weight": train({"prepare_model": _reads_late_weights_early}),
        "nan": train(nan),
        "fused elsewhere": train({"prepare_model": _fuses_elsewhere, "tied": False}),
        "scaled": train({}, lambda trainer: trainer.model[0].scale_gradients(0.5)),
        "not released": _raised(lambda: build(False)),
        "only released": _raised(lambda: build(True)),
        "no optimizer": _raised(no_optimizer),
        **_late(),
    }


def test_faults_of_callers_and_models_are_told_in_one_sentence() -> None:
    (problems,) = run_ranks(1, _problems)
    expected = {
        "micro-batches": "RuntimeError: --flash-gradient-release cannot accumulate several micro",
        "two passes": "a second gradient after the first was used",
        "two fused passes": "a second gradient after the first was used",
        "late micro-batch": "cannot accumulate several micro-batches",
        "late fused": "was written before its bucket had memory",
        "late twice": "a second gradient after the first was used",
        "no pass": "came without a backward pass",
        "no step": "no optimizer.step() came after it",
        "unused": "1 parameters got no gradient in this backward pass, as --overlap-grad-reduce",
        "late weight": "modified by an inplace operation",
        "nan": "found NaN in local grad norm",
        "fused elsewhere": "word_embeddings.weight was written before its bucket had memory",
        "scaled": "drop --calculate-per-token-loss",
        "not released": "ValueError: gradient_release=True needs DistributedDataParallel to be",
        "only released": "ValueError: DistributedDataParallel was built within released_buffers()",
        "no optimizer": "a gradient came before an optimizer was built",
    }
    assert problems.pop("late") == ""
    assert problems.keys() == expected.keys()
    for fault, message in expected.items():
        assert message in problems[fault], (fault, problems[fault])


GOOD = """--flash-gradient-release --overlap-grad-reduce --clip-grad 0
--rerun-mode disabled""".split()
# Flags that replace or follow the good ones, and parts of the message.
REFUSED: dict[str, tuple[str, ...]] = {
    "--clip-grad 1.0": ("--clip-grad above 0", "--flash-bucket-clip-grad"),
    "--loss-scale 8": ("--loss-scale: ",),
    "--rerun-mode validate_results": ("use --rerun-mode disabled",),
    "--rampup-batch-size 1 1 10": ("--rampup-batch-size: micro-batches",),
    "--step-batch-size-schedule 0:8": ("--step-batch-size-schedule: micro-batches",),
    "--mtp-detach-heads": ("--mtp-detach-heads: ",),
    "--use-transformer-engine-op-fuser": ("--use-transformer-engine-op-fuser: ",),
    "--calculate-per-token-loss": ("--calculate-per-token-loss: ",),
    "--pipeline-model-parallel-size 2": ("--pipeline-model-parallel-size above 1",),
    "--tensor-model-parallel-size 2 --sequence-parallel": ("--sequence-parallel: ",),
    "--tensor-model-parallel-size 2 --qk-layernorm": ("--qk-layernorm with",),
    "--optimizer-cuda-graph": ("--optimizer-cuda-graph: ",),
    "--delay-wgrad-compute": ("--delay-wgrad-compute: ",),
    "--overlap-moe-expert-parallel-comm": ("--overlap-moe-expert-parallel-comm: ",),
    "--use-nccl-ub": ("--use-nccl-ub: ",),
    "--ddp-reduce-scatter-with-fp32-accumulation": ("with-fp32-accumulation: ",),
    "--ddp-param-name-patterns-for-fp32-local-accumulation all": ("-local-accumulation: ",),
    "--cuda-graph-impl local": ("--cuda-graph-impl other than none",),
    "--save-wgrads-interval 2": ("--save-wgrads-interval: ",),
    "--overlap-param-gather --flash-early-param-gather": ("--flash-early-param-gather: ",),
    "--overlap-param-gather-with-optimizer-step": ("gather-with-optimizer-step: ",),
    "--vision-pretraining --vision-pretraining-type dino": ("--vision-pretraining-type dino",),
    "--rl-offload-optimizer-during-inference": ("--rl-offload-optimizer-during-inference: ",),
    "--flash-release-slots 1": ("--flash-release-slots must be 2 or more, got 1",),
    "--flash-bucket-clip-grad -1": ("--flash-bucket-clip-grad must be a norm above 0", "-1"),
}
# Without the good flags.
REFUSED_ALONE: dict[str, tuple[str, ...]] = {
    "--flash-gradient-release": (
        "no --overlap-grad-reduce",
        "--clip-grad above 0",
        "--rerun-mode other than disabled",
    ),
    "--flash-accept-partial-step": ("partial-step is for --flash-gradient-release, which is not",),
    "--flash-release-slots 4": (
        "release-slots is for --flash-gradient-release, which is not given",
    ),
    "--flash-bucket-clip-grad 1": ("--flash-bucket-clip-grad cannot be used", "--clip-grad above"),
    "--flash-bucket-clip-grad 1 --clip-grad 0 --pipeline-model-parallel-size 2": ("-size above 1",),
}


def _messages() -> dict[str, Any]:
    from test_hook import _parse

    flash = ("--optimizer", "flash_adamw")
    accepted = _parse(*flash, *GOOD, "--flash-bucket-clip-grad", "0.5")
    refused = {flags: _parse(*flash, *GOOD, *flags.split()) for flags in REFUSED}
    alone = {flags: _parse(*flash, *flags.split()) for flags in REFUSED_ALONE}
    return {"accepted": not isinstance(accepted, str), **refused, **alone}


def test_what_cannot_be_used_with_it_is_one_clear_error_at_parsing() -> None:
    (messages,) = run_ranks(1, _messages)
    assert messages.pop("accepted") is True
    for flags, parts in {**REFUSED, **REFUSED_ALONE}.items():
        message = messages[flags]
        assert isinstance(message, str), f"{flags} accepted"
        assert "\n" not in message
        for part in parts:
            assert part in message, message
        if flags in REFUSED and "cannot be used" in message:
            assert message.count(" | ") == 0, "only what was added is refused"


def _build_refusals() -> dict[str, str]:
    import tiny_gpt
    from megatron.core import num_microbatches_calculator, rerun_state_machine

    from megatron_flashoptim.megatron import factory, hooks

    def by_hooks(config: Any, chunks: list[Any], flash: Any) -> Any:
        # Of this package a patched Megatron calls no more than the class and the chain.
        with factory._distributed_optimizer_bound_to(flash):
            built = tiny_gpt.get_stock_optimizer(config, chunks)
        return hooks.chained_optimizer(getattr(built, "chained_optimizers", [built]))

    def build(flash: dict[str, Any] | None = None, **more: Any) -> str:
        optimizer = {"clip_grad": 0.0, **more.pop("optimizer", {})}

        def body() -> None:
            from megatron_flashoptim import FlashOptimConfig

            config = FlashOptimConfig(**(flash or {"gradient_release": True}))
            tiny_gpt.build(tiny_gpt.Setup(flash=config, optimizer=optimizer, **{**MODEL, **more}))

        return _raised(body)

    def averaged(model: Any) -> None:
        model.decoder.final_layernorm.weight.average_gradients_across_tp_domain = True

    found = {
        "--overlap-grad-reduce": build(ddp={}),
        "--clip-grad above 0": build(optimizer={"clip_grad": 1.0}),
        "OptimizerConfig.grad_norm_skip_threshold": build(
            optimizer={"grad_norm_skip_threshold": 5.0}
        ),
        "--flash-bucket-clip-grad": build({"bucket_clip_grad": 1.0}, optimizer={"clip_grad": 1.0}),
        "averaged over tensor-parallel": build(prepare_model=averaged),
    }
    original, tiny_gpt.get_megatron_optimizer = tiny_gpt.get_megatron_optimizer, by_hooks
    found["--clip-grad above 0: the norm"] = build(optimizer={"clip_grad": 1.0})
    clipped = build({"bucket_clip_grad": 1.0}, optimizer={"clip_grad": 1.0})
    found["--flash-bucket-clip-grad cannot be used"] = clipped
    tiny_gpt.get_megatron_optimizer = original
    num_microbatches_calculator.init_num_microbatches_calculator(0, None, 8, 2, 1)
    found["4 micro-batches in a global batch"] = build()
    num_microbatches_calculator.unset_num_microbatches_calculator()
    rerun_state_machine.initialize_rerun_state_machine(
        mode=rerun_state_machine.RerunMode.VALIDATE_RESULTS
    )
    found["rerun mode validate_results"] = build()
    rerun_state_machine.destroy_rerun_state_machine()
    found[""] = build()
    return found


def test_what_cannot_be_used_with_it_is_refused_when_an_optimizer_is_built() -> None:
    (problems,) = run_ranks(1, _build_refusals)
    assert problems.pop("") == ""
    for part, problem in problems.items():
        assert problem.startswith("ValueError: ") and part in problem, (part, problem)


@pytest.mark.parametrize("option", ["release_slots", "bucket_clip_grad"])
def test_values_out_of_range_are_refused(option: str) -> None:
    from megatron_flashoptim import FlashOptimConfig

    for value in {"release_slots": [1, 0], "bucket_clip_grad": [-1.0, float("inf")]}[option]:
        with pytest.raises(ValueError, match=f"--flash-{option.replace('_', '-')} .*{value}"):
            FlashOptimConfig(**{option: value})
