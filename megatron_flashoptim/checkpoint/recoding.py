"""What tensors of the other optimizer become of part of a checkpoint: shapes, and contents."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator
from functools import cached_property
from typing import Any

import torch

from megatron_flashoptim.checkpoint import deviation, metadata
from megatron_flashoptim.checkpoint.conversion import (
    SCALE_OF,
    can_convert_correction,
    decode_moment,
    encode_moment,
)
from megatron_flashoptim.checkpoint.deviation import AT_ONCE, Report
from megatron_flashoptim.checkpoint.folder import (
    ADAM,
    FLASH,
    MASTER,
    OLDER_MASTER,
    WEIGHTS,
    CheckpointFolder,
)
from megatron_flashoptim.checkpoint.model_space import PER_ELEMENT, PREFIX, in_groups
from megatron_flashoptim.checkpoint.model_state import Chunk, ModelState, Span
from megatron_flashoptim.checkpoint.writer import NewBox
from megatron_flashoptim.codec import join_master, split_master
from megatron_flashoptim.codec.master import correction_dtype
from megatron_flashoptim.codec.spec import GROUP_SIZE
from megatron_flashoptim.optim.config import FlashOptimConfig
from megatron_flashoptim.optim.shard import CORRECTION, EXP_AVG, EXP_AVG_SQ, HIGH, MOMENTS

# Elements of a span: one box of each new tensor, in memory at once. Models of more than so many
# elements have longer spans: what describes each box, about 1 kB, is in memory too.
SPAN = 1 << 22
_MANY = 1 << 38
_ADAM_KINDS = {MASTER, OLDER_MASTER, EXP_AVG, EXP_AVG_SQ}


class Recoding:
    """How the tensors of one checkpoint are recoded.

    Args:
        folder: the checkpoint.
        target: ``"flash"`` or ``"adam"``.
        flash: update rule and format of new flash state.
    """

    def __init__(self, folder: CheckpointFolder, target: str, flash: FlashOptimConfig) -> None:
        self.target = target
        self.state = ModelState(folder)
        self._folder = folder
        seed = folder.flash.get("seed", getattr(folder.common.get("args"), "seed", flash.seed))
        self.flash = dataclasses.replace(flash, seed=seed)

    @cached_property
    def keeps_moments(self) -> bool:
        """Whether the moments are those of the new optimizer too; else they start at zero."""
        saved = metadata.optimizer_of(self._folder.flash)
        if self.target == ADAM:
            return self._folder.optimizer == ADAM or metadata.holds_adam_state(saved)
        if self._folder.optimizer == ADAM:
            return metadata.holds_adam_state(self.flash.optimizer)
        return metadata.hold_same_state(saved, self.flash.optimizer)

    @cached_property
    def keeps_masters(self) -> bool:
        """Whether every master is kept to the last bit; else they are rounded to the new bits."""
        if self.target == ADAM or self.weights_dtype != metadata.BFLOAT16:
            return True
        adams = self._folder.optimizer == ADAM
        saved = 32 if adams else metadata.format_of(self._folder.flash)["master_bits"]
        return bool(self.flash.master_bits >= saved)

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of the moments of the new state."""
        return tuple(SCALE_OF) if self.target == ADAM else self.flash.rule.moments

    def check(self, *, repair: bool) -> None:
        """Refuse sources of which nothing would be converted, or not all.

        Raises:
            ValueError: says why, and what to do.
        """
        folder = self._folder
        if folder.optimizer == WEIGHTS:
            raise ValueError(
                f"{folder.path} has weights and no optimizer state: there is nothing to convert, "
                "and any run loads it as it is"
            )
        if folder.sharding_type not in (
            metadata.FULLY_RESHARDABLE,
            metadata.FULLY_SHARDED_MODEL_SPACE,
        ):
            raise ValueError(
                f"{folder.path} has optimizer state of the sharding type {folder.sharding_type!r}, "
                "which is not converted. Save it with --dist-ckpt-optim-fully-reshardable"
            )
        tensors = folder.reader.tensors()
        having_state = folder.state().keys() & tensors.keys()
        deviation.check_dtypes(
            (str(tensors[key].properties.dtype) for key in having_state), folder.path
        )
        if folder.optimizer == FLASH:
            self.check_flash(repair=repair)
            self._check_kinds()
            return
        kinds = {kind for kinds in folder.state().values() for kind in kinds}
        unknown = sorted(kinds - _ADAM_KINDS)
        if unknown:
            raise ValueError(
                f"{folder.path} has the optimizer state {', '.join(unknown)}, which is not of "
                "Megatron's Adam: it cannot be converted"
            )
        deviation.check_not_quantized(folder.common, folder.path)
        if self.target == ADAM and not repair:
            self._check_kinds()  # another of Megatron's optimizers keeps some of it
            raise ValueError(
                f"{folder.path} is a checkpoint of Megatron's Adam already; with --repair, --to "
                "adam mends masters that are not those of the weights"
            )
        without = sorted(set(folder.state()) - set(folder.weights()))
        if without:
            raise ValueError(
                f"{folder.path} has optimizer state but no weight of {without[0]}: it is damaged"
            )
        self._check_kinds()

    def _check_kinds(self) -> None:
        """Refuse state that lacks something, which reading would find after hours."""
        self.state.check_kinds(self.moments if self.keeps_moments else ())

    def check_flash(self, *, repair: bool) -> None:
        """Refuse flash state that cannot be what is asked for, or is it already.

        Raises:
            ValueError: says why, and what to do.
        """
        described = self._folder.flash
        if repair:
            raise ValueError(
                "--repair mends checkpoints of Megatron's Adam; in "
                f"{self._folder.path}, of flash, the weights are the masters' high parts"
            )
        if self.target == ADAM and not self.keeps_moments:
            raise ValueError(
                f"{self._folder.path} is of {metadata.optimizer_of(described)}, whose moments are "
                "not Adam's. --to weights takes the masters alone; --to flash --optimizer "
                "flash_adamw keeps them and starts Adam's moments at zero, and --to adam takes that"
            )
        saved = metadata.format_of(described)["master_bits"]
        if self.target == FLASH and not can_convert_correction(saved, self.flash.master_bits):
            raise ValueError(
                f"--master-bits {self.flash.master_bits} would drop the corrections of the "
                f"{saved}-bit masters in {self._folder.path}; give 24 or 32, or take the weights "
                "alone with --to weights --dtype bf16"
            )
        bits = self.flash.master_bits if self.target == FLASH else saved
        readable = dataclasses.replace(self.flash, master_bits=bits, master_rounding="stochastic")
        weights = described.get("weights", metadata.BFLOAT16)
        new = metadata.describe(readable, weights)
        # Update rule and code can be changed here, which a run cannot while it loads.
        free: dict[str, Any] = {
            name: new[name] for name in ("optimizer", "exp_avg_sq_code") if name in new
        }
        metadata.check({**described, **free}, readable, weights)
        if self.target == FLASH and metadata.format_of(new) == metadata.format_of(described):
            code = f" and the code {new['exp_avg_sq_code']}" if "exp_avg_sq_code" in new else ""
            raise ValueError(
                f"{self._folder.path} is a checkpoint of {new['optimizer']} with "
                f"{new['master_bits']}-bit masters{code} already; give another --optimizer, "
                "--master-bits or --exp-avg-sq-code"
            )

    @cached_property
    def weights_dtype(self) -> str:
        """dtype of the weights that have optimizer state, as the metadata names it."""
        tensors = self._folder.reader.tensors()
        dtypes = {tensors[key].properties.dtype for key in self._folder.state()}
        return metadata.BFLOAT16 if torch.bfloat16 in dtypes else metadata.FLOAT32

    @cached_property
    def per_element(self) -> set[str]:
        """Model keys whose scales are saved per element, because groups run over ends of rows."""
        return {
            key
            for key in self._folder.state()
            if not all(chunk.has_whole_groups() for chunk in self.state.chunks(key))
        }

    def described(self) -> dict[str, Any]:
        """Return the description of the new flash state."""
        described = metadata.describe(self.flash, self.weights_dtype)
        return described | metadata.describe_groups(
            self.per_element, self._fp32_in_bf16(), self._quantized
        )

    @cached_property
    def _quantized(self) -> frozenset[str]:
        """Model keys whose masters have high parts beside the weights."""
        return frozenset(self._folder.flash.get(metadata.QUANTIZED_WEIGHTS, ()))

    def _fp32_in_bf16(self) -> list[str]:
        """Return the model keys with fp32 weights in a bf16 model."""
        if self.weights_dtype != metadata.BFLOAT16:
            return []
        tensors = self._folder.reader.tensors()
        return [k for k in self._folder.state() if tensors[k].properties.dtype == torch.float32]

    def spans(self) -> Iterator[Span]:
        """Yield all weights, cut into spans."""
        chunks = [
            chunk for key in sorted(self._folder.weights()) for chunk in self.state.chunks(key)
        ]
        numel = sum(chunk.box.numel() for chunk in chunks)
        for chunk in chunks:
            yield from chunk.cut(SPAN if numel < _MANY else 2 * SPAN)

    def chunks_to_check(self) -> list[Chunk]:
        """Return what has masters that may not be those of the weights."""
        if self._folder.optimizer == FLASH:
            return []
        return [chunk for key in sorted(self._folder.state()) for chunk in self.state.chunks(key)]

    def belongs(self, chunk: Chunk) -> bool:
        """Return whether a chunk's masters are those of its weights."""
        return self.state.belongs(chunk, SPAN)

    def boxes(self, span: Span) -> list[NewBox]:
        """Return the boxes that a span becomes, in the order of ``produce``."""
        key = span.chunk.key
        found = self._folder.reader.tensors()[key]
        shape = tuple(found.size)
        outputs = [(key, found.properties.dtype, False)]
        if self.state.has_state(key):
            outputs += self._outputs(key, found.properties.dtype)
        return [
            NewBox(name, dtype, in_groups(shape) if divided else shape, box)
            for name, dtype, divided in outputs
            for box, _ in span.boxes(divided_by_groups=divided)
        ]

    def _outputs(self, key: str, weight: torch.dtype) -> Iterator[tuple[str, torch.dtype, bool]]:
        """Yield key, dtype and whether it is divided by 32 of each new tensor of state."""
        if self.target == ADAM:
            for kind in (MASTER, *self.moments):
                yield f"{PREFIX}.{kind}.{key}", torch.float32, False
            return
        correction = correction_dtype(self.flash.master_bits)
        if key in self._quantized:
            yield f"{PREFIX}.{HIGH}.{key}", torch.bfloat16, False
        if weight == torch.bfloat16 and correction is not None:
            yield f"{PREFIX}.{CORRECTION}.{key}", correction, False
        for kind in self.moments:
            yield f"{PREFIX}.{kind}.{key}", MOMENTS[kind][0], False
            name = SCALE_OF[kind]
            if key in self.per_element:
                yield f"{PREFIX}.{name}_{PER_ELEMENT}.{key}", torch.bfloat16, False
            else:
                yield f"{PREFIX}.{name}.{key}", torch.bfloat16, True

    def produce(
        self, span: Span, damaged: Container[Chunk], report: Report
    ) -> dict[tuple[str, tuple[int, ...]], torch.Tensor]:
        """Return the contents of a span's boxes, by key and offset.

        Args:
            span: what to recode.
            damaged: chunks whose masters are to be made of the weights, and moments to be zero.
            report: takes the errors in.
        """
        key = span.chunk.key
        weight = self.state.weight(span)
        if not self.state.has_state(key):
            return self._in_boxes(span, {(key, False): weight})
        mends = span.chunk in damaged
        master = weight.to(torch.float32) if mends else self.state.master(span)
        flat: dict[tuple[str, bool], torch.Tensor] = {}
        if self.target == ADAM:
            flat[key, False] = weight
            flat[f"{PREFIX}.{MASTER}.{key}", False] = master
        else:
            flat.update(self._split(key, weight, master, report))
        from_zero = mends or not self.keeps_moments
        for kind in self.moments:
            values = torch.zeros(span.numel) if from_zero else self.state.moment(span, kind)
            if self.target == ADAM:
                flat[f"{PREFIX}.{kind}.{key}", False] = values
            else:
                flat.update(self._encode(key, kind, values, report))
        report.parameters += span.start == 0
        report.elements += span.numel
        return self._in_boxes(span, flat)

    def _split(
        self, key: str, weight: torch.Tensor, master: torch.Tensor, report: Report
    ) -> dict[tuple[str, bool], torch.Tensor]:
        if weight.dtype != torch.bfloat16:
            return {(key, False): master.to(weight.dtype)}
        dtype = correction_dtype(self.flash.master_bits)
        high = torch.empty_like(weight)
        correction = None if dtype is None else torch.empty(weight.shape, dtype=dtype)
        for part in _slices(weight.numel()):
            high[part], split = split_master(master[part], bits=self.flash.master_bits)
            if correction is not None and split is not None:
                correction[part] = split
            stored = join_master(high[part], split)
            report.deviations[MASTER].add(deviation.of_master(stored, master[part]))
        found = {(key, False): high}
        if key in self._quantized:
            found = {(key, False): weight, (f"{PREFIX}.{HIGH}.{key}", False): high}
        if correction is not None:
            found[f"{PREFIX}.{CORRECTION}.{key}", False] = correction
        return found

    def _encode(
        self, key: str, kind: str, values: torch.Tensor, report: Report
    ) -> dict[tuple[str, bool], torch.Tensor]:
        code = self.flash.exp_avg_sq_code
        codes = torch.empty(values.shape, dtype=MOMENTS[kind][0])
        scale = torch.empty(-(-values.numel() // GROUP_SIZE), dtype=torch.bfloat16)
        for part in _slices(values.numel()):
            groups = slice(part.start // GROUP_SIZE, -(-part.stop // GROUP_SIZE))
            codes[part], scale[groups] = encode_moment(kind, values[part], code=code)
            stored = decode_moment(kind, codes[part], scale[groups], code=code)
            report.deviations[kind].add(deviation.of_moment(stored, values[part]))
        found = {(f"{PREFIX}.{kind}.{key}", False): codes}
        name = f"{PREFIX}.{SCALE_OF[kind]}"
        if key in self.per_element:
            expanded = scale.repeat_interleave(GROUP_SIZE)[: values.numel()]
            found[f"{name}_{PER_ELEMENT}.{key}", False] = expanded
        else:
            found[f"{name}.{key}", True] = scale
        return found

    def _in_boxes(
        self, span: Span, flat: dict[tuple[str, bool], torch.Tensor]
    ) -> dict[tuple[str, tuple[int, ...]], torch.Tensor]:
        return {
            (name, whole.offset): span.view(tensor, local, divided_by_groups=divided).contiguous()
            for (name, divided), tensor in flat.items()
            for whole, local in span.boxes(divided_by_groups=divided)
        }


def _slices(numel: int) -> Iterator[slice]:
    for start in range(0, numel, AT_ONCE):
        yield slice(start, min(start + AT_ONCE, numel))
