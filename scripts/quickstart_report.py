"""The quickstart's table and picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from quickstart_runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WEIGHT_BYTES = 2  # bf16
# Okabe and Ito's palette, which colour-blind readers can tell apart.
ADAM_COLOUR = "#E69F00"
FLASH_COLOUR = "#0072B2"
WEIGHT_COLOUR = "#A6A6A6"
GRADIENT_COLOUR = "#D0D0D0"
BAR_WIDTH = 0.9
CHECKPOINT_OFFSET = 2.5


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The three runs and what they ran on."""

    adam: Run
    flash: Run
    resumed: Run
    resumed_from: int
    iterations: int
    ranks: int
    device: str
    hardware: str
    versions: dict[str, str]

    def repeated_losses(self) -> list[tuple[int, float, float]]:
        """Return (iteration, loss, loss of the resumed run) of the repeated iterations.

        Without the second one: Megatron does not print its loss by itself.
        """
        return [
            (iteration, self.flash.losses[iteration], loss)
            for iteration, loss in sorted(self.resumed.losses.items())
            if iteration != self.resumed_from + 2
        ]

    def resume_is_identical(self) -> bool:
        """Return whether all printed losses of the resumed run equal the original's."""
        return self.resumed.validation_loss == self.flash.validation_loss and all(
            original == repeated for _, original, repeated in self.repeated_losses()
        )


def table(comparison: Comparison) -> str:
    """Return the table and the notes below it."""
    adam, flash = comparison.adam, comparison.flash
    rows = [("", "Adam", "flash_adamw", "difference or ratio")]
    quarters = (comparison.iterations * part // 4 for part in (1, 2, 3, 4))
    for iteration in (1, *quarters):
        rows.append(
            _difference(
                f"loss at iteration {iteration}", adam.losses[iteration], flash.losses[iteration]
            )
        )
    rows.append(_difference("validation loss", adam.validation_loss, flash.validation_loss))
    measured: list[tuple[str, int, float, float]] = [
        (
            "optimizer state, bytes per parameter",
            3,
            _state_per_parameter(adam),
            _state_per_parameter(flash),
        ),
        ("iteration, median ms", 1, adam.iteration_ms, flash.iteration_ms),
        ("  optimizer step in it, median ms", 1, adam.optimizer_ms, flash.optimizer_ms),
        ("checkpoint, MB", 2, adam.checkpoint_bytes / 1e6, flash.checkpoint_bytes / 1e6),
        (
            "checkpoint, bytes per parameter",
            2,
            _saved_per_parameter(adam),
            _saved_per_parameter(flash),
        ),
    ]
    for label, digits, in_adam, in_flash in measured:
        ratio = f"x {in_flash / in_adam:.2f}"
        rows.append((label, f"{in_adam:.{digits}f}", f"{in_flash:.{digits}f}", ratio))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[1]))
    return "\n".join([*lines, "", *_notes(comparison)])


def draw(comparison: Comparison, path: Path) -> None:
    """Write the loss curves and the bytes per parameter as a PNG."""
    import matplotlib  # here, so that options can be checked before it is installed

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, bars) = pyplot.subplots(
        1, 2, figsize=(12, 5), width_ratios=(5, 4), layout="constrained"
    )
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
    _draw_losses(curves, comparison)
    _draw_bytes(bars, comparison)
    millions = comparison.flash.parameters / 1e6
    figure.supxlabel(
        f"GPT with {millions:.2f}M parameters, data-parallel size {comparison.ranks} on "
        f"{comparison.device.upper()}, "
        f"megatron-core {comparison.versions['megatron-core']}, "
        f"torch {comparison.versions['torch']}",
        fontsize=9,
        color="#555555",
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_losses(axes: Axes, comparison: Comparison) -> None:
    window = max(1, comparison.iterations // 50)
    for run, name, colour, width in (
        (comparison.adam, "Adam", ADAM_COLOUR, 4.5),
        (comparison.flash, "flash_adamw", FLASH_COLOUR, 1.5),
    ):
        losses = list(run.losses.values())
        label = f"{name}, validation loss {run.validation_loss:.3f}"
        axes.plot(list(run.losses), losses, color=colour, linewidth=width / 2, alpha=0.2)
        axes.plot(
            list(run.losses), running_mean(losses, window), color=colour, lw=width, label=label
        )
    if window > 1:
        axes.plot([], [], color="black", linewidth=1, alpha=0.2, label="pale: every iteration")
    same = "identical" if comparison.resume_is_identical() else "not identical"
    axes.axvspan(
        comparison.resumed_from,
        comparison.iterations,
        color="black",
        alpha=0.07,
        linewidth=0,
        label=f"repeated from the checkpoint of {comparison.resumed_from}: losses {same}",
    )
    axes.set(xlabel="iteration", ylabel="loss", xlim=(0, comparison.iterations))
    axes.set_title(
        "Training loss, same seed and data"
        + (f" (mean of the last {window} iterations)" if window > 1 else ""),
        loc="left",
    )
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)


def running_mean(values: list[float], window: int) -> list[float]:
    """Return the mean of up to the last ``window`` values at each position."""
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        means.append(sum(recent) / len(recent))
    return means


def _draw_bytes(axes: Axes, comparison: Comparison) -> None:
    columns = (
        (comparison.adam, ADAM_COLOUR, "black"),
        (comparison.flash, FLASH_COLOUR, "white"),
    )
    for x, (run, colour, ink) in enumerate(columns):
        bottom = 0.0
        for part, height, fill, text_colour in (
            ("weights", float(WEIGHT_BYTES), WEIGHT_COLOUR, "black"),
            ("gradients", float(run.gradient_bytes), GRADIENT_COLOUR, "black"),
            ("state", _state_per_parameter(run), colour, ink),
        ):
            axes.bar(x, height, BAR_WIDTH, bottom, color=fill)
            axes.text(
                x,
                bottom + height / 2,
                f"{part} {height:.3g}",
                ha="center",
                va="center",
                fontsize=9,
                color=text_colour,
            )
            bottom += height
        saved = _saved_per_parameter(run)
        axes.bar(x + CHECKPOINT_OFFSET, saved, BAR_WIDTH, color=colour)
        for position, total in ((x, bottom), (x + CHECKPOINT_OFFSET, saved)):
            axes.text(
                position, total + 0.2, f"{total:.1f}", ha="center", va="bottom", weight="bold"
            )
    positions = [0, 1, CHECKPOINT_OFFSET, 1 + CHECKPOINT_OFFSET]
    axes.set_xticks(positions, ["Adam", "flash_adamw"] * 2, fontsize=9)
    for center, group in ((0.5, "in training"), (0.5 + CHECKPOINT_OFFSET, "checkpoint on disk")):
        axes.annotate(
            group,
            (center, 0),
            (0, -24),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="top",
        )
    axes.set_ylabel("bytes")
    axes.set_title("Bytes per parameter (optimizer state: all ranks together)", loc="left")
    axes.tick_params(axis="x", length=0)
    axes.locator_params(axis="y", integer=True)
    axes.margins(y=0.08)


def _difference(label: str, adam: float, flash: float) -> tuple[str, str, str, str]:
    return label, f"{adam:.4f}", f"{flash:.4f}", f"{flash - adam:+.4f}"


def _state_per_parameter(run: Run) -> float:
    return run.state_bytes / run.parameters


def _saved_per_parameter(run: Run) -> float:
    return run.checkpoint_bytes / run.parameters


def _notes(comparison: Comparison) -> list[str]:
    adam, flash, resumed = comparison.adam, comparison.flash, comparison.resumed
    notes = [
        "Optimizer state: live tensors of all ranks (data-parallel size "
        f"{comparison.ranks}), over the {flash.parameters:,} parameters they own."
    ]
    if comparison.device == "cpu":
        notes.append(
            "Times: on a CPU flash_adamw runs its plain PyTorch reference; on a GPU one Triton "
            "kernel does the step."
        )
    repeated = comparison.repeated_losses()
    different = [iteration for iteration, original, again in repeated if original != again]
    start = (
        f"Resume: a fresh process loaded the flash_adamw checkpoint of iteration "
        f"{comparison.resumed_from} and repeated the rest; "
    )
    if comparison.resume_is_identical():
        notes.append(
            f"{start}{len(repeated)} of {len(repeated)} losses and the validation loss are "
            "identical to the last printed digit (the second loss of a run is no part of this: "
            "Megatron prints a mean of two there)."
        )
    else:
        first = f", first at iteration {different[0]}" if different else ""
        notes.append(
            f"{start}{len(different)} of {len(repeated)} losses DIFFER{first}; validation loss "
            f"{resumed.validation_loss:.6f} against {flash.validation_loss:.6f}."
        )
    if adam.torch_adam:
        notes.append(
            "Adam is not resumed: without Transformer Engine and Apex Megatron runs torch's "
            "optimizer, whose checkpoint it cannot load."
        )
    else:
        notes.append("Adam is not resumed here.")
    return notes
