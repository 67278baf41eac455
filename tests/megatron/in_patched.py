"""What a Megatron with the patches must do; run by ``test_patches.py`` with it on the path."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pretraining import FLASH, MODEL, SCRIPT, data_flags, device_flags, losses, printed_by_training
from ranks import run_ranks

# Set by test_patches.py: folders, and the losses of the launcher's run.
EXPECTED: dict[str, Any] = json.loads(os.environ.get("FLASHOPTIM_PATCHED", "{}"))


def _train(command: list[str]) -> str:
    from megatron_flashoptim.megatron.launching import skip_compilation_of_built_helpers

    skip_compilation_of_built_helpers()
    sys.argv = command
    sys.path.insert(0, str(SCRIPT.parent))
    with printed_by_training() as printed:
        runpy.run_path(command[0], run_name="__main__")
    from megatron.training import arguments, training

    assert "megatron_flashoptim.run" not in sys.modules, "no launcher"
    for name in (arguments.add_megatron_arguments, training.get_megatron_optimizer):
        assert not hasattr(name, "__wrapped__"), "Megatron's own, which calls the hooks"
    return printed.getvalue()


def test_training_goes_on_from_the_launchers_checkpoint_with_its_losses() -> None:
    import megatron.core

    assert Path(megatron.core.__file__).is_relative_to(EXPECTED["patched"])
    printed = _train_from(EXPECTED["checkpoints"], "--report-theoretical-memory")
    found = losses(printed)
    launchers = {int(i): tuple(pair) for i, pair in EXPECTED["losses"].items()}
    assert sorted(found) == [5, 6, 8], "the checkpoint must have been loaded"
    assert {i: found[i] for i in (6, 8)} == {i: launchers[i] for i in (6, 8)}
    told = printed.index("Theoretical memory footprints")
    assert told < printed.index("scheduler are built"), "before the first iteration"


def _train_from(checkpoints: str, *flags: str) -> str:
    """Train on two ranks from the iteration 4 of a folder; returns what was printed."""
    load = ("--load", checkpoints, "--ckpt-step", "4")
    data = data_flags(Path(EXPECTED["corpus"]))
    arguments = [str(SCRIPT), *MODEL, *device_flags(), *data, *FLASH, *load, *flags]
    return "".join(run_ranks(2, _train, arguments))


@pytest.mark.parametrize("rank", [0, 1])
def test_damaged_files_of_a_checkpoint_are_named(rank: int, tmp_path: Path) -> None:
    """From 0.19 on what Megatron reads first is in rank 0's."""
    shutil.copytree(EXPECTED["checkpoints"], tmp_path, dirs_exist_ok=True)
    files = (tmp_path / "iter_0000004").glob(f"__{rank}_*.distcp")
    damaged = max(files, key=lambda file: file.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(AssertionError, match=rf"is damaged: {damaged.name} has 100 of \d+"):
        _train_from(str(tmp_path))


def _parse(*flags: str) -> Any:
    """Return validated arguments of a run on 8 ranks, or the error."""
    from megatron.training import arguments

    sys.argv = ["pretrain_gpt.py", *MODEL, *device_flags(), "--train-iters", "1", *flags]
    os.environ.update(RANK="0", WORLD_SIZE="8")
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            return arguments.validate_args(arguments.parse_args())
    except SystemExit:
        return errors.getvalue().strip().split("error: ")[-1]
    except AssertionError as problem:
        return str(problem)


EIGHT_RANKS = ("--global-batch-size", "16", "--micro-batch-size", "2")


def _built_on_8_ranks(optimizer: str) -> tuple[list[int], str, float]:
    """Build the rank's DDP and optimizer.

    Returns:
        Elements of each bucket's shard, the optimizer's class, and Megatron's theoretical bytes
        of weights, gradients and optimizer.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.training import global_vars, theoretical_memory_usage, training
    from megatron.training.arguments import core_transformer_config_from_args

    from megatron_flashoptim.megatron.memory import planner

    args = _parse("--optimizer", optimizer, *EIGHT_RANKS)
    global_vars._GLOBAL_ARGS = args
    torch.distributed.destroy_process_group()  # run_ranks' own

    def provide(pre_process: bool = True, post_process: bool = True, **_: Any) -> Any:
        config = core_transformer_config_from_args(args)
        spec = get_gpt_layer_local_spec()
        return GPTModel(config, spec, 259, 64, pre_process, post_process)

    with planner.nominal_rank(args, 0, 8), contextlib.redirect_stdout(io.StringIO()):
        chunks = training.get_model(provide)
        config, overrides = training.get_megatron_optimizer_config(args)
        built = training.get_megatron_optimizer(
            config, chunks, config_overrides=overrides, use_gloo_process_groups=False
        )
    torch.distributed.barrier = lambda *_: None
    torch.distributed.destroy_process_group = lambda *_: None
    buckets = [bucket for buffer in chunks[0].buffers for bucket in buffer.buckets]
    args.padded_vocab_size = 260
    bytes_on_rank = theoretical_memory_usage.compute_weight_and_optimizer_memory(args)
    return [len(bucket.grad_data) // 8 for bucket in buckets], type(built).__name__, bytes_on_rank


def test_buckets_are_aligned_for_a_flash_optimizer_and_for_no_other() -> None:
    ((shards, name, flash_bytes),) = run_ranks(1, _built_on_8_ranks, "flash_adamw")
    assert name == "FlashChainedOptimizer"
    assert all(size % 32 == 0 for size in shards)
    ((shards, name, adam_bytes),) = run_ranks(1, _built_on_8_ranks, "adam")
    assert name == "ChainedOptimizer"
    assert any(size % 32 for size in shards), "a model whose shards need the alignment"
    # Weights and fp32 gradients on all ranks; the state is divided by 8.
    per_parameter = flash_bytes / adam_bytes * (2 + 4 + 12 / 8)
    assert 2 + 4 + 3.125 / 8 < per_parameter < 2 + 4 + 3.2 / 8


def _install() -> list[bool]:
    import test_hook

    import megatron_flashoptim
    from megatron_flashoptim.megatron import install

    before = test_hook._bound()
    megatron_flashoptim.install()
    # What gradient release needs, which is in no patch.
    (binding,) = install.bindings()
    assert binding.path == "_ParamAndGradBuffer.__init__"
    unchanged = [old is new for old, new in zip(before, test_hook._bound(), strict=True)]
    megatron_flashoptim.uninstall()
    return unchanged


def test_install_binds_nothing_that_is_patched() -> None:
    ((*unchanged,),) = run_ranks(1, _install)
    assert unchanged and all(unchanged)


def _plain_adam() -> str:
    import test_hook

    return test_hook._stock_factory_with_flash_arguments()


def test_a_script_that_makes_its_own_config_is_stopped() -> None:
    (message,) = run_ranks(1, _plain_adam)
    assert "plain Adam in Megatron's own DistributedOptimizer" in message


def _losses_of_own_config(by_config: bool) -> tuple[str, list[float]]:
    import tiny_gpt

    from megatron_flashoptim import FlashOptimConfig

    flash = FlashOptimConfig(master_bits=32)
    setup = tiny_gpt.Setup(flash=flash)
    if by_config:  # and Megatron's own function
        setup = tiny_gpt.Setup(flash=None, optimizer={"flash": flash})
    trainer = tiny_gpt.build(setup)
    return trainer.optimizer.describe(), trainer.train(2)


def test_code_without_arguments_asks_by_configuration_or_by_the_packages_function() -> None:
    by_function, by_config = (run_ranks(1, _losses_of_own_config, side)[0] for side in (0, 1))
    assert by_function == by_config
    assert "32-bit" in by_config[0], by_config


def _parse_without_plugin() -> tuple[Any, str]:
    # What importing a package that is not installed does.
    # None makes an import fail; the types know of modules only.
    sys.modules["megatron_flashoptim.megatron.hooks"] = None  # type: ignore[assignment]
    return _parse("--optimizer", "flash_adamw", *EIGHT_RANKS), _parse(
        "--optimizer", "adam", *EIGHT_RANKS
    ).optimizer


def test_without_the_package_its_optimizers_are_refused_by_name() -> None:
    ((message, other),) = run_ranks(1, _parse_without_plugin)
    assert message.startswith("--optimizer flash_adamw needs the package megatron-flashoptim")
    assert other == "adam"


def _build_without_plugin(flash: object) -> str:
    import importlib

    import tiny_gpt
    from megatron.core import optimizer

    import megatron_flashoptim.megatron as package

    vars(package).pop("hooks")
    # None makes an import fail; the types know of modules only.
    sys.modules["megatron_flashoptim.megatron.hooks"] = None  # type: ignore[assignment]
    vars(optimizer).pop("flashoptim")
    importlib.reload(optimizer)
    try:
        tiny_gpt.build(tiny_gpt.Setup(layers=1, flash=None, optimizer={"flash": flash}))
    except ImportError as problem:
        return str(problem)
    return ""


def test_without_the_package_a_configuration_that_asks_for_it_is_refused_by_name() -> None:
    (message,) = run_ranks(1, _build_without_plugin, "24-bit masters")
    assert message.startswith("OptimizerConfig.flash needs the package megatron-flashoptim")
    assert run_ranks(1, _build_without_plugin, None) == [""]


def shifted_parameters() -> list[str]:
    """Return the weights that are not the bf16 of the masters ``fully_reshardable`` would save."""
    (names, _) = run_ranks(2, _shifted_parameters)
    return names


def _shifted_parameters() -> list[str]:
    import tiny_gpt
    from exact_adamw import use_as_megatrons_adam
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    use_as_megatrons_adam()
    options: dict[str, Any] = {"flash": None, "overlap": True, "bucket_size": 15_000}
    trainer = tiny_gpt.build(tiny_gpt.Setup(**options, hidden=72, layers=2))
    trainer.train(1)
    trainer.sync_params()
    model = trainer.model[0].module.sharded_state_dict()
    (member,) = trainer.optimizer.chained_optimizers
    assert len(member.buffers[0].buckets) > 1
    state = member.sharded_param_state_fully_reshardable(model, False, {})
    weights, masters = (
        {
            # All layers have one key.
            (value.key.removeprefix("optimizer.state.param."), value.global_offset): value.data
            for value in nested_values(tensors)
            if isinstance(value, ShardedTensor) and ".exp_avg" not in value.key
        }
        for tensors in (model, state)
    )
    assert len(masters) == len(list(trainer.model[0].parameters()))
    return sorted(
        f"{key} at {offset}"
        for (key, offset), master in masters.items()
        if not torch.equal(master.bfloat16(), weights[key, offset])
    )


def test_masters_are_saved_unshifted_from_several_padded_buckets() -> None:
    assert shifted_parameters() == []
