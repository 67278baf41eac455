#!/usr/bin/env python3
"""Train the quickstart's GPT with Adam and with flash_adamw in several parallel layouts.

    python scripts/follow_adam.py --iterations 20

runs each layout on two ranks with Megatron's own training loop, on two GPUs where there are any,
and prints how far losses and gradient norms of flash_adamw are from those of Adam in the same
layout, and, as a measure, how far those of Adam are with a learning rate 1 % higher. The first
loss must be the same: nothing has been stepped.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
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
LAYOUTS = {
    "data parallel": "",
    "overlap": "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 100000",
    "bf16 gradients": "--grad-reduce-in-bf16",
    "tensor parallel": "--tensor-model-parallel-size 2",
    # On GPUs Megatron's norms take it with Transformer Engine or Apex only.
    "tensor and sequence parallel": "--tensor-model-parallel-size 2 --sequence-parallel",
    "pipeline": "--pipeline-model-parallel-size 2",
    "virtual stages": "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    "experts": f"{_MOE} --expert-model-parallel-size 2",
}
LEARNING_RATE = "2.02e-3"  # 1 % above that of the configuration


def grad_norms(run: Run) -> list[float]:
    """Return the gradient norms in a run's log, in order."""
    found = {int(number): float(norm) for number, norm in _NORM.findall(Path(run.log).read_text())}
    return [found[number] for number in sorted(found)]


def deviation(run: Run, reference: Run) -> dict[str, float]:
    """Return the largest relative differences of losses and gradient norms."""
    losses = [abs(run.losses[i] / reference.losses[i] - 1) for i in reference.losses]
    norms = [
        abs(ours / theirs - 1)
        for ours, theirs in zip(grad_norms(run), grad_norms(reference), strict=True)
    ]
    return {"first_loss": losses[0], "loss": max(losses), "grad_norm": max(norms)}


def measure(launcher: Launcher, layouts: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Run each layout three times and return the deviations from Adam."""
    found = {}
    for layout in layouts:
        print(layout, flush=True)
        name = layout.replace(" ", "-")
        flags = LAYOUTS[layout].split()
        adam = launcher.run(f"{name}-adam", ["--optimizer", "adam", *flags])
        flash = launcher.run(f"{name}-flash", ["--optimizer", "flash_adamw", *flags])
        found[layout] = {"flash_adamw": deviation(flash, adam)}
        if layout == "data parallel":
            more = ["--optimizer", "adam", "--lr", LEARNING_RATE, *flags]
            found[layout]["adam, lr + 1 %"] = deviation(launcher.run(f"{name}-lr", more), adam)
    return found


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return the deviations as a table."""
    lines = [f"{'layout':30} {'run':16} {'first loss':>11} {'loss':>9} {'grad norm':>10}"]
    for layout, runs in found.items():
        for run, of in runs.items():
            lines.append(
                f"{layout:30} {run:16} {of['first_loss']:11.1e} {of['loss']:9.1e} "
                f"{of['grad_norm']:10.1e}"
            )
    return "\n".join([*lines, "largest relative differences from Adam in the same layout"])


def main() -> None:
    """Run, print, and write the rows."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=20, help="of each run (default: 20)")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--json", type=Path, help="file for the rows")
    add_run_options(parser, "follow-out")
    options = parser.parse_args()
    check_run_options(parser, options)
    try:
        setup = choose_setup(options)
        found = measure(make_launcher(setup, options, options.iterations), options.layouts)
    except RunFailed as problem:
        sys.exit(f"follow_adam: error: {problem}")
    print(table(found))
    if options.json:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True
        ).stdout.strip()
        environment = {"hardware": setup.hardware, "ranks": setup.ranks, "commit": commit}
        stored = {"environment": environment | setup.versions, "deviations": found}
        options.json.write_text(json.dumps(stored, indent=2) + "\n")


if __name__ == "__main__":
    main()
