"""Rows, table and plot of scripts/quality.py."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickstart_report import ADAM_COLOUR, FLASH_COLOUR
from quickstart_runs import RunFailed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OTHER_COLOUR = "#009E73"
# Iterations to one stored loss.
BLOCK = 10


@dataclass(frozen=True)
class Row:
    """What is kept of a finished run."""

    experiment: str
    optimizer: str
    seed: int
    iterations: int
    validation: dict[int, float]
    """Loss on text that is held out, by iteration."""
    losses: list[float]
    """Training losses, means of 10 iterations."""
    grad_norms: list[float]
    """Gradient norms before clipping, medians of 10 iterations."""
    iteration_ms: float
    """Median of what Megatron logged, each a mean of 10 iterations."""
    peak_bytes: int
    """Largest of the device's allocated bytes that Megatron saw when it logged."""

    @property
    def final(self) -> float:
        """Validation loss after the last iteration."""
        return self.validation[self.iterations]


def read(experiment: str, optimizer: str, seed: int, events: Path) -> Row:
    """Read a run's TensorBoard events, of all its processes.

    Raises:
        RunFailed: they lack an iteration, or the validation at the end.
    """
    # No type stubs.
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    accumulator = EventAccumulator(str(events), size_guidance={"scalars": 0})
    accumulator.Reload()
    written = accumulator.Tags()["scalars"]

    def scalars(tag: str) -> dict[int, float]:
        # A process that was ended has written iterations that the next one repeats.
        return {e.step: e.value for e in (accumulator.Scalars(tag) if tag in written else ())}

    losses, norms = scalars("lm loss"), scalars("grad-norm")
    validation, times = scalars("lm loss validation-0"), scalars("iteration-time")
    last = max(losses, default=0)
    missing = [step for step in range(1, last + 1) if step not in losses or step not in norms]
    if missing or last not in validation or not times:
        raise RunFailed(
            f"{events} lacks "
            + (f"iteration {missing[0]}" if missing else f"validation or times, up to {last}")
        )
    memory = scalars("mem-max-allocated-bytes")
    blocks = [range(first, min(first + BLOCK, last + 1)) for first in range(1, last + 1, BLOCK)]
    return Row(
        experiment=experiment,
        optimizer=optimizer,
        seed=seed,
        iterations=last,
        validation={step: round(value, 5) for step, value in sorted(validation.items())},
        losses=[round(statistics.fmean(losses[i] for i in block), 4) for block in blocks],
        grad_norms=[round(statistics.median(norms[i] for i in block), 4) for block in blocks],
        iteration_ms=round(1e3 * statistics.median(times.values()), 1),
        peak_bytes=int(max(memory.values())) if memory else 0,
    )


def rows_of(record: dict[str, Any]) -> dict[str, dict[str, list[Row]]]:
    """Return the rows by experiment and optimizer, in the order of the experiment's table."""
    rows = [
        Row(**{**run, "validation": {int(step): v for step, v in run["validation"].items()}})
        for run in record["runs"]
    ]
    return {
        letter: {
            optimizer: sorted(
                (r for r in rows if (r.experiment, r.optimizer) == (letter, optimizer)),
                key=lambda row: row.seed,
            )
            for optimizer in described["optimizers"]
        }
        for letter, described in record["experiments"].items()
    }


def table(record: dict[str, Any]) -> str:
    """Return Markdown: final validation losses over seeds, and what the optimizer changed.

    The difference is the mean over the seeds that both have; "spread" is the range over seeds.
    """
    lines = [
        "| experiment | optimizer | seeds | final validation loss | spread | minus the first "
        "| iteration, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for letter, optimizers in rows_of(record).items():
        first: dict[int, float] = {}
        for optimizer, rows in optimizers.items():
            if not rows:
                continue
            finals = {row.seed: row.final for row in rows}
            first = first or finals
            both = sorted(finals.keys() & first.keys())
            difference = "-"
            if finals is not first and both:
                mean = statistics.fmean(finals[seed] - first[seed] for seed in both)
                difference = f"{mean:+.4f}"
            each = ", ".join(f"{loss:.4f}" for loss in finals.values())
            spread = max(finals.values()) - min(finals.values())
            lines.append(
                f"| {letter} | {optimizer} | {', '.join(map(str, finals))} | "
                f"{statistics.fmean(finals.values()):.4f} ({each}) | {spread:.4f} | {difference} | "
                f"{statistics.median(row.iteration_ms for row in rows):.0f} |"
            )
    return "\n".join(lines)


def draw(record: dict[str, Any], path: Path) -> None:
    """Write validation losses, and their difference from the first optimizer's mean, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    experiments = rows_of(record)
    figure, grid = pyplot.subplots(
        2, len(experiments), figsize=(5 * len(experiments), 7), squeeze=False, layout="constrained"
    )
    for column, (letter, optimizers) in enumerate(experiments.items()):
        curves, differences = grid[0][column], grid[1][column]
        curves.set_title(record["experiments"][letter]["title"])
        _draw_validation(curves, optimizers)
        _draw_differences(differences, optimizers)
    figure.supxlabel(
        f"{record['device']}, megatron-core {record['versions']['megatron-core']}, "
        f"torch {record['versions']['torch']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _colours(optimizers: dict[str, list[Row]]) -> dict[str, str]:
    return dict(zip(optimizers, (ADAM_COLOUR, FLASH_COLOUR, OTHER_COLOUR), strict=False))


def _draw_validation(axes: Axes, optimizers: dict[str, list[Row]]) -> None:
    for optimizer, colour in _colours(optimizers).items():
        for number, row in enumerate(optimizers[optimizer]):
            axes.plot(
                list(row.validation),
                list(row.validation.values()),
                color=colour,
                linewidth=1,
                marker=".",
                markersize=4,
                label=None if number else optimizer,
            )
    axes.set_ylabel("validation loss")
    axes.set_xlabel("iteration")
    axes.spines[["top", "right"]].set_visible(False)
    if any(optimizers.values()):
        axes.legend(frameon=False)


def _draw_differences(axes: Axes, optimizers: dict[str, list[Row]]) -> None:
    """Draw each run's validation loss minus the mean of the first optimizer's seeds."""
    first, base = next(iter(optimizers.items()))
    axes.axhline(0, color="black", linewidth=0.5)
    for optimizer, colour in _colours(optimizers).items() if base else ():
        for row in optimizers[optimizer]:
            shared = [step for step in row.validation if all(step in b.validation for b in base)]
            means = [statistics.fmean(b.validation[step] for b in base) for step in shared]
            values = [row.validation[s] - mean for s, mean in zip(shared, means, strict=True)]
            axes.plot(shared, values, color=colour, linewidth=1, marker=".", markersize=4)
    axes.set_ylabel(f"validation loss minus the mean of {first}'s")
    axes.set_xlabel("iteration")
    axes.spines[["top", "right"]].set_visible(False)
