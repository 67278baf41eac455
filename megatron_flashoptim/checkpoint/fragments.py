"""Tensors as ``fully_sharded_model_space``, of releases before 0.16, has them: cut and flattened.

A tensor of shape (X, Y) that ranks held as (x, y) each is saved as (X / x, Y / y, x * y): which
fragment, and which element of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from megatron_flashoptim.checkpoint.boxes import Box, flat_number, view_of_box
from megatron_flashoptim.checkpoint.reader import CheckpointReader


def read_fragments(
    target: torch.Tensor, shape: Sequence[int], wanted: Box, key: str, reader: CheckpointReader
) -> None:
    """Read a box of a tensor that was saved in flattened fragments.

    Args:
        target: receives the box, of its shape and converted to its dtype.
        shape: of the whole tensor.
        wanted: the box, in coordinates of the whole.
        key: of the saved tensor, which has one dimension more.
        reader: the checkpoint.

    Raises:
        ValueError: the fragments do not make up the shape.
    """
    *counts, numel = reader.shape(key)
    if math.prod(shape) != math.prod(counts) * numel or any(
        size % count for size, count in zip(shape, counts, strict=True)
    ):
        raise ValueError(
            f"{key} has {math.prod(counts)} fragments of {numel} elements in the checkpoint, which "
            f"do not make up the shape {tuple(shape)} of this run"
        )
    extents = tuple(size // count for size, count in zip(shape, counts, strict=True))
    spans = (
        range(first // extent, -(-(first + length) // extent))
        for first, length, extent in zip(wanted.offset, wanted.shape, extents, strict=True)
    )
    for fragment in itertools.product(*spans):
        origin = tuple(a * b for a, b in zip(fragment, extents, strict=True))
        common = wanted.intersect(Box(origin, extents))
        assert common is not None
        inside = common.relative_to(origin)
        ends = [a + b - 1 for a, b in zip(inside.offset, inside.shape, strict=True)]
        first = flat_number(inside.offset, extents)
        covering = torch.zeros(flat_number(ends, extents) + 1 - first, dtype=torch.float32)
        cut = (*(1,) * len(fragment), covering.numel())
        reader.read_into(covering.view(cut), key, (*fragment, first))
        into = target
        for dim, (a, b) in enumerate(
            zip(common.relative_to(wanted.offset).offset, common.shape, strict=True)
        ):
            into = into.narrow(dim, a, b)
        into.copy_(view_of_box(covering, extents, first, inside))
