"""The arguments that a run of ``megatron.training`` saved in its checkpoint.

Read by one process, on any machine: no process group, no GPU, and of all tensors only the names.
"""

from __future__ import annotations

import pickle
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

# Written by Megatron into the folder that --save names.
_TRACKER = "latest_checkpointed_iteration.txt"
# First file of the legacy torch format.
_LEGACY = "mp_rank_*/model_optim_rng.pt"
# Of a damaged or foreign file; torch's own is no ValueError, and not even an Exception.
_UNREADABLE = (
    CheckpointException,
    pickle.UnpicklingError,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
)


@dataclass(frozen=True)
class SavedArgs:
    """What a checkpoint says of the run that saved it.

    Attributes:
        folder: folder of the iteration.
        args: Megatron's arguments, after Megatron validated them.
        names: of the saved tensors; in the legacy ``torch`` format of the first rank's weights.
    """

    folder: Path
    args: Namespace
    names: frozenset[str]


def read_saved_args(folder: str | Path) -> SavedArgs:
    """Read the arguments of a ``torch_dist`` or legacy ``torch`` checkpoint.

    Imports Megatron, which registers the classes that may be loaded; nothing else is unpickled
    from the file of arguments.

    Args:
        folder: what ``--save`` named (its latest iteration is read), or one ``iter_`` folder.

    Raises:
        ValueError: there is no such checkpoint, or none whose arguments can be read; says why.
    """
    from megatron.core import dist_checkpointing

    iteration = iteration_folder(folder)
    legacy = sorted(iteration.glob(_LEGACY))
    try:
        if (iteration / "metadata.json").is_file():
            state = dist_checkpointing.load_common_state_dict(str(iteration))
            saved: dict[str, Any] = FileSystemReader(iteration).read_metadata().state_dict_metadata
            names = {key for key, what in saved.items() if isinstance(what, TensorStorageMetadata)}
        elif legacy:
            # Mapped, not read: the file holds all weights of a rank.
            state = torch.load(legacy[0], map_location="cpu", weights_only=True, mmap=True)
            chunks = [value for key, value in state.items() if key.startswith("model")]
            names = {name for chunk in chunks for name in chunk}
        else:
            raise ValueError(
                f"the checkpoint in {iteration} is of a format that is not read; "
                "torch_dist and torch are"
            )
    except (*_UNREADABLE, dist_checkpointing.core.CheckpointingException) as problem:
        first = next(iter(str(problem).splitlines()), "") or type(problem).__name__
        raise ValueError(
            f"the arguments in the checkpoint in {iteration} cannot be read ({first}); the files "
            "may be damaged, or hold classes that Megatron does not list as safe to load"
        ) from problem
    args = state.get("args")
    if not isinstance(args, Namespace):
        raise ValueError(
            f"the checkpoint in {iteration} holds no arguments of megatron.training: it was saved "
            "by other code. Give the model's sizes as arguments instead"
        )
    return SavedArgs(iteration, args, frozenset(names))


def iteration_folder(folder: str | Path) -> Path:
    """Return the folder of a checkpoint's latest iteration, or the folder itself if it is one.

    Raises:
        ValueError: the folder is no checkpoint, or its latest iteration is missing.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{folder} is no folder; give the folder of a checkpoint")
    if (root / ".metadata").is_file() or any(root.glob(_LEGACY)):
        return root
    tracker = root / _TRACKER
    if not tracker.is_file():
        raise ValueError(
            f"{folder} is no checkpoint: it has neither {_TRACKER}, as a folder of --save has, "
            "nor .metadata or mp_rank_ folders, as the folder of an iteration has"
        )
    latest = tracker.read_text().strip()
    name = f"iter_{int(latest):07d}" if latest.isdecimal() else "release"
    if not latest.isdecimal() and latest != "release":
        raise ValueError(
            f"{tracker} holds {latest!r} instead of an iteration; give the folder of an iteration"
        )
    if not (root / name).is_dir():
        raise ValueError(
            f"{tracker} names iteration {latest}, but {root / name} is no folder; give the "
            "folder of another iteration"
        )
    return root / name
