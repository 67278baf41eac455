"""The state in a checkpoint as parts that can be read a range at a time: layers and buckets.

In model space a part is a tensor of the model, or one layer of it where Megatron keeps the layers
of one kind in one tensor, in the first dimension. ``dp_reshardable`` knows buckets only; a part is
then a bucket. Elements are numbered in row-major order, and quantization groups are 32 elements
from the part's first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from megatron_flashoptim.checkpoint.boxes import Box, boxes_of_range
from megatron_flashoptim.checkpoint.conversion import SCALE_OF, decode_elements, decode_moment
from megatron_flashoptim.checkpoint.deviation import were_quantized
from megatron_flashoptim.checkpoint.folder import (
    ADAM,
    FLASH,
    OLDER_MASTER,
    CheckpointFolder,
)
from megatron_flashoptim.checkpoint.folder import MASTER as STOCK_MASTER
from megatron_flashoptim.checkpoint.fragments import read_fragments
from megatron_flashoptim.checkpoint.model_space import PER_ELEMENT
from megatron_flashoptim.checkpoint.reader import CheckpointReader
from megatron_flashoptim.codec import join_master
from megatron_flashoptim.codec.spec import GROUP_SIZE, ExpAvgSqCode
from megatron_flashoptim.optim.shard import CORRECTION, EXP_AVG, EXP_AVG_SQ, GROUP_STATE, HIGH

# Kinds of values a part may have, beside the moments and the correction.
WEIGHT = "weight"
MASTER = "master"
KINDS = (WEIGHT, MASTER, CORRECTION, EXP_AVG, EXP_AVG_SQ)

# Elements read at once, whole groups; the codec's temporary tensors are some 100 bytes each.
AT_ONCE = 1 << 19

# Elements to whose multiples Megatron pads the starts of parameters in a bucket.
_ALIGNMENT = 64

_LAYER = re.compile(r"(?P<before>(?:.*?\.)?layers)\.(?P<number>\d+)\.(?P<after>.*)")
_STACKED = re.compile(r"(?P<before>(?:.*?\.)?layers)\.(?P<after>.*)")
_BUCKET = re.compile(
    r"(?P<before>.*dp_group_idx_\d+\.gbuf_idx_\d+)\.(?:dtype_\(.*\)\.)?"
    r"bucket_idx_(?P<number>\d+)\.(?P<kind>\w+)"
)


@dataclass(frozen=True)
class Part:
    """A layer of a tensor of the model with its state, or a bucket.

    Attributes:
        name: of the tensor with ``*`` for the number of the layer or bucket.
        index: that number, None where there is none.
        spans: ranges of elements that were saved; groups are counted from element 0.
        first: number of the part's element 0 in the saved tensors.
        shape: of the saved tensors, codes and fp32 state alike.
        keys: of the saved tensors by kind (and by the name of a scale).
        reader: of the checkpoint.
        code: of the second moment.
        flash: whether moments are codes, else fp32.
        quantized: whether weights beside fp32 masters may be FP8 values.
    """

    name: str
    index: int | None
    spans: tuple[tuple[int, int], ...]
    first: int
    shape: tuple[int, ...]
    keys: dict[str, str]
    reader: CheckpointReader = field(repr=False)
    code: ExpAvgSqCode = "sqrt"
    flash: bool = False
    quantized: bool = False

    @property
    def elements(self) -> int:
        """Number of elements saved."""
        return sum(end - start for start, end in self.spans)

    @property
    def label(self) -> str:
        """The name with the number put in."""
        return self.name if self.index is None else self.name.replace("*", str(self.index), 1)

    @property
    def high(self) -> str:
        """Key of ``keys`` that flash masters have their high part under, if it is there."""
        return HIGH if HIGH in self.keys else WEIGHT

    def kinds(self) -> list[str]:
        """Return the kinds of values; corrections only without the weights they belong to."""
        found = {kind for kind in KINDS if kind in self.keys}
        if self.flash and self.high in self.keys and len(self.keys) > 1:
            found = (found - {CORRECTION}) | {MASTER}
        return [kind for kind in KINDS if kind in found]

    def dtype(self, kind: str) -> torch.dtype:
        """Return the dtype in which a kind is saved."""
        dtype: torch.dtype = self.reader.tensors()[self.keys[kind]].properties.dtype
        return dtype

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield ranges of at most ``AT_ONCE`` elements that cover the spans, whole groups each."""
        for start, end in self.spans:
            for begin in range(start, end, AT_ONCE):
                yield begin, min(begin + AT_ONCE, end)

    def stored(self, kind: str, start: int, end: int) -> torch.Tensor:
        """Return elements as they are saved: fp32 or bf16 values, or codes.

        Raises:
            ValueError: the checkpoint does not have all of them, or is damaged.
        """
        return _read(self.reader, self.keys[kind], self.shape, self.first + start, self.first + end)

    def encoded(self, moment: str, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes (n) and scales of flash state: bf16, ceil(n / 32) or one per element (n).

        ``start`` is at a whole group. Which of the two it is follows from
        ``scales_per_element``.
        """
        codes = self.stored(moment, start, end)
        key = self.keys[SCALE_OF[moment]]
        first, last = self.first + start, self.first + end
        if self.scales_per_element(moment):
            return codes, _read(self.reader, key, self.shape, first, last)
        *rows, columns = self.shape
        shape = (*rows, -(-columns // GROUP_SIZE))
        return codes, _read(self.reader, key, shape, first // GROUP_SIZE, -(-last // GROUP_SIZE))

    def scales_per_element(self, moment: str) -> bool:
        """Return whether flash state has a scale for each element instead of each group."""
        return f"{SCALE_OF[moment]}_{PER_ELEMENT}" in self.keys[SCALE_OF[moment]]

    def values(self, kind: str, start: int, end: int) -> torch.Tensor:
        """Return elements as fp32, decoded where they are codes; corrections as whole numbers.

        Raises:
            ValueError: the checkpoint does not have all of them, or is damaged.
        """
        if self.flash and kind in SCALE_OF:
            begin = start if self.scales_per_element(kind) else start - start % GROUP_SIZE
            codes, scale = self.encoded(kind, begin, end)
            return decode(kind, codes, scale, code=self.code)[start - begin :]
        if self.flash and kind == MASTER:
            weight = self.stored(self.high, start, end)
            if weight.dtype != torch.bfloat16:
                return weight.to(torch.float32)
            has_correction = CORRECTION in self.keys
            return join_master(
                weight, self.stored(CORRECTION, start, end) if has_correction else None
            )
        return self.stored(kind, start, end).to(torch.float32)


def decode(
    moment: str, codes: torch.Tensor, scale: torch.Tensor, *, code: ExpAvgSqCode
) -> torch.Tensor:
    """Decode flat codes (n) with scales of groups, ceil(n / 32), or of elements (n), to fp32."""
    if scale.numel() == codes.numel() > 1:
        return decode_elements(moment, codes, scale, code=code)
    return decode_moment(moment, codes, scale, code=code)


def parts(folder: CheckpointFolder) -> list[Part]:
    """Return all parts of a checkpoint: tensors of the model by layer, then buckets.

    Raises:
        ValueError: state has another shape than its weight.
    """
    code = cast(ExpAvgSqCode, folder.flash.get("exp_avg_sq_code", "sqrt"))
    common: dict[str, Any] = {
        "reader": folder.reader,
        "code": code,
        "flash": folder.optimizer == FLASH,
        "quantized": were_quantized(folder.common),
    }
    state = folder.state()
    weights = folder.weights()
    found = []
    for key in sorted({*weights, *state}):
        saved = {_kind(kind, folder.optimizer): name for kind, name in state.get(key, {}).items()}
        keys = {kind.removesuffix(f"_{PER_ELEMENT}"): name for kind, name in saved.items()}
        if key in weights:
            keys[WEIGHT] = key
        found += list(_layers(key, keys, common))
    return _in_depth_order(found) + _in_depth_order(list(_buckets(folder, common)))


def families[T](
    found: list[tuple[Part, dict[str, T]]], kind: str
) -> dict[str, list[tuple[Part, T]]]:
    """Return what was found of a kind, by the parts' name and in the order of depth."""
    named: dict[str, list[tuple[Part, T]]] = {}
    for part, by_kind in found:
        if kind in by_kind:
            named.setdefault(part.name, []).append((part, by_kind[kind]))
    return named


def split_name(key: str) -> tuple[str, int | None, bool]:
    """Return a key with ``*`` for its layer, the layer, and whether layers are stacked in it."""
    if match := _LAYER.fullmatch(key):
        return f"{match['before']}.*.{match['after']}", int(match["number"]), False
    if match := _STACKED.fullmatch(key):
        return f"{match['before']}.*.{match['after']}", None, True
    return key, None, False


def _layers(key: str, keys: dict[str, str], common: dict[str, Any]) -> Iterator[Part]:
    reader: CheckpointReader = common["reader"]
    first_key = keys.get(WEIGHT) or keys.get(MASTER) or next(iter(keys.values()))
    shape = reader.shape(first_key)
    for kind in (MASTER, EXP_AVG, EXP_AVG_SQ, CORRECTION):
        if kind in keys and math.prod(reader.shape(keys[kind])) != math.prod(shape):
            raise ValueError(
                f"{keys[kind]} has the shape {reader.shape(keys[kind])} and {first_key} "
                f"{shape}: the checkpoint was put together from different models"
            )
    name, layer, stacked = split_name(key)
    count = shape[0] if stacked and shape else 1
    numel = math.prod(shape) // count if count else 0
    for number in range(count):
        index = number if stacked else layer
        yield Part(name, index, ((0, numel),), number * numel, shape, keys, **common)


def _buckets(folder: CheckpointFolder, common: dict[str, Any]) -> Iterator[Part]:
    keys: dict[tuple[str, int], dict[str, str]] = {}
    for key in folder.reader.tensors():
        if match := _BUCKET.fullmatch(key):
            kind = _kind(match["kind"], folder.optimizer)
            keys.setdefault((match["before"], int(match["number"])), {})[kind] = key
    for (before, number), of_bucket in sorted(keys.items()):
        some = next(key for kind, key in of_bucket.items() if kind not in GROUP_STATE)
        shape = folder.reader.shape(some)
        spans = _merged(folder.reader.chunks(some))
        name = f"{before.partition('distributed.')[2]}.bucket_idx_*"
        yield Part(name, number, spans, 0, shape, of_bucket, **common)


def _kind(name: str, optimizer: str) -> str:
    return MASTER if optimizer == ADAM and name in (STOCK_MASTER, OLDER_MASTER) else name


def _merged(chunks: list[Box]) -> tuple[tuple[int, int], ...]:
    """Return the ranges that flat chunks cover; where they meet, a range goes on.

    Megatron's Adam saves what lies behind a parameter up to the next multiple of 64 as chunks of
    their own, of uninitialized memory. They are left out: parameters begin at such multiples.
    """
    spans: list[tuple[int, int]] = []
    for start, size in sorted((chunk.offset[0], chunk.shape[0]) for chunk in chunks):
        if start % _ALIGNMENT and start // _ALIGNMENT == (start + size - 1) // _ALIGNMENT:
            continue
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], start + size)
        elif size:
            spans.append((start, start + size))
    return tuple(spans)


def _in_depth_order(found: list[Part]) -> list[Part]:
    """Sort parts of one name by their number, names as they come."""
    return sorted(found, key=lambda part: (part.name, -1 if part.index is None else part.index))


def _read(
    reader: CheckpointReader, key: str, shape: tuple[int, ...], start: int, end: int
) -> torch.Tensor:
    """Return elements of a saved tensor, flat, in its own dtype."""
    saved = reader.shape(key)
    read = []
    for box in boxes_of_range(shape, start, end):
        if len(saved) == len(shape) + 1:  # as ``fully_sharded_model_space`` has it
            target = torch.zeros(box.shape, dtype=torch.float32)
            read_fragments(target, shape, box, key, reader)
        else:
            target = reader.read(key, box)
        read.append(target.flatten())
    return torch.cat(read) if len(read) != 1 else read[0]
