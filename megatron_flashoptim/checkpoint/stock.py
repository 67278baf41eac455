"""State of Megatron's own Adam, read from its checkpoint and encoded parameter by parameter.

Stock keeps fp32 masters and moments, as ``optimizer.state.{param,exp_avg,exp_avg_sq}.KEY`` in the
parameters' shapes (``fully_reshardable``), cut and flattened (``fully_sharded_model_space``, of
releases before 0.16) or as flat buckets (``dp_reshardable``). A rank reads its
own range of one tensor, encodes it in place and goes on to the next.

The master wins over the model weight beside it: where 24 bits round up to half a bf16 ulp (2 in
1000 elements), the split's high part is the next bf16 number, and the weight follows it. Keeping
the weight would move the master instead, the one of the two that carries the training.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megatron_flashoptim.checkpoint import deviation
from megatron_flashoptim.checkpoint.boxes import Box, view_of_box
from megatron_flashoptim.checkpoint.bucket_space import BucketSpace
from megatron_flashoptim.checkpoint.conversion import SCALE_OF, decode_moment, encode_moment
from megatron_flashoptim.checkpoint.deviation import AT_ONCE, Report
from megatron_flashoptim.checkpoint.folder import MASTER, OLDER_MASTER, load_common
from megatron_flashoptim.checkpoint.fragments import read_fragments
from megatron_flashoptim.checkpoint.loading import ReadsFolder
from megatron_flashoptim.checkpoint.model_space import PREFIX, ModelSpace, OwnedRange
from megatron_flashoptim.checkpoint.reader import CheckpointReader
from megatron_flashoptim.codec import join_master, split_master
from megatron_flashoptim.codec.spec import GROUP_SIZE
from megatron_flashoptim.optim.shard import BucketShard

# What stock has in the keys of buckets: dtypes of weights and of gradients.
_DTYPE_IN_KEY = re.compile(r"\.dtype_\((torch\.\w+),")


@dataclass(frozen=True)
class StockPart:
    """A box of a saved tensor.

    Attributes:
        key: of the tensor, with ``{kind}`` for the kind of state and perhaps a ``*``.
        shape: the tensor's shape as this run expects it.
        offset: where the box begins in it.
        place: the box's place in the flat tensor of a ``StockRange``.
        allow_shape_mismatch: the tensor may have another size, such as a padded vocabulary.
        hint: what to do where it must not.
        weight: key of the model weight, "" in buckets, whose own keys say its dtype.
    """

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    place: Callable[[torch.Tensor], torch.Tensor]
    allow_shape_mismatch: bool = False
    hint: str = ""
    weight: str = ""


@dataclass(frozen=True)
class StockRange:
    """The elements of one parameter that this rank owns, and where a checkpoint has them.

    Attributes:
        name: of the parameter, for messages.
        shard: the bucket shard they go to.
        start, end: element range in the shard; ``start`` is at a whole group.
        parts: the boxes that make up the range.
        master: the checkpoint's name of the master weight.
    """

    name: str
    shard: BucketShard
    start: int
    end: int
    parts: Sequence[StockPart]
    master: str = MASTER


@dataclass
class StockLoading(ReadsFolder):
    """State to be converted once Megatron has loaded the weights.

    Attributes:
        ranges: what this rank owns.
        folder: the checkpoint's, see ``loading.tell_folder``.
    """

    ranges: Sequence[StockRange]
    folder: str | None = None

    def saved_args(self) -> object:
        """Return the arguments in the checkpoint, None where it has none; on rank 0, which logs."""
        if self.folder is None or torch.distributed.get_rank() != 0:
            return None
        try:
            return load_common(Path(self.folder)).get("args")
        except ValueError:
            return None  # Megatron has read what is needed; this is for a line in the log

    def convert(self) -> Report:
        """Read and encode everything; touches no parameter whose master is not its weight's.

        Returns:
            What was found; reading errors too, so that all ranks can be told.
        """
        report = Report()
        if self.folder is None:
            report.problem = (
                "Megatron's Adam state is read from the checkpoint's folder, which is known only "
                "after megatron_flashoptim.install(); call it before dist_checkpointing.load"
            )
            return report
        try:
            reader = CheckpointReader(self.folder)
            deviation.check_dtypes(_dtypes_of_weights(self.ranges, reader), self.folder)
            rounded = [_convert_range(owned, reader, report) for owned in self.ranges]
            quantizes = any(owned.shard.owns_param for owned in self.ranges)
            if report.damaged and (not quantizes or sum(rounded) == len(report.damaged)):
                deviation.check_not_quantized(load_common(Path(self.folder)), self.folder)
        except (ValueError, OSError) as problem:
            report.problem = str(problem)
        return report


def ranges_of_model(space: ModelSpace, *, older: bool = False) -> list[StockRange]:
    """Return where ``fully_reshardable`` has this rank's state.

    Args:
        space: what this rank owns.
        older: for ``fully_sharded_model_space``, see ``_read_fragments``.
    """
    master = OLDER_MASTER if older else MASTER
    return [
        StockRange(
            _name(owned), owned.shard, owned.start, owned.end, list(_model_parts(owned)), master
        )
        for owned in space.ranges
    ]


def _name(owned: OwnedRange) -> str:
    piece = owned.pieces[0]
    in_front = piece.global_offset[: piece.prepended]
    return piece.key + (f"[{', '.join(map(str, in_front))}]" if in_front else "")


def _model_parts(owned: OwnedRange) -> Iterator[StockPart]:
    for piece in owned.pieces:
        for box in owned.boxes(piece):
            relative = box.relative_to(piece.box.offset)
            in_piece = (*(0,) * piece.prepended, *relative.offset)
            yield StockPart(
                key=f"{PREFIX}.{{kind}}.{piece.key}",
                shape=piece.global_shape,
                offset=tuple(a + b for a, b in zip(piece.global_offset, in_piece, strict=True)),
                place=partial(
                    view_of_box,
                    shape=owned.shape,
                    first=owned.param_start,
                    box=box,
                    leading=piece.prepended,
                ),
                allow_shape_mismatch=piece.allow_shape_mismatch,
                weight=piece.key,
            )


def ranges_of_buckets(
    space: BucketSpace, owned: Iterable[tuple[str, int, int, int]], prefix: str
) -> list[StockRange]:
    """Return where ``dp_reshardable`` has this rank's state.

    Args:
        space: the buckets of this run.
        owned: name, shard number, start and end in the shard of each owned parameter.
        prefix: what Megatron's chain puts in front of the optimizer's keys.
    """
    buckets = list(space.named_buckets())
    ranges = []
    for name, number, start, end in owned:
        bucket_name, bucket, shard = buckets[number]
        buffer_name, last = bucket_name.split(".")
        # Between them stock has the dtypes of weights and gradients, which may be others here.
        begin = f"{prefix}optimizer.distributed.dp_group_idx_{space.dp_group_index}.{buffer_name}"
        part = StockPart(
            key=f"{begin}.dtype_*.{last}.{{kind}}",
            shape=(bucket.numel_unpadded,),
            offset=(space.dp_rank * shard.param.numel() + start,),
            place=_whole,
            hint="dp_reshardable needs the tensor, pipeline and expert parallel sizes, "
            "--overlap-grad-reduce, --ddp-bucket-size and --fp8-param-gather of the run that saved "
            "it",
        )
        ranges.append(StockRange(name, shard, start, end, [part]))
    return ranges


def _whole(flat: torch.Tensor) -> torch.Tensor:
    return flat


def _dtypes_of_weights(ranges: Iterable[StockRange], reader: CheckpointReader) -> Iterator[str]:
    """Yield the dtype that each range's weights have in the checkpoint."""
    tensors = reader.tensors()
    for owned in ranges:
        for part in owned.parts:
            if part.weight in tensors:
                yield str(tensors[part.weight].properties.dtype)
            elif not part.weight:
                key = reader.find(part.key.replace("{kind}", owned.master))
                named = _DTYPE_IN_KEY.search(key)
                if named and named[1] != str(torch.uint8):  # of quantized weights
                    yield named[1]


@torch.no_grad()
def _convert_range(owned: StockRange, reader: CheckpointReader, report: Report) -> bool:
    """Read and encode masters and moments of one parameter, one after the other.

    Returns:
        Whether it was not: the bf16 weights are not the masters', but may be them in FP8.
    """
    elements = slice(owned.start, owned.end)
    weight = owned.shard.param[elements]
    master = _read(owned, reader, MASTER)
    same = deviation.is_near if owned.shard.owns_param else deviation.belongs
    if not same(master, weight):
        report.damaged.append(owned.name)
        return not owned.shard.owns_param and deviation.is_near(master, weight)
    for start in range(0, master.numel(), AT_ONCE):
        part = slice(owned.start + start, min(owned.start + start + AT_ONCE, owned.end))
        report.deviations[MASTER].add(_store_master(owned.shard, part, master[start:]))
    del master
    for moment in SCALE_OF:
        values = _read(owned, reader, moment)
        for start in range(0, values.numel(), AT_ONCE):
            part = slice(owned.start + start, min(owned.start + start + AT_ONCE, owned.end))
            report.deviations[moment].add(_store_moment(owned.shard, moment, part, values[start:]))
    report.parameters += 1
    report.elements += owned.end - owned.start
    return False


def _read(owned: StockRange, reader: CheckpointReader, kind: str) -> torch.Tensor:
    """Return one kind of state of a range, flat fp32 in host memory."""
    flat = torch.zeros(owned.end - owned.start, dtype=torch.float32)
    for part in owned.parts:
        name = owned.master if kind == MASTER else kind
        key = reader.find(part.key.replace("{kind}", name))
        saved = reader.shape(key)
        if owned.master == OLDER_MASTER and len(saved) == len(part.shape) + 1:
            target = part.place(flat)
            read_fragments(target, part.shape, Box(part.offset, tuple(target.shape)), key, reader)
            continue
        if saved != part.shape and not part.allow_shape_mismatch:
            raise ValueError(
                f"{key} has the shape {saved} in the checkpoint and {part.shape} in this run"
                + (f": {part.hint}" if part.hint else "")
            )
        partly = part.allow_shape_mismatch
        reader.read_into(part.place(flat), key, part.offset, partly=partly)
    return flat


def _store_master(shard: BucketShard, part: slice, values: torch.Tensor) -> deviation.Deviation:
    """Split masters into weight and correction; ``values`` may go on beyond the part."""
    master = values[: part.stop - part.start].to(shard.param.device)
    if shard.correction is None:
        shard.param[part].copy_(master)
        stored = shard.param[part].to(torch.float32)
    else:
        high, correction = split_master(master, bits=shard.master_bits)
        assert correction is not None
        shard.param[part].copy_(high)
        shard.correction[part].copy_(correction)
        stored = join_master(high, correction)
    return deviation.of_master(stored, master)


def _store_moment(
    shard: BucketShard, moment: str, part: slice, values: torch.Tensor
) -> deviation.Deviation:
    """Encode a moment; ``values`` may go on beyond the part."""
    state = dict(shard.state())
    exact = values[: part.stop - part.start].to(shard.param.device)
    codes, scale = encode_moment(moment, exact, code=shard.exp_avg_sq_code)
    state[moment][part].copy_(codes)
    groups = slice(part.start // GROUP_SIZE, -(-part.stop // GROUP_SIZE))
    state[SCALE_OF[moment]][groups].copy_(scale)
    stored = decode_moment(moment, codes, scale, code=shard.exp_avg_sq_code)
    return deviation.of_moment(stored, exact)
