"""``megatron-flashoptim memory``: bytes per rank of weights, gradients and optimizer state."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_flashoptim.cli.argument_files import expand
from megatron_flashoptim.cli.command import Command, UsageError
from megatron_flashoptim.codec.spec import MASTER_BITS
from megatron_flashoptim.optim.config import FlashOptimConfig
from megatron_flashoptim.optim.footprint import OPTIMIZERS, TABLE_BYTES, flash_state_bytes
from megatron_flashoptim.optim.rules import RULES, Rule, rule_of

if TYPE_CHECKING:
    from megatron_flashoptim.megatron.memory.planner import RunSize, StageSize

GIB = 2**30
_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Variant:
    """One optimizer.

    Attributes:
        name: what it is.
        flash: whether buffers and shards are laid out as ours.
        state: bytes per owned element.
        grad_copy: bytes per owned element of an fp32 copy of bf16 gradients.
        checkpoint: bytes per parameter on disk, weights included; None where it is not known.
        needs_sharing: whether there is none without ``--use-distributed-optimizer``.
    """

    name: str
    flash: bool
    state: float
    grad_copy: float = 0.0
    checkpoint: float | None = None
    needs_sharing: bool = True


@dataclass(frozen=True)
class RankBytes:
    """Bytes on a rank.

    Attributes:
        weights, gradients: of the buffers.
        state: of the optimizer, shared by the data-parallel ranks, as the next is.
        grad_copy: fp32 copy of bf16 gradients.
    """

    weights: float
    gradients: float
    state: float
    grad_copy: float

    @property
    def all(self) -> float:
        """Sum of all."""
        return self.weights + self.gradients + self.state + self.grad_copy


def flash_optimizers(only: str | None = None) -> list[tuple[str, Rule]]:
    """Return names and rule of the flash optimizers, those that keep the same moments together.

    Args:
        only: name of the one to return.
    """
    found: dict[tuple[str, ...], list[str]] = {}
    for name in RULES if only is None else (only,):
        found.setdefault(rule_of(name).moments, []).append(name)
    return [(", ".join(names), rule_of(names[0])) for names in found.values()]


def variants(weight_bytes: int, grad_bytes: int, optimizer: str | None = None) -> list[Variant]:
    """Return the optimizers side by side.

    Beside a bf16 gradient Megatron's Adam has a main gradient: an fp32 copy made in the step and
    held until the next iteration begins (``_copy_model_grads_to_main_grads``). The precision-aware
    optimizer of Transformer Engine has none, and keeps an int16 remainder of the master. An fp8
    moment takes 2 bytes: on GPUs before Blackwell, Transformer Engine (2.20) keeps its transpose.

    Args:
        weight_bytes, grad_bytes: per element; fp32 weights are the masters.
        optimizer: name of a flash optimizer, by default all of them.
    """
    if weight_bytes == 4:
        rows = [Variant("adam (fp32 moments)", False, 8.0, needs_sharing=False)]
    else:
        copy = 4.0 if grad_bytes == 2 else 0.0
        name = "adam (fp32 master and moments)"
        rows = [Variant(name, False, 12.0, copy, 14.0, needs_sharing=False)]
        for dtype, moments in (("fp32", 8.0), ("bf16", 4.0), ("fp8", 4.0)):
            rows.append(Variant(f"precision-aware, {dtype} moments", False, 2 + moments))
    for names, rule in flash_optimizers(optimizer):
        for bits in sorted(MASTER_BITS, reverse=True) if weight_bytes == 2 else (32,):
            name = f"{names}, {bits}-bit masters" if weight_bytes == 2 else names
            state = flash_state_bytes(rule, bits, weight_bytes)
            rows.append(Variant(name, True, state, checkpoint=weight_bytes + state))
    return rows


def _table(rows: Sequence[tuple[Variant, RankBytes, str]], more: str, notes: Sequence[str]) -> str:
    """Return a line for each optimizer, and notes on what is not self-evident.

    Args:
        rows: optimizers, their bytes and the text of further columns.
        more: heading of these.
        notes: on what only the caller knows.
    """
    width = max(32, *(len(variant.name) for variant, _, _ in rows))
    heads = ("weights", "grads", "state", "fp32 grads")
    columns = " ".join(f"{head:>16}" for head in heads)
    lines = [f"{'bytes on the rank':{width}} {columns} {'GiB in all':>11}{more}"]
    for variant, size, text in rows:
        parts = (size.weights, size.gradients, size.state, size.grad_copy)
        columns = " ".join(f"{part:16,.0f}" for part in parts)
        lines.append(f"{variant.name:{width}} {columns} {size.all / GIB:11.3f}{text}")
    lines.append("")
    if any(size.grad_copy for _, size, _ in rows):
        lines.append(
            "fp32 grads: Megatron's copy of the bf16 gradients whose state the rank has, made in "
            "the step and held until the next iteration"
        )
    if any("fp8" in variant.name for variant, _, _ in rows):
        lines.append(
            "fp8 moments take what bf16 ones do: before Blackwell, Transformer Engine 2.20 keeps "
            "a transpose of each"
        )
    return "\n".join([*lines, *notes])


def render(
    parameters: float, data_parallel_size: int, grad_bytes: int, optimizer: str | None = None
) -> str:
    """Return the table for a number of parameters per model-parallel rank, bf16 weights."""
    rows = []
    for variant in variants(2, grad_bytes, optimizer):
        owned = parameters / data_parallel_size
        sizes = (owned * variant.state, owned * variant.grad_copy)
        size = RankBytes(parameters * 2, parameters * grad_bytes, *sizes)
        saved = variant.checkpoint
        checkpoint = "-" if saved is None else f"{parameters * saved / GIB:.3f}"
        rows.append((variant, size, f" {size.all / parameters:11.3f} {checkpoint:>14}"))
    title = (
        f"{parameters:,.0f} parameters per model-parallel rank, data-parallel size "
        f"{data_parallel_size}, 16-bit weights, {8 * grad_bytes}-bit gradients"
    )
    heads = f" {'bytes/param':>11} {'checkpoint GiB':>14}"
    note = (
        "checkpoint: of all data-parallel ranks together; the precision-aware optimizer's was not "
        "measured"
    )
    return f"{title}\n\n" + _table(rows, heads, [note])


def rank_bytes(size: RunSize, stage: StageSize, variant: Variant) -> RankBytes:
    """Return bytes on the first rank of a pipeline stage."""
    if not size.distributed and not variant.needs_sharing:
        owned = float(stage.parameters)
        sizes = (size.weight_bytes, size.grad_bytes, variant.state, variant.grad_copy)
        return RankBytes(*(owned * each for each in sizes))
    buffer = stage.flash_buffer if variant.flash else stage.stock_buffer
    owned = stage.flash_shard if variant.flash else stage.owned
    gradients = buffer
    if variant.flash and size.release_slots:  # at most: slots that only small buckets use are small
        gradients = min(buffer, size.release_slots * stage.flash_bucket)
    state = variant.state + (TABLE_BYTES if variant.flash else 0.0)
    return RankBytes(
        float(buffer * size.weight_bytes),
        float(gradients * size.grad_bytes),
        owned * state,
        owned * variant.grad_copy,
    )


def _largest(size: RunSize, variant: Variant) -> StageSize:
    """Return the stage that an optimizer takes most bytes on; that is not always the one with most
    parameters, as those of experts are shared by fewer ranks."""
    return max(size.stages, key=lambda stage: rank_bytes(size, stage, variant).all)


def render_run(size: RunSize) -> str:
    """Return the table for Megatron's arguments, of the stage that takes most bytes."""
    shown = variants(size.weight_bytes, size.grad_bytes, size.optimizer)
    bits = f"{FlashOptimConfig().master_bits}-bit"
    stage = _largest(size, next((each for each in shown if bits in each.name), shown[-1]))
    title = (
        f"{stage.parameters:,} parameters on a rank of pipeline stage {stage.stage} of "
        f"{len(size.stages)}, data-parallel size {size.data_parallel_size}, "
        f"{8 * size.weight_bytes}-bit weights, {8 * size.grad_bytes}-bit gradients"
    )
    rows, notes = [], []
    elsewhere: dict[int, list[str]] = {}
    for variant in shown:
        found = rank_bytes(size, stage, variant)
        largest = _largest(size, variant)
        if rank_bytes(size, largest, variant).all > found.all:
            elsewhere.setdefault(largest.stage, []).append(variant.name)
            found = rank_bytes(size, largest, variant)
        rows.append((variant, found, ""))
    for number, names in elsewhere.items():
        notes.append(f"on a rank of stage {number}, where it takes more: {'; '.join(names)}")
    if not size.distributed:
        notes.append(
            "adam: all state on each rank, as the arguments are without "
            "--use-distributed-optimizer; the others need it, and share theirs"
        )
    if stage.flash_buffer > stage.stock_buffer:
        notes.append(
            f"{size.optimizer}: buffers are padded by {stage.flash_buffer - stage.stock_buffer:,} "
            "elements more than Adam's, so that each rank's part is whole groups of 32"
        )
    if size.release_slots:
        notes.append(
            f"{size.optimizer}: grads are at most this, the pool of {size.release_slots} buckets "
            "if all were as large as the largest; Adam's are not released"
        )
    if size.activations:
        notes.append(
            f"activations come on top: {size.activations / GIB:.3f} GiB on a rank of the first "
            "stage by Megatron's formula, which knows no recomputation; not measured"
        )
    return f"{title}\n\n" + _table(rows, "", notes)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--parameters",
        type=_positive(_number),
        help="parameters of one model-parallel rank, such as 8B, 124M or 8e9",
    )
    parser.add_argument(
        "--data-parallel-size",
        type=_positive(int),
        help="with --parameters: ranks that share the state (default: 1)",
    )
    parser.add_argument(
        "--grad-dtype",
        choices=("fp32", "bf16"),
        help="with --parameters: dtype of the gradient buffer (default: fp32, as Megatron's)",
    )
    parser.add_argument(
        "--optimizer",
        metavar="NAME",
        help=f"{', '.join(OPTIMIZERS)}; adam, which every table has, is shown beside flash_adamw "
        "(default: with --parameters all of them, else that of the arguments or the checkpoint)",
    )
    parser.add_argument(
        "--gpus",
        type=_positive(int),
        help="number of GPUs, with Megatron's arguments; with --checkpoint as many as saved it "
        "if not given",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="checkpoint (torch_dist or torch, of Adam or flash) to take the arguments from; "
        "arguments given beside it stand instead of its own",
    )


def _run(options: argparse.Namespace) -> None:
    if options.optimizer not in (None, *OPTIMIZERS):
        raise UsageError(f"--optimizer {options.optimizer} is none of {', '.join(OPTIMIZERS)}")
    if options.parameters is None:
        for flag, value, instead in (
            ("--data-parallel-size", options.data_parallel_size, "--gpus sets it"),
            ("--grad-dtype", options.grad_dtype, "Megatron's is --grad-reduce-in-bf16"),
        ):
            if value is not None:
                raise UsageError(f"{flag} {value} belongs to --parameters; {instead}")
        print(render_run(_planned(options)))
        return
    for given, is_given in (
        ("--gpus", options.gpus is not None),
        ("--checkpoint", options.checkpoint is not None),
        *((argument, True) for argument in options.more[:1]),
    ):
        if is_given:
            raise UsageError(f"{given} cannot be used with --parameters; give one of the two")
    grad_bytes = 2 if options.grad_dtype == "bf16" else 4
    ranks = options.data_parallel_size or 1
    flash = FlashOptimConfig().optimizer if options.optimizer == "adam" else options.optimizer
    print(render(options.parameters, ranks, grad_bytes, flash))


def _planned(options: argparse.Namespace) -> RunSize:
    if options.checkpoint is None and (options.gpus is None or not options.more):
        unknown = f"; {options.more[0]} is none of this command's own" if options.more else ""
        raise UsageError(
            f"give --parameters, --checkpoint, or --gpus and Megatron's arguments{unknown}"
        )
    try:
        arguments = expand(options.more)
    except ValueError as problem:
        raise UsageError(str(problem)) from problem
    from megatron_flashoptim.megatron.memory import planner
    from megatron_flashoptim.megatron.memory.planned_args import ArgumentsError

    if options.optimizer is not None:  # Megatron's own flag
        arguments += ["--optimizer", options.optimizer]
    try:
        if options.checkpoint is not None:
            return planner.plan_checkpoint(options.checkpoint, arguments, options.gpus)
        return planner.plan(arguments, options.gpus)
    except ArgumentsError as problem:
        raise UsageError(str(problem)) from problem


def _number(text: str) -> float:
    """Return a number of parameters as people write it: 8e9, 8B, 1.3b, 124M."""
    last = text[-1:].upper()
    return float(text[:-1]) * _UNITS[last] if last in _UNITS else float(text)


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError as problem:
            example = "64" if kind is int else "8e9, 8B or 124M"
            raise argparse.ArgumentTypeError(f"{text}: not a number such as {example}") from problem
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"must be positive, got {text}")
        return value

    return parse


COMMAND = Command(
    name="memory",
    summary="bytes per rank of weights, gradients and optimizer state",
    description="Compare Adam, the precision-aware optimizer and flash optimizers.\n"
    "Give a number of parameters, the arguments of a GPT's pretrain_gpt.py,\n"
    "or a checkpoint of a GPT.\n\n"
    "weights, grads  Megatron's buffers, padding included; Megatron's estimate of\n"
    "                activations is a line below, with Megatron's arguments\n"
    "state           what the optimizer keeps, shared by the data-parallel ranks\n"
    "fp32 grads      with bf16 gradients, Megatron's Adam copies those whose state a rank\n"
    "                has to fp32 in the step and holds the copy until the next iteration:\n"
    "                4 bytes per parameter beside the 16 of weight, gradient and state",
    examples=(
        "memory --parameters 8B --data-parallel-size 16",
        "memory --parameters 8B --optimizer flash_lion",
        "memory --gpus 64 --num-layers 32 --hidden-size 4096 ...",
        "memory --gpus 64 @configs/llama3_8b.args",
        "memory --checkpoint DIR",
        "memory --checkpoint DIR --gpus 64 --tensor-model-parallel-size 4",
    ),
    add_arguments=_add_arguments,
    run=_run,
    failure="the checkpoint cannot be planned, or a package is missing; one line on stderr says\n"
    "     why and what to do",
    takes_more=True,
)
