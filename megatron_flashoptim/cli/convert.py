"""``megatron-flashoptim convert``: checkpoints of Megatron's Adam to flash and back, or weights."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_flashoptim.cli.command import Command, UsageError
from megatron_flashoptim.cli.progress import Progress
from megatron_flashoptim.codec.spec import EXP_AVG_SQ_CODES, MASTER_BITS
from megatron_flashoptim.optim.rules import RULES

if TYPE_CHECKING:
    from megatron_flashoptim.checkpoint.offline import Conversion, Result

_WEIGHTS = "weights"
_SHOWN_REPAIRED = 20


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", type=Path, help="folder of --save, or an iter_...")
    parser.add_argument("destination", metavar="DST", type=Path, help="folder for the result")
    parser.add_argument(
        "--to",
        required=True,
        choices=("flash", "adam", _WEIGHTS),
        help="flash: for a flash optimizer; adam: for Megatron's own; weights: safetensors",
    )
    parser.add_argument(
        "--optimizer",
        choices=tuple(RULES),
        help="with --to flash: for which one (default: SRC's own; of Adam flash_adamw, or "
        "flash_adam where it decayed by L2). Where its moments are others than SRC's they start at "
        "zero, and masters are kept",
    )
    parser.add_argument(
        "--iteration", type=int, metavar="N", help="of SRC (default: the latest it names)"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be done; read no tensor, write nothing",
    )
    parser.add_argument(
        "--repair",
        action="store_true",
        help="where masters are not those of the weights (a defect of stock's fully_reshardable "
        "save), rebuild them from the weights and drop the moments of these parameters only",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="convert side by side; each takes up to 1.1 GB of memory (default: 1)",
    )
    parser.add_argument(
        "--master-bits",
        type=int,
        choices=MASTER_BITS,
        help="with --to flash: as --flash-master-bits (default: SRC's own, of Adam 24)",
    )
    parser.add_argument(
        "--exp-avg-sq-code",
        choices=EXP_AVG_SQ_CODES,
        help="with --to flash: as --flash-exp-avg-sq-code (default: SRC's own, of Adam sqrt)",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        help="with --to weights: fp32 joins the master weights (default), bf16 takes the model's",
    )


def _run(options: argparse.Namespace) -> int:
    _check(options)
    if options.to == _WEIGHTS:
        return _export(options)
    from megatron_flashoptim.checkpoint.offline import Conversion, Request, RequestError

    request = Request(
        source=options.source,
        destination=options.destination,
        target=options.to,
        iteration=options.iteration,
        optimizer=options.optimizer,
        master_bits=options.master_bits,
        exp_avg_sq_code=options.exp_avg_sq_code,
        repair=options.repair,
        processes=options.processes,
    )
    try:
        conversion = Conversion(request)
    except RequestError as problem:
        raise UsageError(str(problem)) from problem
    _print_source(conversion.folder)
    recoding = conversion.recoding
    if not recoding.keeps_moments:
        flash = recoding.flash
        kept = "kept" if recoding.keeps_masters else f"rounded to {flash.master_bits} bits"
        name = flash.optimizer
        print(f"masters are {kept}; the moments and the step number of {name} start at zero")
    if options.dry_run:
        _print_plan(conversion)
        return 0
    started = time.monotonic()
    with Progress() as progress:
        result = conversion.run(progress)
    _print_result(conversion, result, time.monotonic() - started)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuse options that do not belong to the target.

    Raises:
        UsageError: names the option.
    """
    belongs = {
        "--optimizer": ("flash", options.optimizer),
        "--master-bits": ("flash", options.master_bits),
        "--exp-avg-sq-code": ("flash", options.exp_avg_sq_code),
        "--dtype": (_WEIGHTS, options.dtype),
    }
    for flag, (target, value) in belongs.items():
        if value is not None and options.to != target:
            raise UsageError(f"{flag} {value} belongs to --to {target}, not to --to {options.to}")
    if options.to == _WEIGHTS and options.repair:
        raise UsageError("--repair belongs to --to flash and --to adam")
    if options.to == _WEIGHTS and options.processes > 1:
        raise UsageError(f"--processes {options.processes} belongs to --to flash and --to adam")
    if options.processes < 1:
        raise UsageError(f"--processes {options.processes}: at least 1")


def _print_source(folder: Any) -> None:
    from megatron_flashoptim.checkpoint.metadata import optimizer_of

    args = folder.common.get("args")
    world = f", saved by {args.world_size} ranks" if hasattr(args, "world_size") else ""
    kind = {
        "adam": "Megatron's Adam",
        "flash": optimizer_of(folder.flash),
        "weights": "weights only",
    }
    print(f"{folder.path}: {kind[folder.optimizer]}, {folder.sharding_type or 'no state'}{world}")


def _print_plan(conversion: Conversion) -> None:
    """Print each tensor of the result."""
    from megatron_flashoptim.checkpoint.offline import bytes_of

    for key, boxes in conversion.boxes_of_key().items():
        first = boxes[0]
        size = sum(box.box.numel() for box in boxes) * first.dtype.itemsize
        print(_planned(size, first.dtype, first.shape, key))
    before, after = bytes_of(conversion.folder.path), conversion.bytes_of_result()
    parts = _parts(len(conversion.parts))
    print(
        f"{conversion.final} would have about {_size(after)} in {parts}, of "
        f"{_size(before)} now ({after / before:.2f}); nothing was written"
    )


def _print_result(conversion: Conversion, result: Result, seconds: float) -> None:
    if result.resumed:
        parts = _parts(result.parts)
        print(f"{result.resumed} of {parts} were there from an interrupted conversion")
    report = result.report
    if report and report.damaged:
        shown = report.damaged[:_SHOWN_REPAIRED]
        more = len(report.damaged) - len(shown)
        print(
            f"repaired {len(report.damaged)} parameters, masters from weights, moments zero: "
            + ", ".join(shown)
            + (f" and {more} more" if more else "")
        )
    if report and conversion.request.target == "flash":
        print(report.text(by_ranks=False))
    elif report:
        print(f"{report.elements} elements in {report.parameters} parameters, decoded exactly")
    print(
        f"{result.folder}: {_size(result.bytes_after)}, from {_size(result.bytes_before)} "
        f"({result.bytes_after / result.bytes_before:.2f}), written and verified in {seconds:.1f} s"
    )
    step = "" if result.is_latest else f" --ckpt-step {conversion.folder.iteration}"
    print(f"load it with --load {result.folder.parent}{step}")


def _export(options: argparse.Namespace) -> int:
    import torch

    from megatron_flashoptim.checkpoint.offline import bytes_of
    from megatron_flashoptim.checkpoint.weights_file import WeightsExport, bytes_of_tensor

    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    export = WeightsExport(options.source, options.destination, dtype, options.iteration)
    _print_source(export.folder)
    if kept := export.kept_in_fp32():
        print(f"{kept} of {len(export.tensors)} tensors are fp32 in the model and stay so")
    if options.dry_run:
        for tensor in export.tensors:
            planned = _planned(bytes_of_tensor(tensor), tensor.dtype, tensor.shape, tensor.key)
            print(f"{planned}  in {tensor.file}")
        size = _size(export.bytes_of_result())
        print(f"{options.destination} would have {size}; nothing was written")
        return 0
    started, before = time.monotonic(), bytes_of(export.folder.path)
    with Progress() as progress:
        export.run(progress)
    after = bytes_of(options.destination)
    print(
        f"{options.destination}: {len(export.tensors)} tensors, {_size(after)}, from "
        f"{_size(before)} ({after / before:.2f}), written and verified in "
        f"{time.monotonic() - started:.1f} s"
    )
    return 0


def _planned(size: int, dtype: object, shape: tuple[int, ...], key: str) -> str:
    """Return a dry run's line of a tensor: bytes, dtype, shape, key."""
    dims = "x".join(map(str, shape)) or "scalar"
    return f"  {size / 1e6:12.3f} MB  {str(dtype).removeprefix('torch.'):8}  {dims:20}  {key}"


def _parts(number: int) -> str:
    return f"{number} part" + ("s" if number != 1 else "")


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


COMMAND = Command(
    name="convert",
    summary="checkpoints of Adam to flash and back, weights to safetensors",
    description="Convert a torch_dist checkpoint on one machine, without a GPU and without\n"
    "torchrun. SRC is never touched; DST/iter_..., of weights DST, appears when everything is\n"
    "written and read back. After an interruption the same command goes on where it was, or\n"
    "writes weights anew.",
    examples=(
        "convert --to flash checkpoints/adam checkpoints/flash",
        "convert --to adam --iteration 5000 checkpoints/flash checkpoints/adam",
        "convert --to flash --optimizer flash_lion checkpoints/adam checkpoints/lion",
        "convert --to flash --repair --processes 16 checkpoints/adam checkpoints/flash",
        "convert --to weights --dtype bf16 checkpoints/flash weights",
    ),
    add_arguments=_add_arguments,
    run=_run,
)
