"""``megatron-flashoptim convert`` as users call it; what it writes is tested beside Megatron."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from console import Done, error, run, run_installed
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


def _files(folder: Path) -> dict[str, bytes]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def _check_printed(done: Done) -> None:
    """On stderr stands how far it is, and nothing else; how fast, once something is done."""
    assert done.returncode == 0, done.stderr
    phases = set()
    for line in done.stderr.splitlines():
        phase, share, *_ = line.split()
        assert phase in phases or share == "0%", line
        phases.add(phase)
        assert re.fullmatch(r"\w+ +(0%|\d+%  [\d.]+ [Mk] elements/s(, \d+ s left)?)", line), line
        assert "  0.0 " not in line


def _check_sizes(printed: str, before: Path, after: Path, holds: str = "") -> None:
    """The line of the result has its size and the source's, as they are on disk."""
    sizes = [sum(map(len, _files(folder).values())) for folder in (after, before)]
    said = "{:.2f} MB, from {:.2f} MB".format(*(size / 1e6 for size in sizes))
    assert f"\n{after}: {holds}{said} ({sizes[0] / sizes[1]:.2f}), written" in printed


def test_console_script_converts_and_says_what_it_did(adam: Path, tmp_path: Path) -> None:
    kept = _files(adam)
    done = run_installed("convert", "--to", "flash", str(adam), str(tmp_path / "flash"))
    _check_printed(done)
    assert _files(adam) == kept
    _check_sizes(done.stdout, adam / "iter_0000002", tmp_path / "flash" / "iter_0000002")
    assert "Megatron's Adam, fully_reshardable" in done.stdout
    assert "relative errors of masters largest" in done.stdout
    assert f"load it with --load {tmp_path / 'flash'}" in done.stdout
    assert (tmp_path / "flash" / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert (tmp_path / "flash" / "iter_0000002" / ".metadata").is_file()
    for phase in ("checking", "converting", "verifying"):
        assert f"{phase}" in done.stderr and "100%" in done.stderr
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
    assert " in 1 part, of " in shown
    assert main(["convert", "--to", "flash", str(adam), str(tmp_path / "new")]) == 0
    written = float(capsys.readouterr().out.split("new/iter_0000002: ")[1].split(" MB")[0])
    assert written == pytest.approx(announced, rel=0.15)  # what is no tensor is not counted
    assert main(["convert", "--to", "weights", *arguments[:2], str(tmp_path / "w")]) == 0
    *lines, total = capsys.readouterr().out.splitlines()[1:]
    assert any("float32" in line and "embedding.word_embeddings.weight" in line for line in lines)
    data = sum(float(line.split()[0]) for line in lines)
    assert data == pytest.approx(float(total.split(" would have ")[1].split()[0]), abs=0.01)
    assert not (tmp_path / "w").exists()


def test_console_script_converts_back_and_to_weights(adam: Path, tmp_path: Path) -> None:
    bits = ["--master-bits", "32", "--exp-avg-sq-code", "fourth_root"]
    assert main(["convert", "--to", "flash", *bits, str(adam), str(tmp_path / "flash")]) == 0
    kept = _files(tmp_path / "flash")
    iteration = tmp_path / "flash" / "iter_0000002"
    done = run_installed("convert", "--to", "adam", str(tmp_path / "flash"), str(tmp_path / "adam"))
    _check_printed(done)
    assert "decoded exactly" in done.stdout
    _check_sizes(done.stdout, iteration, tmp_path / "adam" / "iter_0000002")
    done = run_installed("convert", "--to", "weights", str(iteration), str(tmp_path / "weights"))
    _check_printed(done)
    index = json.loads((tmp_path / "weights" / "model.safetensors.index.json").read_text())
    tensors = f"{len(index['weight_map'])} tensors, "
    _check_sizes(done.stdout, iteration, tmp_path / "weights", tensors)
    assert _files(tmp_path / "flash") == kept


def test_a_killed_conversion_goes_on_where_it_was(
    adam: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL while the third part is written; what is there at the end has the same bytes."""
    from megatron_flashoptim.checkpoint import offline, writer

    kept = _files(adam)
    monkeypatch.setattr(offline, "_PART", 1 << 13)
    assert run("convert", "--to", "flash", str(adam), str(tmp_path / "whole")).returncode == 0
    command = ("convert", "--to", "flash", str(adam), str(tmp_path / "flash"))
    original = writer.write_part

    def dies(folder: Path, records: Path, number: int, plan: Any, produce: Any, *more: Any) -> None:
        produced: list[Any] = []

        def until(index: Any) -> Any:
            if number == 2 and produced:
                os.kill(os.getpid(), signal.SIGKILL)
            produced.append(index)
            return produce(index)

        original(folder, records, number, plan, until, *more)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_part", dies)
        assert run(*command).returncode == -signal.SIGKILL
    left = sorted(file.name for file in (tmp_path / "flash").iterdir())
    assert left == [".converting-iter_0000002", ".converting-iter_0000002.lock"]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^2 of \d+ parts were there from an interrupted", done.stdout, re.MULTILINE)
    whole, resumed = (_files(tmp_path / name) for name in ("whole", "flash"))
    described = [pickle.loads(files.pop("iter_0000002/.metadata")) for files in (whole, resumed)]
    assert resumed == whole
    for field in ("state_dict_metadata", "storage_data"):  # a name at random is beside them
        assert getattr(described[0], field) == getattr(described[1], field)
    assert _files(adam) == kept


def _main_failing_at(point: int, error: type[BaseException], command: tuple[str, ...]) -> int:
    """Convert; of all that changes a folder after the result is verified, one fails, from 0 on."""
    from megatron_flashoptim.checkpoint.offline import Conversion

    verify, calls = Conversion._verify, []

    def failing(original: Any) -> Any:
        def fails(*arguments: Any, **options: Any) -> Any:
            calls.append(original)
            if len(calls) == point + 1:
                raise error(errno.EIO, "Input/output error")
            return original(*arguments, **options)

        return fails

    with pytest.MonkeyPatch.context() as patch:

        def verifies(*arguments: Any) -> None:
            verify(*arguments)
            for name in ("rename", "replace", "unlink", "rmdir"):
                patch.setattr(os, name, failing(getattr(os, name)))

        patch.setattr(Conversion, "_verify", verifies)
        return main(command)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_fails_after_the_result_is_verified_is_done_by_the_same_command(
    error: type[BaseException], adam: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rename, tracker, record, records, checked masters, description, working folder."""
    options = ("--to", "flash")
    assert main(["convert", *options, str(adam), str(tmp_path / "whole")]) == 0
    source = adam
    if error is KeyboardInterrupt:  # as a kill, with the other target
        options, source = ("--to", "adam"), tmp_path / "whole"
        assert main(["convert", *options, str(source), str(tmp_path / "whole_adam")]) == 0
    whole = _files(tmp_path / ("whole" if source == adam else "whole_adam"))
    del whole["iter_0000002/.metadata"]  # a name at random is in it
    report = "relative errors" if source == adam else "decoded exactly"
    for point in range(7):
        new = tmp_path / str(point)
        command = ("convert", *options, str(source), str(new))
        capsys.readouterr()
        code = _main_failing_at(point, error, command)
        said = capsys.readouterr().err
        last = point == 6  # an empty folder
        if error is OSError:
            assert code == (0 if last else 1)
            kept = f"{new / '.converting-iter_0000002'}: the same command goes on with it"
            assert last or (kept if point == 0 else "run the same command again") in said
        else:
            assert code == 130
        code = main(command)
        shown = capsys.readouterr()
        if last:
            assert code == 1 and "is there already" in shown.err
            (new / ".converting-iter_0000002").rmdir()
        else:
            assert code == 0, shown.err
            assert "1 of 1 part were there from an interrupted conversion" in shown.out
            assert (report in shown.out) == (point <= 2), "as long as there are records"
        assert (new / "latest_checkpointed_iteration.txt").read_text() == "2"
        files = _files(new)
        del files["iter_0000002/.metadata"]
        assert files == whole
        assert sorted(path.name for path in new.iterdir()) == [
            "iter_0000002",
            "latest_checkpointed_iteration.txt",
        ]


def test_a_result_that_is_in_place_and_unfinished_is_not_another_conversions(
    adam: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("convert", "--to", "flash", str(adam), str(tmp_path / "new"))
    assert _main_failing_at(1, OSError, command) == 1
    said = error(*command, "--master-bits", "32", code=1)
    assert "iter_0000002 is there already" in said
    # Removed as that says, it is converted anew.
    shutil.rmtree(tmp_path / "new" / "iter_0000002")
    assert main(command) == 0
    assert "interrupted" not in capsys.readouterr().out
    assert (tmp_path / "new" / "iter_0000002" / ".metadata").is_file()
    assert [*(tmp_path / "new").glob(".converting*")] == []


def test_weights_that_were_killed_while_moved_are_written_anew(
    adam: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into a folder that was there; a file of the user's keeps it from being filled."""
    from megatron_flashoptim.checkpoint import weights_file

    monkeypatch.setattr(weights_file, "_FILE_BYTES", 20_000)
    new = tmp_path / "new"
    new.mkdir()
    command = ("convert", "--to", "weights", str(adam), str(new))
    original, moved = Path.rename, []

    def dies(path: Path, target: Path) -> Path:
        if len(moved) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        moved.append(path)
        return original(path, target)

    def fails(path: Path, target: Path) -> Path:
        moved.append(path)
        return original(path, target if len(moved) < 3 else new / "no" / "folder")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dies)
        assert run(*command).returncode == -signal.SIGKILL
    assert len(list(new.iterdir())) == 4, "two files, the working folder, and its lock"
    (new / "mine").touch()
    assert "is there already" in error(*command, code=1)
    (new / "mine").unlink()
    assert main(command) == 0
    index = json.loads((new / "model.safetensors.index.json").read_text())
    assert set(_files(new)) == {*index["weight_map"].values(), "model.safetensors.index.json"}
    assert len(set(index["weight_map"].values())) > 3
    other = tmp_path / "other"
    other.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails)
        assert main((*command[:-1], str(other))) == 1
    assert len(moved) == 3 and not any(other.iterdir()), "nothing is left"


def test_nothing_is_written_into_the_source(
    adam: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whatever path it is named; weights into the current folder leave that as it is."""
    kept = {str(path): path.lstat().st_mtime_ns for path in sorted(adam.rglob("*"))}
    iteration = adam / "iter_0000002"
    (tmp_path / "link").symlink_to(iteration)
    inside = (iteration / "new", iteration, tmp_path / "link" / "new" / "er")
    for source, destination in zip((adam, iteration, adam), inside, strict=True):
        for options in (("flash",), ("flash", "--dry-run"), ("weights", "--dtype", "bf16")):
            said = error("convert", "--to", *options, str(source), str(destination), code=1)
            verb = "is" if destination == iteration else "lies within"
            assert f"{destination} {verb} the source {iteration}, which is only read;" in said
    # The folder of --save itself: nobody shall be told to remove it.
    said = error("convert", "--to", "flash", str(adam), str(adam), code=1)
    assert f"{iteration} is the source {iteration}, which is only read; give another" in said
    said = error("convert", "--to", "weights", str(adam), str(adam), code=1)
    assert f"{adam} holds the source {iteration}, which is only read; give another" in said
    assert {str(path): path.lstat().st_mtime_ns for path in sorted(adam.rglob("*"))} == kept
    (tmp_path / "file").touch()
    said = error("convert", "--to", "flash", str(adam), str(tmp_path / "file"), code=1)
    assert f"{tmp_path / 'file'} is there already; remove it, or give another folder" in said
    current = tmp_path / "current"
    current.mkdir()
    monkeypatch.chdir(current)
    was = current.stat().st_ino
    (current / ".converting").mkdir()  # of an export that was killed
    done = run("convert", "--to", "weights", str(adam), ".")
    _check_printed(done)
    _check_sizes(done.stdout, iteration, Path("."), "15 tensors, ")
    assert current.stat().st_ino == was
    assert sorted(_files(current)) == [
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    ]


def _limit_files(size: int) -> None:
    """Let no file of this process grow beyond so many bytes, as a full disk would."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))


def test_what_cannot_be_written_is_one_line_and_goes_on(
    adam: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second part, then torch's .metadata, then a file of weights."""
    from megatron_flashoptim.checkpoint import offline, weights_file, writer

    def limited(module: Any, name: str, size: int, *arguments: str) -> str:
        """Run a command whose fork has a limit from a function's second call on, or its only."""
        original, calls = getattr(module, name), []

        def limits(*given: Any) -> Any:
            calls.append(name)
            if len(calls) == 2 or name != "write_part":
                _limit_files(size)
            return original(*given)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, limits)
            done = run("convert", *arguments)
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr and " ([Errno 27] File too large" in done.stderr
        return done.stderr.splitlines()[-1]

    monkeypatch.setattr(offline, "_PART", 1 << 13)
    command = ("--to", "flash", str(adam), str(tmp_path / "flash"))
    work = tmp_path / "flash" / ".converting-iter_0000002"
    for name in ("write_part", "write_metadata"):
        said = limited(writer, name, 20_000, *command)
        assert f"error: {work / 'checkpoint'} cannot be written" in said
        assert "; make room, or mend what that says, and run the same command again" in said
        assert name == "write_metadata" or len(list((work / "records").iterdir())) == 1
    done = run("convert", *command)
    assert done.returncode == 0, done.stderr
    parts = re.search(r"^(\d+) of (\d+) parts were there from", done.stdout, re.MULTILINE)
    assert parts and int(parts[1]) == int(parts[2]) > 3
    weights = tmp_path / "weights"
    said = limited(
        weights_file.WeightsExport, "run", 20_000, "--to", "weights", str(adam), str(weights)
    )
    assert f"error: {weights} cannot be written" in said
    assert [file.name for file in tmp_path.iterdir()] == ["flash"], "nothing is left of weights"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--to", "adam", "--master-bits", "32"], "--master-bits 32 belongs to --to flash"),
        (["--to", "flash", "--dtype", "bf16"], "--dtype bf16 belongs to --to weights"),
        (["--to", "weights", "--repair"], "--repair belongs to --to flash and --to adam"),
        (["--to", "weights", "--processes", "2"], "--processes 2 belongs to --to flash and --to"),
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
