"""``megatron-flashoptim memory --checkpoint`` and ``inspect`` of what Megatron itself saved."""

from __future__ import annotations

import multiprocessing
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from console import error, run
from ranks import run_ranks

from megatron_flashoptim import FlashOptimConfig

# The arguments that training_checkpoints.Run trains with and that sizes depend on.
MODEL = """--num-layers 2 --hidden-size 64 --num-attention-heads 4 --bf16 --seq-length 64
--max-position-embeddings 64 --micro-batch-size 2 --position-embedding-type rope --vocab-size 255
--use-distributed-optimizer""".split()
UNTIED = "--swiglu --untie-embeddings-and-output-weights"
TP2_PP2 = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
# Optimizer and format, number of ranks, flags and the same for the tiny GPT.
SAVED: dict[str, tuple[int, str, dict[str, Any]]] = {
    "adam, torch_dist": (2, "--grad-reduce-in-bf16", {"flash": None}),
    "flash_adamw, torch_dist": (
        4,
        f"{TP2_PP2} {UNTIED}",
        {"tp": 2, "pp": 2, "swiglu": True, "tied": False},
    ),
    "flash_lion, torch": (
        2,
        "--optimizer flash_lion --ckpt-format torch --pipeline-model-parallel-size 2",
        {"flash": FlashOptimConfig("flash_lion"), "pp": 2},
    ),
    "gradient release": (
        1,
        "--optimizer flash_adamw --flash-gradient-release --flash-release-slots 2 --clip-grad 0 "
        "--overlap-grad-reduce --ddp-bucket-size 20000 --rerun-mode disabled",
        {
            "flash": FlashOptimConfig(gradient_release=True, release_slots=2),
            "ddp": {"overlap_grad_reduce": True},
            "bucket_size": 20_000,
            "optimizer": {"clip_grad": 0.0},
        },
    ),
}


def _save(folder: Path, flags: list[str], options: dict[str, Any]) -> None:
    import training_checkpoints

    if options.get("flash", True) is None:
        from exact_adamw import use_as_megatrons_adam

        use_as_megatrons_adam()
        adam = ["adam" if flag == "flash_adamw" else flag for flag in training_checkpoints._FLAGS]
        training_checkpoints._FLAGS = adam
    trained = training_checkpoints.Run(folder, *flags, **options)
    # What Megatron's tokenizers that read a file leave of the vocabulary's size.
    trained.args.vocab_size, trained.args.padded_vocab_size = None, 256
    trained.train(1)
    trained.save(7)


@pytest.fixture(scope="module")
def saved(megatron: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train a step of each case and save it with Megatron's own ``save_checkpoint``."""
    folders = {}
    for name, (ranks, flags, options) in SAVED.items():
        folders[name] = tmp_path_factory.mktemp("saved")
        run_ranks(ranks, _save, folders[name], flags.split(), options)
    return folders


def _forked(name: str, *args: Any) -> Any:
    """Call a function of the planner in a fork: it changes Megatron's global state."""
    from megatron_flashoptim.megatron.memory import planner

    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(getattr(planner, name), args)


@pytest.mark.parametrize("case", SAVED)
def test_a_checkpoint_is_planned_as_its_arguments_are(case: str, saved: dict[str, Path]) -> None:
    ranks, flags, _ = SAVED[case]
    typed = [*MODEL, *flags.split()]
    assert _forked("plan_checkpoint", str(saved[case])) == _forked("plan", typed, ranks)
    # On other numbers of ranks, with other parallel sizes; what is typed stands.
    other = ["--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size", "1"]
    changed = _forked("plan_checkpoint", str(saved[case] / "iter_0000007"), other, 8)
    # The vocabulary is known as it was padded.
    assert changed == _forked("plan", [*typed, "--vocab-size", "256", *other], 8)
    assert len(changed.stages) == 1 and changed.data_parallel_size == 2


def test_fp16_is_refused_until_bf16_is_given(
    saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_flashoptim.megatron.memory import planner

    folder = str(saved["adam, torch_dist"])
    wanted = _forked("plan_checkpoint", folder)
    original = planner.read_saved_args

    def of_fp16(path: Path) -> Any:
        found = original(path)
        found.args.fp16, found.args.bf16 = True, False
        return found

    monkeypatch.setattr(planner, "read_saved_args", of_fp16)
    with pytest.raises(ValueError, match=r"arguments saved in .*: --fp16 is not planned.*--bf16"):
        _forked("plan_checkpoint", folder)
    assert _forked("plan_checkpoint", folder, ["--bf16"]) == wanted
    monkeypatch.undo()
    typed = [*(flag for flag in MODEL if flag != "--bf16"), "--fp16"]
    with pytest.raises(planner.ArgumentsError, match=r"^--fp16 is not planned"):
        _forked("plan", typed, 2)
    with pytest.raises(planner.ArgumentsError, match="flash_adamw cannot be used with --fp16"):
        _forked("plan", [*typed, "--optimizer", "flash_adamw"], 2)
    with pytest.raises(planner.ArgumentsError, match=r"^--fp8-param-gather is not planned"):
        _forked("plan", [*MODEL, "--fp8-format", "hybrid", "--fp8-param-gather"], 2)


def test_gradient_release_is_that_of_the_checkpoint_until_an_optimizer_is_given(
    saved: dict[str, Path],
) -> None:
    folder = str(saved["gradient release"])
    assert _forked("plan_checkpoint", folder).release_slots == 2
    for optimizer in ("flash_lion", "adam"):
        assert _forked("plan_checkpoint", folder, ["--optimizer", optimizer]).release_slots == 0


def test_the_command_prints_the_plan_of_a_checkpoint(saved: dict[str, Path]) -> None:
    case = "flash_adamw, torch_dist"
    planned = _forked("plan_checkpoint", str(saved[case]))
    largest = max(planned.stages, key=lambda stage: stage.parameters)
    done = run("memory", "--checkpoint", str(saved[case]))
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{largest.parameters:,} parameters on a rank of pipeline stage")
    (flash,) = [line for line in lines if line.startswith("flash_adamw, 24-bit masters")]
    assert flash[32:].split()[0] == f"{2 * largest.flash_buffer:,}"


def test_inspect_says_what_megatron_saved_of_a_run(saved: dict[str, Path]) -> None:
    done = run("inspect", str(saved["flash_adamw, torch_dist"]), "--no-report")
    assert (done.returncode, done.stderr) == (0, "")
    described = done.stdout.partition("\n\n")[0].splitlines()[1:]
    fields = dict(line.split(maxsplit=1) for line in described)
    assert fields["iteration"] == "7"
    assert fields["versions"].endswith(", Megatron checkpoint 3.0")
    assert fields["model"] == "layers 2, hidden 64"
    assert fields["parallel"] == "data 1, tensor 2, pipeline 2, expert 1, context 1"


def test_wrong_arguments_beside_a_checkpoint_exit_with_2(saved: dict[str, Path]) -> None:
    folder = str(saved["flash_adamw, torch_dist"])
    said = error("memory", "--checkpoint", folder, "--gpus", "6", code=2)
    assert "Megatron refuses the arguments: world size (6) is not divisible" in said


def _without_checkpoint(folder: Path) -> str:
    return "has no latest_checkpointed_iteration.txt, so it is no checkpoint"


def _missing_iteration(folder: Path) -> str:
    (folder / "latest_checkpointed_iteration.txt").write_text("12")
    return "has no iter_0000012; it has no iterations"


def _of_other_code(folder: Path) -> str:
    (folder / "mp_rank_00").mkdir()
    torch.save({"model": {}, "iteration": 3}, folder / "mp_rank_00" / "model_optim_rng.pt")
    return "holds no arguments of megatron.training"


def _cut_off(folder: Path) -> str:
    _of_other_code(folder)
    file = folder / "mp_rank_00" / "model_optim_rng.pt"
    file.write_bytes(file.read_bytes()[:100])
    return "cannot be read"


def _of_bert(folder: Path) -> str:
    (folder / "mp_rank_00").mkdir()
    model = {"encoder.layers.0.weight": torch.ones(1), "lm_head.bias": torch.ones(1)}
    state = {"model": model, "args": Namespace(world_size=1)}
    torch.save(state, folder / "mp_rank_00" / "model_optim_rng.pt")
    return "holds tensors of encoder, lm_head: it is not of a GPT"


def _of_mamba(folder: Path) -> str:
    (folder / "mp_rank_00").mkdir()
    model = {"decoder.layers.0.mixer.weight": torch.ones(1)}
    args = Namespace(world_size=1, num_layers=4, hybrid_layer_pattern="MM*-")
    state = {"model": model, "args": args}
    torch.save(state, folder / "mp_rank_00" / "model_optim_rng.pt")
    return "--hybrid-layer-pattern means a hybrid or Mamba model"


class Surprise:
    """A class that a checkpoint has no business to load."""


def _of_unlisted_classes(folder: Path) -> str:
    (folder / "mp_rank_00").mkdir()
    torch.save({"args": Surprise()}, folder / "mp_rank_00" / "model_optim_rng.pt")
    return "hold classes that Megatron does not list as safe to load"


BROKEN = (
    *(_without_checkpoint, _missing_iteration, _of_other_code, _cut_off, _of_bert, _of_mamba),
    _of_unlisted_classes,
)


@pytest.mark.parametrize("make", BROKEN)
def test_a_folder_that_cannot_be_planned_says_why(make: Any, tmp_path: Path) -> None:
    message = make(tmp_path)
    with pytest.raises(ValueError) as raised:
        _forked("plan_checkpoint", str(tmp_path))
    assert message in str(raised.value)
    # An error of the checkpoint, not of the command line.
    assert type(raised.value) is ValueError


def test_a_damaged_torch_dist_checkpoint_is_named(saved: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(saved["adam, torch_dist"], tmp_path, dirs_exist_ok=True)
    for file in (tmp_path / "iter_0000007").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"iter_0000007 cannot be read \("):
        _forked("plan_checkpoint", str(tmp_path))


def test_a_missing_folder_exits_with_1_and_one_line() -> None:
    said = error("memory", "--checkpoint", "no/such/folder", code=1)
    assert "no/such/folder is no folder; give what --save or --load was given" in said
