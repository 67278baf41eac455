"""Looks, before training, at the folders that ``--load`` and ``--save`` name.

Megatron itself starts with new weights where ``--load`` names a single iteration, mixes iterations
of the legacy format where ``--ckpt-step`` is not the latest, and finds out at the first save, which
may be hours later, that it cannot write into ``--save``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron_flashoptim.checkpoint.iterations import (
    TRACKER,
    holds_legacy_state,
    holds_state,
    latest_of,
    name_of,
    number_of,
)
from megatron_flashoptim.checkpoint.together import on_all_ranks
from megatron_flashoptim.megatron.training_args import training_args


def check_run_folders() -> None:
    """Refuse folders from which Megatron would not load what is asked for, or cannot save to.

    Does nothing where Megatron's training loop does not run, or loads and saves nothing; else a
    collective of all ranks, each of which looks at its own disks. Makes no folder. Addresses
    (``msc://...``) are not looked at.

    Raises:
        ValueError: names the option and the folder; on all ranks.
    """
    args = training_args()
    load, save = _folder(args, "load"), _folder(args, "save")
    if getattr(args, "skip_train", False):
        save = None
    if load is not None or save is not None:
        on_all_ranks(lambda: _check(args, load, save))


def _folder(args: Any, name: str) -> Path | None:
    given = getattr(args, name, None)
    return Path(given) if given and "://" not in given else None


def _check(args: Any, load: Path | None, save: Path | None) -> None:
    if load is not None:
        _check_load(load)
        if args.ckpt_step and not (args.finetune or args.no_load_optim):
            _check_step(load, args.ckpt_step)
    if save is not None:
        _check_save(save)


def _check_load(folder: Path) -> None:
    if folder.is_file():
        raise ValueError(f"--load {folder} is a file; give the folder that --save named")
    if (folder / TRACKER).is_file() or not holds_state(folder):
        return
    number = number_of(folder)
    step = "" if number is None else f" --ckpt-step {number}"
    raise ValueError(
        f"--load {folder} is the folder of one checkpoint, where Megatron would load nothing and "
        f"start with new weights; give --load {folder.parent}{step}"
    )


def _check_step(folder: Path, step: int) -> None:
    """Refuse weights of one iteration beside the optimizer of another.

    ``load_checkpoint`` of 0.17 to 0.19 reads the tracker again for the optimizer's file of the
    legacy format, and goes on from its number.
    """
    latest = latest_of(folder)
    chosen = folder / name_of(step)
    if latest is None or latest == step or not holds_legacy_state(chosen):
        return
    raise ValueError(
        f"--ckpt-step {step}: {chosen} has the format of --ckpt-format torch, and Megatron would "
        f"load the optimizer of iteration {latest}, the latest in {folder}, beside its weights, "
        f"and count on from {latest}; copy {chosen.name} to another folder, write {step} into a "
        f"{TRACKER} there, and give that folder to --load"
    )


def _check_save(folder: Path) -> None:
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ValueError(
            f"--save {folder} cannot be written, since {there} is a file; name another folder"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"--save {folder} cannot be written, since {there} is read-only for this user; name "
            "another folder, or have it made writable"
        )
