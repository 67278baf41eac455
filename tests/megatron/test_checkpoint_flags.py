"""Megatron's own save_checkpoint and load_checkpoint, with the flags users give them."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_state import assert_same_state
from ranks import run_ranks

from megatron_flashoptim import FlashOptimConfig

FULL = "--dist-ckpt-optim-fully-reshardable"


def _train(
    folder: Path,
    flags: str,
    steps: int,
    *,
    load: bool = False,
    save_at: tuple[int, ...] = (),
    **options: Any,
) -> dict[str, Any]:
    import training_checkpoints

    run = training_checkpoints.Run(folder, *flags.split(), **options)
    start = run.load() if load else 0
    loaded = run.everything()
    losses = []
    for iteration in range(start + 1, start + steps + 1):
        losses += run.train(1)
        if iteration in save_at:
            run.save(iteration)
    return {**run.everything(), "start": start, "losses": losses, "loaded": loaded}


OVERLAP = {"overlap": True, "bucket_size": 15_000}
CASES = {
    "defaults": ("", {}),
    "fully reshardable": (FULL, OVERLAP),
    "memory efficient": (f"{FULL} --distrib-optim-fully-reshardable-mem-efficient", {}),
    "parallel load": (f"{FULL} --ckpt-fully-parallel-load", OVERLAP),
    "async": (f"{FULL} --async-save", {}),
    "constant structure": (f"{FULL} --ckpt-assume-constant-structure --async-save", {}),
    "torch": ("--ckpt-format torch", {}),
    "torch, tensor parallel": ("--ckpt-format torch", {"tp": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_training_resumes_bitwise(case: str, tmp_path: Path) -> None:
    flags, options = CASES[case]
    whole = run_ranks(2, _train, tmp_path, flags, 5, save_at=(2, 3), **options)
    resumed = run_ranks(2, _train, tmp_path, flags, 2, load=True, **options)
    for ours, theirs in zip(resumed, whole, strict=True):
        assert ours["start"] == 3
        assert ours["losses"] == theirs["losses"][3:]
        assert_same_state(ours, theirs)


def _convert(folder: Path, converted: Path, to: str) -> dict[str, Any]:
    """Do what the training loop does for ``--ckpt-convert-format``."""
    import training_checkpoints
    from megatron.training.training import update_use_dist_ckpt

    run = training_checkpoints.Run(
        folder, *("" if to == "torch" else "--ckpt-format torch").split()
    )
    iteration = run.load()
    run.args.ckpt_format = to
    update_use_dist_ckpt(run.args)
    run.args.save = str(converted)
    run.save(iteration)
    return run.everything()


@pytest.mark.parametrize("to", ["torch", "torch_dist"])
def test_formats_convert_into_each_other(to: str, tmp_path: Path) -> None:
    formats = {"torch": "--ckpt-format torch", "torch_dist": ""}
    other = formats["torch_dist" if to == "torch" else "torch"]
    folder, converted = tmp_path / "saved", tmp_path / "converted"
    saved = run_ranks(2, _train, folder, other, 2, save_at=(2,))
    run_ranks(2, _convert, folder, converted, to)
    loaded = run_ranks(2, _train, converted, formats[to], 0, load=True)
    for ours, theirs in zip(loaded, saved, strict=True):
        assert_same_state(ours, theirs)


def _async_race(folder: Path) -> dict[str, Any]:
    import training_checkpoints
    from megatron.training import async_utils

    run = training_checkpoints.Run(folder, FULL, "--async-save")
    run.train(2)
    saved = run.everything()
    run.save_in_background(2)
    run.train(2)
    async_utils.maybe_finalize_async_save(blocking=True)
    return saved


def test_async_save_holds_the_state_at_the_save(tmp_path: Path) -> None:
    saved = run_ranks(2, _async_race, tmp_path)
    loaded = run_ranks(2, _train, tmp_path, FULL, 0, load=True)
    for ours, theirs in zip(loaded, saved, strict=True):
        assert_same_state(ours, theirs)


@pytest.mark.parametrize(
    ("saved_with", "loaded_with", "start"),
    [
        ("--no-save-optim", "--no-load-optim --no-load-rng", 3),
        (FULL, "--no-load-optim --no-load-rng", 3),
        ("", "--finetune", 0),
        ("--ckpt-format torch", "--ckpt-format torch --no-load-optim --no-load-rng", 3),
        (FULL, "--no-load-optim --no-load-rng --load-main-params-from-ckpt", 3),
    ],
)
def test_model_only_load_starts_from_exactly_the_weights(
    saved_with: str, loaded_with: str, start: int, tmp_path: Path
) -> None:
    saved = run_ranks(2, _train, tmp_path, saved_with, 3, save_at=(3,))
    ranks = run_ranks(2, _train, tmp_path, loaded_with, 1, load=True)
    for rank, before in zip(ranks, saved, strict=True):
        assert rank["start"] == start
        for name, weight in before["weights"].items():
            assert torch.equal(weight, rank["loaded"]["weights"][name]), name
        assert any(tensor.any() for tensor in before["state"].values())
        assert not any(tensor.any() for tensor in rank["loaded"]["state"].values())
        assert {group["step"] for group in rank["groups"]} == {1}


def _with_lr(flags: str, lr: float) -> dict[str, Any]:
    """Return flags and options of a run whose embeddings learn four times as fast."""
    rates = {"lr": lr, "decoupled_lr": 4 * lr, "min_lr": 0.0, "decoupled_min_lr": 0.0}
    return {"flags": f"--lr {lr} {flags}", "tied": False, "optimizer": rates}


def _learning_rates(folder: Path, *runs: tuple[str, float]) -> list[Any]:
    """Return the learning rates of matrices and embeddings in runs that load, or the error."""
    from megatron.core import parallel_state
    from megatron.training import global_vars

    found: list[Any] = []
    for flags, lr in runs:
        try:
            run = _train(folder, steps=0, load=True, **_with_lr(flags, lr))
            found.append(sorted({group["lr"] for group in run["groups"]}))
        except ValueError as problem:
            found.append(str(problem))
        parallel_state.destroy_model_parallel()
        global_vars.unset_global_variables()
    return found


@pytest.mark.parametrize(
    "flags", [pytest.param(FULL, marks=pytest.mark.smoke), "", "--ckpt-format torch"]
)
def test_schedule_is_the_checkpoints_unless_overridden(flags: str, tmp_path: Path) -> None:
    """Of every param group: embeddings have a learning rate of their own."""
    override = f"{flags} --override-opt_param-scheduler"
    use = f"{flags} --use-checkpoint-opt_param-scheduler"
    run_ranks(1, _train, tmp_path, steps=4, save_at=(4,), **_with_lr(flags, 1e-3))
    ((kept, refused, used, overridden, longer),) = run_ranks(
        1,
        _learning_rates,
        tmp_path,
        *[(flags, 1e-3), (flags, 5e-4), (use, 5e-4), (override, 5e-4)],
        (f"{override} --lr-decay-iters 16", 1e-3),
    )
    # Linear to 0 over 8 or 16 iterations, after 4.
    assert kept == used == pytest.approx([1e-3 / 2, 4e-3 / 2])
    assert overridden == pytest.approx([5e-4 / 2, 2e-3 / 2])
    assert longer == pytest.approx([1e-3 * 3 / 4, 4e-3 * 3 / 4])
    assert "saved with max_lr=0.001, this run has 0.0005: give --override-opt" in refused


def _killed_while_saving(folder: Path) -> None:
    import training_checkpoints
    from megatron.core.dist_checkpointing.strategies import torch as torch_strategy

    run = training_checkpoints.Run(folder, FULL)
    run.load()
    run.train(1)

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    torch_strategy.TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks = die
    run.save(4)


def test_interrupted_save_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    saved = run_ranks(2, _train, tmp_path, FULL, 3, save_at=(3,))
    with pytest.raises(AssertionError, match="ended with -9"):
        run_ranks(2, _killed_while_saving, tmp_path)
    assert (tmp_path / "iter_0000004").is_dir()
    loaded = run_ranks(2, _train, tmp_path, FULL, 0, load=True)
    for ours, theirs in zip(loaded, saved, strict=True):
        assert ours["start"] == 3
        assert_same_state(ours, theirs)


def _error(folder: Path, flags: str, **options: Any) -> str:
    import training_checkpoints

    try:
        training_checkpoints.Run(folder, *flags.split(), **options).load()
    except BaseException as problem:  # SystemExit too: Megatron ends the process for some
        return f"{type(problem).__name__}: {problem}"
    return ""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, megatron: None) -> Path:
    """A checkpoint of iteration 1."""
    folder = tmp_path_factory.mktemp("checkpoint")
    run_ranks(2, _train, folder, FULL, 1, save_at=(1,))
    return folder


@pytest.fixture
def copy_of_checkpoint(checkpoint: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    return folder


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_file_is_named_on_every_rank(
    damage: str, rank: int, copy_of_checkpoint: Path
) -> None:
    """Rank 0's holds what Megatron reads first, from 0.19 on."""
    (file,) = (copy_of_checkpoint / "iter_0000001").glob(f"__{rank}_*.distcp")
    size = file.stat().st_size
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, 100)
    what = "is missing" if damage == "missing" else f"has 100 of {size} bytes"
    for message in run_ranks(2, _error, copy_of_checkpoint, FULL):
        assert message.startswith("ValueError") and f"{file.name} {what}" in message
        assert "--ckpt-step" in message


@pytest.mark.parametrize("kept", [None, 100])
def test_damaged_metadata_is_named_on_every_rank(
    kept: int | None, copy_of_checkpoint: Path
) -> None:
    file = copy_of_checkpoint / "iter_0000001" / ".metadata"
    if kept is None:
        file.unlink()
    else:
        os.truncate(file, kept)
    what = "has no .metadata: it is no torch_dist" if kept is None else f"{file} cannot be read"
    for message in run_ranks(2, _error, copy_of_checkpoint, FULL):
        assert message.startswith("ValueError") and what in message


def _verdict(folder: Path) -> str:
    from megatron_flashoptim.checkpoint.damage import check_files_together

    try:
        check_files_together(folder)
    except ValueError as problem:
        return str(problem)
    return ""


@pytest.mark.parametrize("kept", [0, 100])
def test_unreadable_metadata_is_an_error_on_every_rank(kept: int, copy_of_checkpoint: Path) -> None:
    """Rank 0 alone reads it; the others must not wait for a verdict that never comes."""
    folder = copy_of_checkpoint / "iter_0000001"
    assert run_ranks(2, _verdict, folder) == ["", ""]
    os.truncate(folder / ".metadata", kept)
    for message in run_ranks(2, _verdict, folder):
        assert "iter_0000001/.metadata cannot be read" in message and "--ckpt-step" in message


@pytest.mark.parametrize(
    ("other", "tensor"),
    [
        ({"hidden": 128}, "layer_norm_weight"),
        ({"layers": 3}, "layer_norm_weight"),
        ({"swiglu": True}, "linear_fc1.weight"),
        ({"tied": False}, "output_layer.weight"),
    ],
)
def test_checkpoint_of_another_model_is_an_error_that_names_a_tensor(
    other: dict[str, Any], tensor: str, checkpoint: Path
) -> None:
    for message in run_ranks(2, _error, checkpoint, FULL, **other):
        assert tensor in message


def test_state_that_megatron_leaves_out_is_named_on_every_rank(checkpoint: Path) -> None:
    """Only the last stage has the output layer, which the checkpoint lacks."""
    flags = f"{FULL} --dist-ckpt-strictness log_all"
    for message in run_ranks(2, _error, checkpoint, flags, tied=False, pp=2):
        assert message.startswith("ValueError: the checkpoint lacks optimizer.state.correction.")
        assert "correction.output_layer.weight, optimizer.state.exp_avg.output_layer" in message
        assert "--dist-ckpt-strictness" in message and "--no-load-optim" in message
        assert message.endswith("(on rank 1; 1 of 2 ranks have a problem)")


def _freeze_an_mlp(model: Any) -> None:
    for param in model.decoder.layers[-1].mlp.parameters():
        param.requires_grad = False


def _start_errors(folder: Path, **options: Any) -> dict[str, str]:
    import training_checkpoints
    from megatron.training import global_vars

    flags = {"fully": (FULL,), "dp": (), "weights alone": (FULL, "--no-save-optim")}
    found = {}
    for name, given in flags.items():
        global_vars.unset_global_variables()
        try:
            training_checkpoints.Run(folder, *given, **options)
            found[name] = ""
        except ValueError as problem:
            found[name] = str(problem)
    return found


def test_what_could_not_be_saved_is_refused_before_training(tmp_path: Path) -> None:
    for told in run_ranks(2, _start_errors, tmp_path, prepare_model=_freeze_an_mlp):
        assert "elements of decoder.layers.mlp." in told["fully"]
        assert "Save with dp_reshardable" in told["fully"]
        assert told["dp"] == told["weights alone"] == ""


def _adams_errors(folders: dict[str, Path]) -> dict[str, str]:
    """Return the errors of plain Adam loading checkpoints of flash optimizers."""
    from exact_adamw import use_as_megatrons_adam
    from megatron.core import parallel_state
    from megatron.training import global_vars

    use_as_megatrons_adam()
    said = {}
    flags = f"{FULL} --optimizer adam"
    for name, folder in folders.items():
        said[name] = _error(folder, flags, flash=None)
        parallel_state.destroy_model_parallel()
        global_vars.unset_global_variables()
    other = next(iter(folders.values()))
    said["of another model"] = _error(other, f"{flags} --no-load-optim", flash=None, hidden=128)
    return said


def test_plain_adam_is_told_in_one_line_that_a_checkpoint_is_of_a_flash_optimizer(
    checkpoint: Path, tmp_path: Path
) -> None:
    folders = {"model space": checkpoint}
    for name, flags, options in (
        ("buckets", "", {}),
        ("lion", f"{FULL} --optimizer flash_lion", {"flash": FlashOptimConfig("flash_lion")}),
    ):
        folders[name] = tmp_path / name
        run_ranks(1, _train, folders[name], flags, 1, save_at=(1,), **options)
    (said,) = run_ranks(1, _adams_errors, folders)
    weights = "load the weights alone with --no-load-optim --no-load-rng, or --finetune"
    for name, optimizer in (
        ("model space", "flash_adamw"),
        ("buckets", "flash_adamw"),
        ("lion", "flash_lion"),
    ):
        start = f"ValueError: the checkpoint in {folders[name]}/iter_0000001 was saved with"
        assert said[name].startswith(f"{start} --optimizer {optimizer}, and this run has")
        assert "\n" not in said[name] and said[name].endswith(weights)
        assert ("convert --to adam" in said[name]) is (name != "lion")
    assert "save once with --dist-ckpt-optim-fully-reshardable" in said["buckets"]
    assert "layer_norm_weight" in said["of another model"]


def _warned(folder: Path, **options: Any) -> list[str]:
    import checkpoints

    logged = checkpoints.collect_log()
    _train(folder, f"{FULL} --make-vocab-size-divisible-by 1", 0, load=True, **options)
    return [message for message in logged if "rows in the checkpoint" in message]


@pytest.mark.parametrize("vocab", [256, 272])
def test_other_rows_of_the_vocabulary_are_warned_of_once(vocab: int, checkpoint: Path) -> None:
    first, second = run_ranks(2, _warned, checkpoint, vocab=vocab, tp=2)
    assert second == []
    if vocab == 256:
        assert first == []
        return
    (warning,) = first
    assert "embedding.word_embeddings.weight has 256 rows in the checkpoint and 272" in warning
    assert "New rows start as zeros" in warning and warning.endswith("there are 256 rows")
