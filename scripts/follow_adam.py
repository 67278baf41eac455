#!/usr/bin/env python3
"""Train the quickstart's GPT with Adam and with flash_adamw in several parallel layouts.

    python scripts/follow_adam.py --iterations 20

runs each layout on two ranks with Megatron's own training loop, on two GPUs where there are any,
and prints how far losses and gradient norms of flash_adamw are from those of Adam in the same
layout, and, as a measure, how far those of Adam are with a learning rate 1 % higher. The first
loss must be the same: nothing has been stepped. The rows hold every iteration's figures. Layouts
that need GPUs, two ranks, Transformer Engine or Apex are left out where there are none; --ranks 1
will do for FP8.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from quickstart_runs import Launcher, Run, RunFailed
from quickstart_setup import (
    REPOSITORY,
    OneLineParser,
    add_run_options,
    check_run_options,
    choose_setup,
    make_launcher,
)

_NORM = re.compile(r"iteration +(\d+)/.*grad norm: ([\d.]+)")
_MOE = (
    "--num-experts 4 --moe-router-topk 2 --disable-bias-linear --moe-token-dispatcher-type alltoall"
)
_GROUPED = "--moe-grouped-gemm --expert-model-parallel-size 2"
_SEQUENCE_PARALLEL = "--tensor-model-parallel-size 2 --sequence-parallel"
_TE = "--transformer-impl transformer_engine"
_FP8 = "--fp8-format hybrid --fp8-recipe"
_RECIPES = ("delayed", "tensorwise", "blockwise")
LAYOUTS = {
    "data parallel": "",
    "overlap": "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 100000",
    "bf16 gradients": "--grad-reduce-in-bf16",
    "tensor parallel": "--tensor-model-parallel-size 2",
    "tensor and sequence parallel": _SEQUENCE_PARALLEL,
    "pipeline": "--pipeline-model-parallel-size 2",
    "virtual stages": "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    "experts": f"{_MOE} --expert-model-parallel-size 2",
    "nccl user buffers": "--use-nccl-ub --disable-symmetric-registration",
    "transformer engine": _TE,
    "transformer engine, sequence parallel": f"{_TE} {_SEQUENCE_PARALLEL}",
    "transformer engine, grouped experts": f"{_TE} {_MOE} {_GROUPED}",
    **{f"fp8 {recipe}": f"{_TE} {_FP8} {recipe}" for recipe in _RECIPES},
    **{f"fp8 weights {r}": f"{_TE} {_FP8} {r} --fp8-param-gather" for r in _RECIPES},
}
# Which no CPU has, and of these the ones with Transformer Engine.
NEEDS_GPUS = ("nccl user buffers",)
NEEDS_TE = tuple(name for name, flags in LAYOUTS.items() if _TE in flags)
# On GPUs, of Megatron's own norms only Apex's take sequence parallelism.
NEEDS_APEX = ("tensor and sequence parallel",)
NEEDS_TWO_RANKS = tuple(name for name, flags in LAYOUTS.items() if "-parallel-size 2" in flags)
# A quarter of the configuration's learning rate. With the whole of it, and the warm-up of a run of
# 15 iterations, one gradient norm is ten times its neighbours, or not, by the last bits.
RUNS = {
    "adam": "--optimizer adam --lr 5e-4",
    "flash_adamw": "--optimizer flash_adamw --lr 5e-4",
    "adam, lr + 1 %": "--optimizer adam --lr 5.05e-4",
}
Figures = dict[str, list[float]]


def grad_norms(run: Run) -> list[float]:
    """Return the gradient norms in a run's log, in order."""
    found = {int(number): float(norm) for number, norm in _NORM.findall(Path(run.log).read_text())}
    return [found[number] for number in sorted(found)]


def figures(run: Run) -> Figures:
    """Return losses and gradient norms of a run, iteration by iteration."""
    return {"losses": list(run.losses.values()), "grad_norms": grad_norms(run)}


def deviations(ours: list[float], theirs: list[float]) -> list[float]:
    """Return the relative differences, iteration by iteration."""
    return [abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)]


def layouts_of(device: str, ranks: int) -> Iterator[str]:
    """Yield the layouts that can be trained here."""
    has_te, has_apex = (
        importlib.util.find_spec(name) is not None for name in ("transformer_engine", "apex")
    )
    for name in LAYOUTS:
        if name in NEEDS_TWO_RANKS and ranks < 2:
            continue
        if device == "cuda":
            if (has_te or name not in NEEDS_TE) and (has_apex or name not in NEEDS_APEX):
                yield name
        elif name not in (*NEEDS_GPUS, *NEEDS_TE):
            yield name


def measure(launcher: Launcher, layouts: list[str]) -> dict[str, dict[str, Figures]]:
    """Run each layout with each optimizer and return their figures."""
    found: dict[str, dict[str, Figures]] = {}
    for layout in layouts:
        print(layout, flush=True)
        found[layout] = {}
        for name, flags in RUNS.items():
            folder = f"{layout} {name}".replace(" ", "-").replace(",", "").replace("%", "percent")
            run = launcher.run(folder, [*flags.split(), *LAYOUTS[layout].split()])
            found[layout][name] = figures(run)
    return found


def table(found: dict[str, dict[str, Figures]]) -> str:
    """Return the largest deviations from Adam as a table."""
    lines = [
        f"{'layout':38} {'run':15} {'first loss':>10} {'loss':>8} {'grad norm':>9} "
        f"{'median':>8} {'largest at':>10}"
    ]
    for layout, runs in found.items():
        reference = runs["adam"]
        for run, of in runs.items():
            if of is reference:
                continue
            losses, norms = (deviations(of[kind], reference[kind]) for kind in reference)
            lines.append(
                f"{layout:38} {run:15} {losses[0]:10.1e} {max(losses):8.1e} {max(norms):9.1e} "
                f"{statistics.median(norms):8.1e} {norms.index(max(norms)) + 1:10}"
            )
    end = "largest relative differences from Adam in the same layout; of norms the median too,"
    return "\n".join([*lines, f"{end} and the iteration of the largest"])


def main() -> None:
    """Run, print, and write the rows."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=20, help="of each run (default: 20)")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="default: all")
    parser.add_argument("--json", type=Path, help="file for the rows")
    add_run_options(parser, "follow-out")
    options = parser.parse_args()
    check_run_options(parser, options)
    try:
        setup = choose_setup(options)
        layouts = options.layouts or list(layouts_of(setup.device, setup.ranks))
        found = measure(make_launcher(setup, options, options.iterations), layouts)
    except RunFailed as problem:
        sys.exit(f"follow_adam: error: {problem}")
    print(table(found))
    if options.json:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True
        ).stdout.strip()
        environment = {"hardware": setup.hardware, "ranks": setup.ranks, "commit": commit}
        stored = {"environment": environment | setup.versions, "figures": found}
        options.json.write_text(json.dumps(stored, indent=2) + "\n")


if __name__ == "__main__":
    main()
