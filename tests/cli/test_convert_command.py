"""``megatron-flashoptim convert`` as users call it; what it writes is tested beside Megatron."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from console import error, run_installed
from ranks import run_ranks

from megatron_flashoptim.cli import main


def _saved(folder: Path) -> Path:
    """Save an iteration of Megatron's Adam as its training loop names it; returns the root."""
    import checkpoints
    import tiny_gpt
    from exact_adamw import use_as_megatrons_adam

    use_as_megatrons_adam()
    trainer = tiny_gpt.build(tiny_gpt.Setup(flash=None, layers=1))
    trainer.train(2)
    iteration = folder / "iter_0000002"
    iteration.mkdir(parents=True)
    checkpoints.save(trainer, iteration, "fully_reshardable")
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    return folder


@pytest.fixture(scope="module")
def adam(megatron: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adam")
    run_ranks(1, _saved, folder)
    return folder


def test_console_script_converts_and_says_what_it_did(adam: Path, tmp_path: Path) -> None:
    done = run_installed("convert", "--to", "flash", str(adam), str(tmp_path / "flash"))
    assert done.returncode == 0, done.stderr
    assert "Megatron's Adam, fully_reshardable" in done.stdout
    assert "relative errors of masters largest" in done.stdout
    assert f"load it with --load {tmp_path / 'flash'}" in done.stdout
    assert (tmp_path / "flash" / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert (tmp_path / "flash" / "iter_0000002" / ".metadata").is_file()
    for phase in ("checking", "converting", "verifying"):
        assert f"{phase}" in done.stderr and "100%" in done.stderr
    assert "Warning" not in done.stderr
    again = error("convert", "--to", "flash", str(adam), str(tmp_path / "flash"), code=1)
    assert "is there already" in again


def test_dry_run_lists_what_would_be_written_and_writes_nothing(
    adam: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--dry-run", str(adam), str(tmp_path / "new")]
    assert main(["convert", "--to", "flash", *arguments]) == 0
    shown = capsys.readouterr().out
    assert not any(tmp_path.iterdir())
    assert "int8" in shown and "optimizer.state.correction.decoder" in shown
    announced = float(shown.split("would have about ")[1].split(" MB")[0])
    assert main(["convert", "--to", "flash", str(adam), str(tmp_path / "new")]) == 0
    written = float(capsys.readouterr().out.split("new/iter_0000002: ")[1].split(" MB")[0])
    assert written == pytest.approx(announced, rel=0.15)  # what is no tensor is not counted
    assert main(["convert", "--to", "weights", *arguments[:2], str(tmp_path / "w")]) == 0
    assert "embedding.word_embeddings.weight" in capsys.readouterr().out
    assert not (tmp_path / "w").exists()


def test_back_and_weights(adam: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bits = ["--master-bits", "32", "--exp-avg-sq-code", "fourth_root"]
    assert main(["convert", "--to", "flash", *bits, str(adam), str(tmp_path / "flash")]) == 0
    assert main(["convert", "--to", "adam", str(tmp_path / "flash"), str(tmp_path / "adam")]) == 0
    assert "decoded exactly" in capsys.readouterr().out
    iteration = tmp_path / "flash" / "iter_0000002"
    assert main(["convert", "--to", "weights", str(iteration), str(tmp_path / "weights")]) == 0
    assert "tensors" in capsys.readouterr().out
    assert (tmp_path / "weights" / "model.safetensors.index.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--to", "adam", "--master-bits", "32"], "--master-bits 32 belongs to --to flash"),
        (["--to", "flash", "--dtype", "bf16"], "--dtype bf16 belongs to --to weights"),
        (["--to", "weights", "--repair"], "--repair belongs to --to flash and --to adam"),
        (["--to", "flash", "--processes", "0"], "--processes 0: at least 1"),
        (["--to", "gguf"], "invalid choice: 'gguf'"),
        ([], "--to"),
    ],
)
def test_wrong_command_lines_exit_with_2(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["convert", *arguments, str(tmp_path / "a"), str(tmp_path / "b")])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        ("nowhere", [], "is no folder"),
        ("", [], "no latest_checkpointed_iteration.txt"),
        ("adam", ["--iteration", "7"], "has no iter_0000007; it has iter_0000002"),
        ("adam/iter_0000002", ["--iteration", "7"], "is one iteration; drop --iteration 7"),
        ("adam", ["--to", "adam"], "already"),
    ],
)
def test_what_cannot_be_done_exits_with_1_and_one_line(
    source: str,
    options: list[str],
    says: str,
    adam: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "adam").symlink_to(adam)
    to = [] if "--to" in options else ["--to", "flash"]
    code = main(["convert", *to, *options, str(tmp_path / source), str(tmp_path / "new")])
    assert code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megatron-flashoptim convert: error: ") and says in line
    assert not (tmp_path / "new").exists()


def test_without_safetensors_the_error_names_it(
    adam: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert main(["convert", "--to", "weights", str(adam), str(tmp_path / "weights")]) == 1
    assert "safetensors" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
