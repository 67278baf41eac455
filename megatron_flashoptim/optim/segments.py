"""SegmentTable: which parameter, and so which hyper-parameters, a quantization group has.

A shard is a sequence of segments, one per parameter that has elements in it. A kernel program
works within one tile of ``GROUPS_PER_ENTRY`` groups and walks the few segments that meet the tile,
so that one launch serves parameters of different weight decay, learning rate and gradient scale.
The table costs 4 bytes per tile (0.002 byte per parameter) and 16 bytes per segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Groups of 32 per entry of the tile table: few enough to meet few segments, many enough that the
# table adds 0.002 byte per parameter. A kernel program works on a part of a tile.
GROUPS_PER_ENTRY = 64


@dataclass(frozen=True)
class Segment:
    """One parameter's groups in a shard.

    Attributes:
        start: first group of the segment, counted from the shard's start.
        row: row of the hyper-parameter table.
        tensor_id: 32-bit id of the parameter, the key of its stochastic rounding.
        first_group: number, within the parameter, of the group at ``start``.
    """

    start: int
    row: int
    tensor_id: int
    first_group: int


class SegmentTable:
    """Device tables of the segments of one shard.

    Args:
        segments: in ascending order of ``start``; the first begins at group 0, or earlier groups
            are padding and are counted to it.
        num_groups: groups of the shard.
        device: where the tables live.
        groups_per_entry: groups per entry of the tile table, a power of two.

    Attributes:
        start, row, tensor_id, group_shift: int32 tensors, one element per segment;
            ``group_shift`` is what must be added to a group's number in the shard to get its
            number in the parameter.
        entry_segment: int32 tensor of tiles + 1 elements: the segment that holds the first group of
            each tile, then the last segment.

    Raises:
        ValueError: segments out of order or outside the shard.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        num_groups: int,
        device: torch.device | str,
        *,
        groups_per_entry: int = GROUPS_PER_ENTRY,
    ) -> None:
        starts = [segment.start for segment in segments]
        if starts != sorted(set(starts)) or any(not 0 <= s < num_groups for s in starts):
            raise ValueError(f"segment starts must ascend within {num_groups} groups: {starts}")
        self.segments = tuple(segments)
        self.num_groups = num_groups
        self.groups_per_entry = groups_per_entry

        def table(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64).to(torch.int32).to(device)

        # Padding groups before the first segment count to it.
        self.start = table([0, *starts[1:]] if starts else [])
        self.row = table([s.row for s in segments])
        self.tensor_id = table([s.tensor_id for s in segments])
        self.group_shift = table([s.first_group - s.start for s in segments])
        tiles = range(0, num_groups, groups_per_entry)
        boundaries = torch.tensor([0, *starts[1:]] if starts else [0], dtype=torch.int64)
        first = torch.searchsorted(boundaries, torch.tensor(list(tiles)), right=True) - 1
        last = torch.tensor([max(len(segments) - 1, 0)])
        self.entry_segment = torch.cat([first, last]).to(torch.int32).to(device)

    def __len__(self) -> int:
        return len(self.segments)

    def per_group(self, values: torch.Tensor) -> torch.Tensor:
        """Expand one value per segment to one value per group of the shard."""
        groups = torch.arange(self.num_groups, device=values.device)
        index = torch.searchsorted(self.start.to(torch.int64), groups, right=True) - 1
        return values[index]

    def nbytes(self) -> int:
        """Return the bytes of the device tables."""
        tables = (self.start, self.row, self.tensor_id, self.group_shift, self.entry_segment)
        return sum(t.nbytes for t in tables)
