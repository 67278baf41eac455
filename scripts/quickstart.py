#!/usr/bin/env python3
"""Train a small GPT with Adam and with flash_adamw, resume the latter, and compare them.

Run it through scripts/quickstart.sh, which installs what it needs. The corpus is the interpreter's
own standard library, the model is configs/quickstart_gpt.args. Every run is a process of its own
under torchrun, with its whole output in a log. Runs that finished before with the same settings,
versions and sources are reused.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path

import quickstart_report
from quickstart_runs import RunFailed, shown
from quickstart_setup import (
    OneLineParser,
    add_run_options,
    check_run_options,
    choose_setup,
    git_commit,
    make_launcher,
)

STAGES = 6
MINIMUM_ITERATIONS = 10
# Part of the iterations that the resumed run repeats.
RESUMED_PART = 0.1

_started = float(os.environ.get("QUICKSTART_STARTED", time.time()))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the options; needs nothing but the standard library."""
    parser = OneLineParser(
        prog="scripts/quickstart.sh",
        description="Train a small GPT with Adam and with flash_adamw and compare them.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--iterations",
        type=int,
        default=400,
        metavar="N",
        help=f"training iterations of each run, at least {MINIMUM_ITERATIONS} (default: 400)",
    )
    add_run_options(parser, "quickstart-out")
    parser.add_argument(
        "--check", action="store_true", help="only check these options, and do nothing"
    )
    options = parser.parse_args(argv)
    if options.iterations < MINIMUM_ITERATIONS:
        parser.error(f"--iterations {options.iterations}: at least {MINIMUM_ITERATIONS}")
    check_run_options(parser, options)
    return options


def stage(number: int, title: str) -> None:
    """Print a heading with the time since the start."""
    print(f"[{number}/{STAGES}] {elapsed()} {title}", flush=True)


def elapsed() -> str:
    """Return minutes and seconds since the start."""
    minutes, seconds = divmod(int(time.time() - _started), 60)
    return f"{minutes:02d}:{seconds:02d}"


def main() -> None:
    """Run the six stages; exits with code 1 if one fails."""
    options = parse()
    if options.check:
        return
    setup = choose_setup(options)
    stage(2, "corpus: this Python's standard library")
    launcher = make_launcher(setup, options, options.iterations)
    repeated = max(1, int(options.iterations * RESUMED_PART))
    resumed_from = options.iterations - repeated

    stage(3, f"Adam, {options.iterations} iterations")
    adam = launcher.train("adam", "adam", save_interval=options.iterations)
    stage(4, f"flash_adamw, {options.iterations} iterations")
    flash = launcher.train("flash_adamw", "flash_adamw", save_interval=resumed_from)
    stage(5, f"flash_adamw resumed from iteration {resumed_from} in a fresh process")
    resumed = launcher.resume("flash_adamw_resumed", flash, iteration=resumed_from)

    stage(6, "results")
    comparison = quickstart_report.Comparison(
        adam=adam,
        flash=flash,
        resumed=resumed,
        resumed_from=resumed_from,
        iterations=options.iterations,
        ranks=setup.ranks,
        device=setup.device,
        hardware=setup.hardware,
        versions=setup.versions,
    )
    picture = options.output / "quickstart.png"
    results = options.output / "results.json"
    quickstart_report.draw(comparison, picture)
    record = dataclasses.asdict(comparison)
    record["resume_is_identical"] = comparison.resume_is_identical()
    record["git_commit"] = git_commit()
    results.write_text(json.dumps(record, indent=2) + "\n")
    print(f"\n{quickstart_report.table(comparison)}\n")
    print(f"picture  {shown(picture)}")
    print(f"numbers  {shown(results)}")
    for run in (adam, flash, resumed):
        print(f"log      {shown(Path(run.log))}")
    print(f"done in {elapsed()}")
    if setup.device == "cpu" and not comparison.resume_is_identical():
        raise SystemExit("quickstart: error: the resumed run differs from the one it repeats")


if __name__ == "__main__":
    try:
        main()
    except RunFailed as failure:
        raise SystemExit(f"quickstart: error: {failure}") from None
    except KeyboardInterrupt:
        raise SystemExit("quickstart: interrupted; finished runs are kept") from None
