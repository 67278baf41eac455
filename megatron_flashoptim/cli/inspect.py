"""``megatron-flashoptim inspect``: what is in a checkpoint, layer by layer, and how good it is."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_flashoptim.cli.command import Command, UsageError
from megatron_flashoptim.cli.progress import Progress

if TYPE_CHECKING:
    from megatron_flashoptim.checkpoint.description import Bytes
    from megatron_flashoptim.checkpoint.difference import Comparison
    from megatron_flashoptim.checkpoint.folder import CheckpointFolder
    from megatron_flashoptim.checkpoint.statistics import Inspection, Statistics

REPORTS = (".html", ".png")
INSTALL = "pip install 'megatron-flashoptim[inspect]'"
# Last folders of a checkpoint's path that name its report (run, --save, iteration), and the most
# characters of them: two checkpoints have to fit into the 255 bytes of a file name.
_NAMING_FOLDERS = 3
_LONGEST_LABEL = 100
# Elements above which reading takes long enough to say how far it is.
_LARGE = 20_000_000


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CKPT", help="folder given to --save, or iter_N in it"
    )
    parser.add_argument("--iteration", type=int, help="which one (default: the latest)")
    parser.add_argument(
        "--against",
        metavar="OTHER",
        help="another checkpoint to compare with, after all that is printed of CKPT alone",
    )
    parser.add_argument("--against-iteration", type=int, help="which one of OTHER")
    parser.add_argument("--layers", action="store_true", help="a line for every layer")
    parser.add_argument(
        "--report",
        metavar="FILE",
        help="where to draw the distributions, .html or .png (default: a file in the current "
        "folder named after run, checkpoint and iteration, ...-inspect.html)",
    )
    parser.add_argument("--no-report", action="store_true", help="draw nothing")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="read side by side (default: 1)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write everything as JSON")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="instead of all that, read every file once and compare its bytes with the CRC-32 "
        "saved beside them; takes the legacy torch format too",
    )


def _run(options: argparse.Namespace) -> None:
    if options.verify:
        _verify(options)
        return
    draws = _draws(options)
    if options.against_iteration is not None and options.against is None:
        raise UsageError("--against-iteration needs --against")
    _check_processes(options)
    for name in (options.report, options.json):
        if name is not None and not Path(name).absolute().parent.is_dir():
            raise UsageError(f"{Path(name).absolute().parent} for {name} is no folder; make it")

    from megatron_flashoptim.checkpoint.damage import check_files
    from megatron_flashoptim.checkpoint.description import bytes_by_kind, describe
    from megatron_flashoptim.checkpoint.difference import check_comparable, compare
    from megatron_flashoptim.checkpoint.folder import open_folder
    from megatron_flashoptim.checkpoint.side_by_side import pool
    from megatron_flashoptim.checkpoint.statistics import inspect
    from megatron_flashoptim.cli import inspect_tables

    folder = open_folder(options.checkpoint, options.iteration)
    other = None
    if options.against is not None:
        other = open_folder(options.against, options.against_iteration)
        check_comparable(folder, other)
    both = [folder.path] if other is None else [folder.path, other.path]
    for path in both:
        check_files(path)
    fields, sizes = describe(folder), bytes_by_kind(folder)
    print(folder.path)
    print("\n".join([*inspect_tables.description(fields), "", *inspect_tables.byte_table(sizes)]))
    sys.stdout.flush()

    comparison = None
    with Progress() as progress, pool(options.processes) as executor:
        told_if_large = _if_large(progress)
        inspection = inspect(folder, told_if_large, executor=executor)
        if other is not None:
            comparison = compare(folder, other, told_if_large, executor=executor)
    print("\n".join(inspect_tables.statistics_tables(inspection, layers=options.layers)))
    if told := inspect_tables.findings(inspection):
        print("\n" + "\n".join(told))
    if comparison is not None and other is not None:
        print(f"\n{folder.path}\nagainst {other.path}")
        print("\n".join(inspect_tables.described_beside(fields, describe(other))))
        print("\n".join(inspect_tables.comparison_tables(comparison, layers=options.layers)))
    if options.json is not None:
        found = as_json(inspection, fields, sizes, comparison)
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
        print(f"\nwritten: {options.json}")
    if draws:
        from megatron_flashoptim.cli import report as drawing

        tables = [*inspect_tables.byte_table(sizes)]
        tables += inspect_tables.statistics_tables(inspection, layers=False)
        every_layer = inspect_tables.statistics_tables(inspection, layers=True)
        if comparison is not None:
            tables += ["", f"against {comparison.second.path}"]
            tables += inspect_tables.comparison_tables(comparison, layers=False)
            every_layer += inspect_tables.comparison_tables(comparison, layers=True)
        text = drawing.Text(str(folder.path), fields, tables, every_layer, told)
        report = Path(options.report or default_report(*both))
        drawing.write(report, inspection, comparison, text)
        print(f"\nwritten: {report}")


def _check_processes(options: argparse.Namespace) -> None:
    if options.processes < 1:
        raise UsageError(f"--processes {options.processes}: at least 1")


def _verify(options: argparse.Namespace) -> None:
    """Print what is damaged, a line each.

    Raises:
        ValueError: something is.
    """
    for flag in ("against", "against_iteration", "layers", "report", "json"):
        if getattr(options, flag):
            given = "--" + flag.replace("_", "-")
            raise UsageError(f"{given} cannot be used with --verify, which only compares bytes")
    _check_processes(options)

    from megatron_flashoptim.checkpoint.damage import WAYS_OUT
    from megatron_flashoptim.checkpoint.iterations import iteration_folder
    from megatron_flashoptim.checkpoint.side_by_side import pool
    from megatron_flashoptim.checkpoint.verification import verify

    folder = iteration_folder(options.checkpoint, options.iteration)
    with Progress("bytes") as progress, pool(options.processes) as executor:
        found = verify(folder, _if_large(progress), executor=executor)
    print(folder)
    for line in found.damaged:
        print(f"damaged: {line}")
    print(
        f"{found.read} bytes read in {found.seconds:.1f} s: {found.items} items in "
        f"{found.files} files, {len(found.damaged) or 'none'} damaged"
    )
    if found.without_sums:
        print(f"{found.without_sums} of these bytes were saved without a CRC-32 to compare with")
    if found.damaged:
        sys.stdout.flush()
        raise ValueError(f"the checkpoint in {folder} is damaged, see above. {WAYS_OUT}")


def _draws(options: argparse.Namespace) -> bool:
    """Return whether a report can and shall be written."""
    if options.report is not None and options.no_report:
        raise UsageError("--report and --no-report exclude each other; give one")
    if options.no_report:
        return False
    if options.report is not None and Path(options.report).suffix not in REPORTS:
        raise UsageError(f"--report must end in {' or '.join(REPORTS)}, got {options.report}")
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    if options.report is not None:
        # No ModuleNotFoundError: it would be told to install more than is needed.
        raise ImportError(f"--report needs matplotlib, which is missing; {INSTALL}")
    print(f"no report: matplotlib is missing; {INSTALL}, or --no-report", file=sys.stderr)
    return False


def default_report(path: Path, other: Path | None = None) -> str:
    """Return a file name for a report that says of which run and iteration it is.

    Args:
        path: folder of the iteration.
        other: that of ``--against``.
    """
    labels = []
    for each in (path, other):
        if each is not None:
            # Without the root, and without resolving links: as users call it.
            folders = Path(os.path.abspath(each)).parts[1:][-_NAMING_FOLDERS:]
            labels.append("-".join(folders)[-_LONGEST_LABEL:])
    return f"{'-against-'.join(labels)}-inspect.html"


def _if_large(progress: Progress) -> Callable[[str, int, int], None]:
    """Return a progress that says nothing while a small checkpoint is read."""

    def tell(phase: str, done: int, total: int) -> None:
        if total >= _LARGE:
            progress(phase, done, total)

    return tell


def as_json(
    inspection: Inspection,
    fields: dict[str, str],
    sizes: list[Bytes],
    comparison: Comparison | None,
) -> dict[str, Any]:
    """Return everything as plain values; numbers that JSON lacks (Inf, NaN) are None."""
    folder: CheckpointFolder = inspection.folder
    found: dict[str, Any] = {
        "checkpoint": str(folder.path),
        "optimizer": folder.optimizer,
        "sharding_type": folder.sharding_type,
        "description": fields,
        "flashoptim": folder.flash,
        "bytes": [vars(row) for row in sizes],
        "masters_checked": inspection.checked,
        "masters_not_of_weights": inspection.not_of_weights,
        "parts": [
            {
                "name": part.name,
                "index": part.index,
                **{kind: statistics_json(each) for kind, each in statistics.items()},
            }
            for part, statistics in inspection.parts
        ],
    }
    if comparison is not None:
        found["against"] = {
            "checkpoint": str(comparison.second.path),
            "only_first": comparison.only[0],
            "only_second": comparison.only[1],
            "parts": [
                {
                    "name": part.name,
                    "index": part.index,
                    **{
                        kind: {
                            "elements": each.elements,
                            "differing": each.differing,
                            "mean": _finite(each.mean),
                            "largest": _finite(each.largest),
                        }
                        for kind, each in differences.items()
                    },
                }
                for part, differences in comparison.parts
            ],
        }
    return found


def statistics_json(each: Statistics) -> dict[str, Any]:
    """Return the statistics of one kind of a part as plain values."""
    found: dict[str, Any] = {
        "elements": each.elements,
        "nonfinite": each.nonfinite,
        "norm": _finite(each.norm),
        "largest": _finite(each.largest),
        "relative_error": each.relative_error,
        "binades": each.binades.tolist(),
    }
    if each.codes is not None:
        found |= {
            "saturated": each.saturated,
            "zero": each.zero,
            "minimum": each.minimum,
            "codes": each.codes.tolist(),
        }
    if each.scale_binades is not None:
        found |= {
            "scales": each.scales,
            "zero_scales": each.zero_scales,
            "nan_scales": each.nan_scales,
            "smallest_scale": _finite(each.smallest_scale),
            "largest_scale": each.largest_scale,
            "scale_binades": each.scale_binades.tolist(),
        }
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


COMMAND = Command(
    name="inspect",
    summary="what is in a checkpoint, how good it is, whether damaged",
    description=(
        "Prints what a torch_dist checkpoint is, its bytes, and for each tensor over all layers:\n"
        "norms, quantization error, shares of codes and scales. Of Megatron's own Adam, what\n"
        "flash_adamw would make of it. Writes a report with the distributions. Reads a part of\n"
        "a tensor at a time, needs no GPU and changes nothing. With --verify only whether each\n"
        "byte is the one that was saved."
    ),
    examples=(
        "inspect checkpoints",
        "inspect checkpoints --iteration 1000 --layers --no-report",
        "inspect checkpoints_flash --against checkpoints_adam --report differences.html",
        "inspect checkpoints --verify --processes 8",
    ),
    add_arguments=_add_arguments,
    run=_run,
    failure=(
        "the checkpoint is damaged, cannot be read or the two not compared, or matplotlib is\n"
        "     missing for --report; one line on stderr says why and what to do"
    ),
)
