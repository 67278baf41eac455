"""Rows, table and plot of scripts/quality.py; put together from the numbers of several calls.

    python scripts/quality_report.py a.json b.json --json all.json --picture all.png

No run may be in two of the records.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickstart_report import ADAM_COLOUR, FLASH_COLOUR
from quickstart_runs import RunFailed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OTHER_COLOURS = ("#009E73", "#999999", "#CC79A7", "#D55E00")
# Iterations to one stored loss, and stored losses to one of the plot of differences.
BLOCK, SMOOTHED = 10, 5


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
    iteration_ms: float | None
    """Median of what Megatron logged, each a mean of 10; None where runs shared a GPU."""
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

    The difference is mean and standard deviation over the seeds that both have; "spread" is the
    range over seeds.
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
                of_seeds = [finals[seed] - first[seed] for seed in both]
                difference = f"{statistics.fmean(of_seeds):+.4f}"
                if len(both) > 1:
                    difference += f" ± {statistics.stdev(of_seeds):.4f}"
            times = [row.iteration_ms for row in rows if row.iteration_ms is not None]
            each = ", ".join(f"{loss:.4f}" for loss in finals.values())
            spread = max(finals.values()) - min(finals.values())
            lines.append(
                f"| {letter} | {optimizer} | {', '.join(map(str, finals))} | "
                f"{statistics.fmean(finals.values()):.4f} ({each}) | {spread:.4f} | {difference} | "
                f"{f'{statistics.median(times):.0f}' if times else '-'} |"
            )
    return "\n".join(lines)


def draw(record: dict[str, Any], path: Path) -> None:
    """Write training losses, their differences in pairs, and validation losses, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    experiments = rows_of(record)
    figure, grid = pyplot.subplots(
        3, len(experiments), figsize=(5.5 * len(experiments), 10), squeeze=False
    )
    figure.set_layout_engine("constrained")
    for column, (letter, optimizers) in enumerate(experiments.items()):
        top, middle, bottom = grid[:, column]
        top.set_title(record["experiments"][letter]["title"])
        _draw_training(top, optimizers)
        _draw_pairs(middle, optimizers)
        _draw_validation(bottom, optimizers)
        for axes in (top, middle, bottom):
            axes.set_xlabel("iteration")
            axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        f"{record['device']}, megatron-core {record['versions']['megatron-core']}, "
        f"torch {record['versions']['torch']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _colours(optimizers: dict[str, list[Row]]) -> dict[str, str]:
    return dict(zip(optimizers, cycle((ADAM_COLOUR, FLASH_COLOUR, *OTHER_COLOURS)), strict=False))


def _steps(losses: list[float]) -> list[int]:
    return [BLOCK * (number + 1) for number in range(len(losses))]


def _draw_training(axes: Axes, optimizers: dict[str, list[Row]]) -> None:
    """Draw each run's training loss, in means of 10 iterations, without the first tenth."""
    for optimizer, colour in _colours(optimizers).items():
        for number, row in enumerate(optimizers[optimizer]):
            first = len(row.losses) // 10
            axes.plot(
                _steps(row.losses)[first:],
                row.losses[first:],
                color=colour,
                linewidth=0.8,
                label=None if number else optimizer,
            )
    axes.set_ylabel("training loss")
    if any(optimizers.values()):
        axes.legend(frameon=False)


def _draw_pairs(axes: Axes, optimizers: dict[str, list[Row]]) -> None:
    """Draw the training loss minus that of the first optimizer's run on the same batches."""
    first, base = next(iter(optimizers.items()))
    of_seed = {row.seed: row.losses for row in base}
    axes.axhline(0, color="black", linewidth=0.5)
    for optimizer, colour in _colours(optimizers).items():
        for row in optimizers[optimizer] if optimizer != first else ():
            pairs = zip(row.losses, of_seed.get(row.seed, ()), strict=False)
            differences = [own - other for own, other in pairs]
            means = [
                statistics.fmean(differences[end - SMOOTHED : end])
                for end in range(SMOOTHED, len(differences) + 1)
            ]
            axes.plot(_steps(differences)[SMOOTHED - 1 :], means, color=colour, linewidth=0.8)
    axes.set_ylabel(f"training loss minus {first}'s,\nsame batches, means of 50 iterations")


def _draw_validation(axes: Axes, optimizers: dict[str, list[Row]]) -> None:
    """Draw each run's validation loss minus the mean of the first optimizer's seeds."""
    first, base = next(iter(optimizers.items()))
    axes.axhline(0, color="black", linewidth=0.5)
    for optimizer, colour in _colours(optimizers).items() if base else ():
        for row in optimizers[optimizer]:
            shared = [step for step in row.validation if all(step in b.validation for b in base)]
            means = [statistics.fmean(b.validation[step] for b in base) for step in shared]
            values = [row.validation[s] - mean for s, mean in zip(shared, means, strict=True)]
            axes.plot(shared, values, color=colour, linewidth=1, marker=".", markersize=5)
    axes.set_ylabel(f"validation loss minus\nthe mean of {first}'s")


def together(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one record of several, which may not have a run twice.

    Raises:
        RunFailed: they are of other text, devices or versions, or have a run twice.
    """
    first, *others = records
    for record in others:
        for key in ("device", "versions", "corpus"):
            if record[key] != first[key]:
                raise RunFailed(f"records differ in {key}: {first[key]} and {record[key]}")
    runs = [run for record in records for run in record["runs"]]
    names = [(run["experiment"], run["optimizer"], run["seed"]) for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RunFailed(f"records have a run twice: {', '.join(map(str, twice[0]))}")
    experiments: dict[str, Any] = {}
    for record in records:
        for letter, described in record["experiments"].items():
            known = experiments.setdefault(letter, {**described, "optimizers": {}})
            # A record made before an optimizer was added to the experiment lacks it.
            optimizers = {**known["optimizers"], **described["optimizers"]}
            if {**known, "optimizers": {}} != {**described, "optimizers": {}} or any(
                optimizers[name] != of for name, of in known["optimizers"].items()
            ):
                raise RunFailed(f"records differ in what experiment {letter} is")
            known["optimizers"] = optimizers
    return {
        **first,
        "commit": ", ".join(dict.fromkeys(record["commit"] for record in records)),
        "commands": list(dict.fromkeys(c for record in records for c in record["commands"])),
        "experiments": dict(sorted(experiments.items())),
        "runs": runs,
    }


def main() -> None:
    """Print the table of one or more records; write them and their plot as one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("records", nargs="+", type=Path, help="numbers of scripts/quality.py")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw them here")
    options = parser.parse_args()
    try:
        record = together([json.loads(path.read_text()) for path in options.records])
    except (OSError, RunFailed) as problem:
        raise SystemExit(f"quality_report: error: {problem}") from None
    print(table(record))
    if options.json:
        options.json.write_text(json.dumps(record) + "\n")
    if options.picture:
        draw(record, options.picture)


if __name__ == "__main__":
    main()
