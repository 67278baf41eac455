"""Folders of --load and --save that would lose a training are refused before it begins."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pretraining import FLASH, pretrain, printed
from ranks import run_ranks
from test_hook import _parse

NOBODY = 65534


def _refusal(corpus: Path, *flags: str) -> str:
    """Return the last line of a training that is refused."""
    with pytest.raises(AssertionError) as refused:
        printed(corpus, *FLASH, *flags)
    return str(refused.value).strip().splitlines()[-1]


@pytest.mark.smoke
def test_a_single_iteration_is_refused_and_the_flags_that_load_it_are_named(
    megatron: None, corpus: Path, tmp_path: Path
) -> None:
    """Megatron would find no tracker in it and start with new weights."""
    save = ("--save", str(tmp_path), "--save-interval", "2")
    whole = pretrain(corpus, *FLASH, *save, "--train-iters", "4")
    folder = tmp_path / "iter_0000002"
    asked_for = f"--load {tmp_path} --ckpt-step 2"
    assert _refusal(corpus, "--load", str(folder)) == (
        f"ValueError: --load {folder} is the folder of one checkpoint, where Megatron would load "
        f"nothing and start with new weights; give {asked_for}"
    )
    resumed = pretrain(corpus, *FLASH, *asked_for.split(), "--train-iters", "4")
    assert resumed[4] == whole[4]


@pytest.mark.smoke
def test_an_earlier_iteration_of_the_legacy_format_is_refused_and_loads_as_the_message_says(
    megatron: None, corpus: Path, tmp_path: Path
) -> None:
    """Megatron would load the latest optimizer beside its weights, as it does with Adam."""
    legacy = (*FLASH, "--ckpt-format", "torch", "--train-iters", "4")
    run, alone = tmp_path / "run", tmp_path / "alone"
    whole = pretrain(corpus, *legacy, "--save", str(run), "--save-interval", "2")
    load = ("--ckpt-format", "torch", "--load", str(run), "--ckpt-step", "2")
    assert _refusal(corpus, *load) == (
        f"ValueError: --ckpt-step 2: {run}/iter_0000002 has the format of --ckpt-format torch, and "
        f"Megatron would load the optimizer of iteration 4, the latest in {run}, beside its "
        "weights, and count on from 4; copy iter_0000002 to another folder, write 2 into a "
        "latest_checkpointed_iteration.txt there, and give that folder to --load"
    )
    shutil.copytree(run / "iter_0000002", alone / "iter_0000002")
    (alone / "latest_checkpointed_iteration.txt").write_text("2")
    assert pretrain(corpus, *legacy, "--load", str(alone))[4] == whole[4]
    for weights_alone in ("--finetune", "--no-load-optim"):
        assert _checked(*load, weights_alone) == ""
    assert _checked(*load[:-1], "4") == ""


def _check(real_user: int | None, *flags: str) -> str:
    """Return the refusal of a run's folders; rank 1 may be of another user."""
    from megatron.training import global_vars

    from megatron_flashoptim.megatron.run_folders import check_run_folders

    global_vars._GLOBAL_ARGS = _parse("--optimizer", "flash_adamw", *flags)
    if real_user is not None and torch.distributed.get_rank() == 1:
        os.setreuid(real_user, -1)  # what os.access asks for
    try:
        check_run_folders()
    except ValueError as problem:
        return str(problem)
    return ""


def _checked(*flags: str, real_user: int | None = None) -> str:
    """Return what both ranks say, which is the same."""
    first, second = run_ranks(2, _check, real_user, *flags)
    assert first == second
    return str(first)


@pytest.fixture
def shared() -> Iterator[Path]:
    """Return a folder that any user may enter, which pytest's are not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_a_folder_that_one_rank_cannot_write_is_refused_on_all(
    megatron: None, shared: Path
) -> None:
    is_root = os.geteuid() == 0
    user: dict[str, Any] = {"real_user": NOBODY if is_root else None}
    for mode in (0o777, 0o555):
        shared.joinpath(f"{mode:o}").mkdir()
        shared.joinpath(f"{mode:o}").chmod(mode)
    assert _checked("--save", str(shared / "777"), **user) == ""
    assert _checked("--save", str(shared / "777" / "new" / "run"), **user) == ""
    for folder in (shared / "555", shared / "555" / "new" / "run"):
        refusal = _checked("--save", str(folder), **user)
        assert refusal == (
            f"--save {folder} cannot be written, since {shared / '555'} is read-only for this "
            "user; name another folder, or have it made writable"
            + (" (on rank 1; 1 of 2 ranks have a problem)" if is_root else "")
        )
        assert _checked("--save", str(folder), "--skip-train", **user) == ""
    assert not (shared / "777" / "new").exists()


def test_files_in_place_of_folders_are_refused(megatron: None, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert _checked("--load", str(file)) == (
        f"--load {file} is a file; give the folder that --save named"
    )
    for folder in (file, file / "run"):
        assert _checked("--save", str(folder)) == (
            f"--save {folder} cannot be written, since {file} is a file; name another folder"
        )


def test_a_run_that_has_not_saved_yet_is_none_to_be_refused(megatron: None, tmp_path: Path) -> None:
    """--load and --save are the same folder from the first start on, whatever its name."""
    for name in ("new", "release", "iter_0000002"):
        folder = tmp_path / name
        assert _checked("--load", str(folder), "--save", str(folder)) == ""
        folder.mkdir()
        assert _checked("--load", str(folder), "--save", str(folder)) == ""
    address = "msc://profile/run"
    assert _checked("--load", address, "--save", address) == ""
