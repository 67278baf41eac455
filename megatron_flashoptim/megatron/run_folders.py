"""Looks, before training, at the folders that ``--load`` and ``--save`` name.

Megatron itself starts with new weights where ``--load`` names a single iteration, loads another
checkpoint than ``--ckpt-step`` says beside a release, mixes iterations of the legacy format where
it says another than the latest, and finds out at the first save, which may be hours later, that it
cannot write into ``--save``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from megatron_flashoptim.checkpoint.iterations import (
    RELEASE,
    TRACKER,
    holds_legacy_state,
    name_of,
    number_of,
    tracked,
)
from megatron_flashoptim.checkpoint.together import on_all_ranks
from megatron_flashoptim.megatron.training_args import training_args

# A run may build several optimizers.
_checked: Any = None


def check_run_folders() -> None:
    """Refuse folders from which Megatron would not load what is asked for, or cannot save to.

    Does nothing where Megatron's training loop does not run, or loads and saves nothing, or where
    paths may stand for object stores; else a collective of all ranks, once for a run, in which each
    looks at its own disks. Makes no folder.

    Raises:
        ValueError: names the option and the folder; on all ranks.
    """
    global _checked
    args = training_args()
    load, save = _folder(args, "load"), _folder(args, "save")
    if args is _checked or (load is None and save is None):
        return
    _checked = args
    on_all_ranks(lambda: _check(args, load, save))


def _folder(args: Any, name: str) -> Path | None:
    given = getattr(args, name, None)
    # Of NVIDIA's Multi-Storage Client; its configuration may give any path another meaning.
    storage = getattr(sys.modules.get("megatron.core.msc_utils"), "MultiStorageClientFeature", None)
    if not given or "://" in given or (storage is not None and storage.is_enabled()):
        return None
    return Path(given).absolute()


def _check(args: Any, load: Path | None, save: Path | None) -> None:
    elsewhere = ("pretrained_checkpoint", "non_persistent_ckpt_type")
    if load is not None and not any(getattr(args, name, None) for name in elsewhere):
        _check_load(load)
        step = getattr(args, "ckpt_step", None)
        if step:
            weights_alone = any(getattr(args, n, False) for n in ("finetune", "no_load_optim"))
            _check_step(load, step, weights_alone)
    unused = ("skip_train", "ckpt_convert_format")
    if save is not None and not any(getattr(args, name, None) for name in unused):
        _check_save(save)


def _check_load(folder: Path) -> None:
    if os.path.isfile(folder):
        raise ValueError(f"--load {folder} is a file; give the folder that --save named")
    if os.path.isfile(folder / TRACKER) or not (
        os.path.isfile(folder / "metadata.json") or holds_legacy_state(folder)
    ):
        return
    number, latest = number_of(folder), _latest(folder.parent)
    if latest == folder.name:
        instead = f"give --load {folder.parent}"
    elif number and latest not in (None, RELEASE) and not holds_legacy_state(folder):
        instead = f"give --load {folder.parent} --ckpt-step {number}"
    else:
        instead = _in_a_folder_of_its_own(folder.name, number)
    raise ValueError(
        f"--load {folder} is the folder of one checkpoint and has no {TRACKER}, without which "
        f"Megatron loads nothing from it and starts with new weights; {instead}"
    )


def _check_step(folder: Path, step: int, weights_alone: bool) -> None:
    """Refuse another checkpoint than was asked for, or a mixture.

    ``load_checkpoint`` of 0.17 to 0.19 takes ``release`` from the tracker whatever the step is, and
    reads the tracker again for the optimizer's file of the legacy format, to go on from its number.
    """
    latest, name = _latest(folder), name_of(step)
    if latest == RELEASE:
        would = f"load {folder / RELEASE}, which {TRACKER} names"
    elif latest not in (None, name) and not weights_alone and holds_legacy_state(folder / name):
        would = (
            f"load the optimizer of {latest}, the latest in {folder}, beside the weights of "
            f"{name}, which has the format of --ckpt-format torch, and count on from there"
        )
    else:
        return
    raise ValueError(
        f"--ckpt-step {step}: Megatron would {would}; for {name} "
        f"{_in_a_folder_of_its_own(name, step)}"
    )


def _latest(folder: Path) -> str | None:
    """Return the name of the folder that Megatron takes for the latest."""
    latest = tracked(folder)
    return name_of(int(latest)) if latest is not None and latest.isdecimal() else latest


def _in_a_folder_of_its_own(name: str, number: int | None) -> str:
    kept, held = ("iter_NNNNNNN", "its iteration") if number is None else (name_of(number), number)
    if name == RELEASE:
        kept = held = RELEASE
    return (
        f"put it, or a link to it, as {kept} into another folder with a {TRACKER} that holds "
        f"{held}, and give that folder to --load"
    )


def _check_save(folder: Path) -> None:
    there = folder
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not os.path.isdir(there):
        raise ValueError(
            f"--save {folder} cannot be written, since {there} is no folder; name another one"
        )
    tracker = folder / TRACKER
    if not os.access(there, os.W_OK | os.X_OK):
        refused = there
    elif os.path.lexists(tracker) and not os.access(tracker, os.W_OK):
        refused = tracker
    else:
        return
    raise ValueError(
        f"--save {folder} cannot be written, since {refused} is read-only for this user; name "
        "another folder, or have it made writable"
    )
