"""What ``megatron-flashoptim convert`` says of damaged checkpoints, and what it leaves behind."""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from damage import flip

from megatron_flashoptim.cli import main

NAME = "iter_0000002"


@pytest.fixture
def saved(adam: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adam, tmp_path / "saved" / NAME))


def _error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line beside the progress of a command that fails."""
    capsys.readouterr()
    assert main(arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    (said,) = (line for line in lines if not re.match(r"\w+ +\d+%", line))
    return said


def _cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def _overwritten(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def _data_cut(folder: Path) -> None:
    (file,) = folder.glob("*.distcp")
    os.truncate(file, file.stat().st_size - 500)


def _not_of_the_manifest(folder: Path) -> None:
    """Megatron's own, and a file that reads as well as before."""
    from megatron.core.dist_checkpointing.validation import save_integrity_manifest

    save_integrity_manifest(str(folder))
    file = folder / "metadata.json"
    file.write_text(file.read_text() + " ")


def _common_flipped(folder: Path) -> None:
    """Of a release before 0.19, with a value that reads as well as before."""
    torch.save({"iteration": 2, "optimizer": {"lr": torch.ones(99)}}, folder / "common.pt")
    content = (folder / "common.pt").read_bytes()
    assert content.count(torch.ones(99).numpy().tobytes()) == 1
    (folder / "common.pt").write_bytes(content.replace(torch.ones(3).numpy().tobytes(), b"\0" * 12))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "metadata cut": (_cut(".metadata", 500), "/.metadata cannot be read ("),
    "metadata empty": (_cut(".metadata", 0), "/.metadata cannot be read ("),
    "metadata garbage": (
        _overwritten(".metadata", b"\x8a\xff" * 99),
        "/.metadata cannot be read (",
    ),
    "metadata of another": (
        _overwritten(".metadata", pickle.dumps(Namespace())),
        "/.metadata cannot be read (of type Namespace)",
    ),
    "json cut": (_cut("metadata.json", 9), "/metadata.json cannot be read ("),
    "json of another": (_overwritten("metadata.json", b"[]"), "/metadata.json cannot be read ("),
    "common empty": (_overwritten("common.pt", b""), "/common.pt cannot be read ("),
    "common garbage": (_overwritten("common.pt", b"\x00r" * 99), "/common.pt cannot be read ("),
    "manifest cut": (_overwritten("integrity.json", b"{"), "/integrity.json cannot be read ("),
    "not of the manifest": (_not_of_the_manifest, "is damaged: metadata.json is not the file of"),
    "common flipped": (_common_flipped, "/common.pt cannot be read (its bytes are not those"),
    "data cut": (_data_cut, "is damaged: __0_0.distcp has "),
    "data missing": (lambda folder: (folder / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_named_by_every_command(
    damage: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_flashoptim.checkpoint.saved_args import read_saved_args

    make, says = DAMAGES[damage]
    of_convert = "manifest" in damage or damage == "common flipped"
    make(saved)
    new = str(tmp_path / "new")
    for command in (
        ("convert", "--to", "flash", "--dry-run", str(saved), new),
        ("convert", "--to", "weights", "--dtype", "bf16", str(saved), new),
        *(() if of_convert else (("inspect", str(saved), "--no-report"),)),
    ):
        said = _error(capsys, *command)
        assert says in said and "Copy it again" in said and "--iteration N" in said
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    if not of_convert and not damage.startswith("data"):  # of those ``memory`` reads nothing
        with pytest.raises(ValueError, match=re.escape(says)):
            read_saved_args(saved)


def _items(folder: Path, *, described: bool = False) -> dict[str, tuple[Path, int]]:
    """Return the file of each saved item, and a byte in the middle of contents or description."""
    from megatron_flashoptim.checkpoint.reader import CheckpointReader

    found = {}
    for index, info in CheckpointReader(folder).metadata.storage_data.items():
        file = folder / info.relative_path
        item = file.read_bytes()[info.offset : info.offset + info.length]
        with ZipFile(io.BytesIO(item)) as archive:
            record = max(archive.infolist(), key=lambda each: each.file_size)
            if described:
                record = next(each for each in archive.infolist() if "data.pkl" in each.filename)
            start = item.index(archive.read(record))
        found[index.fqn] = file, info.offset + start + record.file_size // 2
    return found


@pytest.mark.parametrize("kind", ["weight", "shape", "param", "exp_avg", "rng", "common"])
def test_one_flipped_bit_is_found(
    kind: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a weight, a master, a moment, and what is no tensor; nothing is left behind."""
    from megatron_flashoptim.checkpoint.folder import COMMON_KEY

    wanted = {
        "weight": "embedding.word_embeddings.weight",
        "shape": "embedding.word_embeddings.weight",
        "param": "optimizer.state.param.embedding.word_embeddings.weight",
        "exp_avg": "optimizer.state.exp_avg.embedding.word_embeddings.weight",
        "common": COMMON_KEY,
    }
    items = _items(saved, described=kind == "shape")
    key = wanted.get(kind) or next(key for key in items if "rng" in key or "_extra" in key)
    file, position = items[key]
    flip(file, position)
    folders = (str(saved), str(tmp_path / "new"))
    commands: list[tuple[str, ...]] = [("convert", "--to", "flash", *folders)]
    if kind in ("weight", "param"):
        dtype = "bf16" if kind == "weight" else "fp32"
        commands.append(("convert", "--to", "weights", "--dtype", dtype, *folders))
    for command in commands:
        said = _error(capsys, *command)
        assert f"is damaged: {key} in {file.name}: its bytes are not those" in said
        assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    flip(file, position)
    assert main(commands[0]) == 0


def test_a_tensor_of_no_file_is_named(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "embedding.word_embeddings.weight"
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    metadata.storage_data = {
        index: info for index, info in metadata.storage_data.items() if index.fqn != key
    }
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    for command in (
        ("convert", "--to", "flash", str(saved), str(tmp_path / "new")),
        ("inspect", str(saved), "--no-report"),
    ):
        said = _error(capsys, *command)
        assert f"is damaged: {key} in .metadata: does not say in which file it is. " in said


def test_what_was_finished_before_damage_is_kept_and_gone_on_with(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from megatron_flashoptim.checkpoint import offline

    monkeypatch.setattr(offline, "_PART", 1 << 13)
    command = ("convert", "--to", "flash", str(saved), str(tmp_path / "new"))
    last = "optimizer.state.exp_avg_sq.embedding.word_embeddings.weight"
    file, position = _items(saved)[last]
    flip(file, position)
    said = _error(capsys, *command)
    work = tmp_path / "new" / f".converting-{NAME}"
    assert f"is damaged: {last}" in said
    assert f"kept in {work}: the same command goes on" in said
    assert list((tmp_path / "new").iterdir()) == [work]
    flip(file, position)
    assert main(command) == 0
    assert re.search(r"^\d+ of \d+ parts were there", capsys.readouterr().out, re.MULTILINE)
    assert not work.exists()


def test_a_process_that_was_killed_is_told_in_one_line_and_leaves_nothing(
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As where the system has no memory left: it kills a process of the pool."""
    from megatron_flashoptim.checkpoint import workers

    def killed(*_: object) -> None:
        raise BrokenProcessPool("A process in the process pool was terminated abruptly.")

    monkeypatch.setattr(workers.Pool, "write", killed)
    arguments = ("--to", "flash", str(saved), str(tmp_path / "new"))
    assert "terminated abruptly" in _error(capsys, "convert", *arguments)
    assert not (tmp_path / "new").exists()
