"""Reading tensors of a ``torch_dist`` checkpoint one at a time, outside Megatron's own load.

Megatron reads all tensors of a sharded state dict in one go, so that fp32 masters and moments to be
encoded would all have to be in memory first: 12 bytes per owned parameter. Here one saved tensor
is in memory at a time. Nothing is collective: each rank reads what it owns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list


class StockReader:
    """The tensors of one checkpoint folder.

    Args:
        folder: folder of one iteration, with torch's ``.metadata``.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = folder
        self._reader = FileSystemReader(folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=False)
        self._tensors = metadata.state_dict_metadata
        self._found: dict[str, str] = {}

    def find(self, pattern: str) -> str:
        """Return the key that a pattern with at most one ``*`` stands for.

        A key without may have ``chained_N.`` in front, as Megatron's chains had once. Without
        such a tensor, returns the pattern, which then names it in errors.
        """
        if pattern in self._tensors:
            return pattern
        if pattern not in self._found:
            begin, star, end = pattern.partition("*")
            if not star:
                begin, end = "chained_", f".{pattern}"
            keys = (key for key in self._tensors if key.startswith(begin) and key.endswith(end))
            self._found[pattern] = next(keys, pattern)
        return self._found[pattern]

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor.

        Raises:
            ValueError: the checkpoint has no tensor of that key.
        """
        return tuple(self._tensor(key).size)

    def read_into(self, target: torch.Tensor, key: str, offset: Sequence[int]) -> None:
        """Read a box of a tensor; elements beyond the tensor's end stay as they are.

        Args:
            target: receives the box, of its shape and converted to its dtype.
            key: of the tensor.
            offset: where the box begins in it.

        Raises:
            ValueError: the checkpoint has no tensor of that key.
        """
        box = ChunkStorageMetadata(torch.Size(offset), target.shape)
        items = create_read_items_for_chunk_list(key, self._tensor(key), [box])
        self._reader.read_data(LoadPlan(items), _Into(target)).wait()

    def _tensor(self, key: str) -> TensorStorageMetadata:
        found: Any = self._tensors.get(key)
        if not isinstance(found, TensorStorageMetadata):
            raise ValueError(
                f"the checkpoint in {self.folder} has no tensor {key}: it holds no state of "
                "Megatron's Adam for this model. Load the weights alone with --no-load-optim "
                "--no-load-rng, or --finetune"
            )
        return found


class _Into(DefaultLoadPlanner):
    """Has every read item written into its place in one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        part = self._target
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            part = part.narrow(dim, start, length)
        return part
