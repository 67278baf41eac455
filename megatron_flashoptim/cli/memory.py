"""``megatron-flashoptim memory``: bytes per rank of weights, gradients and optimizer state."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
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


@dataclass(frozen=True)
class Footprint:
    """Bytes per parameter of one optimizer, bf16 weights.

    Attributes:
        name: what it is.
        gradient: bytes of gradient per parameter, on every rank.
        state: bytes of optimizer state per parameter, main gradient included, shared by the
            data-parallel ranks.
        checkpoint: bytes per parameter on disk, weights included.
    """

    name: str
    gradient: float
    state: float
    checkpoint: float

    def per_rank(self, data_parallel_size: int) -> float:
        """Return bytes per parameter that one rank holds."""
        return 2.0 + self.gradient + self.state / data_parallel_size


def flash_optimizers(only: str | None = None) -> list[tuple[str, Rule]]:
    """Return names and rule of the flash optimizers, those that keep the same moments together.

    Args:
        only: name of the one to return.
    """
    found: dict[tuple[str, ...], list[str]] = {}
    for name in RULES if only is None else (only,):
        found.setdefault(rule_of(name).moments, []).append(name)
    return [(", ".join(names), rule_of(names[0])) for names in found.values()]


def _stock_adam_bytes(grad_bytes: int) -> float:
    """Return bytes per owned parameter that Megatron's Adam keeps beside a bf16 weight.

    fp32 master and moments, and beside a bf16 gradient a main gradient: an fp32 copy made in the
    step and held until the next iteration begins (``_copy_model_grads_to_main_grads``).
    """
    return 12.0 if grad_bytes == 4 else 16.0


def footprints(grad_bytes: int, optimizer: str | None = None) -> list[Footprint]:
    """Return the optimizers side by side.

    Args:
        grad_bytes: bytes of a gradient.
        optimizer: name of a flash optimizer, by default all of them.
    """
    # A checkpoint of Adam holds the bf16 weight, fp32 master and moments, and no gradient.
    adam = _stock_adam_bytes(grad_bytes)
    rows = [Footprint("adam (fp32 master and moments)", grad_bytes, adam, 14.0)]
    for names, rule in flash_optimizers(optimizer):
        for bits in sorted(MASTER_BITS, reverse=True):
            state = flash_state_bytes(rule, bits)
            rows.append(Footprint(f"{names}, {bits}-bit masters", grad_bytes, state, 2 + state))
    return rows


def render(
    parameters: float, data_parallel_size: int, grad_bytes: int, optimizer: str | None = None
) -> str:
    """Return the table for a number of parameters per model-parallel rank."""
    rows = footprints(grad_bytes, optimizer)
    width = max(len(row.name) for row in rows)
    lines = [
        f"{parameters:.4g} parameters per model-parallel rank, data-parallel size "
        f"{data_parallel_size}, bf16 weights, {'bf16' if grad_bytes == 2 else 'fp32'} gradients",
        "",
        f"{'optimizer':{width}} {'bytes/param':>11} {'weights':>9} {'grads':>9} {'state':>9} "
        f"{'rank GiB':>9} {'checkpoint':>11}",
    ]
    for row in rows:
        total = row.per_rank(data_parallel_size)
        sizes = (2.0, row.gradient, row.state / data_parallel_size, total)
        weights, grads, state, rank = (parameters * size / GIB for size in sizes)
        lines.append(
            f"{row.name:{width}} {total:11.3f} {weights:9.2f} {grads:9.2f} {state:9.2f} "
            f"{rank:9.2f} {parameters * row.checkpoint / GIB:11.2f}"
        )
    lines += ["", "GiB per rank; the checkpoint is that of all data-parallel ranks together."]
    return "\n".join(lines)


@dataclass(frozen=True)
class Variant:
    """One optimizer of a run.

    Attributes:
        name: what it is.
        flash: whether buffers and shards are laid out as ours.
        state: bytes per owned element.
    """

    name: str
    flash: bool
    state: float


def variants(size: RunSize) -> list[Variant]:
    """Return the optimizers of a run side by side.

    The precision-aware optimizer of Transformer Engine keeps an int16 remainder of the master,
    and no main gradient. An fp8 moment takes 2 bytes: on GPUs before Blackwell, Transformer Engine
    (2.20) keeps its transpose, too.
    """
    name, rule = size.optimizer, rule_of(size.optimizer)
    if size.weight_bytes == 4:  # the weights are the masters, and have fp32 gradients
        flash = flash_state_bytes(rule, 16) + TABLE_BYTES
        return [Variant("adam (fp32 moments)", False, 8.0), Variant(name, True, flash)]
    rows = [Variant("adam (fp32 master and moments)", False, _stock_adam_bytes(size.grad_bytes))]
    for dtype, moments in (("fp32", 8.0), ("bf16", 4.0), ("fp8", 4.0)):
        rows.append(Variant(f"precision-aware, {dtype} moments", False, 2 + moments))
    for bits in sorted(MASTER_BITS, reverse=True):
        state = flash_state_bytes(rule, bits) + TABLE_BYTES
        rows.append(Variant(f"{name}, {bits}-bit masters", True, state))
    return rows


def rank_bytes(size: RunSize, stage: StageSize, variant: Variant) -> tuple[float, float, float]:
    """Return bytes of weights, gradients and optimizer on the first rank of a pipeline stage."""
    buffer = stage.flash_buffer if variant.flash else stage.stock_buffer
    owned = stage.flash_shard if variant.flash else stage.owned
    gradients = buffer
    if variant.flash and size.release_slots:  # at most: slots that only small buckets use are small
        gradients = min(buffer, size.release_slots * stage.flash_bucket)
    weights, grads = float(buffer * size.weight_bytes), float(gradients * size.grad_bytes)
    return weights, grads, owned * variant.state


def render_run(size: RunSize) -> str:
    """Return the table for Megatron's arguments, of the stage with the most parameters."""
    stage = max(size.stages, key=lambda each: each.parameters)
    lines = [
        f"{stage.parameters:,} parameters on a rank of pipeline stage {stage.stage} of "
        f"{len(size.stages)}, data-parallel size {size.data_parallel_size}, "
        f"{8 * size.weight_bytes}-bit weights, {8 * size.grad_bytes}-bit gradients",
        "",
        f"{'bytes on the rank':32} {'weights':>18} {'grads':>18} {'state':>18} {'GiB in all':>11}",
    ]
    for variant in variants(size):
        parts = rank_bytes(size, stage, variant)
        columns = " ".join(f"{part:18,.0f}" for part in parts)
        lines.append(f"{variant.name:32} {columns} {sum(parts) / GIB:11.3f}")
    return "\n".join(lines)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--parameters",
        type=_positive(float),
        help="parameters of one model-parallel rank, e.g. 8e9",
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


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError as problem:
            example = "8e9" if kind is float else "64"
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
    "or a checkpoint of a GPT.",
    examples=(
        "memory --parameters 8e9 --data-parallel-size 16",
        "memory --parameters 8e9 --optimizer flash_lion",
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
