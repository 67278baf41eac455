#!/usr/bin/env python3
"""The update actually applied, against exact AdamW, over a grid of gradients.

Every cell (kind of gradient, gradient scale, beta2) runs fp64 AdamW, flashoptim's format and ours
on the same gradients and compares the updates. Ours go through the optimizer's own step on an fp32
parameter, so that the moments' codes are all that differs; flashoptim's format is ``PaperAdamW``
below, from the paper's formulas. docs/stress-grid.md has the results.

    python scripts/stress_grid.py --json grid.json
    python scripts/stress_grid.py --quick
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron_flashoptim.codec import decode_exp_avg_sq
from megatron_flashoptim.codec.spec import GROUP_SIZE, ExpAvgSqCode, Rounding
from megatron_flashoptim.optim.config import ROUNDING_POLICIES, FlashOptimConfig, RoundingPolicy
from megatron_flashoptim.optim.hyper import HyperRow, HyperTable
from megatron_flashoptim.optim.rules import rule_of
from megatron_flashoptim.optim.segments import Segment, SegmentTable
from megatron_flashoptim.optim.shard import BucketShard
from megatron_flashoptim.optim.step import reference_step_

BETA1 = 0.9
# Steps by beta2: ten time constants of v and more where that is quick, four at 0.999.
STEPS = {0.95: 400, 0.98: 800, 0.99: 1500, 0.995: 2000, 0.999: 4000}
BETA2S = (0.95, 0.99, 0.999)
SCALES = (1.0, 1e-4, 1e-6, 1e-8, 1e-10)
# Gradients shrink or grow by this over the run.
DRIFT = 30.0
SPARSE_ZEROS = 0.95
STUDENT_FREEDOM = 3
KINDS = {
    "stationary": "normal, sizes of elements lognormal(0, 1)",
    "shrinking": f"the same, shrinking {DRIFT:.0f} times over the run",
    "growing": f"the same, growing {DRIFT:.0f} times over the run",
    "sparse": f"the same, {SPARSE_ZEROS:.0%} exact zeros in every step",
    "heavy_draws": f"Student's t, {STUDENT_FREEDOM} degrees of freedom, sizes lognormal(0, 1)",
    "heavy_sizes": "normal, sizes of elements lognormal(0, 3)",
}
# For a closer look: spreads of the sizes between those of the grid.
SPREAD = {"sizes_1.5": 1.5, "sizes_2": 2.0, "heavy_sizes": 3.0}
GROUPS = 256
SEED = 0
# The errors are those of the last tenth of the run.
WINDOW = 0.1
# Relative to the gradient scale, as 1e-8 is to gradients of order 1. An absolute 1e-8 would drown
# gradients of 1e-8 and 1e-10 and every error of v with them; its error is shown beside.
RELATIVE_EPS = 1e-8
DEFAULT_EPS = 1e-8

PAPER = "paper"
CODES: tuple[ExpAvgSqCode, ...] = ("sqrt", "fourth_root")

# Bars: of the update's relative error in the stationary cells, up to beta2 0.99 and beyond, and of
# overshoot and bias in every cell.
BARS = ("error", "overshoot", "bias")
ERROR_BAR, ERROR_BAR_LARGE_BETA2 = 0.20, 0.35
OVERSHOOT_BAR = 4.0
BIAS_BAR = 0.03


@dataclass(frozen=True)
class Result:
    """What one format did in one cell, over the last tenth of the run unless said otherwise.

    Attributes:
        error: relative L2 error of the update.
        error_step: median over the steps of the relative L2 error in one step.
        error_default_eps: ``error`` with eps 1e-8 whatever the gradient scale.
        overshoot: largest |update| over the exact largest.
        overshoot_step: median over the steps of that ratio in one step.
        overshoot_run: that ratio over the whole run.
        bias: mean of sqrt(v) over its exact value, minus 1, of elements whose exact v is positive.
        bias_used: that mean weighted by the square of the exact update.
    """

    error: float
    error_step: float
    error_default_eps: float
    overshoot: float
    overshoot_step: float
    overshoot_run: float
    bias: float
    bias_used: float

    def missed(self, kind: str, beta2: float) -> list[str]:
        """Return the names of the bars that are missed; a NaN misses each."""
        error_bar = ERROR_BAR if beta2 <= 0.99 else ERROR_BAR_LARGE_BETA2
        met = {
            "error": kind != "stationary" or self.error <= error_bar,
            "overshoot": self.overshoot <= OVERSHOOT_BAR,
            "bias": abs(self.bias) <= BIAS_BAR,
        }
        return [bar for bar in BARS if not met[bar]]


@dataclass(frozen=True)
class Cell:
    """One cell of the grid: ``results`` by name of the format."""

    kind: str
    scale: float
    beta2: float
    steps: int
    results: dict[str, Result]


class Gradients:
    """Gradients of all kinds from the same draws, which depend on neither kinds nor scale.

    The size of an element at the start of the run is ``scale`` times a lognormal number.
    """

    def __init__(
        self, kinds: Sequence[str], *, scale: float, groups: int, steps: int, seed: int
    ) -> None:
        self._kinds, self._scale, self._steps = kinds, scale, steps
        self._generator = torch.Generator().manual_seed(seed)
        self._log_size = self._normal(groups * GROUP_SIZE)

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator)

    def draw(self, step: int) -> torch.Tensor:
        """Return the gradients of the next step, numbered from 1: fp32 ``(kinds, elements)``."""
        numel = self._log_size.numel()
        size = self._log_size.exp() * self._scale
        normal = self._normal(numel)
        is_hit = torch.rand(numel, generator=self._generator) >= SPARSE_ZEROS
        chi2 = self._normal(STUDENT_FREEDOM, numel).square().mean(dim=0)
        drift = DRIFT ** (step / self._steps)
        rows = {
            "stationary": size * normal,
            "shrinking": size * normal / drift,
            "growing": size * normal * drift,
            "sparse": size * normal * is_hit,
            "heavy_draws": size * normal / chi2.sqrt(),
        }
        for kind, spread in SPREAD.items():
            rows[kind] = (spread * self._log_size).exp() * self._scale * normal
        return torch.stack([rows[kind] for kind in self._kinds])


class Adam(ABC):
    """An Adam of learning rate 1 without weight decay; ``shape`` is kinds by elements of each.

    ``state`` holds the tensors that a step modifies in place.
    """

    state: Sequence[torch.Tensor]

    def __init__(self, shape: tuple[int, int], *, beta2: float) -> None:
        self._shape, self._beta2 = shape, beta2

    @abstractmethod
    def step(self, gradient: torch.Tensor, *, step: int, eps: float) -> torch.Tensor:
        """Advance the state by fp32 gradients and return the update, both ``(kinds, elements)``."""

    @abstractmethod
    def root(self) -> torch.Tensor:
        """Return the square root of the stored v, fp64 ``(kinds, elements)``."""

    def preview(self, gradient: torch.Tensor, *, step: int, eps: float) -> torch.Tensor:
        """Return the update of ``step``, leaving the state as it is."""
        before = [tensor.clone() for tensor in self.state]
        update = self.step(gradient, step=step, eps=eps)
        for tensor, value in zip(self.state, before, strict=True):
            tensor.copy_(value)
        return update


class ExactAdamW(Adam):
    """AdamW in fp64."""

    def __init__(self, shape: tuple[int, int], *, beta2: float) -> None:
        super().__init__(shape, beta2=beta2)
        self._m = torch.zeros(shape, dtype=torch.float64)
        self._v = torch.zeros_like(self._m)
        self.state = (self._m, self._v)

    def step(self, gradient: torch.Tensor, *, step: int, eps: float) -> torch.Tensor:
        exact = gradient.double()
        self._m.mul_(BETA1).add_(exact, alpha=1 - BETA1)
        self._v.mul_(self._beta2).addcmul_(exact, exact, value=1 - self._beta2)
        return _update(self._m, self._v, beta2=self._beta2, step=step, eps=eps)

    def root(self) -> torch.Tensor:
        return self._v.sqrt()


class PaperAdamW(Adam):
    """AdamW whose moments are stored as flashoptim does (arXiv 2602.23349), in plain fp32.

    Groups of 32, fp16 scales, companded codes computed against the group's largest magnitude and
    rounded to nearest; a small v may get code 0.
    """

    def __init__(self, shape: tuple[int, int], *, beta2: float) -> None:
        super().__init__(shape, beta2=beta2)
        self._m_code = torch.zeros(shape[0] * shape[1] // GROUP_SIZE, GROUP_SIZE)
        self._v_code = torch.zeros_like(self._m_code)
        self._m_scale = torch.zeros(len(self._m_code), 1, dtype=torch.float16)
        self._v_scale = torch.zeros_like(self._m_scale)
        self.state = (self._m_code, self._m_scale, self._v_code, self._v_scale)

    def step(self, gradient: torch.Tensor, *, step: int, eps: float) -> torch.Tensor:
        gradient = gradient.view(-1, GROUP_SIZE)
        z = self._m_code / 127
        m = self._m_scale.float() * (z / (2 - z.abs()))
        m = BETA1 * m + (1 - BETA1) * gradient
        v = self._group_root().square()
        v = self._beta2 * v + (1 - self._beta2) * gradient.square()

        absmax = m.abs().amax(dim=1, keepdim=True)
        x = torch.where(absmax > 0, m / absmax, 0.0)
        self._m_code.copy_(torch.round(127 * (2 * x / (1 + x.abs()))))
        self._m_scale.copy_(absmax)
        root = v.sqrt()
        largest = root.amax(dim=1, keepdim=True)
        self._v_code.copy_(torch.round(255 * torch.where(largest > 0, root / largest, 0.0)))
        self._v_scale.copy_(largest)
        return _update(m, v, beta2=self._beta2, step=step, eps=eps).view(self._shape)

    def _group_root(self) -> torch.Tensor:
        return self._v_scale.float() * (self._v_code / 255)

    def root(self) -> torch.Tensor:
        return self._group_root().double().view(self._shape)


def _update(
    m: torch.Tensor, v: torch.Tensor, *, beta2: float, step: int, eps: float
) -> torch.Tensor:
    denominator = (v / (1 - beta2**step)).sqrt() + eps
    return m / (1 - BETA1**step) / denominator


class FlashAdamW(Adam):
    """The optimizer's own step on an fp32 parameter: its weight after a step from 0 is the update.

    Every kind is a parameter of its own in one shard. ``code`` and ``rounding`` are those of the
    second moment, ``seed`` that of stochastic rounding.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        beta2: float,
        code: ExpAvgSqCode,
        rounding: Rounding,
        seed: int,
    ) -> None:
        super().__init__(shape, beta2=beta2)
        self._rounding, self._seed = rounding, seed
        groups = shape[1] // GROUP_SIZE
        parameters = [Segment(kind * groups, 0, kind, 0) for kind in range(shape[0])]
        segments = SegmentTable(parameters, shape[0] * groups, "cpu")
        zeros = torch.zeros(shape[0] * shape[1])
        self._shard = BucketShard(zeros, zeros.clone(), segments, exp_avg_sq_code=code)
        self._table = HyperTable(1, "cpu")
        self.state = [tensor for _, tensor in self._shard.state()]

    def step(self, gradient: torch.Tensor, *, step: int, eps: float) -> torch.Tensor:
        group = {"lr": 1.0, "weight_decay": 0.0, "betas": (BETA1, self._beta2), "eps": eps}
        hyper = HyperRow.of(rule_of("flash_adamw"), {**group, "step": step})
        self._table.fill([hyper], seed=self._seed)
        self._shard.param.zero_()
        self._shard.grad.copy_(gradient.flatten())
        reference_step_(
            self._shard, self._table, exp_avg_sq_rounding=self._rounding, master_rounding="nearest"
        )
        return -self._shard.param.view(self._shape)

    def root(self) -> torch.Tensor:
        shard = self._shard
        code = shard.exp_avg_sq_code
        assert shard.exp_avg_sq is not None and shard.exp_avg_sq_scale is not None
        v = decode_exp_avg_sq(shard.exp_avg_sq, shard.exp_avg_sq_scale, code=code)
        return v.double().sqrt().view(self._shape)


class Comparison:
    """What the results of one format are made of, per step and kind of gradient."""

    def __init__(self) -> None:
        self._largest: list[torch.Tensor] = []
        self._sums: list[torch.Tensor] = []

    def add(self, update: torch.Tensor, exact: torch.Tensor) -> None:
        """Take in the updates of any step."""
        self._largest.append(torch.stack([x.abs().amax(dim=1).double() for x in (update, exact)]))

    def add_last(
        self,
        *,
        updates: tuple[torch.Tensor, torch.Tensor],
        updates_default_eps: tuple[torch.Tensor, torch.Tensor],
        roots: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Take in a step of the last tenth: pairs of what the format has and what is exact."""
        sums = []
        for update, exact in (updates, updates_default_eps):
            sums += [(update - exact).square(), exact.square()]
        root, exact_root = roots
        is_counted = exact_root > 0
        excess = torch.where(is_counted, root / exact_root - 1, 0.0)
        used = torch.where(is_counted, updates[1].square(), 0.0)
        sums += [excess, is_counted.double(), excess * used, used]
        self._sums.append(torch.stack([value.sum(dim=1) for value in sums]))

    def results(self) -> list[Result]:
        """Return one result per kind."""
        largest, sums = torch.stack(self._largest), torch.stack(self._sums)
        total, last = sums.sum(dim=0), largest[-len(sums) :]
        columns = (
            (total[0] / total[1]).sqrt(),
            (sums[:, 0] / sums[:, 1]).sqrt().median(dim=0).values,
            (total[2] / total[3]).sqrt(),
            last[:, 0].amax(dim=0) / last[:, 1].amax(dim=0),
            (last[:, 0] / last[:, 1]).median(dim=0).values,
            largest[:, 0].amax(dim=0) / largest[:, 1].amax(dim=0),
            total[4] / total[5],
            total[6] / total[7],
        )
        return [Result(*row) for row in torch.stack(columns, dim=1).tolist()]


def run_cells(
    kinds: Sequence[str],
    *,
    scale: float,
    beta2: float,
    steps: int,
    groups: int = GROUPS,
    policies: Sequence[RoundingPolicy] = ("auto",),
    seed: int = SEED,
) -> list[Cell]:
    """Run the cells of one gradient scale and beta2: the paper's format, ours as asked for.

    Args:
        kinds: names from ``KINDS`` or ``SPREAD``.
        scale: gradient scale.
        beta2: as in Adam.
        steps: steps of the run.
        groups: groups of 32 elements per cell.
        policies: values of ``--flash-rounding``.
        seed: seed of gradients and stochastic rounding.
    """
    shape = (len(kinds), groups * GROUP_SIZE)
    exact = ExactAdamW(shape, beta2=beta2)
    names: dict[str, tuple[str, Rounding]] = {PAPER: (PAPER, "nearest")}
    formats: dict[tuple[str, Rounding], Adam] = {names[PAPER]: PaperAdamW(shape, beta2=beta2)}
    for code in CODES:
        for policy in policies:
            config = FlashOptimConfig(exp_avg_sq_code=code, rounding=policy)
            rounding = config.resolve_rounding(beta2)
            names[f"{code} {policy}"] = (code, rounding)
            if (code, rounding) not in formats:
                formats[code, rounding] = FlashAdamW(
                    shape, beta2=beta2, code=code, rounding=rounding, seed=seed
                )
    comparisons = {key: Comparison() for key in formats}
    gradients = Gradients(kinds, scale=scale, groups=groups, steps=steps, seed=seed)
    for step in range(1, steps + 1):
        gradient = gradients.draw(step)
        is_last = step > steps - max(1, round(WINDOW * steps))
        eps = RELATIVE_EPS * scale
        if is_last:
            exact_default = exact.preview(gradient, step=step, eps=DEFAULT_EPS)
        exact_update = exact.step(gradient, step=step, eps=eps)
        for key, adam in formats.items():
            if is_last:
                default = adam.preview(gradient, step=step, eps=DEFAULT_EPS)
            update = adam.step(gradient, step=step, eps=eps)
            comparisons[key].add(update, exact_update)
            if is_last:
                comparisons[key].add_last(
                    updates=(update, exact_update),
                    updates_default_eps=(default, exact_default),
                    roots=(adam.root(), exact.root()),
                )
    results = {key: comparison.results() for key, comparison in comparisons.items()}
    return [
        Cell(kind, scale, beta2, steps, {name: results[names[name]][i] for name in names})
        for i, kind in enumerate(kinds)
    ]


def table(cells: Sequence[Cell]) -> str:
    """Return a Markdown table; a number that misses its bar has a ``!`` behind it."""
    names = list(cells[0].results)
    heading = ["gradients", "scale", "beta2", "steps", *(f"{n}: err, over, bias" for n in names)]
    rows = [heading, ["---"] * len(heading)]
    for cell in cells:
        row = [cell.kind, f"{cell.scale:g}", f"{cell.beta2:g}", str(cell.steps)]
        for name in names:
            result = cell.results[name]
            missed = result.missed(cell.kind, cell.beta2)
            columns = {
                "error": f"{result.error:.2f}" if result.error < 100 else f"{result.error:.0e}",
                "overshoot": f"{result.overshoot:.3g}",
                "bias": f"{result.bias:+.3f}" if abs(result.bias) < 1 else f"{result.bias:+.2g}",
            }
            row.append(" ".join(columns[n] + "!" * (n in missed) for n in columns))
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def summary(cells: Sequence[Cell]) -> str:
    """Return, for each format, in how many cells it misses which bars."""
    lines = []
    for name in cells[0].results:
        missed = [cell.results[name].missed(cell.kind, cell.beta2) for cell in cells]
        counts = (f"{bar} {sum(bar in m for m in missed)}" for bar in BARS)
        met = sum(not m for m in missed)
        lines.append(
            f"{name}: {met} of {len(cells)} cells meet all bars; misses {', '.join(counts)}"
        )
    return "\n".join(lines)


def _append_run(path: Path, options: argparse.Namespace, cells: Sequence[Cell]) -> None:
    """Write a run to a JSON file, beside the runs of other commands that it holds."""
    rows = [asdict(cell) for cell in cells]
    for row in rows:
        for result in row["results"].values():
            for key, value in result.items():
                # JSON has neither NaN nor Infinity.
                result[key] = float(f"{value:.4g}") if math.isfinite(value) else None
    command = " ".join(["scripts/stress_grid.py", *sys.argv[1:]])
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    run = {
        "command": command,
        "torch": torch.__version__,
        "seed": options.seed,
        "elements_per_cell": options.groups * GROUP_SIZE,
        "cells": rows,
    }
    runs = [*(other for other in runs if other["command"] != command), run]
    text = json.dumps({"runs": runs}, allow_nan=False, indent=1) + "\n"
    path.write_text(re.sub(r"{[^{}]*}", lambda match: " ".join(match[0].split()), text))


def main() -> None:
    """Run the grid and print it."""
    kinds = "; ".join(f"{kind}: {meaning}" for kind, meaning in KINDS.items())
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=f"Kinds: {kinds}.")
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS, *SPREAD], default=list(KINDS))
    parser.add_argument("--scales", nargs="+", type=float, default=SCALES)
    parser.add_argument("--beta2", nargs="+", type=float, choices=list(STEPS), default=BETA2S)
    parser.add_argument("--rounding", nargs="+", choices=ROUNDING_POLICIES, default=["auto"])
    parser.add_argument("--steps-factor", type=float, default=1.0, help=f"times {STEPS}")
    parser.add_argument("--groups", type=int, default=GROUPS, help="groups of 32 per cell")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--json", type=Path, help="file to add the results to")
    parser.add_argument("--quick", action="store_true", help="few groups, two scales, short runs")
    options = parser.parse_args()
    if options.quick:
        options.groups, options.scales, options.steps_factor = 32, (1.0, 1e-8), 0.25
    torch.set_num_threads(1)
    cells = []
    for beta2 in options.beta2:
        for scale in options.scales:
            began = time.monotonic()
            cells += run_cells(
                options.kinds,
                scale=scale,
                beta2=beta2,
                steps=round(STEPS[beta2] * options.steps_factor),
                groups=options.groups,
                policies=options.rounding,
                seed=options.seed,
            )
            seconds = f"{time.monotonic() - began:.0f} s"
            print(f"beta2 {beta2:g} scale {scale:g}: {seconds}", file=sys.stderr)
    cells.sort(key=lambda cell: (options.kinds.index(cell.kind), cell.beta2, -cell.scale))
    print(table(cells), summary(cells), sep="\n\n")
    if options.json:
        _append_run(options.json, options, cells)


if __name__ == "__main__":
    main()
