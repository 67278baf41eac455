"""install(), the flags and their refusals, and the guard against plain Adam."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import logging
import sys
from typing import Any

import pytest
from ranks import run_ranks

import megatron_flashoptim
from megatron_flashoptim.megatron.versions import installed_version

pytestmark = pytest.mark.smoke

BASE = """--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64
--max-position-embeddings 64 --micro-batch-size 1 --train-iters 2 --lr 1e-3 --bf16
--use-distributed-optimizer --transformer-impl local --seed 77""".split()


def _parse(*flags: str, base: list[str] = BASE) -> Any:
    """Parse as a training script does; returns the namespace or all that is said of an error."""
    from megatron.training import arguments

    megatron_flashoptim.install()
    sys.argv = ["pretrain_gpt.py", *base, *flags]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return arguments.parse_args()
    except SystemExit as end:
        assert end.code == 2
        return errors.getvalue().strip().removeprefix("pretrain_gpt.py: error: ")


def _fields(*flags: str) -> dict[str, Any]:
    from megatron_flashoptim.megatron.arguments import config_from_args

    args = _parse(*flags)
    assert isinstance(args, argparse.Namespace), args
    return {"optimizer": args.optimizer, "flash": config_from_args(args)}


def test_flash_adamw_is_adam_for_megatron_plus_our_own_configuration() -> None:
    from megatron_flashoptim import FlashOptimConfig

    (parsed,) = _in_fork(_fields, "--optimizer", "flash_adamw")
    assert parsed == {"optimizer": "adam", "flash": FlashOptimConfig(seed=77)}
    flags = ("--flash-master-bits", "32", "--flash-rounding", "stochastic")
    flags += ("--flash-master-rounding", "stochastic")
    flags += ("--flash-early-param-gather", "--overlap-param-gather", "--overlap-grad-reduce")
    (parsed,) = _in_fork(_fields, "--optimizer", "flash_adamw", *flags)
    assert parsed["flash"] == FlashOptimConfig(
        master_bits=32,
        rounding="stochastic",
        master_rounding="stochastic",
        early_param_gather=True,
        seed=77,
    )


@pytest.mark.parametrize("name", ["adam", "sgd", "lion"])
def test_other_optimizers_stay_megatrons_own(name: str) -> None:
    (parsed,) = _in_fork(_fields, "--optimizer", name)
    assert parsed == {"optimizer": name, "flash": None}


REFUSED = {
    "--fp16": ("--fp16", "use --bf16"),
    "--use-precision-aware-optimizer": ("--use-precision-aware-optimizer", "drop the flag"),
    "--optimizer-cpu-offload": ("--optimizer-cpu-offload", "drop the flag"),
    "--use-megatron-fsdp": ("--use-megatron-fsdp", "drop the flag"),
    "--use-torch-fsdp2": ("--use-torch-fsdp2", "drop the flag"),
    "--fp8-format hybrid --fp8-recipe mxfp8 --fp8-param-gather": (
        "--fp8-recipe other than delayed, tensorwise or blockwise",
        "drop --fp8-param-gather",
    ),
    "--fp8-format hybrid --fp8-param-gather --ckpt-format torch": (
        "--fp8-param-gather cannot be used with --ckpt-format",
        "use torch_dist",
    ),
    "--optimizer-cuda-graph --log-num-zeros-in-grad": ("--log-num-zeros-in-grad", "drop one"),
    "--optimizer-cuda-graph --cuda-graph-warmup-steps 0": ("--cuda-graph-warmup-steps", "1 or"),
    "--non-persistent-ckpt-type local": ("--non-persistent-ckpt-type local", "use global"),
    "--flash-early-param-gather": ("--flash-early-param-gather", "add --overlap-param-gather"),
    "--flash-early-param-gather --overlap-param-gather --optimizer-cuda-graph": (
        "--optimizer-cuda-graph",
        "drop one",
    ),
    "--qk-clip": ("--qk-clip", "drop the flag"),
    "--optimizer-cuda-graph --rl-offload-optimizer-during-inference": (
        "--rl-offload-optimizer-during-inference",
        "drop one",
    ),
    "--rl-offload-optimizer-during-inference --ckpt-assume-constant-structure": (
        "--ckpt-assume-constant-structure",
        "drop one",
    ),
    "--optimizer-cuda-graph --timing-log-level 1": ("--timing-log-level above 0", "drop one"),
    "--optimizer-cuda-graph --overlap-param-gather-with-optimizer-step": (
        "--overlap-param-gather-with-optimizer-step",
        "drop",  # one of the two, or with 0.17 this one
    ),
    "--ckpt-format torch_dcp": ("--ckpt-format", "torch_dist or torch"),
    "--flash-master-bits 16": ("--flash-master-bits 16", "--flash-master-rounding stochastic"),
    "--flash-master-bits 20": ("--flash-master-bits", "choose from 16, 24, 32"),
    "--flash-rounding up": ("--flash-rounding", "stochastic"),
    "--flash-master-bit 24": ("unrecognized arguments", "--flash-master-bit 24"),
    "--optimizer flash_adam_w": ("argument --optimizer", "flash_adam_w", "flash_adamw"),
}


@pytest.mark.parametrize("flags", REFUSED)
def test_unsupported_combination_is_one_clear_error_at_parsing(flags: str) -> None:
    base = [flag for flag in BASE if not (flag == "--bf16" and flags == "--fp16")]
    (message,) = _in_fork(_parse, "--optimizer", "flash_adamw", *flags.split(), base=base)
    assert isinstance(message, str), "accepted"
    assert "\n" not in message, "Megatron's usage"
    for part in REFUSED[flags]:
        assert part in message


def test_overlap_options_are_accepted_together() -> None:
    from megatron_flashoptim.megatron import versions

    flags = """--overlap-grad-reduce --overlap-param-gather --use-nccl-ub
    --no-align-param-gather --ckpt-format torch
    --ddp-pad-buckets-for-high-nccl-busbw --ddp-reduce-scatter-with-fp32-accumulation
    --ddp-num-buckets 4 --num-distributed-optimizer-instances 2""".split()
    if versions.gathers_in_step():
        flags.append("--overlap-param-gather-with-optimizer-step")
    (parsed,) = _in_fork(_fields, "--optimizer", "flash_adamw", *flags)
    assert parsed["flash"] is not None


def test_flash_adamw_needs_the_distributed_optimizer() -> None:
    base = [flag for flag in BASE if flag != "--use-distributed-optimizer"]
    (message,) = _in_fork(_parse, "--optimizer", "flash_adamw", base=base)
    assert "add --use-distributed-optimizer" in message


def test_flash_flags_without_a_flash_optimizer_are_refused() -> None:
    (message,) = _in_fork(_parse, "--optimizer", "adam", "--flash-master-bits", "32")
    assert "--flash-master-bits given with --optimizer adam" in message


def test_an_error_in_megatrons_own_options_is_told_as_megatron_does() -> None:
    (message,) = _in_fork(_parse, "--optimizer", "flash_adamw", "--bf17")
    assert message.startswith("usage: ") and "unrecognized arguments: --bf17" in message


def _in_fork(body: Any, *args: Any, **kwargs: Any) -> list[Any]:
    """Run in a fork, so that install() and sys.argv end with it; plain objects come back."""
    results = run_ranks(1, _pickled, body, *args, **kwargs)
    return [__import__("pickle").loads(result) for result in results]


def _pickled(body: Any, *args: Any, **kwargs: Any) -> bytes:
    return __import__("pickle").dumps(body(*args, **kwargs))


def _bound() -> list[Any]:
    from megatron.core import dist_checkpointing
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.training import arguments, theoretical_memory_usage, training

    from megatron_flashoptim.megatron import versions

    module, path = versions.layout_name()
    return [
        arguments.add_megatron_arguments,
        training.get_megatron_optimizer,
        getattr(versions.find(module, path), path.rpartition(".")[2]),
        DistributedOptimizer.__init__,
        dist_checkpointing.load,
        theoretical_memory_usage.compute_weight_and_optimizer_memory,
        training.calc_params_l2_norm,
    ]


def _install_and_undo() -> None:
    originals = _bound()
    megatron_flashoptim.install()
    installed = _bound()
    for original, wrapper in zip(originals, installed, strict=True):
        assert wrapper is not original and wrapper.__wrapped__ is original
    megatron_flashoptim.install()
    assert _bound() == installed, "a second install() must change nothing"
    megatron_flashoptim.uninstall()
    assert _bound() == originals
    megatron_flashoptim.uninstall()
    assert _bound() == originals
    megatron_flashoptim.install()
    assert [wrapper.__wrapped__ for wrapper in _bound()] == originals


def test_install_is_idempotent_and_undoable() -> None:
    run_ranks(1, _install_and_undo)


def _uninstall_below_anothers_wrapper(has_wraps: bool) -> dict[str, Any]:
    """Somebody wraps what install() has bound, with or without functools.wraps."""
    from megatron.training import training

    from megatron_flashoptim.megatron import install as module

    logging.disable(logging.NOTSET)
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    module.logger.addHandler(handler)

    original = training.calc_params_l2_norm
    megatron_flashoptim.install()
    ours = training.calc_params_l2_norm

    def somebody_elses(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    theirs = functools.wraps(ours)(somebody_elses) if has_wraps else somebody_elses
    training.calc_params_l2_norm = theirs
    megatron_flashoptim.uninstall()
    left = training.calc_params_l2_norm is theirs
    others_undone = not any(hasattr(bound, "__wrapped__") for bound in _bound()[:-1])
    megatron_flashoptim.install()
    bound_again = training.calc_params_l2_norm is not theirs
    training.calc_params_l2_norm = ours  # they undo theirs
    megatron_flashoptim.uninstall()
    return {
        "left": left,
        "others_undone": others_undone,
        "bound_again": bound_again,
        "undone_later": training.calc_params_l2_norm is original,
        "messages": [record.getMessage() for record in records],
    }


@pytest.mark.parametrize("has_wraps", [True, False])
def test_uninstall_leaves_a_wrapper_on_top_of_ours_and_says_so(has_wraps: bool) -> None:
    (found,) = run_ranks(1, _uninstall_below_anothers_wrapper, has_wraps)
    assert found["left"] and found["others_undone"] and not found["bound_again"], found
    assert found["undone_later"]
    (message,) = found["messages"]
    assert "megatron.training.training.calc_params_l2_norm" in message
    assert "somebody_elses" in message and "test_hook.py" in message


def _install_without(module_name: str, name: str) -> tuple[str, bool]:
    import importlib

    module = importlib.import_module(module_name)
    delattr(module, name)
    from megatron_flashoptim.megatron.install import bindings

    try:
        megatron_flashoptim.install()
    except ImportError as problem:
        left = [b for b in bindings() if (b.module, b.path) != (module_name, name)]
        bound = any(hasattr(getattr(b.owner(), b.attribute), "__wrapped__") for b in left)
        return str(problem), bound
    return "", False


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("megatron.training.arguments", "add_megatron_arguments"),
        ("megatron.training.training", "get_megatron_optimizer"),
        ("megatron.core.optimizer", "DistributedOptimizer"),
        (
            "megatron.training.theoretical_memory_usage",
            "compute_weight_and_optimizer_memory",
        ),
    ],
)
def test_missing_symbol_is_named_with_the_installed_version(module: str, name: str) -> None:
    ((message, bound),) = run_ranks(1, _install_without, module, name)
    assert f"{module}.{name}" in message
    assert f"megatron-core {installed_version()}" in message
    assert not bound, "nothing may be bound when a name is missing"


def _missed_binding() -> str:
    import tiny_gpt

    from megatron_flashoptim.megatron import factory

    factory._distributed_optimizer_bound_to = lambda _: contextlib.nullcontext()
    try:
        tiny_gpt.build(tiny_gpt.Setup())
    except RuntimeError as problem:
        return str(problem)
    return ""


def test_plain_adam_is_never_trained_silently() -> None:
    (message,) = run_ranks(1, _missed_binding)
    assert "expected FlashDistributedOptimizer" in message
    assert "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer" in message


def _stock_factory_with_flash_arguments() -> str:
    import tiny_gpt
    from megatron.training import global_vars

    args = _parse("--optimizer", "flash_adamw")
    global_vars._GLOBAL_ARGS = args
    try:
        tiny_gpt.build(tiny_gpt.Setup(flash=None))
    except RuntimeError as problem:
        return str(problem)
    return ""


def test_a_script_that_builds_megatrons_own_optimizer_is_stopped() -> None:
    (message,) = run_ranks(1, _stock_factory_with_flash_arguments)
    assert "plain Adam in Megatron's own DistributedOptimizer" in message
    assert "megatron_flashoptim.get_megatron_optimizer" in message


def _name_is_restored() -> None:
    import megatron.core.optimizer
    import tiny_gpt
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    tiny_gpt.build(tiny_gpt.Setup())
    assert megatron.core.optimizer.DistributedOptimizer is DistributedOptimizer
    with pytest.raises(ValueError, match="sgd"):
        tiny_gpt.build(tiny_gpt.Setup(optimizer={"optimizer": "sgd"}))
    assert megatron.core.optimizer.DistributedOptimizer is DistributedOptimizer


def test_megatrons_name_is_bound_only_while_an_optimizer_is_built() -> None:
    run_ranks(1, _name_is_restored)


BAD_CONFIGS: dict[str, dict[str, Any]] = {
    "--no-decoupled-weight-decay": {"decoupled_weight_decay": False},
    "--optimizer-cuda-graph": {"optimizer_cuda_graph": True},
    "OptimizerConfig.optimizer must be 'adam'": {"optimizer": "sgd"},
    "add --use-distributed-optimizer": {"use_distributed_optimizer": False},
}


def _build_error(options: dict[str, Any]) -> str:
    import tiny_gpt

    try:
        tiny_gpt.build(tiny_gpt.Setup(optimizer=options))
    except ValueError as problem:
        return str(problem)
    return ""


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_unsupported_config_is_refused_when_the_optimizer_is_built(message: str) -> None:
    (problem,) = run_ranks(1, _build_error, BAD_CONFIGS[message])
    assert message in problem


def test_importing_the_package_imports_neither_megatron_nor_triton() -> None:
    import subprocess

    code = (
        "import sys, megatron_flashoptim, megatron_flashoptim.codec, megatron_flashoptim.optim;"
        "loaded = {name.split('.')[0] for name in sys.modules};"
        "assert not loaded & {'megatron', 'triton'}, loaded & {'megatron', 'triton'}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
