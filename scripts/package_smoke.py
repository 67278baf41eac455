#!/usr/bin/env python3
"""Use an installed megatron-flashoptim as a user does: run in the environment it is installed in.

    python -P scripts/package_smoke.py SOURCE [train]

SOURCE is a tree of the repository that the installed package must not come from. Works in the
current folder. With ``train`` it trains a tiny GPT on two CPU ranks and converts its checkpoint.
"""

from __future__ import annotations

import importlib
import math
import os
import pkgutil
import re
import runpy
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

BIN = Path(sys.executable).parent
# Modules that need the extra [inspect], and say so when the command is run.
NEEDS_AN_EXTRA = {"megatron_flashoptim.cli.report"}
# Modules of the extra [bridge], which scripts/test_bridge.sh imports.
NEEDS_BRIDGE = {"megatron_flashoptim.megatron.bridge"}
ITERATIONS = 4
RUN = [
    *("--train-iters", str(ITERATIONS), "--micro-batch-size", "4", "--eval-iters", "1"),
    *("--train-data-path", "corpus/train_document", "--valid-data-path", "corpus/valid_document"),
    *("--optimizer", "flash_adamw", "--save", "checkpoints"),
    *("--save-interval", str(ITERATIONS), "--dist-ckpt-optim-fully-reshardable"),
    *("--data-cache-path", "cache"),
]
LOSS = re.compile(r"iteration +\d+/.*?lm loss: (\S+)")


def run(*command: str | Path) -> str:
    """Run a command and return what it printed.

    Raises:
        SystemExit: it failed; says what it printed.
    """
    words = list(map(str, command))
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\nerror: {' '.join(words)} exited {done.returncode}")
    return done.stdout + done.stderr


def check(right: bool, message: str) -> None:
    """Exit with a message unless something is right."""
    if not right:
        sys.exit(f"error: {message}")


def check_imports(source: Path, with_extra: bool) -> None:
    """Every module is that of this environment, and imports with what was asked for alone."""
    package = importlib.import_module("megatron_flashoptim")
    home = Path(str(package.__file__)).resolve()
    check(
        home.is_relative_to(Path(sys.prefix).resolve()) and not home.is_relative_to(source),
        f"megatron_flashoptim is imported from {home}, not from {sys.prefix}",
    )
    check(package.__version__ == version("megatron-flashoptim"), "versions differ")
    for module in pkgutil.walk_packages(package.__path__, "megatron_flashoptim."):
        left_out = NEEDS_BRIDGE if with_extra else NEEDS_BRIDGE | NEEDS_AN_EXTRA
        if module.name not in left_out:
            importlib.import_module(module.name)


def check_commands() -> None:
    """The console script is there and does something."""
    command = BIN / "megatron-flashoptim"
    check(run(command, "--version").strip() == version("megatron-flashoptim"), "--version is wrong")
    check("convert" in run(command, "--help"), "--help names no commands")
    planned = run(command, "memory", "--parameters", "8e9")
    check("flash_adamw" in planned, f"memory printed {planned}")


def check_codec() -> None:
    """A 24-bit master survives splitting and joining, a first moment is off by a code at most."""
    import torch

    from megatron_flashoptim import codec

    weight = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    joined = codec.join_master(*codec.split_master(weight))
    again = codec.join_master(*codec.split_master(joined))
    check(torch.equal(joined, again), "a split master does not join to itself")
    error = ((joined - weight) / weight).abs().max().item()
    check(error <= 2.0**-16, f"a master is off by {error}")
    decoded = codec.decode_exp_avg(*codec.encode_exp_avg(weight))
    error = ((decoded - weight) / weight.abs().max()).abs().max().item()
    check(error <= 0.01, f"a first moment is off by {error}")


def train_and_convert(source: Path) -> None:
    """Train on two ranks with the launcher, save, and convert the checkpoint to Adam's."""
    from megatron_flashoptim.cli.argument_files import read_arguments
    from megatron_flashoptim.megatron import cpu

    scripts = source / "scripts"
    runpy.run_path(str(scripts / "prepare_corpus.py"))["build"](Path("corpus"))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launcher = ["-m", "megatron_flashoptim.run", "--device", "cpu"]
    model = read_arguments(source / "configs" / "quickstart_gpt.args")
    arguments = [*model, *cpu.MEGATRON_FLAGS, *RUN]
    script = scripts / "pretrain_gpt.py"
    printed = run(sys.executable, *torchrun, *launcher, script, *arguments)
    losses = [float(loss) for loss in LOSS.findall(printed)]
    check(len(losses) == ITERATIONS, f"{printed}\n{ITERATIONS} losses are expected, not {losses}")
    check(all(map(math.isfinite, losses)) and losses[-1] < losses[0], f"losses are {losses}")
    run(BIN / "megatron-flashoptim", "convert", "--to", "adam", "checkpoints", "converted")


def main() -> None:
    """Run all checks."""
    source, train = Path(sys.argv[1]).resolve(), "train" in sys.argv[2:]
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    check_imports(source, train)
    check_commands()
    check_codec()
    if train:
        train_and_convert(source)


if __name__ == "__main__":
    main()
