"""The tables that ``megatron-flashoptim inspect`` prints."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_flashoptim.checkpoint.description import Bytes
    from megatron_flashoptim.checkpoint.difference import Comparison, Difference
    from megatron_flashoptim.checkpoint.state_parts import Part
    from megatron_flashoptim.checkpoint.statistics import Inspection, Statistics

TITLES = {
    "weight": "weights",
    "master": "masters",
    "correction": "corrections (buckets do not say which weights they belong to)",
    "exp_avg": "first moments",
    "exp_avg_sq": "second moments",
}
# Parameters to name where masters are not those of the weights.
_MAX_NAMED = 8
_NAME = 60


def description(fields: dict[str, str]) -> list[str]:
    """Return the lines that say what a checkpoint is."""
    return [f"  {name:10} {value}" for name, value in fields.items()]


def described_beside(one: dict[str, str], two: dict[str, str]) -> list[str]:
    """Return the fields of two checkpoints; where they differ, both values."""
    lines = []
    for name in {**one, **two}:
        mine, theirs = one.get(name, "-"), two.get(name, "-")
        if mine == theirs:
            lines.append(f"  {name:10} {mine}")
        else:
            lines += [f"* {name:10} {mine}", f"  {'':10} {theirs}"]
    return lines


def byte_table(rows: Iterable[Bytes]) -> list[str]:
    """Return bytes per kind; "per parameter" is over the elements of the weights."""
    rows = list(rows)
    parameters = sum(row.elements for row in rows if row.kind == "weights")

    def per_parameter(count: int) -> str:
        return f"{count / parameters:.3f}" if parameters else "-"

    table = [("bytes", "dtype", "tensors", "elements", "bytes", "per parameter")]
    for row in rows:
        counts = (str(row.tensors), str(row.elements), str(row.bytes))
        table.append((row.kind, row.dtype, *counts, per_parameter(row.bytes)))
    total = sum(row.bytes for row in rows)
    tensors = sum(row.tensors for row in rows)
    table.append(("all", "", str(tensors), "", str(total), per_parameter(total)))
    return _aligned(table, left=2)


def statistics_tables(inspection: Inspection, *, layers: bool) -> list[str]:
    """Return a table for each kind of state: a line per tensor, or per layer of it."""
    kinds = [kind for kind in TITLES if inspection.families(kind)]
    if inspection.has_masters_of_weights():
        kinds.remove("weight")
    lines: list[str] = []
    for kind in kinds:
        families = inspection.families(kind)
        has_error = inspection.total(kind).error is not None
        has_codes = inspection.total(kind).codes is not None
        lines += ["", *_statistics_table(kind, families, layers, has_error, has_codes)]
    return lines


def _statistics_table(
    kind: str,
    families: dict[str, list[tuple[Part, Statistics]]],
    layers: bool,
    has_error: bool,
    has_codes: bool,
) -> list[str]:
    buckets = next(iter(families)).endswith("bucket_idx_*")
    header = ["buckets" if buckets else "layers"]
    header += ["norm min", "median", "max", "at"] if kind != "correction" else []
    header += ["error median", "max", "at"] if has_error else []
    header += ["top %", "zero %", "min %"] if has_codes else []
    header += ["scale from", "to"] if kind in ("exp_avg", "exp_avg_sq") else []
    header += ["Inf/NaN"]
    table = [(TITLES[kind], *header)]
    for name, family in families.items():
        table.append((_short(name), *_family_row(kind, family, has_error, has_codes)))
        if layers and family[0][0].index is not None:
            for part, one in family:
                row = _family_row(kind, [(part, one)], has_error, has_codes)
                table.append((f"  {part.index}", "", *row[1:]))
    everything = [pair for family in families.values() for pair in family]
    whole = [(replace(everything[0][0], index=None), _sum(everything))]
    table.append(("all", *_family_row(kind, whole, has_error, has_codes)))
    return _aligned(table, left=1)


def _family_row(
    kind: str, family: list[tuple[Part, Statistics]], has_error: bool, has_codes: bool
) -> tuple[str, ...]:
    together = _sum(family)
    count = str(len(family)) if family[0][0].index is not None else ""
    row = [count]
    if kind != "correction":  # sums of corrections mean nothing
        row += _spread(family, lambda each: each.norm)
    if has_error:
        row += _spread(family, lambda each: each.relative_error or 0.0)[1:]
    if has_codes:
        row += [_percent(value) for value in (together.saturated, together.zero, together.minimum)]
    if kind in ("exp_avg", "exp_avg_sq"):
        has_scale = together.largest_scale > 0
        row += [_number(together.smallest_scale) if has_scale else "0"]
        row += [_number(together.largest_scale)]
    row.append(str(together.nonfinite) if together.nonfinite else "")
    return tuple(row)


def _sum(family: list[tuple[Part, Statistics]]) -> Statistics:
    total = type(family[0][1])(family[0][1].kind)
    for _, each in family:
        total.add(each)
    return total


def _spread[Values](
    family: Sequence[tuple[Part, Values]], value: Callable[[Values], float]
) -> list[str]:
    """Return least, median and largest value, and the number of the layer of the largest."""
    values = [value(each) for _, each in family]
    largest = max(range(len(values)), key=lambda number: _order(values[number]))
    index = family[largest][0].index
    least, median = min(values, key=_order), statistics.median(values)
    if len(values) == 1:
        return ["", "", _number(values[0]), ""]
    at = "" if index is None else str(index)
    return [_number(least), _number(median), _number(values[largest]), at]


def _order(value: float) -> float:
    return math.inf if math.isnan(value) else value


def findings(inspection: Inspection) -> list[str]:
    """Return what is wrong with the checkpoint, or was found right."""
    lines = []
    rounded = "masters rounded to bf16"
    if any(part.quantized for part, _ in inspection.parts):
        rounded = "masters, to about FP8's precision (--fp8-param-gather),"
    if inspection.not_of_weights:
        more = len(inspection.not_of_weights) - _MAX_NAMED
        named = ", ".join(inspection.not_of_weights[:_MAX_NAMED])
        lines.append(
            f"{rounded} are NOT the weights in {len(inspection.not_of_weights)} of "
            f"{inspection.checked}: {named}" + (f" and {more} more" if more > 0 else "")
        )
    elif inspection.checked:
        lines.append(f"{rounded} are the weights, in all {inspection.checked}")
    for kind in TITLES:
        total = inspection.total(kind)
        bad = total.nonfinite
        if bad:
            worst = next(part.label for part, found in inspection.parts if _bad(found.get(kind)))
            lines.append(f"{TITLES[kind]}: {bad} Inf or NaN, the first in {worst}")
        if total.nan_scales:
            lines.append(f"{TITLES[kind]}: {total.nan_scales} groups of 32 would decode to NaN")
    return lines


def _bad(found: Statistics | None) -> bool:
    return found is not None and found.nonfinite > 0


def comparison_tables(comparison: Comparison, *, layers: bool) -> list[str]:
    """Return a table for each kind of state: how far the two are from each other."""
    lines: list[str] = []
    for kind, title in TITLES.items():
        families = comparison.families(kind)
        if not families:
            continue
        along = "buckets" if next(iter(families)).endswith("bucket_idx_*") else "layers"
        header = (along, "differ %", "mean median", "max", "at", "largest", "at")
        table: list[tuple[str, ...]] = [(title, *header)]
        for name, family in families.items():
            table.append((_short(name), *_difference_row(family)))
            if layers and family[0][0].index is not None:
                table += [
                    (f"  {part.index}", "", *_difference_row([(part, one)])[1:])
                    for part, one in family
                ]
        table.append(("all", "", *_difference_row([(family[0][0], comparison.total(kind))])[1:]))
        lines += ["", *_aligned(table, left=1)]
    for number, only in enumerate(comparison.only, 1):
        if only:
            more = len(only) - _MAX_NAMED
            named = ", ".join(only[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
            lines += ["", f"only the {'first' if number == 1 else 'second'} has: {named}"]
    return lines


def _difference_row(family: list[tuple[Part, Difference]]) -> tuple[str, ...]:
    elements = sum(each.elements for _, each in family)
    differing = sum(each.differing for _, each in family)
    count = str(len(family)) if family[0][0].index is not None else ""
    largest = _spread(family, lambda each: each.largest)
    share = differing / elements if elements else 0.0
    return (count, _percent(share), *_spread(family, lambda each: each.mean)[1:], *largest[2:])


def _percent(share: float | None) -> str:
    if share is None:
        return "-"
    return "0" if share == 0 else f"{100 * share:.3g}"


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.3g}"


def _short(name: str) -> str:
    """Return a name that fits its column, its beginning left out where it is too long."""
    return name if len(name) <= _NAME else "..." + name[3 - _NAME :]


def _aligned(table: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Return rows with columns of equal width, the first ``left`` of them left aligned."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
