"""Weights and optimizer state of a checkpoint in model space, part of a tensor by part, as fp32.

The unit is what one rank held of a model tensor and saved in one piece (a chunk). Quantization
groups are counted in it row by row, as the ranks counted them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from megatron_flashoptim.checkpoint import deviation
from megatron_flashoptim.checkpoint.boxes import Box, boxes_of_range, view_of_box
from megatron_flashoptim.checkpoint.conversion import SCALE_OF, decode_elements
from megatron_flashoptim.checkpoint.folder import FLASH, MASTER, OLDER_MASTER, CheckpointFolder
from megatron_flashoptim.checkpoint.fragments import read_fragments
from megatron_flashoptim.checkpoint.metadata import FULLY_SHARDED_MODEL_SPACE
from megatron_flashoptim.checkpoint.model_space import PER_ELEMENT, in_groups
from megatron_flashoptim.codec import join_master
from megatron_flashoptim.codec.spec import GROUP_SIZE
from megatron_flashoptim.optim.shard import CORRECTION, HIGH


@dataclass(frozen=True)
class Chunk:
    """What a rank held of a model tensor.

    Attributes:
        key: of the tensor.
        box: in the tensor.
    """

    key: str
    box: Box

    @property
    def name(self) -> str:
        """Key and, in front of a stack of layers or experts, which; for messages."""
        shape = self.box.shape
        last = max(0, len(shape) - 1)
        stacked = next((n for n, extent in enumerate(shape[:last]) if extent != 1), last)
        return self.key + (f"[{', '.join(map(str, self.box.offset[:stacked]))}]" if stacked else "")

    def has_whole_groups(self) -> bool:
        """Return whether no quantization group runs over the end of a row."""
        if not self.box.shape:
            return False
        return not (self.box.offset[-1] % GROUP_SIZE or self.box.shape[-1] % GROUP_SIZE)

    def cut(self, most: int) -> Iterator[Span]:
        """Yield spans of at most ``most`` elements, of whole groups and, if possible, whole rows.

        Args:
            most: a multiple of 32.
        """
        numel = self.box.numel()
        row = self.box.shape[-1] if self.box.shape else 1
        step = most
        if self.has_whole_groups() and row <= most:
            step = most // row * row
        for start in range(0, numel, step):
            yield Span(self, start, min(start + step, numel))


@dataclass(frozen=True)
class Span:
    """A range of a chunk's elements in row-major order.

    Attributes:
        chunk: the chunk.
        start, end: element numbers in it; ``start`` is a multiple of 32.
    """

    chunk: Chunk
    start: int
    end: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.end - self.start

    def boxes(self, *, divided_by_groups: bool = False) -> Iterator[tuple[Box, Box]]:
        """Yield the boxes that make up the span: in the whole tensor, and in the chunk.

        Args:
            divided_by_groups: in tensors whose last dimension is divided by 32.
        """
        chunk = self.chunk.box
        for inside in boxes_of_range(chunk.shape, self.start, self.end):
            offset, shape, origin = inside.offset, inside.shape, chunk.offset
            if divided_by_groups:
                offset, shape, origin = in_groups(offset), in_groups(shape), in_groups(origin)
            local = Box(offset, shape)
            yield Box(tuple(a + b for a, b in zip(origin, offset, strict=True)), shape), local

    def view(
        self, flat: torch.Tensor, local: Box, *, divided_by_groups: bool = False
    ) -> torch.Tensor:
        """Return a box of the chunk as a view of the flat tensor of the span's elements."""
        if divided_by_groups:
            return view_of_box(
                flat, in_groups(self.chunk.box.shape), self.start // GROUP_SIZE, local
            )
        return view_of_box(flat, self.chunk.box.shape, self.start, local)


class ModelState:
    """State of all model tensors of a checkpoint in model space, Megatron's Adam's or flash.

    Args:
        folder: the checkpoint.
    """

    def __init__(self, folder: CheckpointFolder) -> None:
        self._folder = folder
        self._reader = folder.reader
        self._kinds = folder.state()
        self._older = folder.sharding_type == FULLY_SHARDED_MODEL_SPACE
        self._master = OLDER_MASTER if self._older else MASTER
        self._code = folder.flash.get("exp_avg_sq_code", "sqrt")

    def chunks(self, key: str) -> list[Chunk]:
        """Return the chunks of a model tensor."""
        return [Chunk(key, box) for box in self._reader.chunks(key)]

    def has_state(self, key: str) -> bool:
        """Return whether a model tensor has optimizer state; frozen ones do not."""
        return key in self._kinds

    def check_kinds(self, moments: Iterable[str]) -> None:
        """Look for masters and some moments of all that has state, before any is read.

        Raises:
            ValueError: the checkpoint lacks one; names it.
        """
        flash = self._folder.optimizer == FLASH
        for key, kinds in self._kinds.items():
            if not flash:
                self._key(key, self._master)
            for moment in moments:
                self._key(key, moment)
                if flash and f"{SCALE_OF[moment]}_{PER_ELEMENT}" not in kinds:
                    self._key(key, SCALE_OF[moment])

    def weight(self, span: Span) -> torch.Tensor:
        """Return model weights, flat, of their own dtype."""
        key = span.chunk.key
        return self._read(span, key, self._reader.tensors()[key].properties.dtype)

    def high(self, span: Span) -> torch.Tensor:
        """Return the high parts of flash masters, flat: the weights, or what is kept for them."""
        if (key := self._kinds[span.chunk.key].get(HIGH)) is None:
            return self.weight(span)
        return self._read(span, key, torch.bfloat16)

    def master(self, span: Span) -> torch.Tensor:
        """Return master weights, flat fp32.

        Raises:
            ValueError: the checkpoint lacks them.
        """
        if self._folder.optimizer == FLASH:
            high = self.high(span)
            if CORRECTION not in self._kinds[span.chunk.key]:
                return high.to(torch.float32)
            key = self._kinds[span.chunk.key][CORRECTION]
            dtype = self._reader.tensors()[key].properties.dtype
            return join_master(high, self._read(span, key, dtype))
        return self._read_fp32(span, self._master)

    def belongs(self, chunk: Chunk, most: int) -> bool:
        """Return whether a chunk's masters are those of its weights.

        Args:
            chunk: with optimizer state.
            most: elements to read at once, a multiple of 32.
        """
        quantized = deviation.were_quantized(self._folder.common)
        same = deviation.is_near if quantized else deviation.belongs
        return all(same(self.master(span), self.weight(span)) for span in chunk.cut(most))

    def moment(self, span: Span, kind: str) -> torch.Tensor:
        """Return a moment, ``"exp_avg"`` or ``"exp_avg_sq"``, flat fp32.

        Raises:
            ValueError: the checkpoint lacks it.
        """
        if self._folder.optimizer != FLASH:
            return self._read_fp32(span, kind)
        key = self._key(span.chunk.key, kind)
        codes = self._read(span, key, self._reader.tensors()[key].properties.dtype)
        return decode_elements(kind, codes, self._element_scales(span, kind), code=self._code)

    def _element_scales(self, span: Span, kind: str) -> torch.Tensor:
        kinds: Mapping[str, str] = self._kinds[span.chunk.key]
        name = SCALE_OF[kind]
        per_element = kinds.get(f"{name}_{PER_ELEMENT}")
        if per_element is not None:
            return self._read(span, per_element, torch.bfloat16)
        scales = torch.empty(span.numel, dtype=torch.bfloat16)
        key = self._key(span.chunk.key, name)
        for whole, local in span.boxes():
            first = whole.offset[-1] // GROUP_SIZE
            last = -(-(whole.offset[-1] + whole.shape[-1]) // GROUP_SIZE)
            groups = Box((*whole.offset[:-1], first), (*whole.shape[:-1], last - first))
            expanded = self._reader.read(key, groups).repeat_interleave(GROUP_SIZE, dim=-1)
            skip = whole.offset[-1] - first * GROUP_SIZE
            span.view(scales, local).copy_(expanded.narrow(-1, skip, whole.shape[-1]))
        return scales

    def _read_fp32(self, span: Span, kind: str) -> torch.Tensor:
        key = self._key(span.chunk.key, kind)
        weight = self._reader.shape(span.chunk.key)
        if not self._older or len(self._reader.shape(key)) == len(weight):
            return self._read(span, key, torch.float32)
        flat = torch.empty(span.numel, dtype=torch.float32)
        for whole, local in span.boxes():
            read_fragments(span.view(flat, local), weight, whole, key, self._reader)
        return flat

    def _read(self, span: Span, key: str, dtype: torch.dtype) -> torch.Tensor:
        flat = torch.empty(span.numel, dtype=dtype)
        for whole, local in span.boxes():
            self._reader.read_into(span.view(flat, local), key, whole.offset)
        return flat

    def _key(self, key: str, kind: str) -> str:
        """Return the key of a kind of state of a model tensor.

        Raises:
            ValueError: there is none.
        """
        found = self._kinds[key].get(kind)
        if found is None:
            raise ValueError(
                f"{self._folder.path} has no {kind} of {key}, but other state of it: "
                "the checkpoint is damaged, or of an optimizer that is not known here"
            )
        return found
