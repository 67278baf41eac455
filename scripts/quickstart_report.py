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
SHARED_COLOURS = {"weights": "#8C8C8C", "gradients": "#C4C4C4"}


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
        """Return (iteration, loss, loss of the resumed run) of the repeated iterations."""
        return [
            (iteration, self.flash.losses[iteration], loss)
            for iteration, loss in sorted(self.resumed.losses.items())
        ]

    def resume_is_identical(self) -> bool:
        """Return whether all printed losses of the resumed run equal the original's."""
        return self.resumed.validation_loss == self.flash.validation_loss and all(
            original == repeated for _, original, repeated in self.repeated_losses()
        )


def table(comparison: Comparison) -> str:
    """Return the table and the notes below it."""
    adam, flash = comparison.adam, comparison.flash
    rows = [("", "Adam", "flash_adamw", "difference")]
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
        1, 2, figsize=(12, 5), width_ratios=(3, 2), layout="constrained"
    )
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
    _draw_losses(curves, comparison)
    _draw_bytes(bars, comparison)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_losses(axes: Axes, comparison: Comparison) -> None:
    adam, flash, resumed = comparison.adam, comparison.flash, comparison.resumed
    same = "identical" if comparison.resume_is_identical() else "not identical"
    for run, label, colour, line, width in (
        (adam, f"Adam: validation {adam.validation_loss:.4f}", ADAM_COLOUR, "-", 4.0),
        (flash, f"flash_adamw: validation {flash.validation_loss:.4f}", FLASH_COLOUR, "-", 1.2),
        (resumed, f"resumed from {comparison.resumed_from}: {same}", "black", ":", 1.5),
    ):
        axes.plot(
            list(run.losses),
            list(run.losses.values()),
            color=colour,
            linestyle=line,
            linewidth=width,
            label=label,
        )
    axes.set(xlabel="iteration", ylabel="training loss", xlim=(0, comparison.iterations))
    axes.set_title("Loss, same seed and data", loc="left")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)


def _draw_bytes(axes: Axes, comparison: Comparison) -> None:
    columns = ((comparison.adam, ADAM_COLOUR), (comparison.flash, FLASH_COLOUR))
    for x, (run, colour) in enumerate(columns):
        parts = {
            "weights": float(WEIGHT_BYTES),
            "gradients": float(run.gradient_bytes),
            "optimizer": _state_per_parameter(run),
        }
        bottom = 0.0
        for part, height in parts.items():
            axes.bar(x, height, 0.8, bottom, color=SHARED_COLOURS.get(part, colour))
            axes.text(x, bottom + height / 2, f"{part} {height:.3g}", ha="center", va="center")
            bottom += height
        saved = _saved_per_parameter(run)
        axes.bar(x + 2.5, saved, 0.8, color=colour)
        for position, total in ((x, bottom), (x + 2.5, saved)):
            axes.text(
                position, total + 0.2, f"{total:.1f}", ha="center", va="bottom", weight="bold"
            )
    axes.set_xticks([0, 1, 2.5, 3.5], ["Adam", "flash_adamw"] * 2)
    axes.set_ylabel("bytes per parameter")
    axes.set_title("Memory in training", loc="left")
    axes.tick_params(axis="x", length=0)


def _difference(label: str, adam: float, flash: float) -> tuple[str, str, str, str]:
    return label, f"{adam:.4f}", f"{flash:.4f}", f"{flash - adam:+.4f}"


def _state_per_parameter(run: Run) -> float:
    return run.state_bytes / run.parameters


def _saved_per_parameter(run: Run) -> float:
    return run.checkpoint_bytes / run.parameters


def _notes(comparison: Comparison) -> list[str]:
    adam, flash, resumed = comparison.adam, comparison.flash, comparison.resumed
    notes = [
        f"Optimizer state: the live tensors of all {comparison.ranks} ranks, over the "
        f"{flash.parameters:,} parameters they own."
    ]
    if comparison.device == "cpu":
        notes.append(
            "Times: on a CPU flash_adamw runs its plain PyTorch reference; on a GPU one Triton "
            "kernel does the step."
        )
    repeated = comparison.repeated_losses()
    different = [row for row in repeated if row[1] != row[2]]
    start = (
        f"Resume: flash_adamw loaded its checkpoint of iteration {comparison.resumed_from} in a "
    )
    if comparison.resume_is_identical():
        notes.append(
            f"{start}fresh process; all {len(repeated)} losses after it and the validation loss "
            "are identical to the digits that Megatron prints."
        )
    else:
        first = f", first at iteration {different[0][0]}" if different else ""
        notes.append(
            f"{start}fresh process; {len(different)} of {len(repeated)} losses DIFFER{first}; "
            f"validation loss {resumed.validation_loss:.6f} against {flash.validation_loss:.6f}."
        )
    if adam.torch_adam:
        notes.append(
            "Adam is not resumed: without Transformer Engine and Apex Megatron runs torch's "
            "optimizer, whose checkpoint it cannot load."
        )
    else:
        notes.append("Adam is not resumed here.")
    return notes
