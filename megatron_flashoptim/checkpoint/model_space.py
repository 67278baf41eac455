"""``fully_reshardable``: flash state in the shape of the model's parameters, without a gather.

Each rank's range of a parameter becomes a few boxes (``boxes``) of the global tensors that Megatron
maps the parameter to (``pieces``). Every box is an ordinary sharded tensor on the live state, so
that each rank writes and reads its own bytes only, and any other cut of the model can read them.

Codes and corrections have the parameter's shape. Scales have its last dimension divided by 32,
under ``optimizer.state.exp_avg_scale.KEY``, where no group runs over the end of a row. Parameters
whose local rows are no multiple of 32 are saved with one scale per element instead, under
``optimizer.state.exp_avg_scale_per_element.KEY``; which ones those are is part of the checkpoint's
metadata. ``conversion.regroup`` makes groups of scales per element.

The high part of a master is the model's weight, but for quantized weights. Of their keys, which are
part of the metadata too, the high parts are saved under ``optimizer.state.high.KEY``, and any run
takes them from there. A run with quantized weights takes those of other keys from the weights.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_flashoptim.checkpoint.boxes import Box, boxes_of_range, view_of_box
from megatron_flashoptim.checkpoint.conversion import SCALE_OF, regroup
from megatron_flashoptim.checkpoint.loading import Loading, saved_state_dict
from megatron_flashoptim.checkpoint.pieces import Piece
from megatron_flashoptim.codec.spec import GROUP_SIZE, ExpAvgSqCode
from megatron_flashoptim.optim.shard import CORRECTION, GROUP_STATE, HIGH, BucketShard

PREFIX = "optimizer.state"
PER_ELEMENT = "per_element"


@dataclass(frozen=True)
class OwnedRange:
    """The elements of one parameter that this rank owns the state of.

    Attributes:
        pieces: the parameter's places in global tensors.
        shape: shape of the parameter on this rank.
        param_start: first owned element of the parameter, a multiple of 32.
        shard: the bucket shard with the state.
        start, end: element range in the shard.
    """

    pieces: Sequence[Piece]
    shape: tuple[int, ...]
    param_start: int
    shard: BucketShard
    start: int
    end: int

    @property
    def numel(self) -> int:
        """Number of owned elements."""
        return self.end - self.start

    def elements(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this range of a tensor with one element per parameter element."""
        return tensor[self.start : self.end]

    def groups(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this range of a tensor with one element per quantization group."""
        return tensor[self.start // GROUP_SIZE : -(-self.end // GROUP_SIZE)]

    def boxes(self, piece: Piece) -> Iterator[Box]:
        """Yield the owned boxes of a piece, in coordinates of the local parameter."""
        for box in boxes_of_range(self.shape, self.param_start, self.param_start + self.numel):
            common = box.intersect(piece.box)
            if common is not None:
                yield common


@dataclass(frozen=True)
class ModelSpace:
    """The state of one distributed optimizer, as a checkpoint in model space sees it.

    Attributes:
        ranges: what this rank owns.
        instance: number of the distributed optimizer instance; 0 is saved.
    """

    ranges: Sequence[OwnedRange]
    instance: int

    def keys_with_broken_groups(self) -> set[str]:
        """Return model keys for which a group of this rank runs over the end of a row."""
        return {
            piece.key
            for owned in self.ranges
            for piece in owned.pieces
            if not piece.has_whole_groups(owned.shape)
        }

    def covered(self) -> dict[str, tuple[int, int]]:
        """Return, for each model key, the elements whose state this rank saves, and all there are.

        Megatron keeps layers or experts of one kind under one key. If some are frozen, the state of
        the others is not the whole tensor, which cannot be saved.
        """
        found: dict[str, tuple[int, int]] = {}
        for owned in self.ranges:
            for piece in owned.pieces:
                saves = self.instance == 0 and not any(piece.replica_id[:2])
                numel = sum(box.numel() for box in owned.boxes(piece)) if saves else 0
                before, _ = found.get(piece.key, (0, 0))
                found[piece.key] = (before + numel, math.prod(piece.global_shape))
        return found

    def quantized_keys(self) -> set[str]:
        """Return model keys of which this rank has quantized weights."""
        return {p.key for owned in self.ranges if owned.shard.owns_param for p in owned.pieces}

    def saving(
        self, per_element: Container[str], quantized: Container[str] = ()
    ) -> dict[str, object]:
        """Return the sharded state dict to save.

        Args:
            per_element: model keys that any rank has broken groups for; their scales are saved
                per element by all ranks.
            quantized: model keys of which any rank has quantized weights; their high parts are
                saved by all ranks, since a key may hold layers of both kinds.
        """
        sharded: list[ShardedTensor] = []
        for owned in self.ranges:
            for piece in owned.pieces:
                if piece.key in quantized:
                    sharded += self._elements(owned, piece, HIGH, owned.elements(owned.shard.param))
            for name, tensor in owned.shard.state():
                if name == HIGH:
                    continue
                expanded = None
                for piece in owned.pieces:
                    if name not in GROUP_STATE:
                        sharded += self._elements(owned, piece, name, owned.elements(tensor))
                    elif piece.key not in per_element:
                        sharded += self._groups(owned, piece, name, owned.groups(tensor))
                    else:
                        if expanded is None:
                            scales = _on_host(owned.groups(tensor))
                            expanded = scales.repeat_interleave(GROUP_SIZE)
                        sharded += self._elements(owned, piece, f"{name}_{PER_ELEMENT}", expanded)
        return saved_state_dict(sharded)

    def loading(
        self, per_element: Container[str], saved_bits: int, quantized: Container[str] = ()
    ) -> dict[str, object]:
        """Return the sharded state dict to load, see ``loading.finish``.

        Args:
            per_element: model keys whose scales the checkpoint holds per element.
            saved_bits: master bits of the checkpoint.
            quantized: model keys whose high parts the checkpoint holds beside the weights.
        """
        loading = Loading()
        for owned in self.ranges:
            self._load_high(loading, owned, quantized)
            as_it_is = all(
                piece.key not in per_element and piece.has_whole_groups(owned.shape)
                for piece in owned.pieces
            )
            for name, tensor in owned.shard.state():
                if name in GROUP_STATE and as_it_is:
                    for piece in owned.pieces:
                        for box in self._groups(owned, piece, name, owned.groups(tensor)):
                            loading.read(box)
                elif name not in (*GROUP_STATE, HIGH):
                    for piece in owned.pieces:
                        for box in self._elements(owned, piece, name, owned.elements(tensor)):
                            if name == CORRECTION:
                                loading.read_correction(box, saved_bits)
                            else:
                                loading.read(box)
            if not as_it_is:
                self._load_regrouped(loading, owned, per_element)
        return loading.state_dict()

    def _load_high(self, loading: Loading, owned: OwnedRange, quantized: Container[str]) -> None:
        """Read high parts that are no weights of the checkpoint, or none of this run."""
        live = owned.elements(owned.shard.param)
        target = live if owned.shard.owns_param else None
        for piece in owned.pieces:
            if piece.key not in quantized and not owned.shard.owns_param:
                continue
            if target is None:  # weights are loaded by Megatron as well, before or after this
                target = torch.zeros_like(live)
            for box in self._elements(owned, piece, HIGH, target):
                if piece.key in quantized:
                    loading.read(box)
                else:
                    loading.weights.append(replace(box, key=piece.key))
            if target is live:
                continue
            for of_piece in owned.boxes(piece):
                read, place = (
                    view_of_box(flat, owned.shape, owned.param_start, of_piece)
                    for flat in (target, live)
                )
                loading.actions.append(_Copy(read, place))

    def _elements(
        self, owned: OwnedRange, piece: Piece, name: str, flat: torch.Tensor
    ) -> Iterator[ShardedTensor]:
        """Yield the boxes of a tensor with one element per parameter element."""
        for box in owned.boxes(piece):
            view = view_of_box(flat, owned.shape, owned.param_start, box, leading=piece.prepended)
            yield self._sharded(piece, name, view, box.relative_to(piece.box.offset))

    def _groups(
        self, owned: OwnedRange, piece: Piece, name: str, flat: torch.Tensor
    ) -> Iterator[ShardedTensor]:
        """Yield the boxes of a tensor with one element per group, last dimension divided."""
        shape = in_groups(owned.shape)
        first = owned.param_start // GROUP_SIZE
        for element_box in owned.boxes(piece):
            box = Box(in_groups(element_box.offset), in_groups(element_box.shape))
            view = view_of_box(flat, shape, first, box, leading=piece.prepended)
            relative = box.relative_to(in_groups(piece.box.offset))
            yield self._sharded(piece, name, view, relative, divided=True)

    def _sharded(
        self, piece: Piece, name: str, view: torch.Tensor, box: Box, *, divided: bool = False
    ) -> ShardedTensor:
        """Return a box, in coordinates of the piece, as a sharded tensor."""
        global_shape, global_offset = piece.global_shape, piece.global_offset
        if divided:
            global_shape, global_offset = in_groups(global_shape), in_groups(global_offset)
        in_piece = (*(0,) * piece.prepended, *box.offset)
        return ShardedTensor(
            f"{PREFIX}.{name}.{piece.key}",
            view,
            view.dtype,
            tuple(view.shape),
            global_shape,
            tuple(a + b for a, b in zip(global_offset, in_piece, strict=True)),
            axis_fragmentations=None,
            replica_id=(*piece.replica_id[:2], self.instance),
            allow_shape_mismatch=piece.allow_shape_mismatch,
        )

    def _load_regrouped(
        self, loading: Loading, owned: OwnedRange, per_element: Container[str]
    ) -> None:
        """Read a scale for each element and make groups of them."""
        state = dict(owned.shard.state())
        for moment, scale_name in SCALE_OF.items():
            if moment not in state:
                continue
            codes = owned.elements(state[moment])
            scales = torch.zeros(owned.numel, dtype=torch.bfloat16, device=codes.device)
            for piece in owned.pieces:
                if piece.key in per_element:
                    name = f"{scale_name}_{PER_ELEMENT}"
                    for box in self._elements(owned, piece, name, scales):
                        loading.read(box)
                else:
                    self._read_expanded(loading, owned, piece, scale_name, scales)
            target = owned.groups(state[scale_name])
            loading.actions.append(
                _Regroup(moment, owned.shard.exp_avg_sq_code, codes, scales, target)
            )

    def _read_expanded(
        self, loading: Loading, owned: OwnedRange, piece: Piece, name: str, scales: torch.Tensor
    ) -> None:
        """Read the checkpoint's groups that cover this rank's elements, and expand them."""
        # Whole rows of the piece: ranks that share a row ask for the same tensor, which Megatron's
        # fully parallel load takes for granted of tensors at one offset.
        columns = piece.global_offset[-1]
        first = columns // GROUP_SIZE
        last = -(-(columns + piece.box.shape[-1]) // GROUP_SIZE)
        for box in owned.boxes(piece):
            relative = box.relative_to(piece.box.offset)
            in_piece = (*(0,) * piece.prepended, *relative.offset)
            offset = tuple(a + b for a, b in zip(piece.global_offset, in_piece, strict=True))
            shape = (*(1,) * piece.prepended, *box.shape[:-1], last - first)
            covering = torch.zeros(shape, dtype=torch.bfloat16, device=scales.device)
            loading.read(
                ShardedTensor(
                    f"{PREFIX}.{name}.{piece.key}",
                    covering,
                    covering.dtype,
                    shape,
                    in_groups(piece.global_shape),
                    (*offset[:-1], first),
                    axis_fragmentations=None,
                    replica_id=(*piece.replica_id[:2], self.instance),
                    allow_shape_mismatch=piece.allow_shape_mismatch,
                )
            )
            target = view_of_box(
                scales, owned.shape, owned.param_start, box, leading=piece.prepended
            )
            loading.actions.append(_Expand(covering, offset[-1] - first * GROUP_SIZE, target))


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same in host memory, where more can be made of it that is to be saved.

    With ``--ckpt-assume-constant-structure`` the worker of nvidia-resiliency-ext takes tensors on
    the device from the addresses that the first save told it, and those in host memory as they are.
    """
    return tensor if tensor.is_meta else tensor.cpu()


@dataclass(frozen=True)
class _Copy:
    """Put what was read in its place."""

    read: torch.Tensor
    target: torch.Tensor

    def __call__(self) -> None:
        self.target.copy_(self.read)


@dataclass(frozen=True)
class _Expand:
    """Give each element of ``target`` the scale of the checkpoint's group it lies in."""

    covering: torch.Tensor
    skip: int
    target: torch.Tensor

    def __call__(self) -> None:
        expanded = self.covering.repeat_interleave(GROUP_SIZE, dim=-1)
        self.target.copy_(expanded.narrow(-1, self.skip, self.target.shape[-1]))


@dataclass(frozen=True)
class _Regroup:
    """Make codes and scales of whole groups in place."""

    moment: str
    code: ExpAvgSqCode
    codes: torch.Tensor
    element_scales: torch.Tensor
    scale: torch.Tensor

    def __call__(self) -> None:
        codes, scale, _ = regroup(self.moment, self.codes, self.element_scales, code=self.code)
        self.codes.copy_(codes)
        self.scale.copy_(scale)


def in_groups(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return sizes or offsets with the last one counted in groups, rounded up."""
    return (*sizes[:-1], -(-sizes[-1] // GROUP_SIZE))
