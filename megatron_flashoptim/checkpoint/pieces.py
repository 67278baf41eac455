"""Pieces: how Megatron's sharded state dict maps a local parameter into global tensors.

Most parameters are one piece: a ``ShardedTensor``. A ``ShardedTensorFactory`` cuts the parameter
first, for example SwiGLU's fused weight into its two halves. A factory is asked with a tensor
without storage; strides and offset of the views it returns tell where they lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from megatron_flashoptim.checkpoint.boxes import Box
from megatron_flashoptim.codec.spec import GROUP_SIZE


@dataclass(frozen=True)
class Piece:
    """A box of a local parameter and its place in a global tensor.

    Attributes:
        key: key of the model tensor in the checkpoint.
        box: the part of the local parameter.
        global_shape: shape of the global tensor, with the dimensions that layers or experts
            prepend.
        global_offset: where the piece begins in it.
        replica_id: Megatron's replica id of the model tensor: pipeline, tensor and data
            parallel replica.
        allow_shape_mismatch: the global tensor may have another size in the checkpoint, such as
            a padded vocabulary.
    """

    key: str
    box: Box
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    replica_id: tuple[int, ...]
    allow_shape_mismatch: bool

    @property
    def prepended(self) -> int:
        """Number of dimensions the global tensor has in front of the parameter's own."""
        return len(self.global_shape) - len(self.box.shape)

    def has_whole_groups(self, local_shape: tuple[int, ...]) -> bool:
        """Return whether no quantization group runs over the end of a row of the piece."""
        if not local_shape:
            return False
        lasts = (
            local_shape[-1],
            self.box.offset[-1],
            self.box.shape[-1],
            self.global_shape[-1],
            self.global_offset[-1],
        )
        return all(value % GROUP_SIZE == 0 for value in lasts)


def pieces_of(sharded: Any, local_shape: tuple[int, ...]) -> list[Piece]:
    """Return the pieces of a parameter.

    Args:
        sharded: the parameter's ``ShardedTensor`` or ``ShardedTensorFactory``.
        local_shape: shape of the parameter on this rank.

    Raises:
        ValueError: a factory does something else than cut the parameter into boxes.
    """
    if isinstance(sharded, ShardedTensor):
        whole = Box((0,) * len(local_shape), local_shape)
        return [_piece(sharded, whole)]
    if not isinstance(sharded, ShardedTensorFactory):
        raise ValueError(f"expected a ShardedTensor or a factory of them, got {type(sharded)}")
    template = torch.empty(local_shape, device="meta", dtype=sharded.data.dtype)
    built = sharded.build_fn(
        sharded.key, template, sharded.replica_id, getattr(sharded, "flattened_range", None)
    )
    pieces = [_piece(part, _box_of_view(part, template)) for part in _parts(built)]
    if sum(piece.box.numel() for piece in pieces) != template.numel():
        raise ValueError(
            f"the checkpoint factory of {sharded.key} does not cut the parameter of shape "
            f"{local_shape} into parts that cover it once; save with the sharding type "
            "dp_reshardable"
        )
    return pieces


def _parts(built: Any) -> Iterator[ShardedTensor]:
    if isinstance(built, ShardedTensor):
        yield built
        return
    yield from nested_values(built)


def _piece(sharded: ShardedTensor, box: Box) -> Piece:
    replica_id = sharded.replica_id
    return Piece(
        key=sharded.key,
        box=box,
        global_shape=tuple(sharded.global_shape),
        global_offset=tuple(sharded.global_offset),
        replica_id=(replica_id,) if isinstance(replica_id, int) else tuple(replica_id),
        allow_shape_mismatch=sharded.allow_shape_mismatch,
    )


def _box_of_view(part: ShardedTensor, template: torch.Tensor) -> Box:
    """Return where a view lies in the tensor it was made of."""
    view = part.data
    is_view = view.untyped_storage()._cdata == template.untyped_storage()._cdata
    if not is_view or view.stride() != template.stride():
        raise ValueError(
            f"the checkpoint factory of {part.key} transforms the parameter instead of cutting "
            "it; save with the sharding type dp_reshardable"
        )
    offset = []
    rest = view.storage_offset()
    for stride in template.stride():
        offset.append(rest // stride)
        rest %= stride
    return Box(tuple(offset), tuple(view.shape))
