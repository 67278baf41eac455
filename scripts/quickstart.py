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
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import quickstart_report
from quickstart_runs import Launcher, RunFailed, read_arguments, run_logged, shown, value_of

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL_FILE = REPOSITORY / "configs" / "quickstart_gpt.args"
PACKAGES = ("torch", "triton", "megatron-core", "numpy", "megatron-flashoptim")
STAGES = 6
MINIMUM_ITERATIONS = 10
# Part of the iterations that the resumed run repeats.
RESUMED_PART = 0.1

# Where Transformer Engine and Apex may be missing, as on CPU ranks (megatron.cpu.MEGATRON_FLAGS).
CUDA_FLAGS = (
    *("--transformer-impl", "local"),
    *("--distributed-backend", "nccl"),
    "--no-rope-fusion",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-bias-gelu-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
    "--no-persist-layer-norm",
    *("--num-workers", "0"),
)

_started = float(os.environ.get("QUICKSTART_STARTED", time.time()))


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"quickstart: error: {message} (--help lists the options)\n")


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
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="data-parallel processes (default: 2, on GPUs at most as many as there are)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto takes GPUs where there are any (default: auto)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=MODEL_FILE,
        metavar="FILE",
        help="Megatron arguments of the model (default: configs/quickstart_gpt.args)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=REPOSITORY / "quickstart-out",
        metavar="DIR",
        help="folder for corpus, runs and results (default: quickstart-out in the repository)",
    )
    parser.add_argument("--fresh", action="store_true", help="discard the runs of earlier calls")
    parser.add_argument(
        "--check", action="store_true", help="only check these options, and do nothing"
    )
    options = parser.parse_args(argv)
    if options.iterations < MINIMUM_ITERATIONS:
        parser.error(f"--iterations {options.iterations}: at least {MINIMUM_ITERATIONS}")
    if not options.config.is_file():
        parser.error(f"--config {options.config}: no such file")
    if options.ranks is not None:
        batch = int(value_of(read_arguments(options.config), "--global-batch-size"))
        if options.ranks < 1 or batch % options.ranks:
            parser.error(
                f"--ranks {options.ranks}: must divide the global batch of {batch} sequences "
                f"({options.config})"
            )
    if options.output.exists() and not options.output.is_dir():
        parser.error(f"--output {options.output}: is a file")
    options.output = options.output.absolute()
    return options


def choose_device(wanted: str, ranks: int | None) -> tuple[str, int, str]:
    """Return (cpu or cuda, ranks, name of the hardware); SystemExit where it is not to be had."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = ("cuda" if gpus else "cpu") if wanted == "auto" else wanted
    if device == "cpu":
        return device, ranks or 2, processor_name()
    if not gpus:
        raise SystemExit("quickstart: error: --device cuda: torch sees no GPU here")
    ranks = ranks or min(gpus, 2)
    if ranks > gpus:
        raise SystemExit(f"quickstart: error: --ranks {ranks}: torch sees {gpus} GPU(s) here")
    check_triton_can_compile()
    return device, ranks, torch.cuda.get_device_name(0)


def check_triton_can_compile() -> None:
    """Exit with what to install where Triton would fail on its first kernel."""
    import sysconfig

    version = platform.python_version().rpartition(".")[0]
    missing = []
    if not any(shutil.which(name) for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name):
        missing.append("a C compiler (package gcc)")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append(f"Python.h (package python{version}-dev or python{version}-devel)")
    if missing:
        raise SystemExit(
            f"quickstart: error: on a GPU, Triton needs {' and '.join(missing)}; install that, or "
            "choose --device cpu"
        )


def processor_name() -> str:
    """Return the CPU's name and number of cores."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # the name of the architecture then
    return f"{name}, {os.cpu_count()} cores"


def git_commit() -> str | None:
    """Return the checked out commit, with -dirty after it if files changed; None without git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def source_digest() -> str:
    """Return a hash of the sources that a run depends on."""
    digest = hashlib.sha256()
    for path in sorted((REPOSITORY / "megatron_flashoptim").rglob("*.py")):
        digest.update(path.read_bytes())
    digest.update((REPOSITORY / "scripts" / "pretrain_gpt.py").read_bytes())
    return digest.hexdigest()


def stage(number: int, title: str) -> None:
    """Print a heading with the time since the start."""
    print(f"[{number}/{STAGES}] {elapsed()} {title}", flush=True)


def elapsed() -> str:
    """Return minutes and seconds since the start."""
    minutes, seconds = divmod(int(time.time() - _started), 60)
    return f"{minutes:02d}:{seconds:02d}"


def build_corpus(folder: Path) -> str:
    """Build or reuse the corpus; return a hash of the text it was made from."""
    script = REPOSITORY / "scripts" / "prepare_corpus.py"
    command = [sys.executable, str(script), str(folder)]
    lines: list[str] = []
    log = folder.with_name("corpus.log")
    run_logged(command, log, lines.append, cwd=REPOSITORY, environment=dict(os.environ))
    description = json.loads((folder / "corpus.json").read_text())
    tokens = description["tokens"]
    if any(line.startswith("corpus: reusing") for line in lines):
        print(f"  reusing {shown(folder)}")
    print(
        f"  {description['source']}: {tokens['train']:,} tokens to train on, "
        f"{tokens['valid']:,} held out"
    )
    return str(description["sha256"])


def main() -> None:
    """Run the six stages; exits with code 1 if one fails."""
    options = parse()
    if options.check:
        return
    device, ranks, hardware = choose_device(options.device, options.ranks)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    versions["python"] = platform.python_version()
    print(
        f"Python {versions['python']}, torch {versions['torch']}, "
        f"megatron-core {versions['megatron-core']}; {ranks} {device} rank(s) on {hardware}"
    )
    runs = options.output / "runs"
    if options.fresh and runs.exists():
        shutil.rmtree(runs)
    options.output.mkdir(parents=True, exist_ok=True)

    stage(2, "corpus: this Python's standard library")
    corpus = options.output / "corpus"
    corpus_digest = build_corpus(corpus)

    arguments = read_arguments(options.config)
    batch = int(value_of(arguments, "--global-batch-size"))
    arguments += ["--micro-batch-size", str(batch // ranks)]
    arguments += ["--train-iters", str(options.iterations)]
    for split in ("train", "valid"):
        arguments += [f"--{split}-data-path", str(corpus / f"{split}_document")]
    # Megatron's cached indexes do not notice that the corpus changed.
    arguments += ["--data-cache-path", str(options.output / "cache" / corpus_digest[:12])]
    if device == "cpu":
        from megatron_flashoptim.megatron.cpu import MEGATRON_FLAGS

        arguments += MEGATRON_FLAGS
    else:
        arguments += CUDA_FLAGS
    identity = {
        "versions": versions,
        "hardware": hardware,
        "sources": source_digest(),
        "corpus": corpus_digest,
    }
    launcher = Launcher(REPOSITORY, runs, device, ranks, options.iterations, arguments, identity)
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
        ranks=ranks,
        device=device,
        hardware=hardware,
        versions=versions,
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
    if device == "cpu" and not comparison.resume_is_identical():
        raise SystemExit("quickstart: error: the resumed run differs from the one it repeats")


if __name__ == "__main__":
    try:
        main()
    except RunFailed as failure:
        raise SystemExit(f"quickstart: error: {failure}") from None
    except KeyboardInterrupt:
        raise SystemExit("quickstart: interrupted; finished runs are kept") from None
