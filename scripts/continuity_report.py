"""Table, numbers and plot of scripts/continuity.py."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickstart_report import ADAM_COLOUR, FLASH_COLOUR, running_mean
from quickstart_runs import Run
from quickstart_setup import Setup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SEED_COLOUR = "#BBBBBB"
DATA_COLOUR = "#CC79A7"
ORDER_COLOUR = "#555555"
# A difference below is one or two of the last digits that Megatron prints.
SHOWN_DIFFERENCES = (1e-5, 1.0)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Losses of a run after the switch, minus those of another."""

    name: str
    run: Run
    against: Run
    first: float
    """Of the first iteration after the switch, whose weights no step has changed yet."""
    mean_absolute: float
    mean: float
    largest: float
    validation: float


@dataclasses.dataclass(frozen=True)
class Continuity:
    """All runs; those from ``adam_to_flash`` to ``other_data`` start at the switch."""

    iterations: int
    switch: int
    adam: Run
    flash: Run
    adam_to_flash: Run
    adam_to_flash_on_load: Run
    flash_to_adam: Run
    adam_resumed: Run
    other_order: list[Run]
    flash_other_order: list[Run]
    other_data: list[Run]
    other_seeds: list[Run]
    other_order_throughout: list[Run]
    flash_other_seeds: list[Run]
    """Of the same seeds as those of Adam."""

    def after_switch(self) -> range:
        """Return the iterations that all runs have."""
        return range(self.switch + 1, self.iterations + 1)

    def difference(self, name: str, run: Run, against: Run) -> Difference:
        """Compare two runs after the switch."""
        each = self.differences(run, against)
        return Difference(
            name=name,
            run=run,
            against=against,
            first=each[0],
            mean_absolute=round(sum(map(abs, each)) / len(each), 6),
            mean=round(sum(each) / len(each), 6),
            largest=max(map(abs, each)),
            validation=round(run.validation_loss - against.validation_loss, 6),
        )

    def differences(self, run: Run, against: Run) -> list[float]:
        """Return the difference of each iteration after the switch."""
        # Megatron prints six digits after the point.
        return [round(run.losses[i] - against.losses[i], 6) for i in self.after_switch()]

    def rows(self) -> list[Difference]:
        """Return what changes of optimizer did, then what changes anyway."""
        adam, flash = self.adam, self.flash
        rows = [
            ("Adam, converted, flash_adamw", self.adam_to_flash, adam),
            ("flash_adamw, converted, Adam", self.flash_to_adam, flash),
            ("flash_adamw, converted, Adam", self.flash_to_adam, adam),
            ("flash_adamw throughout", flash, adam),
            ("Adam resumed", self.adam_resumed, adam),
            *(("Adam, other order of summation", run, adam) for run in self.other_order),
            *(("flash_adamw, other order", run, flash) for run in self.flash_other_order),
            *(("Adam, other data from the switch", run, adam) for run in self.other_data),
            *(
                ("Adam, other order from the first iteration", run, adam)
                for run in self.other_order_throughout
            ),
            *(("Adam, other seed", run, adam) for run in self.other_seeds),
            *(
                ("flash_adamw throughout, other seed", *pair)
                for pair in zip(self.flash_other_seeds, self.other_seeds, strict=True)
            ),
        ]
        return [self.difference(name, run, against) for name, run, against in rows]

    def on_load_is_the_same(self) -> bool:
        """Return whether conversion on load gave the losses of offline conversion."""
        offline, on_load = self.adam_to_flash, self.adam_to_flash_on_load
        return (
            offline.losses == on_load.losses and offline.validation_loss == on_load.validation_loss
        )

    def seed_spread(self) -> float:
        """Return the range of validation losses of Adam with different seeds."""
        return _range([run.validation_loss for run in (self.adam, *self.other_seeds)])

    def data_spread(self) -> float:
        """Return the range of validation losses of Adam with different data after the switch."""
        return _range([run.validation_loss for run in (self.adam, *self.other_data)])

    def record(self) -> dict[str, Any]:
        """Return everything as plain values."""
        runs = [
            *(self.adam, self.flash, self.adam_to_flash, self.adam_to_flash_on_load),
            *(self.flash_to_adam, self.adam_resumed, *self.other_order, *self.flash_other_order),
            *(*self.other_data, *self.other_seeds, *self.flash_other_seeds),
            *self.other_order_throughout,
        ]
        return {
            "iterations": self.iterations,
            "switch_after": self.switch,
            "parameters": self.flash.parameters,
            "conversion_on_load_gives_the_same_losses": self.on_load_is_the_same(),
            "validation_spread_of_seeds": self.seed_spread(),
            "validation_spread_of_data_after_the_switch": self.data_spread(),
            "differences_after_the_switch": [
                {
                    "what": row.name,
                    "run": row.run.name,
                    "against": row.against.name,
                    **{field: getattr(row, field) for field in _MEASURES},
                }
                for row in self.rows()
            ],
            "runs": {
                run.name: {
                    "validation_loss": run.validation_loss,
                    "losses": [round(loss, 6) for loss in run.losses.values()],
                    "first_iteration": min(run.losses),
                }
                for run in runs
            },
        }


_NUMBERS = re.compile(r"\[[-\d.,e\s]+\]")
_MEASURES = ("first", "mean_absolute", "mean", "largest", "validation")
_HEADINGS = ("first", "mean |d|", "mean d", "largest |d|", "d validation")


def table(continuity: Continuity) -> str:
    """Return the table and what is said below it."""
    rows: list[tuple[str, ...]] = [
        ("difference of losses after the switch", "against", *_HEADINGS, "validation")
    ]
    for row in continuity.rows():
        numbers = [f"{getattr(row, measure):+.5f}" for measure in _MEASURES]
        validation = f"{row.run.validation_loss:.5f}"
        rows.append((row.name, row.against.name, *numbers, validation))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    same = "identical" if continuity.on_load_is_the_same() else "DIFFERENT"
    return "\n".join(
        [
            *lines,
            "",
            f"validation loss of Adam throughout {continuity.adam.validation_loss:.4f}; over "
            f"{1 + len(continuity.other_seeds)} seeds within {continuity.seed_spread():.4f}, over "
            f"{1 + len(continuity.other_data)} orders of data after the switch within "
            f"{continuity.data_spread():.4f}",
            f"losses after conversion on load and after megatron-flashoptim convert: {same}",
        ]
    )


def draw(continuity: Continuity, setup: Setup, path: Path) -> None:
    """Write the plot: both directions, loss curves above and differences below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, 2, figsize=(13, 8), sharex="row", sharey="row", layout="constrained"
    )
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", alpha=0.3)
    for column, direction in enumerate(_directions(continuity)):
        _draw_losses(axes[0, column], continuity, direction)
        _draw_differences(axes[1, column], continuity, direction)
    figure.supxlabel(
        f"GPT with {continuity.flash.parameters / 1e6:.2f}M parameters on bytes, {setup.ranks} "
        f"{setup.device.upper()} ranks, megatron-core {setup.versions['megatron-core']}, torch "
        f"{setup.versions['torch']}. Seeds differ in initialization and data.",
        fontsize=9,
        color="#555555",
    )
    figure.savefig(path, dpi=130, facecolor="white")
    pyplot.close(figure)


@dataclasses.dataclass(frozen=True)
class _Direction:
    """A change of optimizer, and runs of the optimizer before it that differ otherwise."""

    before: str
    after: str
    colours: tuple[str, str]
    whole: Run
    changed: Run
    order: list[Run]
    data: list[Run]
    seeds: list[Run]


def _directions(continuity: Continuity) -> tuple[_Direction, _Direction]:
    return (
        _Direction(
            before="Adam",
            after="flash_adamw",
            colours=(ADAM_COLOUR, FLASH_COLOUR),
            whole=continuity.adam,
            changed=continuity.adam_to_flash,
            order=continuity.other_order,
            data=continuity.other_data,
            seeds=continuity.other_seeds,
        ),
        _Direction(
            before="flash_adamw",
            after="Adam",
            colours=(FLASH_COLOUR, ADAM_COLOUR),
            whole=continuity.flash,
            changed=continuity.flash_to_adam,
            order=continuity.flash_other_order,
            data=[],
            seeds=continuity.flash_other_seeds,
        ),
    )


def _draw_losses(axes: Axes, continuity: Continuity, direction: _Direction) -> None:
    whole, changed = direction.whole, direction.changed
    for number, run in enumerate(direction.seeds):
        axes.plot(
            list(run.losses),
            list(run.losses.values()),
            color=SEED_COLOUR,
            lw=0.9,
            label=None if number else f"{direction.before}, other seeds",
        )
    for run, colour, width, label in (
        (whole, direction.colours[0], 3, f"{direction.before} throughout"),
        (changed, direction.colours[1], 1.3, f"converted, {direction.after} from here"),
    ):
        axes.plot(
            list(run.losses),
            list(run.losses.values()),
            color=colour,
            lw=width,
            label=f"{label}, validation loss {run.validation_loss:.4f}",
        )
    axes.axvline(continuity.switch + 0.5, color="black", lw=0.8, ls=":")
    start = max(1, continuity.switch - continuity.iterations // 4)
    shown = [loss for i, loss in whole.losses.items() if i >= start]
    margin = 0.25 * (max(shown) - min(shown))
    axes.set(
        xlabel="iteration",
        ylabel="training loss",
        xlim=(start, continuity.iterations),
        ylim=(min(shown) - margin, max(shown) + margin),
    )
    axes.set_title(f"{direction.before}, then {direction.after}", loc="left")
    axes.legend(frameon=False, fontsize=9)


def _draw_differences(axes: Axes, continuity: Continuity, direction: _Direction) -> None:
    iterations = list(continuity.after_switch())
    window = max(1, len(iterations) // 10)

    def draw_runs(runs: list[Run], colour: str, width: float, label: str) -> None:
        for number, run in enumerate(runs):
            each = [abs(d) for d in continuity.differences(run, direction.whole)]
            axes.plot(
                iterations,
                running_mean(each, window),
                color=colour,
                lw=width,
                label=None if number else label,
            )

    draw_runs(direction.seeds, SEED_COLOUR, 0.9, f"{direction.before}, other seeds")
    draw_runs(
        direction.data, DATA_COLOUR, 0.9, f"{direction.before}, other data from the switch on"
    )
    draw_runs(
        direction.order, ORDER_COLOUR, 1.1, f"{direction.before}, gradients summed in other order"
    )
    draw_runs([direction.changed], direction.colours[1], 2.2, f"converted to {direction.after}")
    axes.axhline(
        continuity.seed_spread(),
        color=SEED_COLOUR,
        ls="--",
        label=f"spread of Adam's validation loss over {1 + len(continuity.other_seeds)} seeds",
    )
    axes.set_yscale("log")
    axes.set(
        xlabel="iteration",
        ylabel="absolute difference of training loss",
        xlim=(continuity.switch + 1, continuity.iterations),
        ylim=SHOWN_DIFFERENCES,
    )
    axes.set_title(
        f"Difference to {direction.before} throughout (mean of the last {window})", loc="left"
    )
    axes.legend(frameon=False, fontsize=9, loc="upper right", bbox_to_anchor=(1, 0.76))


def as_json(record: dict[str, Any]) -> str:
    """Return a record with each list of numbers in one line."""
    text = json.dumps(record, indent=1)
    return _NUMBERS.sub(lambda found: " ".join(found[0].split()), text) + "\n"


def _range(values: list[float]) -> float:
    return round(max(values) - min(values), 6)
