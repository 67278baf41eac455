"""Folders of --load and --save that would lose a training are refused before it begins."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pretraining import FLASH, pretrain, printed
from ranks import run_ranks
from test_hook import _parse

from megatron_flashoptim.checkpoint.iterations import TRACKER

NOBODY = 65534
SINGLE = (
    f"--load {{folder}} is the folder of one checkpoint and has no {TRACKER}, without which "
    "Megatron loads nothing from it and starts with new weights"
)


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
    assert _refusal(
        corpus, "--load", str(folder)
    ) == f"ValueError: {SINGLE}; give {asked_for}".format(folder=folder)
    resumed = pretrain(corpus, *FLASH, *asked_for.split(), "--train-iters", "4")
    assert min(resumed) == 3 and resumed[4] == whole[4]


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
        f"ValueError: --ckpt-step 2: Megatron would load the optimizer of iter_0000004, the "
        f"latest in {run}, beside the weights of iter_0000002, which has the format of "
        "--ckpt-format torch, and count on from there; for iter_0000002 put it, or a link to it, "
        f"as iter_0000002 into another folder with a {TRACKER} that holds 2, and give that folder "
        "to --load"
    )
    alone.mkdir()
    (alone / "iter_0000002").symlink_to(run / "iter_0000002")
    (alone / TRACKER).write_text("2")
    resumed = pretrain(corpus, *legacy, "--load", str(alone))
    assert min(resumed) == 3 and resumed[4] == whole[4]
    for weights_alone in ("--finetune", "--no-load-optim"):
        assert _checked(*load, weights_alone) == ""
    assert _checked(*load[:-1], "4") == ""


def _check(real_user: int | None, storage_client: bool, *flags: str) -> str:
    """Return the refusal of a run's folders; rank 1 may be of another user."""
    from megatron.core import msc_utils
    from megatron.training import global_vars

    from megatron_flashoptim.megatron.run_folders import check_run_folders

    args = _parse("--optimizer", "flash_adamw", *flags)
    assert isinstance(args, argparse.Namespace), args
    global_vars._GLOBAL_ARGS = args
    if storage_client:  # parsing asks for the package, which is not installed
        type(msc_utils.MultiStorageClientFeature).is_enabled = lambda _: True
    if real_user is not None and torch.distributed.get_rank() == 1:
        os.setreuid(real_user, -1)  # what os.access asks for
    try:
        check_run_folders()
    except ValueError as problem:
        return str(problem)
    return ""


def _checked(*flags: str, real_user: int | None = None, storage_client: bool = False) -> str:
    """Return what both ranks say, which is the same."""
    first, second = run_ranks(2, _check, real_user, storage_client, *flags)
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
        for unused in (("--skip-train",), ("--ckpt-convert-format", "torch")):
            assert _checked("--save", str(folder), *unused, **user) == ""
    assert not (shared / "777" / "new").exists()


def test_a_tracker_of_another_user_is_refused(megatron: None, shared: Path) -> None:
    shared.chmod(0o777)
    (shared / TRACKER).touch()
    is_root = os.geteuid() == 0
    user: dict[str, Any] = {"real_user": NOBODY if is_root else None}
    for mode, refused in ((0o666, False), (0o444, True)):
        (shared / TRACKER).chmod(mode)
        refusal = _checked("--save", str(shared), **user)
        assert (f"since {shared / TRACKER} is read-only" in refusal) is refused, refusal
        assert refused or not refusal


def test_files_in_place_of_folders_are_refused(megatron: None, tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.touch()
    link.symlink_to(tmp_path / "nowhere")
    assert _checked("--load", str(file)) == (
        f"--load {file} is a file; give the folder that --save named"
    )
    for folder, wrong in ((file, file), (file / "run", file), (link, link), (link / "run", link)):
        assert _checked("--save", str(folder)) == (
            f"--save {folder} cannot be written, since {wrong} is no folder; name another one"
        )


@pytest.mark.parametrize(
    ("tracked", "name", "legacy", "instead"),
    [
        ("4", "iter_0000002", False, "give --load {run} --ckpt-step 2"),
        ("2", "iter_0000002", False, "give --load {run}"),
        ("0000002", "iter_0000002", True, "give --load {run}"),
        ("release", "release", False, "give --load {run}"),
        ("4", "iter_0000002", True, "as iter_0000002 into another folder"),
        ("release", "iter_0000002", False, "as iter_0000002 into another folder"),
        (None, "iter_0000002", False, "as iter_0000002 into another folder"),
        ("4", "iter_0000000", False, "as iter_0000000 into another folder"),
        ("4", "release", False, "as release into another folder"),
        ("4", "best", False, "as iter_NNNNNNN into another folder"),
    ],
)
def test_what_to_give_instead_is_named(
    megatron: None, tmp_path: Path, tracked: str | None, name: str, legacy: bool, instead: str
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / ("mp_rank_00" if legacy else "metadata.json")).touch()
    if tracked is not None:
        (tmp_path / TRACKER).write_text(tracked + "\n")
    refusal = _checked("--load", str(folder))
    assert refusal.startswith(SINGLE.format(folder=folder)), refusal
    said = instead.format(run=tmp_path)
    assert refusal.endswith(said) if said.startswith("give") else said in refusal, refusal
    for elsewhere in ("--pretrained-checkpoint=/else", "--non-persistent-ckpt-type=global"):
        assert _checked("--load", str(folder), elsewhere) == ""


def test_a_step_beside_a_release_is_refused(megatron: None, tmp_path: Path) -> None:
    """Megatron would load the release, whatever the format and whatever else is given."""
    (tmp_path / TRACKER).write_text("release")
    for flags in ((), ("--finetune",), ("--no-load-optim",)):
        assert _checked("--load", str(tmp_path), "--ckpt-step", "3", *flags) == (
            f"--ckpt-step 3: Megatron would load {tmp_path}/release, which {TRACKER} names; for "
            "iter_0000003 put it, or a link to it, as iter_0000003 into another folder with a "
            f"{TRACKER} that holds 3, and give that folder to --load"
        )
    assert _checked("--load", str(tmp_path)) == ""


def _check_twice(folder: Path) -> tuple[str, str]:
    from megatron_flashoptim.megatron.run_folders import check_run_folders

    first = _check(None, False, "--save", str(folder))
    folder.touch()  # what a second look would refuse
    check_run_folders()
    return first, _check(None, False, "--save", str(folder))


def test_a_run_of_several_optimizers_is_looked_at_once(megatron: None, tmp_path: Path) -> None:
    """A rank may have fewer of them than others, which would wait for it."""
    for first, of_another_run in run_ranks(2, _check_twice, tmp_path / "save"):
        assert first == "" and "is no folder" in of_another_run


def test_a_run_that_has_not_saved_yet_is_none_to_be_refused(megatron: None, tmp_path: Path) -> None:
    """--load and --save are the same folder from the first start on, whatever its name."""
    for name in ("new", "release", "iter_0000002"):
        folder = tmp_path / name
        assert _checked("--load", str(folder), "--save", str(folder)) == ""
        folder.mkdir()
        assert _checked("--load", str(folder), "--save", str(folder)) == ""


def test_object_stores_are_not_looked_at(
    megatron: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With NVIDIA's Multi-Storage Client any path may be one, by its configuration."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "msc:").touch()
    for address, refused in (("msc:/run", True), ("msc://profile/run", False)):
        assert bool(_checked("--save", address)) is refused
    assert _checked("--save", "msc:/run", storage_client=True) == ""


def test_folders_are_those_that_the_system_finds(
    megatron: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond a link ".." is not the folder that the link is in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real" / "sub").mkdir(parents=True)
    (tmp_path / "real" / "run").mkdir()
    (tmp_path / "run").touch()
    (tmp_path / "link").symlink_to("real/sub")
    assert _checked("--load", "link/../run", "--save", "link/../run") == ""
    assert _checked("--save", "run") != ""
