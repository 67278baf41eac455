"""Boxes cover a flat range once, are few, and are views of the flat tensor."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megatron_flashoptim.checkpoint.boxes import Box, boxes_of_range, view_of_box

SHAPES = [(), (1,), (7,), (3, 4), (4, 1), (1, 5), (2, 3, 4), (3, 1, 4), (2, 2, 2, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boxes_cover_every_range_once_in_order_with_at_most_2n_minus_1(
    shape: tuple[int, ...],
) -> None:
    numel = math.prod(shape)
    whole = torch.arange(numel).view(shape)
    for start, end in itertools.combinations(range(numel + 1), 2):
        boxes = list(boxes_of_range(shape, start, end))
        assert len(boxes) <= max(1, 2 * len(shape) - 1)
        parts = [
            whole[tuple(slice(o, o + s) for o, s in zip(box.offset, box.shape, strict=True))]
            for box in boxes
        ]
        assert torch.cat([part.reshape(-1) for part in parts]).tolist() == list(range(start, end))
        flat = torch.arange(start, end)
        for box, part in zip(boxes, parts, strict=True):
            view = view_of_box(flat, shape, start, box, leading=2)
            assert torch.equal(view, part.view(1, 1, *box.shape))
            assert view.is_contiguous()
            assert view.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()


def test_empty_range_has_no_box() -> None:
    assert list(boxes_of_range((3, 4), 5, 5)) == []


def test_view_of_a_slice_of_a_bucket_begins_where_the_slice_does() -> None:
    bucket = torch.arange(100)
    view = view_of_box(bucket[40:], (10, 6), 12, Box((3, 0), (2, 6)))
    assert view.tolist() == [[46, 47, 48, 49, 50, 51], [52, 53, 54, 55, 56, 57]]


def test_intersection() -> None:
    assert Box((0, 2), (4, 4)).intersect(Box((3, 0), (5, 3))) == Box((3, 2), (1, 1))
    assert Box((0,), (4,)).intersect(Box((4,), (4,))) is None
