#!/usr/bin/env python3
"""Draw the number formats and a bucket's way through a step, for docs/how-it-works.md.

    python scripts/draw_formats.py [OUTPUT]

writes format_master.png, format_group.png, format_curves.png and bucket_step.png into OUTPUT
(default: docs/images). Every bit, code, scale, error and size in them comes from the codec and
from a BucketShard. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_flashoptim.codec import (
    GROUP_SIZE,
    decode_exp_avg,
    decode_exp_avg_sq,
    encode_exp_avg,
    encode_exp_avg_sq,
    join_master,
    split_master,
)
from megatron_flashoptim.codec.spec import ExpAvgSqCode
from megatron_flashoptim.optim.segments import Segment, SegmentTable
from megatron_flashoptim.optim.shard import BucketShard

if TYPE_CHECKING:
    from matplotlib.axes import Axes

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
DPI = 130
# Okabe and Ito's palette, which colour-blind readers can tell apart.
SIGN, EXPONENT, MANTISSA, CORRECTION = "#CC79A7", "#E69F00", "#56B4E9", "#009E73"
LOST, STATE, GRADIENT, WEIGHT = "#E4E4E4", "#009E73", "#E69F00", "#56B4E9"
INK, FAINT = "#222222", "#888888"
# A weight whose low half is more than half a bf16 ulp, so that the correction is negative.
EXAMPLE_WEIGHT = math.pi / 100
RANKS, SHARD_ELEMENTS = 4, 1 << 20


def bits_of(value: int, count: int) -> str:
    """Return the lowest bits of an integer, two's complement."""
    return format(value & ((1 << count) - 1), f"0{count}b")


def pattern_of(tensor: torch.Tensor) -> str:
    """Return the bits of a tensor's only element."""
    integer = {2: torch.int16, 4: torch.int32, 1: torch.int8}[tensor.element_size()]
    return bits_of(int(tensor.view(integer).item()), 8 * tensor.element_size())


def draw_bits(axes: Axes, bits: str, x: int, y: float, colours: list[str]) -> None:
    """Draw one cell for each bit, the first at column x."""
    from matplotlib.patches import Rectangle

    for place, (bit, colour) in enumerate(zip(bits, colours, strict=True)):
        axes.add_patch(Rectangle((x + place, y), 1, 0.8, facecolor=colour, edgecolor="white"))
        axes.text(x + place + 0.5, y + 0.38, bit, ha="center", va="center", family="monospace")


def draw_master(axes: Axes, line: Axes) -> None:
    """Draw the bits of a 24-bit master and where it lies between two bf16 numbers."""
    exact = torch.tensor([EXAMPLE_WEIGHT], dtype=torch.float32)
    high, correction = split_master(exact)
    assert correction is not None
    joined = join_master(high, correction)
    fields = [SIGN] + [EXPONENT] * 8 + [MANTISSA] * 23
    code = int(correction.item())
    rows = (
        (3.6, "fp32 master", pattern_of(exact), 0, fields, f"{exact.item():.10f}"),
        (2.2, "weight, bf16", pattern_of(high), 0, fields[:16], f"{high.item():.10f}"),
        (1.2, "correction, int8", pattern_of(correction), 16, [CORRECTION] * 8, f"{code}"),
        (
            -0.2,
            "joined master",
            pattern_of(joined),
            0,
            fields[:24] + [LOST] * 8,
            f"{joined.item():.10f}",
        ),
    )
    for y, name, bits, x, colours, value in rows:
        draw_bits(axes, bits, x, y, colours)
        axes.text(-0.5, y + 0.38, name, ha="right", va="center")
        axes.text(32.5, y + 0.38, value, ha="left", va="center", family="monospace")
    for start, width, text in ((0, 1, "sign"), (1, 8, "exponent"), (9, 23, "mantissa")):
        axes.text(start + width / 2, 4.55, text, ha="center", va="bottom", color=FAINT)
    note = "signed: the weight is the\nnearest bf16, here above"
    axes.text(24.4, 1.58, note, va="center", color=FAINT)
    error = abs(joined.item() - exact.item()) / exact.item()
    axes.text(
        28, -0.6, f"zeros; error {error:.1e}, at most {2.0**-16:.1e}", ha="center", color=FAINT
    )
    axes.set(xlim=(-7.5, 40.5), ylim=(-1, 5.2))
    axes.axis("off")
    _draw_line(line, exact, high, code)


def _draw_line(axes: Axes, exact: torch.Tensor, high: torch.Tensor, code: int) -> None:
    around = (high.view(torch.int16) + torch.tensor([-1, 0, 1], dtype=torch.int16)).view(
        torch.bfloat16
    )
    below, here, above = (float(value) for value in around)
    step = torch.tensor([-128, 127], dtype=torch.int8)
    reach = join_master(high.expand(2), step).tolist()
    axes.axhline(0, color=FAINT, lw=1)
    axes.fill_between(reach, -0.18, 0.18, color=CORRECTION, alpha=0.35, lw=0)
    for value, name in ((below, "next bf16"), (here, "weight"), (above, "next bf16")):
        axes.plot([value, value], [-0.3, 0.3], color=INK, lw=2)
        axes.text(value, -0.42, f"{name}\n{value:.8f}", ha="center", va="top")
    axes.plot([exact.item()], [0], "o", color=SIGN, markersize=9)
    axes.annotate(
        f"master: weight {code:+d} steps",
        (exact.item(), 0.1),
        (exact.item(), 0.62),
        ha="center",
        arrowprops={"arrowstyle": "-", "color": INK},
    )
    count = int(step[1]) - int(step[0]) + 1
    axes.text(
        here + (above - here) / 50,
        0.4,
        f"the {count} masters of this weight, 1/{count} ulp apart",
        color=CORRECTION,
        va="bottom",
    )
    axes.set(ylim=(-1.2, 1.05), xlim=(below - (here - below) / 3, above + (above - here) / 3))
    axes.axis("off")


def draw_group(first: Axes, second: Axes) -> None:
    """Draw 32 moments, exact and decoded, with their codes and scales."""
    generator = torch.Generator().manual_seed(2602)
    m = torch.randn(GROUP_SIZE, generator=generator) * 1e-4
    m *= torch.randn(GROUP_SIZE, generator=generator).abs()
    v = (torch.randn(GROUP_SIZE, generator=generator) * 3e-4).square()
    codes, scale = encode_exp_avg(m)
    _draw_values(
        first,
        m,
        decode_exp_avg(codes, scale),
        codes,
        f"first moment: 32 int8 codes, one bf16 scale = {scale.item():.3e}, the largest magnitude",
        float(scale),
    )
    codes, scale = encode_exp_avg_sq(v)
    _draw_values(
        second,
        v.sqrt(),
        decode_exp_avg_sq(codes, scale).sqrt(),
        codes,
        f"root of the second moment: 32 uint8 codes, one bf16 scale = {scale.item():.3e}",
        float(scale),
    )
    second.set_xlabel(
        f"element of the group; below each bar its code. {GROUP_SIZE} + 2 bytes a moment, "
        f"{(GROUP_SIZE + 2) / GROUP_SIZE} per parameter"
    )


def _draw_values(
    axes: Axes,
    exact: torch.Tensor,
    decoded: torch.Tensor,
    codes: torch.Tensor,
    title: str,
    scale: float,
) -> None:
    columns = range(GROUP_SIZE)
    axes.bar(columns, exact.tolist(), color=WEIGHT, width=0.75, label="exact")
    axes.plot(columns, decoded.tolist(), "_", color=INK, markersize=13, mew=2, label="decoded")
    largest = int(exact.abs().argmax())
    bottom = -scale if exact.min() < 0 else 0.0
    height = scale - bottom
    for column, code in enumerate(codes.tolist()):
        axes.text(
            column,
            bottom - 0.06 * height,
            str(code),
            ha="center",
            va="top",
            fontsize=9,
            family="monospace",
            weight="bold" if column == largest else "normal",
            color=SIGN if column == largest else INK,
        )
    for line in (scale, -scale) if bottom < 0 else (scale,):
        axes.axhline(line, color=EXPONENT, ls="--", lw=1)
    axes.axhline(0, color=FAINT, lw=0.8)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set(xlim=(-0.8, GROUP_SIZE - 0.2), ylim=(bottom - 0.2 * height, scale * 1.12))
    axes.set_xticks([])
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 0.98))


def in_groups(x: torch.Tensor) -> torch.Tensor:
    """Return values up to 1, 31 a group, behind a 1 that sets each group's scale."""
    rows = x.reshape(-1, GROUP_SIZE - 1)
    return torch.cat([torch.ones(len(rows), 1), rows], dim=1).reshape(-1)


def of_groups(flat: torch.Tensor) -> torch.Tensor:
    """Return the values that ``in_groups`` was given."""
    return flat.reshape(-1, GROUP_SIZE)[:, 1:].reshape(-1)


def draw_curves(first: Axes, second: Axes, error: Axes) -> None:
    """Draw the codes over value / scale, and the relative error of decoding."""
    x = torch.linspace(0, 1, (GROUP_SIZE - 1) * 128)
    small = torch.logspace(-4, 0, (GROUP_SIZE - 1) * 400)
    plain = "linear, for comparison"
    codes, _ = encode_exp_avg(in_groups(x))
    first.plot(x, of_groups(codes), color=WEIGHT, lw=2, label="companded")
    first.plot(x, 127 * x, "--", color=FAINT, lw=1, label=plain)
    first.set(title="first moment", xlabel="|m| / scale", ylabel="code")
    decoded = decode_exp_avg(*encode_exp_avg(in_groups(small)))
    curves = [("first moment", WEIGHT, small, of_groups(decoded))]
    both: tuple[tuple[ExpAvgSqCode, str], ...] = (("sqrt", STATE), ("fourth_root", EXPONENT))
    for code, colour in both:
        codes, _ = encode_exp_avg_sq(in_groups(x).square(), code=code)
        second.plot(x, of_groups(codes), color=colour, lw=2, label=code)
        pair = encode_exp_avg_sq(in_groups(small).square(), code=code)
        root = of_groups(decode_exp_avg_sq(*pair, code=code).sqrt())
        curves.append((f"root of the second, {code}", colour, small, root))
    second.plot(x, 255 * x.square(), "--", color=FAINT, lw=1, label="linear in v, for comparison")
    second.set(title="second moment", xlabel="sqrt(v) / scale", ylabel="code")
    for name, colour, exact, found in curves:
        relative = ((found - exact).abs() / exact).reshape(-1, (GROUP_SIZE - 1) * 4)
        centres = exact.reshape(relative.shape).mean(dim=1)
        error.loglog(centres, relative.amax(dim=1), color=colour, lw=2, label=name)
    error.set(title="largest relative error", xlabel="value / scale")
    error.set_ylim(1e-3, 1e2)
    for axes in (first, second, error):
        axes.legend(frameon=False, fontsize=9)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)


def draw_step(axes: Axes) -> None:
    """Draw one rank's part of a bucket from the gradient to the gathered weights."""
    shard = BucketShard(
        param=torch.zeros(SHARD_ELEMENTS, dtype=torch.bfloat16),
        grad=torch.zeros(SHARD_ELEMENTS, dtype=torch.bfloat16),
        segments=SegmentTable([Segment(0, 0, 0, 0)], SHARD_ELEMENTS // GROUP_SIZE, "cpu"),
    )
    rank, width = 1, 3.0
    for y, name, colour in ((6.6, "grad buffer", GRADIENT), (0.6, "param buffer", WEIGHT)):
        for part in range(RANKS):
            mine = part == rank
            text = f"shard of rank {part}"
            _box(axes, part * width, y, width, 0.9, text, colour if mine else LOST)
        axes.text(-0.2, y + 0.45, f"{name},\none bucket", ha="right", va="center")
    middle = (rank + 0.5) * width
    _box(axes, 0.2, 3.6, 13.1, 1.0, "", "white")
    launch = "one fused launch: join, decode, AdamW, encode, split; all in place"
    axes.text(6.75, 4.1, launch, ha="center", va="center", weight="bold")
    state = list(shard.state())
    x = 5.6
    for name, tensor in state:
        each = tensor.nbytes / SHARD_ELEMENTS
        label = name.replace("_scale", "\nscale")
        _box(axes, x, 2.1, 1.45, 0.9, f"{label}\n{each:g} B", STATE, fontsize=8.5)
        _arrow(axes, (x + 0.725, 3.0), (x + 0.725, 3.6), "<->")
        x += 1.53
    total = sum(tensor.nbytes for _, tensor in state) / SHARD_ELEMENTS
    axes.text(
        (5.6 + x) / 2,
        1.98,
        f"state of rank {rank} beside its shard: {total:g} bytes per parameter",
        ha="center",
        va="top",
    )
    _arrow(axes, (2 * width, 8.5), (2 * width, 7.55), "->")
    axes.text(
        2 * width + 0.2,
        8.05,
        f"reduce-scatter (Megatron): the sum of all {RANKS} ranks' gradients lands in each "
        "rank's own shard",
        va="center",
    )
    _arrow(axes, (middle, 6.55), (middle, 4.65), "->")
    axes.text(
        middle + 0.2,
        5.6,
        f"read once, {shard.grad.element_size()} or 4 B; clipping and loss scale are one number\n"
        "that the launch multiplies by",
        va="center",
    )
    _arrow(axes, (middle, 3.55), (middle, 1.55), "<->")
    axes.text(
        middle - 0.15,
        2.6,
        f"weight, {shard.param.element_size()} B: the high\npart of the master,\nread and written",
        va="center",
        ha="right",
    )
    _arrow(axes, (2 * width, 0.55), (2 * width, -0.4), "->")
    axes.text(
        2 * width + 0.2,
        0.05,
        "all-gather (Megatron): every rank gets all shards; no copy from a main parameter",
        va="center",
    )
    axes.set(xlim=(-2, 14.2), ylim=(-0.5, 8.6))
    axes.axis("off")


def _box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str,
    colour: str,
    fontsize: float = 10,
) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=INK, lw=0.8))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=fontsize)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], style: str) -> None:
    properties: dict[str, Any] = {"arrowstyle": style, "color": INK, "lw": 1.5}
    axes.annotate("", end, start, arrowprops=properties)


def draw(output: Path) -> None:
    """Write the four pictures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def save(figure: Any, name: str) -> None:
        figure.savefig(output / name, dpi=DPI, metadata={"Software": None})
        pyplot.close(figure)

    figure, (bits, line) = pyplot.subplots(
        2, 1, figsize=(12, 5.6), height_ratios=(5, 2), layout="constrained"
    )
    draw_master(bits, line)
    save(figure, "format_master.png")
    figure, (first, second) = pyplot.subplots(2, 1, figsize=(12, 6.4), layout="constrained")
    draw_group(first, second)
    save(figure, "format_group.png")
    figure, panels = pyplot.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
    draw_curves(*panels)
    save(figure, "format_curves.png")
    figure, axes = pyplot.subplots(figsize=(12, 6.4), layout="constrained")
    draw_step(axes)
    save(figure, "bucket_step.png")


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", nargs="?", type=Path, default=IMAGES, help="folder")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    draw(output)


if __name__ == "__main__":
    main()
