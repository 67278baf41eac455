"""``megatron-flashoptim convert`` started again, or twice at the same time."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from console import error, run

from megatron_flashoptim.cli import main

NAME = "iter_0000002"


def _killed_while_verifying(monkeypatch: pytest.MonkeyPatch, *command: str) -> None:
    from megatron_flashoptim.checkpoint import offline

    with monkeypatch.context() as patch:
        patch.setattr(
            offline.Conversion, "_verify", lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        )
        assert run(*command).returncode == -signal.SIGKILL


@pytest.mark.parametrize("options", [("flash",), ("weights",), ("weights", "into a folder")])
def test_two_at_the_same_time_are_one(options: tuple[str, ...], adam: Path, tmp_path: Path) -> None:
    """The second would truncate files of the first; what a kill leaves is no lock."""
    from megatron_flashoptim.checkpoint.alone import alone, lock_of

    new = tmp_path / "new"
    work = new / f".converting-{NAME}" if options[0] == "flash" else tmp_path / ".converting-new"
    if len(options) > 1:
        new.mkdir()
        work = new / ".converting"
    command = ("convert", "--to", options[0], str(adam), str(new))
    with alone(work):
        there = sorted(tmp_path.rglob("*"))
        done = run(*command)
        assert done.returncode == 1
        said = done.stderr.splitlines()[-1]
        assert f"error: another process is at work in {work}; wait for it, or end it" in said
        assert sorted(tmp_path.rglob("*")) == there
    lock_of(work).touch()
    assert main(command) == 0
    assert not [path for path in tmp_path.rglob("*") if ".converting" in path.name]


def test_one_that_was_slower_leaves_the_others_result(adam: Path, tmp_path: Path) -> None:
    """Both were planned before one had finished."""
    from megatron_flashoptim.checkpoint.offline import Conversion, Request

    new = tmp_path / "new"
    first, second = (Conversion(Request(adam, new, "flash")) for _ in range(2))
    first.run()
    kept = {path: path.stat().st_mtime_ns for path in new.rglob("*")}
    with pytest.raises(ValueError, match=f"{NAME} is there already"):
        second.run()
    assert {path: path.stat().st_mtime_ns for path in new.rglob("*")} == kept


def test_a_part_that_lost_its_file_is_written_again(
    adam: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """One is missing, one is short: of a copy, or a file system that lost what it has synced."""
    from megatron_flashoptim.checkpoint import offline

    monkeypatch.setattr(offline, "_PART", 1 << 13)
    command = ("convert", "--to", "flash", str(adam), str(tmp_path / "new"))
    _killed_while_verifying(monkeypatch, *command)
    folder = tmp_path / "new" / f".converting-{NAME}" / "checkpoint"
    (folder / "__1_0.distcp").unlink()
    os.truncate(folder / "__2_0.distcp", 99)
    assert main(command) == 0
    found = re.search(r"^(\d+) of (\d+) parts were there", capsys.readouterr().out, re.MULTILINE)
    assert found and int(found[1]) == int(found[2]) - 2 > 0


def test_what_is_copied_of_a_read_only_source_can_be_written_again(
    adam: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(adam, tmp_path / "source" / NAME)
    (source / "tokenizer" / "of").mkdir(parents=True)
    (source / "tokenizer" / "of" / "it").write_text("words")
    every = [source, *source.rglob("*")]
    modes = {path: path.stat().st_mode for path in every}
    command = ("convert", "--to", "flash", str(source), str(tmp_path / "new"))
    try:
        for path in every:
            path.chmod(modes[path] & ~0o222)
        _killed_while_verifying(monkeypatch, *command)
        assert main(command) == 0
    finally:
        for path in every:
            path.chmod(modes[path])
    made = [*(tmp_path / "new").rglob("*")]
    assert all(path.stat().st_mode & 0o200 for path in made), "not only where this is root"
    assert (tmp_path / "new" / NAME / "tokenizer" / "of" / "it").read_text() == "words"
    assert error(*command, code=1)


def test_an_older_iteration_is_loaded_by_its_number(
    adam: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    new.mkdir()
    tracker = new / "latest_checkpointed_iteration.txt"
    for latest, after in (("9", " --ckpt-step 2"), ("1", ""), ("2", "")):
        tracker.write_text(latest)
        assert main(["convert", "--to", "flash", str(adam), str(new)]) == 0
        assert capsys.readouterr().out.endswith(f"load it with --load {new}{after}\n")
        assert tracker.read_text() == ("9" if latest == "9" else "2")
        shutil.rmtree(new / NAME)


@pytest.mark.parametrize("target", ["flash", "weights"])
def test_a_source_that_is_gone_when_all_is_read_is_not_missed(
    target: str, adam: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As where a run keeps its last iterations only."""
    from megatron_flashoptim.checkpoint import offline, weights_file

    source = shutil.copytree(adam, tmp_path / "source" / NAME)
    size = sum(file.stat().st_size for file in source.iterdir())
    place: Any = offline.Conversion if target == "flash" else weights_file
    original = place._verify

    def verify(*given: Any) -> None:
        original(*given)
        shutil.rmtree(source)

    monkeypatch.setattr(place, "_verify", verify)
    assert main(["convert", "--to", target, str(source), str(tmp_path / "new")]) == 0
    assert f" MB, from {size / 1e6:.2f} MB (" in capsys.readouterr().out


def test_another_checkpoint_at_the_same_place_is_read_anew(adam: Path, tmp_path: Path) -> None:
    """By one process, which opened the first."""
    from megatron_flashoptim.checkpoint.folder import open_folder
    from megatron_flashoptim.checkpoint.offline import Conversion, Request

    source = shutil.copytree(adam, tmp_path / "source")
    flash = Conversion(Request(source, tmp_path / "flash", "flash")).run().folder
    shutil.rmtree(source)
    flash.rename(source)
    back = Conversion(Request(source, tmp_path / "adam", "adam")).run().folder
    assert open_folder(back).optimizer == "adam"


@pytest.mark.parametrize("content", [b"", b"\x80garbage"])
@pytest.mark.parametrize("name", ["records/part-000001.record", "damaged.json", "conversion.json"])
def test_damaged_notes_of_an_unfinished_conversion_are_made_anew(
    name: str, content: bytes, adam: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """But not those of what it is: parts of another conversion would be taken for its own."""
    from megatron_flashoptim.checkpoint import offline

    monkeypatch.setattr(offline, "_PART", 1 << 13)
    command = ("convert", "--to", "flash", str(adam), str(tmp_path / "new"))
    _killed_while_verifying(monkeypatch, *command)
    work = tmp_path / "new" / f".converting-{NAME}"
    (work / name).write_bytes(content)
    code = main(command)
    shown = capsys.readouterr()
    if name == "conversion.json":
        assert code == 1 and f"{work} holds an unfinished conversion of another" in shown.err
        return
    assert code == 0
    assert ("checking" in shown.err) == (name == "damaged.json")
    found = re.search(r"^(\d+) of (\d+) parts were there", shown.out, re.MULTILINE)
    assert found and int(found[2]) - int(found[1]) == ("record" in name) < int(found[1])


def test_parts_that_were_planned_otherwise_are_written_again(
    adam: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a development version of the same number; boxes without a file would be in the result."""
    from megatron_flashoptim.checkpoint import offline
    from megatron_flashoptim.checkpoint.folder import open_folder

    command = ("convert", "--to", "flash", str(adam), str(tmp_path / "new"))
    monkeypatch.setattr(offline, "_PART", 1 << 13)
    _killed_while_verifying(monkeypatch, *command)
    monkeypatch.setattr(offline, "_PART", 1 << 15)
    assert main(command) == 0
    reader = open_folder(tmp_path / "new" / NAME).reader
    for key in reader.tensors():
        for box in reader.chunks(key):
            reader.read(key, box)


def test_a_release_hides_no_training(adam: Path, tmp_path: Path) -> None:
    """Megatron loads a release where the tracker says so; a run's own iterations would be lost."""
    new, source = tmp_path / "new", tmp_path / "a name of one's own"
    source.symlink_to(adam)
    assert main(("convert", "--to", "flash", str(adam), str(new))) == 0
    tracker = new / "latest_checkpointed_iteration.txt"
    command = ("convert", "--to", "flash", str(source), str(new))
    said = error(*command, code=1)
    assert f"{new} has iteration 2, which {tracker.name} names as the latest" in said
    assert tracker.read_text().strip() == "2" and not (new / "release").exists()
    assert main((*command[:-1], str(tmp_path / "other"))) == 0
    named = tmp_path / "other" / tracker.name
    assert named.read_text().strip() == "release"
