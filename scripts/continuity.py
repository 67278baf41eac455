#!/usr/bin/env python3
"""Train half way with Adam, convert, go on with flash_adamw; and the reverse; compare losses.

    python scripts/continuity.py

Every run is Megatron's own training loop under torchrun, and every conversion is the installed
``megatron-flashoptim convert``. What changing the optimizer does is compared with what changes
anyway: the same Adam with gradients summed in another order, with other data after the switch, and
with other seeds. Runs that finished before with the same settings and sources are reused.

Without Transformer Engine and Apex all Adam runs are made with ``--resumable-adam`` of
scripts/pretrain_gpt.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import continuity_report
from continuity_report import Continuity
from quickstart_runs import Launcher, Run, RunFailed, run_logged, shown, value_of
from quickstart_setup import (
    REPOSITORY,
    OneLineParser,
    add_run_options,
    check_run_options,
    choose_setup,
    git_commit,
    make_launcher,
)

MINIMUM_ITERATIONS = 20
ADAM = ("--optimizer", "adam", "--resumable-adam")
FLASH = ("--optimizer", "flash_adamw")
# Beside that of configs/quickstart_gpt.args.
OTHER_SEEDS = (1235, 1236)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the options."""
    parser = OneLineParser(
        prog="continuity", description=(__doc__ or "").split("\n")[0], allow_abbrev=False
    )
    parser.add_argument(
        "--iterations",
        type=int,
        default=200,
        metavar="N",
        help="iterations of a whole run, the switch is after half of them (default: 200)",
    )
    add_run_options(parser, "continuity-out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="numbers (default: in --output)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="plot (default: in --output)")
    options = parser.parse_args(argv)
    if options.iterations < MINIMUM_ITERATIONS or options.iterations % 2:
        parser.error(
            f"--iterations {options.iterations}: an even number, at least {MINIMUM_ITERATIONS}"
        )
    check_run_options(parser, options)
    options.json = options.json or options.output / "continuity.json"
    options.picture = options.picture or options.output / "continuity.png"
    return options


def evaluate_all_that_is_held_out(launcher: Launcher, corpus: Path) -> Launcher:
    """Return a launcher whose validation losses are those of one epoch of the held-out text."""
    tokens = json.loads((corpus / "corpus.json").read_text())["tokens"]["valid"]
    batch = int(value_of(launcher.arguments, "--global-batch-size"))
    length = int(value_of(launcher.arguments, "--seq-length"))
    count = max(1, int(tokens) // (batch * length))
    return dataclasses.replace(
        launcher, arguments=[*launcher.arguments, "--eval-iters", str(count)]
    )


def convert(launcher: Launcher, run: Run, target: str, iteration: int) -> Path:
    """Convert one iteration of a run with the console script; returns the new folder.

    Raises:
        RunFailed: the command is not installed, or ended with an error.
    """
    command = Path(sys.executable).with_name("megatron-flashoptim")
    if not command.is_file():
        raise RunFailed(f"{command} is missing; install the project: pip install -e .")
    folder = launcher.folder / f"{run.name}_converted"
    destination, done = folder / "checkpoints", folder / "conversion.json"
    made_from = {"finished_at": run.finished_at, "sources": launcher.identity["sources"]}
    if done.is_file() and json.loads(done.read_text()) == made_from:
        print(f"  reusing {shown(destination)}")
        return destination
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    arguments = ["convert", "--to", target, "--iteration", str(iteration), run.checkpoints]
    words = [str(command), *arguments, str(destination)]
    print(f"  {shlex.join(['megatron-flashoptim', *words[1:]])}", flush=True)
    run_logged(
        words,
        folder / "log.txt",
        lambda line: print(f"  {line.rstrip()}"),
        cwd=REPOSITORY,
        environment=dict(os.environ),
    )
    done.write_text(json.dumps(made_from) + "\n")
    return destination


def train_all(launcher: Launcher) -> Continuity:
    """Make every run; reuse what is there."""
    switch = launcher.iterations // 2
    micro_batch = int(launcher.arguments[_last(launcher.arguments, "--micro-batch-size") + 1])

    def whole(name: str, *arguments: str, save: bool = False) -> Run:
        print(f"{name}: iterations 1 to {launcher.iterations}")
        folder = launcher.folder / name / "checkpoints"
        saving = ["--save", str(folder), "--save-interval", str(switch)] if save else []
        # A conversion without the run's ranks needs this format.
        saving += ["--dist-ckpt-optim-fully-reshardable"] if save else []
        return launcher.run(name, [*arguments, *saving])

    def half(name: str, *arguments: str, source: Run, folder: Path | None = None) -> Run:
        loaded = shown(folder or Path(source.checkpoints))
        print(f"{name}: iterations {switch + 1} to {launcher.iterations}, from {loaded}")
        loading = ["--load", str(folder or source.checkpoints), "--ckpt-step", str(switch)]
        return launcher.run(
            name,
            [*arguments, *loading, "--exit-on-missing-checkpoint"],
            first=switch + 1,
            depends_on=source.finished_at,
        )

    adam = whole("adam", *ADAM, save=True)
    flash = whole("flash_adamw", *FLASH, save=True)
    to_flash = convert(launcher, adam, "flash", switch)
    to_adam = convert(launcher, flash, "adam", switch)
    return Continuity(
        iterations=launcher.iterations,
        switch=switch,
        adam=adam,
        flash=flash,
        adam_to_flash=half("adam_to_flash", *FLASH, source=adam, folder=to_flash),
        adam_to_flash_on_load=half("adam_to_flash_on_load", *FLASH, source=adam),
        flash_to_adam=half("flash_to_adam", *ADAM, source=flash, folder=to_adam),
        adam_resumed=half("adam_resumed", *ADAM, source=adam),
        other_order=[
            half(f"adam_micro_batch_{size}", *ADAM, "--micro-batch-size", str(size), source=adam)
            for size in _smaller(micro_batch)
        ],
        flash_other_order=[
            half(f"flash_micro_batch_{size}", *FLASH, "--micro-batch-size", str(size), source=flash)
            for size in _smaller(micro_batch)
        ],
        other_data=[
            half(f"adam_data_{seed}", *ADAM, "--seed", str(seed), source=adam)
            for seed in OTHER_SEEDS
        ],
        other_seeds=[
            whole(f"adam_seed_{seed}", *ADAM, "--seed", str(seed)) for seed in OTHER_SEEDS
        ],
        other_order_throughout=[
            whole(f"adam_throughout_micro_batch_{size}", *ADAM, "--micro-batch-size", str(size))
            for size in _smaller(micro_batch)
        ],
        flash_other_seeds=[
            whole(f"flash_seed_{seed}", *FLASH, "--seed", str(seed)) for seed in OTHER_SEEDS
        ],
    )


def _smaller(micro_batch: int) -> list[int]:
    """Return other micro-batch sizes, which sum the same gradients in another order."""
    return [size for size in (micro_batch // 2, micro_batch // 4) if size]


def _last(arguments: list[str], flag: str) -> int:
    return len(arguments) - 1 - arguments[::-1].index(flag)


def main() -> None:
    """Run everything, write numbers and plot, print the table."""
    options = parse()
    setup = choose_setup(options)
    launcher = make_launcher(setup, options, options.iterations)
    launcher = evaluate_all_that_is_held_out(launcher, options.output / "corpus")
    continuity = train_all(launcher)
    record = {
        "device": setup.hardware,
        "ranks": f"{setup.ranks} {setup.device}",
        "versions": setup.versions,
        "commit": git_commit(),
        "command": shlex.join(["python", "scripts/continuity.py", *_shape_options(options)]),
        "adam": "exact fp32 AdamW (--resumable-adam)" if continuity.adam.torch_adam else "fused",
        **continuity.record(),
    }
    options.json.write_text(continuity_report.as_json(record))
    continuity_report.draw(continuity, setup, options.picture)
    print(f"\n{continuity_report.table(continuity)}\n")
    print(f"picture  {shown(options.picture.absolute())}")
    print(f"numbers  {shown(options.json.absolute())}")


def _shape_options(options: argparse.Namespace) -> list[str]:
    """Return the options that what was measured depends on."""
    return ["--iterations", str(options.iterations)] + (
        ["--ranks", str(options.ranks)] if options.ranks else []
    )


if __name__ == "__main__":
    try:
        main()
    except RunFailed as failure:
        raise SystemExit(f"continuity: error: {failure}") from None
    except KeyboardInterrupt:
        raise SystemExit("continuity: interrupted; finished runs are kept") from None
