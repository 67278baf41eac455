"""Megatron's own factories cut a parameter into pieces that are where its views are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_flashoptim.checkpoint.boxes import Box


def pieces_of(sharded: Any, shape: tuple[int, ...]) -> list[Any]:
    from megatron_flashoptim.checkpoint import pieces  # imports megatron, see the fixture

    return pieces.pieces_of(sharded, shape)


def _sharded(tensor: torch.Tensor, *offsets: tuple[int, int, int], **options: Any) -> Any:
    from megatron.core.dist_checkpointing import ShardedTensor

    return ShardedTensor.from_rank_offsets("weight", tensor, *offsets, **options)


def test_plain_tensor_is_one_piece_with_its_prepended_layers_and_experts(megatron: None) -> None:
    # Layer 3 of 4, expert 1 of 2, second of two tensor-parallel rows.
    sharded = _sharded(
        torch.zeros(8, 64),
        (0, 3, 4),
        (1, 1, 2),
        (2, 1, 2),
        prepend_axis_num=2,
        replica_id=(0, 0, 5),
    )
    (piece,) = pieces_of(sharded, (8, 64))
    assert piece.box == Box((0, 0), (8, 64))
    assert piece.global_shape == (4, 2, 16, 64)
    assert piece.global_offset == (3, 1, 8, 0)
    assert piece.prepended == 2
    assert piece.replica_id == (0, 0, 5)
    assert piece.has_whole_groups((8, 64))


@pytest.mark.parametrize("offsets", [(), ((0, 2, 4),)], ids=["dense", "grouped experts"])
def test_swiglu_halves_are_two_pieces_of_one_key(
    megatron: None, offsets: tuple[tuple[int, int, int], ...]
) -> None:
    """``offsets`` is what Megatron's grouped experts give for each expert's own weight."""
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    axis = len(offsets)
    whole = _sharded(
        torch.zeros(12, 32), *offsets, (axis, 1, 2), prepend_axis_num=axis, replica_id=(0, 0, 0)
    )
    gate, up = pieces_of(apply_swiglu_sharded_factory(whole, offsets), (12, 32))
    assert (gate.key, up.key) == ("weight", "weight")
    assert (gate.box, up.box) == (Box((0, 0), (6, 32)), Box((6, 0), (6, 32)))
    expert = (2,) if offsets else ()
    assert gate.global_offset == (*expert, 6, 0)  # second rank's half of the gate
    assert up.global_offset == (*expert, 18, 0)
    assert gate.global_shape == up.global_shape == (*(4 for _ in offsets), 24, 32)


def test_mamba_projection_is_cut_into_named_parts(megatron: None) -> None:
    from megatron.core.ssm.utils import _split_tensor_factory

    whole = _sharded(torch.zeros(10, 32), (0, 0, 2), replica_id=(0, 0, 0))
    factory = _split_tensor_factory(whole, [2, 8], ["z", "x"], 0)
    z, x = pieces_of(factory, (10, 32))
    assert (z.key, x.key) == ("weight.z", "weight.x")
    assert (z.box, x.box) == (Box((0, 0), (2, 32)), Box((2, 0), (8, 32)))
    assert (z.global_shape, x.global_shape) == ((4, 32), (16, 32))


def test_factory_that_transforms_is_refused_by_key(megatron: None) -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    weight = torch.zeros(8, 32)
    for build, complaint in (
        (lambda key, t, *_: [_sharded(t.t().contiguous())], "transforms the parameter"),
        (lambda key, t, *_: [_sharded(t[:4])], "does not cut"),
    ):
        factory = ShardedTensorFactory("weight", weight, build, torch.cat, (0, 0, 0))
        with pytest.raises(ValueError, match=f"weight.*{complaint}|{complaint}"):
            pieces_of(factory, (8, 32))


@pytest.mark.parametrize(
    ("local", "offset", "whole_groups"),
    [
        ((4, 64), (0, 0, 1), True),
        ((4, 48), (1, 1, 2), False),  # 96 columns over two ranks
        ((64,), (0, 1, 2), True),
        ((48,), (0, 0, 1), False),
        ((8, 1, 4), (0, 0, 1), False),  # a convolution's kernel
    ],
)
def test_groups_are_whole_where_local_rows_are_multiples_of_32(
    megatron: None, local: tuple[int, ...], offset: tuple[int, int, int], whole_groups: bool
) -> None:
    (piece,) = pieces_of(_sharded(torch.zeros(local), offset), local)
    assert piece.has_whole_groups(local) is whole_groups


def test_scalar_has_no_whole_group(megatron: None) -> None:
    (piece,) = pieces_of(_sharded(torch.zeros(())), ())
    assert not piece.has_whole_groups(())
