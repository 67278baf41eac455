"""SegmentTable: every group finds its parameter, in the table and in the kernel's walk."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_flashoptim.optim.segments import GROUPS_PER_ENTRY, Segment, SegmentTable


def _segments(starts: list[int]) -> list[Segment]:
    """Return segments that differ in every field."""
    return [
        Segment(start, row=i % 3, tensor_id=(0x9E3779B1 * (i + 1)) % 2**32, first_group=7 * i)
        for i, start in enumerate(starts)
    ]


@st.composite
def _tables(draw: st.DrawFn) -> tuple[list[Segment], int]:
    num_groups = draw(st.integers(1, 5 * GROUPS_PER_ENTRY))
    starts = draw(st.sets(st.integers(0, num_groups - 1), min_size=1, max_size=80))
    return _segments(sorted(starts)), num_groups


def _owner(segments: list[Segment], group: int) -> int:
    """Return the last segment that starts at or before ``group``; the first for padding before."""
    return max([i for i, segment in enumerate(segments) if segment.start <= group], default=0)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(layout=_tables())
def test_per_group_values_equal_a_search_of_every_group(layout: tuple[list[Segment], int]) -> None:
    segments, num_groups = layout
    table = SegmentTable(segments, num_groups, "cpu")
    owners = [segments[_owner(segments, group)] for group in range(num_groups)]
    assert table.per_group(table.row).tolist() == [s.row for s in owners]
    tensor_ids = table.per_group(table.tensor_id).to(torch.int64) & 0xFFFFFFFF
    assert tensor_ids.tolist() == [s.tensor_id for s in owners]
    group_in_tensor = torch.arange(num_groups) + table.per_group(table.group_shift)
    assert group_in_tensor.tolist() == [
        s.first_group + group - s.start for group, s in enumerate(owners)
    ]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(layout=_tables(), groups_per_entry=st.sampled_from([1, 16, GROUPS_PER_ENTRY, 128]))
def test_walking_a_tile_from_its_first_segment_finds_each_group(
    layout: tuple[list[Segment], int], groups_per_entry: int
) -> None:
    """The kernel starts at entry_segment[t] and steps over starts up to entry_segment[t + 1]."""
    segments, num_groups = layout
    table = SegmentTable(segments, num_groups, "cpu", groups_per_entry=groups_per_entry)
    bounds = table.entry_segment.tolist()
    assert len(bounds) == -(-num_groups // groups_per_entry) + 1
    assert bounds[-1] == len(segments) - 1
    for group in range(num_groups):
        tile = group // groups_per_entry
        segment = bounds[tile]
        for candidate in range(bounds[tile] + 1, bounds[tile + 1] + 1):
            if group >= table.start[candidate]:
                segment = candidate
        assert segment == _owner(segments, group)


def test_padding_before_the_first_segment_counts_to_it() -> None:
    """Its groups have negative numbers in the parameter, so they share no random bits with it."""
    table = SegmentTable([Segment(5, 2, 9, 0), Segment(8, 1, 4, 3)], 10, "cpu")
    assert table.start.tolist() == [0, 8]
    assert table.per_group(table.row).tolist() == [2] * 8 + [1] * 2
    assert table.group_shift.tolist() == [-5, -5]


@pytest.mark.parametrize("starts", [[4, 2], [3, 3], [-1], [10], [0, 5, 12], [0, 7, 6]])
def test_starts_that_do_not_ascend_within_the_shard_are_refused(starts: list[int]) -> None:
    with pytest.raises(ValueError, match=r"ascend within 10 groups: \[") as error:
        SegmentTable(_segments(starts), 10, "cpu")
    assert str(starts) in str(error.value)


@pytest.mark.parametrize("num_groups", [0, 1, 64, 65])
def test_a_shard_of_padding_only_has_an_empty_table(num_groups: int) -> None:
    table = SegmentTable([], num_groups, "cpu")
    assert len(table) == 0 and table.start.numel() == 0
    assert not table.entry_segment.any()


@pytest.mark.parametrize(("segments", "groups"), [(1, 1), (1, 64), (3, 65), (10, 1000)])
def test_nbytes_is_4_per_tile_and_16_per_segment(segments: int, groups: int) -> None:
    table = SegmentTable(_segments(list(range(segments))), groups, "cpu")
    tiles = -(-groups // GROUPS_PER_ENTRY)
    assert table.nbytes() == 4 * (tiles + 1) + 16 * segments


def test_ids_of_32_bits_are_kept() -> None:
    ids = [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
    segments = [Segment(i, 0, tensor_id, 0) for i, tensor_id in enumerate(ids)]
    table = SegmentTable(segments, len(ids), "cpu")
    assert table.tensor_id.dtype == torch.int32
    assert (table.tensor_id.to(torch.int64) & 0xFFFFFFFF).tolist() == ids
