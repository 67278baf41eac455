"""Boxes: a flat range of an N-dimensional tensor as a few rectangular pieces.

A data-parallel shard owns a range of a parameter's elements in row-major order. Such a range is a
partial first row, whole rows and a partial last row, and so on inward: at most ``2 N - 1`` boxes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor.

    Attributes:
        offset: first index along each dimension.
        shape: extent along each dimension.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    def intersect(self, other: Box) -> Box | None:
        """Return the common part, or None where there is none."""
        offset = tuple(map(max, self.offset, other.offset))
        ends = (
            min(mine + extent, theirs + other_extent)
            for mine, extent, theirs, other_extent in zip(
                self.offset, self.shape, other.offset, other.shape, strict=True
            )
        )
        shape = tuple(end - start for start, end in zip(offset, ends, strict=True))
        return Box(offset, shape) if all(extent > 0 for extent in shape) else None

    def relative_to(self, offset: Sequence[int]) -> Box:
        """Return the box in coordinates that begin at ``offset``."""
        return Box(tuple(a - b for a, b in zip(self.offset, offset, strict=True)), self.shape)


def flat_number(index: Sequence[int], shape: Sequence[int]) -> int:
    """Return the number, in row-major order, of the element at an index."""
    number = 0
    for position, extent in zip(index, shape, strict=True):
        number = number * extent + position
    return number


def boxes_of_range(shape: tuple[int, ...], start: int, end: int) -> Iterator[Box]:
    """Yield the boxes that make up elements ``start`` to ``end`` (row-major) of a tensor.

    Args:
        shape: shape of the tensor, N dimensions.
        start, end: range of flat element numbers.

    Yields:
        At most ``2 N - 1`` disjoint boxes in ascending order, each contiguous in the tensor.
    """
    if start >= end:
        return
    if not shape:
        yield Box((), ())
        return
    if len(shape) == 1:
        yield Box((start,), (end - start,))
        return
    rest = shape[1:]
    row_numel = math.prod(rest)
    row = start // row_numel
    if start % row_numel:
        row_end = (row + 1) * row_numel
        yield from _in_row(row, rest, start % row_numel, min(end, row_end) - row * row_numel)
        row += 1
        if end <= row_end:
            return
    last_row = end // row_numel
    if last_row > row:
        yield Box((row, *(0,) * len(rest)), (last_row - row, *rest))
    yield from _in_row(last_row, rest, 0, end % row_numel)


def _in_row(row: int, rest: tuple[int, ...], start: int, end: int) -> Iterator[Box]:
    for box in boxes_of_range(rest, start, end):
        yield Box((row, *box.offset), (1, *box.shape))


def view_of_box(
    flat: torch.Tensor, shape: tuple[int, ...], first: int, box: Box, *, leading: int = 0
) -> torch.Tensor:
    """Return a box as a view of the flat tensor that holds a range of the whole tensor.

    Args:
        flat: flat tensor with elements ``first`` and following of the whole, row-major.
        shape: shape of the whole tensor.
        first: flat element number, in the whole, of ``flat[0]``.
        box: a part of the whole that lies in ``flat``.
        leading: number of dimensions of extent 1 to put in front.
    """
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    start = sum(a * b for a, b in zip(box.offset, strides, strict=True)) - first
    return flat.as_strided(
        (*(1,) * leading, *box.shape),
        (*(1,) * leading, *strides),
        flat.storage_offset() + start,
    )
