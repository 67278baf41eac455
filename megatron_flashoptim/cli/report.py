"""The report of ``megatron-flashoptim inspect``: pictures of a checkpoint, readable at 100 layers.

Depth goes along the horizontal axis of every map, so that a layer that is unlike the others is a
column that stands out. One self-contained HTML file, or the pictures alone as PNG.
"""

from __future__ import annotations

import html
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from megatron_flashoptim.checkpoint.difference import Comparison
from megatron_flashoptim.checkpoint.state_parts import Part
from megatron_flashoptim.checkpoint.statistics import BIAS, SIGNED_ZERO, Inspection, Statistics

TITLES = {
    "weight": "weights",
    "master": "masters",
    "correction": "corrections",
    "exp_avg": "first moments",
    "exp_avg_sq": "second moments",
}
# Rows of a map; of more tensors the largest are shown.
_MOST_ROWS = 40
_WIDTH = 17.0
_ROW_HEIGHT = 0.2
_FEWEST_COLUMNS = 2
_EMPTY = "#e8e8e8"

Matrix = Any
# Names of tensors with their layers, in the order of depth, or of buffers with their buckets.
Families = list[tuple[str, list[tuple[Part, Any]]]]


@dataclass(frozen=True)
class Text:
    """What stands beside the pictures.

    Attributes:
        title: path of the checkpoint.
        fields: what it is.
        tables: lines over all layers.
        every_layer: lines for every layer.
        findings: what is wrong or was found right.
    """

    title: str
    fields: dict[str, str]
    tables: Sequence[str]
    every_layer: Sequence[str]
    findings: Sequence[str]


@dataclass(frozen=True)
class _Map:
    """Values by tensor and layer, and how they are drawn.

    Attributes:
        values: matrix of ``_matrix``.
        title: above it.
        colors: name of the color map.
        norm: of the colors; None: from the smallest value to the largest.
    """

    values: Matrix
    title: str
    colors: str = "magma_r"
    norm: Normalize | None = None


def write(path: Path, inspection: Inspection, comparison: Comparison | None, text: Text) -> None:
    """Draw the report into a file ending in ``.html`` or ``.png``."""
    drawings = _drawings(inspection, comparison)
    if path.suffix == ".png":
        heights = [height for height, _ in drawings]
        figure = Figure(figsize=(_WIDTH, sum(heights) + 0.5), layout="constrained")
        figure.suptitle(f"{text.title}\n{text.fields.get('optimizer', '')}", fontsize=11)
        for (_, draw), part in zip(drawings, _stacked(figure, heights), strict=True):
            draw(part)
        figure.savefig(path, dpi=110)
        return
    pictures = []
    for height, draw in drawings:
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure)
        pictures.append(_svg(figure))
    path.write_text(_page(text, pictures))


def _stacked(figure: Figure, heights: list[float]) -> list[SubFigure]:
    return list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])


def _drawings(
    inspection: Inspection, comparison: Comparison | None
) -> list[tuple[float, Callable[[Any], None]]]:
    """Return height in inches and the function that draws, of each picture."""
    kinds = [kind for kind in TITLES if inspection.families(kind)]
    if inspection.has_masters_of_weights():
        kinds.remove("weight")
    drawings: list[tuple[float, Callable[[Any], None]]] = []
    families = {kind: _largest(inspection.families(kind)) for kind in kinds}
    maps = {kind: _maps(families[kind], inspection.total(kind)) for kind in kinds}
    columns = _columns(map(len, maps.values()))
    for kind in kinds:
        if maps[kind]:
            draw = partial(_depth, kind, families[kind], maps[kind], columns)
            drawings.append((_height(len(families[kind])), draw))
    columns = _columns(_panels(inspection, kind) for kind in kinds)
    for kind in kinds:
        drawings.append((3.2, partial(_distribution, inspection, kind, columns)))
    if comparison is not None and (compared := _compared(comparison)):
        rows = max(len(families) for families in compared.values())
        drawings.append((_height(rows), partial(_differences, comparison, compared)))
    return drawings


def _columns(panels: Iterable[int]) -> int:
    """Return in how many columns all pictures of a sort are drawn, so that widths are equal."""
    return max([_FEWEST_COLUMNS, *panels])


def _height(rows: int) -> float:
    return 1.3 + _ROW_HEIGHT * max(rows, 6)


def _maps(families: Families, total: Statistics) -> list[_Map]:
    """Return maps of tensors over depth: size, error, small codes.

    One tensor or bucket alone has nothing to stand out from: its map would be a flat rectangle.
    """
    if total.kind == "correction" or not _several(families):
        return []
    maps = []
    if any(len(family) > 1 for _, family in families):
        sizes = _matrix(families, lambda each: _log2(each.squares / max(each.elements, 1)) / 2)
        relative = np.full_like(sizes, np.nan)
        for row, values in enumerate(sizes):
            usable = np.isfinite(values)
            if usable.any():
                relative[row, usable] = values[usable] - np.median(values[usable])
        most = max(1.0, float(np.abs(relative[np.isfinite(relative)]).max(initial=0.0)))
        norm = TwoSlopeNorm(0, -most, most)
        maps.append(_Map(relative, "rms over the median of its row, log2", "RdBu_r", norm))
    if total.error is not None:
        errors = _matrix(families, lambda each: each.relative_error or 0.0)
        of_root = " (of the root)" if total.kind == "exp_avg_sq" else ""
        maps.append(_Map(errors, "quantization error, relative" + of_root))
    if total.codes is not None and total.kind != "master":
        small = _matrix(families, lambda each: 100 * ((each.zero or 0) + (each.minimum or 0)))
        maps.append(_Map(small, "elements at code 0 or the smallest, %"))
    return maps


def _depth(kind: str, families: Families, maps: Sequence[_Map], columns: int, figure: Any) -> None:
    axes = figure.subplots(1, columns, sharey=True)
    along = "buckets" if _has_buckets(families) else "depth"
    figure.suptitle(f"{TITLES[kind]} over {along}", fontsize=11, x=0.01, ha="left", weight="bold")
    for unused in axes[len(maps) :]:
        unused.set_visible(False)
    for each, drawn in zip(axes, maps, strict=False):
        _draw_map(each, drawn, families)
    axes[0].set_yticks(range(len(families)), [name for name, _ in families], fontsize=6.5)


def _panels(inspection: Inspection, kind: str) -> int:
    """Return how many panels ``_distribution`` draws."""
    curves = (inspection.total(kind).codes is not None) + (kind != "correction")
    return curves * (2 if len(_by_layer(inspection, kind)) > 1 else 1)


def _distribution(inspection: Inspection, kind: str, columns: int, figure: Any) -> None:
    """Draw histograms of codes, values and scales, and the first two over depth."""
    total = inspection.total(kind)
    axes = figure.subplots(1, columns)
    # From the left, whichever there are.
    free = iter(axes)
    figure.suptitle(f"{TITLES[kind]}: distributions", fontsize=11, x=0.01, ha="left", weight="bold")
    per_layer = _by_layer(inspection, kind)
    depths = sorted(per_layer)
    along = "bucket" if _has_buckets(inspection.families(kind).items()) else "layer"
    codes_of = "correction" if kind in ("master", "correction") else "code"
    root = "root of the value" if kind == "exp_avg_sq" else "|value|"
    if total.codes is not None:
        each = next(free)
        shown = _codes(total)
        each.step(shown[0], shown[1], where="mid", lw=0.8)
        top = float(shown[1].max())
        each.set_yscale("log")
        each.set_ylim(max(float(shown[1][shown[1] > 0].min(initial=top)), 1e-6) / 2, 2 * top)
        each.set(xlabel=codes_of, ylabel="share of elements")
    if kind != "correction":
        each = next(free)
        _binades(each, total.binades.numpy(), root)
        if total.scale_binades is not None:
            _binades(each, total.scale_binades.numpy(), "scale of 32")
        each.set(xlabel="log2", ylabel="share")
        each.legend(fontsize=7)
    # Of one layer or bucket the curves say it all.
    if len(depths) > 1 and kind != "correction":
        counts = np.stack([per_layer[depth].binades.numpy()[1:] for depth in depths], axis=1)
        used = np.flatnonzero(counts.any(axis=1))
        low, high = (int(used[0]), int(used[-1]) + 1) if used.size else (0, 1)
        extent = (depths[0] - 0.5, depths[-1] + 0.5, low + 0.5 - BIAS, high + 0.5 - BIAS)
        _density(next(free), counts[low:high], extent, f"log2 of {root}", along)
    if len(depths) > 1 and total.codes is not None:
        codes, _ = _codes(total)
        counts = np.stack([_codes(per_layer[depth])[1] for depth in depths], axis=1)
        extent = (depths[0] - 0.5, depths[-1] + 0.5, codes[0] - 0.5, codes[-1] + 0.5)
        _density(next(free), counts, extent, codes_of, along)
    for each in axes:
        each.tick_params(labelsize=7, which="both")
        if not each.has_data():
            each.set_visible(False)


def _compared(comparison: Comparison) -> dict[str, Families]:
    """Return what has several parts to map the differences of, by kind."""
    found = {kind: _largest(comparison.families(kind)) for kind in TITLES}
    return {kind: families for kind, families in found.items() if _several(families)}


def _differences(comparison: Comparison, compared: dict[str, Families], figure: Any) -> None:
    """Draw maps of the mean relative difference to the other checkpoint."""
    figure.suptitle(
        f"mean relative difference to {comparison.second.path}",
        fontsize=11,
        x=0.01,
        ha="left",
        weight="bold",
    )
    axes = figure.subplots(1, _columns([len(compared)]))
    for unused in axes[len(compared) :]:
        unused.set_visible(False)
    named: list[str] = []
    for each, (kind, families) in zip(axes, compared.items(), strict=False):
        values = _matrix(families, lambda found: found.mean or math.nan)
        usable = values[np.isfinite(values)]
        norm = (
            LogNorm(usable.min(), max(usable.max(), 1.01 * usable.min())) if usable.size else None
        )
        same = "" if usable.size else " (none)"
        _draw_map(each, _Map(values, TITLES[kind] + same, norm=norm), families)
        names = [name for name, _ in families]
        labels = names if names != named else [""] * len(names)
        each.set_yticks(range(len(families)), labels, fontsize=6.5)
        named = names


def _largest(families: dict[str, list[tuple[Part, Any]]]) -> Families:
    """Return at most ``_MOST_ROWS`` families, those with the most elements."""
    sizes = {name: sum(part.elements for part, _ in each) for name, each in families.items()}
    kept = sorted(sizes, key=lambda name: -sizes[name])[:_MOST_ROWS]
    return [(name, families[name]) for name in families if name in kept]


def _several(families: Families) -> bool:
    return sum(len(family) for _, family in families) > 1


def _matrix(families: Families, value: Callable[[Any], float]) -> Matrix:
    """Return values by family and layer; column 0 is of tensors without layers."""
    depths = [part.index for _, family in families for part, _ in family if part.index is not None]
    found = np.full((len(families), 2 + max(depths, default=-1)), np.nan)
    for row, (_, family) in enumerate(families):
        for part, each in family:
            found[row, 0 if part.index is None else part.index + 1] = value(each)
    return found


def _draw_map(axes: Any, drawn: _Map, families: Families) -> None:
    """Draw layers, and left of them a strip of what has none."""
    values, norm = drawn.values, drawn.norm
    layers = values.shape[1] - 1
    shown = np.ma.masked_invalid(values)
    if norm is None and shown.count():
        norm = Normalize(float(shown.min()), float(shown.max()))
    strip = max(1.0, 0.06 * layers) if layers else 1.0
    gap = 0.02 * layers
    image = None
    # Left and right end, and the columns between them.
    for left, right, part in (
        (-0.5 - gap - strip, -0.5 - gap, shown[:, :1]),
        (-0.5, layers - 0.5, shown[:, 1:]),
    ):
        if part.count():
            image = axes.imshow(
                part,
                aspect="auto",
                interpolation="nearest",
                cmap=drawn.colors,
                norm=norm,
                extent=(left, right, len(families) - 0.5, -0.5),
            )
    axes.set_facecolor(_EMPTY)
    axes.set_title(drawn.title, fontsize=8)
    axes.tick_params(labelsize=7)
    has_strip = bool(shown[:, :1].count())
    axes.set_xlim(-0.5 - gap - strip if has_strip else -0.5, max(layers, 0) - 0.5)
    axes.set_ylim(len(families) - 0.5, -0.5)
    # Of a range of length 0 the locator makes fractions.
    ticks = (
        MaxNLocator(10, integer=True).tick_values(0, layers - 1) if layers > 1 else range(layers)
    )
    places = [(float(tick), f"{tick:g}") for tick in ticks if 0 <= tick < layers]
    if has_strip:
        axes.axvspan(-0.5 - gap, -0.5, color="white")
        places.insert(0, (-0.5 - gap - strip / 2, "none"))
    axes.set_xticks([place for place, _ in places], [label for _, label in places])
    axes.set_xlabel("bucket" if _has_buckets(families) else "layer", fontsize=7)
    if image is not None:
        bar = axes.figure.colorbar(image, ax=axes, pad=0.01, fraction=0.05)
        bar.ax.tick_params(labelsize=7, which="both")
        bar.ax.yaxis.get_offset_text().set_fontsize(7)


def _has_buckets(families: Iterable[tuple[str, Any]]) -> bool:
    return any(name.endswith("bucket_idx_*") for name, _ in families)


def _by_layer(inspection: Inspection, kind: str) -> dict[int, Statistics]:
    found: dict[int, Statistics] = {}
    for part, statistics in inspection.parts:
        if part.index is not None and kind in statistics:
            found.setdefault(part.index, Statistics(kind)).add(statistics[kind])
    return found


def _codes(statistics: Statistics) -> tuple[Matrix, Matrix]:
    """Return codes and the share of elements at each."""
    assert statistics.codes is not None
    counts = statistics.codes.numpy()
    first = 0 if statistics.kind == "exp_avg_sq" else -SIGNED_ZERO
    return np.arange(first, first + len(counts)), counts / max(counts.sum(), 1)


def _binades(axes: Any, counts: Matrix, label: str) -> None:
    used = np.flatnonzero(counts[1:]) + 1
    if used.size:
        span = np.arange(used[0], used[-1] + 1)
        axes.step(span + 0.5 - BIAS, counts[span] / counts.sum(), where="mid", lw=1, label=label)


def _density(axes: Any, counts: Matrix, extent: Any, ylabel: str, xlabel: str) -> None:
    """Draw the shares of each column, which sum to 1."""
    shares = counts / np.maximum(counts.sum(axis=0, keepdims=True), 1e-300)
    most = max(float(shares.max()), 1e-6)
    image = axes.imshow(
        np.ma.masked_equal(shares, 0),
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap="viridis",
        norm=LogNorm(max(float(shares[shares > 0].min(initial=most)), most / 1e4), most),
        extent=extent,
    )
    axes.set_facecolor(_EMPTY)
    axes.set_xlabel(xlabel, fontsize=8)
    axes.set_ylabel(ylabel, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01)
    bar.ax.tick_params(labelsize=7, which="both")


def _log2(value: float) -> float:
    return math.log2(value) if value > 0 else -math.inf


def _svg(figure: Figure) -> str:
    stored = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "megatron-flashoptim", "svg.fonttype": "none"}):
        figure.savefig(stored, format="svg", metadata={"Date": None})
    text = stored.getvalue()
    return text[text.index("<svg") :]


def _page(text: Text, pictures: Sequence[str]) -> str:
    def lines(each: Sequence[str]) -> str:
        return html.escape("\n".join(each))

    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in text.fields.items()
    )
    drawn = "\n".join(f"<figure>{picture}</figure>" for picture in pictures)
    told = "".join(f"<p><b>{html.escape(each)}</b></p>" for each in text.findings)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(text.title)}</title>
<style>
body {{ font-family: sans-serif; margin: 1.5em; }}
th {{ text-align: left; padding-right: 1em; font-weight: normal; color: #555; }}
pre {{ font-size: 11px; overflow-x: auto; }}
figure {{ margin: 0 0 1em 0; }} svg {{ width: 100%; height: auto; max-width: 1700px; }}
</style></head><body>
<h1>{html.escape(text.title)}</h1>
<table>{rows}</table>
{told}
{drawn}
<h2>Tables</h2>
<pre>{lines(text.tables)}</pre>
<details><summary>Every layer</summary><pre>{lines(text.every_layer)}</pre></details>
</body></html>
"""
