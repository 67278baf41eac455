"""What is in a checkpoint folder: which iteration, whose optimizer state, in which layout."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import maybe_load_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import load_common_state_dict
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint.api import CheckpointException

from megatron_flashoptim.checkpoint import metadata
from megatron_flashoptim.checkpoint.damage import (
    WAYS_OUT,
    check_files,
    check_manifest,
    reason,
    unreadable,
)
from megatron_flashoptim.checkpoint.iterations import iteration_folder, number_of
from megatron_flashoptim.checkpoint.model_space import PREFIX
from megatron_flashoptim.checkpoint.reader import CheckpointReader
from megatron_flashoptim.checkpoint.torch_file import check_archive

ADAM = "adam"
FLASH = "flash"
WEIGHTS = "weights"

# Key of Megatron's common state among the byte strings; releases before 0.19 have a file instead.
COMMON_KEY = ShardedObject("common_state", None, (1,), (0,)).unique_key

# Names that Megatron's Adam has for the fp32 master, the second in releases before 0.16.
MASTER = "param"
OLDER_MASTER = "fp32_param"
_IN_MODEL_SPACE = re.compile(rf"(?:chained_\d+\.)?{re.escape(PREFIX)}\.(?P<kind>\w+?)\.(?P<key>.+)")
# What reading a damaged or foreign file raises, anything; torch's own is not even an Exception.
UNREADABLE = (CheckpointException, Exception)
_IN_BUCKETS = "optimizer.distributed.dp_group_idx_"


@dataclass(frozen=True)
class CheckpointFolder:
    """One iteration of a ``torch_dist`` checkpoint.

    Attributes:
        path: folder of the iteration.
        iteration: its number, or None for a release.
        reader: of its tensors.
        common: Megatron's state that is the same on all ranks: ``args``, ``iteration``,
            ``optimizer`` (param groups), ``opt_param_scheduler``, ``content_metadata``.
        optimizer: whose state it holds: ``"adam"`` (Megatron's own), ``"flash"`` or
            ``"weights"`` (none).
        sharding_type: of the optimizer state, ``""`` where there is none.
    """

    path: Path
    iteration: int | None
    reader: CheckpointReader
    common: dict[str, Any]
    optimizer: str
    sharding_type: str

    @property
    def name(self) -> str:
        """Name that Megatron has for the folder of this iteration."""
        return "release" if self.iteration is None else f"iter_{self.iteration:07d}"

    @property
    def content(self) -> dict[str, Any]:
        """Megatron's content metadata, empty in checkpoints of releases before 0.14."""
        return self.common.get("content_metadata") or {}

    @property
    def flash(self) -> dict[str, Any]:
        """Description of the flash state, see ``metadata.describe``; empty if there is none."""
        return self.content.get(metadata.KEY) or {}

    def weights(self) -> list[str]:
        """Return the keys of the model's tensors."""
        return [key for key in self.reader.tensors() if not _is_state(key)]

    def state(self) -> dict[str, dict[str, str]]:
        """Return keys of state in model space by model key and kind, such as ``"exp_avg"``."""
        found: dict[str, dict[str, str]] = {}
        for key in self.reader.tensors():
            if match := _IN_MODEL_SPACE.fullmatch(key):
                found.setdefault(match["key"], {})[match["kind"]] = key
        return found


def open_folder(
    path: str | Path, iteration: int | None = None, *, checked: bool = False
) -> CheckpointFolder:
    """Open a checkpoint for reading; loads its description, no tensors.

    Args:
        path, iteration: as of ``iteration_folder``.
        checked: as of ``CheckpointReader``; and compare what has no CRC-32, the files that
            describe the checkpoint, with its integrity manifest, if it has one.

    Raises:
        ValueError: it is no ``torch_dist`` checkpoint, or files of it are missing, too short or
            damaged; says what it is and what to do.
    """
    folder = iteration_folder(path, iteration)
    check_format(folder)
    if checked:
        check_manifest(folder)
    reader = CheckpointReader(folder, checked=checked)
    check_files(folder, reader.metadata)
    if checked:
        _check_common(reader)
    common = load_common(folder)
    content = common.get("content_metadata") or {}
    optimizer, sharding_type = _whose(reader, content)
    number = number_of(folder)
    if number is None and folder.name != "release":  # copied to a folder of another name
        number = common.get("iteration")
    return CheckpointFolder(folder, number, reader, common, optimizer, sharding_type)


def _check_common(reader: CheckpointReader) -> None:
    """Compare the common state with its CRC-32, which torch does not when it loads.

    Raises:
        ValueError: names the file, and the key if it is among tensors.
    """
    file = reader.folder / COMMON_STATE_FNAME
    if file.is_file():
        try:
            with open(file, "rb") as opened:
                check_archive(opened)
        except Exception as problem:  # a damaged archive raises anything
            raise unreadable(file, problem) from problem
    elif COMMON_KEY in reader.byte_strings():
        reader.read_bytes(COMMON_KEY)


def load_common(folder: Path) -> dict[str, Any]:
    """Return Megatron's state that is the same on all ranks.

    Megatron has registered the classes that may be loaded; nothing else is unpickled.

    Raises:
        ValueError: it cannot be read; says why.
    """
    try:
        with warnings.catch_warnings():
            # That there is no process group, which is what is wanted.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            found: dict[str, Any] = load_common_state_dict(str(folder))
    except UNREADABLE as problem:
        file = folder / COMMON_STATE_FNAME
        where = file if file.is_file() else f"the common state of the checkpoint in {folder}"
        raise ValueError(
            f"{where} cannot be read ({reason(problem)}): it may hold classes that Megatron does "
            f"not list as safe to load, or be damaged. {WAYS_OUT}"
        ) from problem
    if not isinstance(found, dict):
        raise unreadable(folder, f"its common state is of type {type(found).__name__}")
    return found


# Files of torch_dist alone: torch's and Megatron's.
DESCRIBED = (".metadata", "metadata.json")


def check_format(folder: Path) -> None:
    """Refuse whatever is no ``torch_dist`` checkpoint.

    Raises:
        ValueError: names the format and what to do.
    """
    # Beside these files, such folders hold what Megatron saved of data loaders.
    described = any((folder / name).is_file() for name in DESCRIBED)
    if not described and any(folder.glob("mp_rank_*")):
        raise ValueError(
            f"{folder} has Megatron's legacy format (--ckpt-format torch). Megatron itself makes "
            "a torch_dist checkpoint of it: load it with --ckpt-convert-format torch_dist "
            "--ckpt-convert-save FOLDER in the run's own launch, with the optimizer that saved it"
        )
    if not (folder / ".metadata").is_file():
        raise ValueError(
            f"{folder} has no .metadata: it is no torch_dist checkpoint, or its save was "
            "interrupted"
        )
    try:
        config = maybe_load_config(str(folder))
    except Exception as problem:  # cut short, no JSON, or not what Megatron writes
        raise unreadable(folder / "metadata.json", problem) from problem
    backend = getattr(config, "sharded_backend", None)
    if backend != "torch_dist":
        raise ValueError(
            f"{folder} has the format {backend or 'of torch.distributed.checkpoint alone'}; only "
            "torch_dist can be read (--ckpt-format torch_dist)"
        )


@contextlib.contextmanager
def told_of_damage(folder: str) -> Iterator[None]:
    """Name files that are missing or too short, where reading a checkpoint fails.

    Nothing is read before: a read that succeeds is as fast as without.

    Args:
        folder: of one iteration, which the body reads.

    Raises:
        ValueError: instead of what the body raised, if that is why.
    """
    try:
        yield
    except UNREADABLE:
        if Path(folder).is_dir():
            check_format(Path(folder))
            check_files(folder)
        raise


def _is_state(key: str) -> bool:
    return bool(_IN_MODEL_SPACE.fullmatch(key)) or _IN_BUCKETS in key


def _whose(reader: CheckpointReader, content: dict[str, Any]) -> tuple[str, str]:
    """Return whose optimizer state there is, and its sharding type."""
    in_model_space = any(_IN_MODEL_SPACE.fullmatch(key) for key in reader.tensors())
    in_buckets = any(_IN_BUCKETS in key for key in reader.tensors())
    if not in_model_space and not in_buckets:
        return WEIGHTS, ""
    sharding_type = content.get(metadata.SHARDING_TYPE)
    if sharding_type is None:  # releases before 0.14 say it nowhere
        older = metadata.FULLY_SHARDED_MODEL_SPACE
        sharding_type = older if in_model_space else metadata.DP_RESHARDABLE
    return (FLASH if metadata.KEY in content else ADAM), str(sharding_type)
