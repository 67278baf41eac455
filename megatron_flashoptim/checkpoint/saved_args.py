"""The arguments that a run of ``megatron.training`` saved in its checkpoint.

Read by one process, on any machine: no process group, no GPU, and of all tensors only the names.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_flashoptim.checkpoint.iterations import iteration_folder

# First file of the legacy torch format.
_LEGACY = "mp_rank_*/model_optim_rng.pt"


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
    from megatron_flashoptim.checkpoint.damage import reason
    from megatron_flashoptim.checkpoint.folder import UNREADABLE, check_format, load_common
    from megatron_flashoptim.checkpoint.reader import CheckpointReader

    iteration = iteration_folder(folder)
    legacy = sorted(iteration.glob(_LEGACY))
    if (iteration / "metadata.json").is_file():
        check_format(iteration)
        names = set(CheckpointReader(iteration).tensors())
        state = load_common(iteration)
    elif legacy:
        try:
            # Mapped, not read: the file holds all weights of a rank.
            state = torch.load(legacy[0], map_location="cpu", weights_only=True, mmap=True)
        except UNREADABLE as problem:
            raise ValueError(
                f"{legacy[0]} cannot be read ({reason(problem)}); it may be damaged, or hold "
                "classes that Megatron does not list as safe to load"
            ) from problem
        chunks = [value for key, value in state.items() if key.startswith("model")]
        names = {name for chunk in chunks for name in chunk}
    else:
        raise ValueError(
            f"the checkpoint in {iteration} is of a format that is not read; torch_dist and torch "
            "are"
        )
    args = state.get("args")
    if not isinstance(args, Namespace):
        raise ValueError(
            f"the checkpoint in {iteration} holds no arguments of megatron.training: it was saved "
            "by other code. Give the model's sizes as arguments instead"
        )
    return SavedArgs(iteration, args, frozenset(names))
