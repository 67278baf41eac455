"""Folders of iterations, as Megatron names them; knows nothing of what is in them."""

from __future__ import annotations

import re
from pathlib import Path

# Written by Megatron into the folder that --save names.
TRACKER = "latest_checkpointed_iteration.txt"
# What it names where the checkpoint is of no iteration, and that one's folder.
RELEASE = "release"
_ITERATION = re.compile(r"iter_(\d{7,})")


def iteration_folder(path: str | Path, iteration: int | None = None) -> Path:
    """Return the folder of one iteration.

    Args:
        path: as given to ``--save``, or already the folder of an iteration.
        iteration: which one; by default the latest that was finished.

    Raises:
        ValueError: there is no such checkpoint; names what was looked for.
    """
    path = Path(path)
    if path.is_file():
        raise ValueError(
            f"{path} is a single file, such as torch.save or the flashoptim package write: state "
            "dicts of other optimizers are not read; give the folder of a torch_dist checkpoint"
        )
    if not path.is_dir():
        raise ValueError(f"{path} is no folder; give what --save or --load was given")
    if _is_iteration(path):
        if iteration is not None and number_of(path) != iteration:
            raise ValueError(
                f"{path} is one iteration; drop --iteration {iteration}, or give {path.parent}"
            )
        return path
    there = sorted(found.name for found in path.iterdir() if _ITERATION.fullmatch(found.name))
    if iteration is not None:
        name = name_of(iteration)
    else:
        latest = tracked(path)
        if latest is None:
            raise ValueError(
                f"{path} has no {TRACKER}, so it is no checkpoint folder of Megatron"
                + (f"; it has {', '.join(there)}: give one of these" if there else "")
            )
        if not latest.isdecimal() and latest != RELEASE:
            raise ValueError(
                f"{path / TRACKER} holds {latest!r} instead of an iteration; give the folder of one"
            )
        name = name_of(int(latest)) if latest.isdecimal() else latest
    if not (path / name).is_dir():
        raise ValueError(f"{path} has no {name}; it has {', '.join(there) or 'no iterations'}")
    return path / name


def _is_iteration(path: Path) -> bool:
    """Return whether a folder is that of one iteration, by its name or by what is in it."""
    return (
        bool(_ITERATION.fullmatch(path.name))
        or path.name == RELEASE
        or (path / ".metadata").is_file()
        or holds_legacy_state(path)
    )


def holds_legacy_state(folder: Path) -> bool:
    """Return whether files of ``--ckpt-format torch`` are in the folder itself."""
    return any(folder.glob("mp_rank_*"))


def name_of(iteration: int) -> str:
    """Return the name of an iteration's folder."""
    return f"iter_{iteration:07d}"


def tracked(path: Path) -> str | None:
    """Return what the tracker in a folder of ``--save`` names, or None where there is none."""
    tracker = path / TRACKER
    return tracker.read_text().strip() if tracker.is_file() else None


def number_of(folder: Path) -> int | None:
    """Return the iteration that a folder is named after, or None."""
    match = _ITERATION.fullmatch(folder.name)
    return int(match[1]) if match else None


def check_destination(destination: Path, source: Path) -> None:
    """Refuse to write into what is read.

    Args:
        destination: folder to be written, which need not be there.
        source: folder of an iteration.

    Raises:
        ValueError: names both.
    """
    inner, outer = destination.resolve(), source.resolve()
    if inner.is_relative_to(outer):
        raise ValueError(
            f"{destination} {'is' if inner == outer else 'lies within'} the source {source}, which "
            "is only read; give another folder"
        )


def check_release(destination: Path) -> None:
    """Refuse to hide a training's iterations behind a release, which only the tracker names.

    Args:
        destination: folder that will get ``release``, which need not be there.

    Raises:
        ValueError: its tracker names an iteration.
    """
    latest = tracked(destination)
    if latest not in (None, RELEASE):
        raise ValueError(
            f"{destination} has iteration {latest}, which {TRACKER} names as the latest; a release "
            "would be loaded in its place. Give another folder"
        )
