#!/usr/bin/env python3
"""Compare final losses of stock and flash optimizers over seeds, with Megatron's training loop.

    python scripts/quality_corpus.py quality-out/corpus
    python scripts/quality.py --minutes 55     # as often as it takes: finished runs are kept,
    python scripts/quality.py                  # stopped ones go on from their checkpoints

Each run is a process under torchrun on one GPU; as many run side by side as there are GPUs, or as
--parallel says: with two to a GPU one starts, validates or saves while the other trains, if
--stagger has them begin one after the other. With ``--minutes`` none is left running after that
time: Megatron saves and exits (``--exit-duration-in-mins``), and the next call goes on. Losses and
norms are read from the runs' TensorBoard events. Validation reads all that is held out
(--full-validation), for which Megatron takes one sequence at a time whatever the batch, so that the
GPU is hardly used. Numbers of several calls, on several machines, are put together by
scripts/quality_report.py.

The table of experiments is EXPERIMENTS below. With Transformer Engine, layers and Adam are its own;
without, Adam is ``--resumable-adam`` of scripts/pretrain_gpt.py. Lion is that of the package
emerging-optimizers: for every parameter (``--plain-lion``), and as Megatron has it, "stock lion".
What follows ``--`` is given to Megatron last, for a trial of something small.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import queue
import shlex
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import quality_report
from quality_report import Row
from quickstart_runs import RunFailed, run_logged, shown
from quickstart_setup import (
    CUDA_FLAGS,
    REPOSITORY,
    OneLineParser,
    Setup,
    choose_setup,
    git_commit,
    source_digest,
)

from megatron_flashoptim.cli.argument_files import expand

# To start Megatron, train for the whole minutes that it counts, and save.
LEAST_MINUTES = 3
ADAM = ("--optimizer", "adam", "--resumable-adam")
FLASH_ADAMW = ("--optimizer", "flash_adamw")
GPT, MOE = "configs/quality_gpt.args", "configs/quality_moe.args"
LONG_MEMORY = ("--adam-beta2", "0.999")
# With Transformer Engine, whose grouped layers run all experts in one call.
GROUPED = ("--moe-grouped-gemm", "--moe-permute-fusion")
# Logits are the largest tensors of these models: 50,304 to a token.
FUSED_LOSS = ("--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl", "native")
# Its attention knows what causal is; a mask would be 64 MB of each batch that the host makes.
WITHOUT_MASK = ("--no-create-attention-mask-in-dataloader",)
# A tenth of AdamW's rate with ten times its decay, as Lion's authors advise (arXiv 2302.06675).
LION_RATES = ("--lr", "6e-5", "--min-lr", "6e-6", "--weight-decay", "1.0")
# Adam with two micro-batches where the others have one, the same sums in another order: how far
# apart do runs end that differ in rounding alone?
ACCUMULATED = "adam, accumulated"
# Adam for word embeddings and norms, Lion with Adam's decay rates for the rest.
STOCK_LION = "stock lion"
# A third of the tokens of a and b.
SHORTER = ("--micro-batch-size", "32", "--global-batch-size", "32", "--train-iters", "1000")


@dataclass(frozen=True)
class Experiment:
    """Runs that differ in optimizer and seed only."""

    title: str
    model: str
    """File of Megatron's arguments."""
    shared: tuple[str, ...]
    optimizers: dict[str, tuple[str, ...]]
    """The first is what the others are compared with."""
    seeds: tuple[int, ...] = (1, 2, 3)


EXPERIMENTS = {
    "a": Experiment(
        "GPT-2 124M, beta2 0.95",
        GPT,
        (),
        {"adam": ADAM, "flash_adamw": FLASH_ADAMW},
    ),
    "b": Experiment(
        "GPT-2 124M, beta2 0.999",
        GPT,
        LONG_MEMORY,
        {
            "adam": ADAM,
            "flash_adamw, stochastic": (*FLASH_ADAMW, "--flash-rounding", "stochastic"),
            "flash_adamw, nearest": (*FLASH_ADAMW, "--flash-rounding", "nearest"),
            ACCUMULATED: ADAM,
        },
    ),
    "c": Experiment(
        "8 experts, 133M",
        MOE,
        (),
        {"adam": ADAM, "flash_adamw": FLASH_ADAMW, ACCUMULATED: ADAM},
    ),
    "d": Experiment(
        "GPT-2 124M, Lion",
        GPT,
        (*LION_RATES, *SHORTER),
        {
            "lion": ("--optimizer", "lion", "--plain-lion"),
            "flash_lion": ("--optimizer", "flash_lion"),
            STOCK_LION: ("--optimizer", "lion"),
        },
    ),
}


@dataclass(frozen=True)
class Run:
    """One training run, in a folder of its own."""

    experiment: str
    optimizer: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]

    @property
    def finished(self) -> Path:
        """File that the launcher makes when training returned."""
        return self.folder / "finished"

    @property
    def shared_gpu(self) -> Path:
        """File that says that another run was on the same GPU, so that times say nothing."""
        return self.folder / "shared-gpu"

    @property
    def commits(self) -> list[str]:
        """Of the repository, whenever it was started."""
        made = self.folder / "commits.txt"
        return made.read_text().split() if made.exists() else []

    def note_commit(self, commit: str) -> None:
        """Add a commit, if it is another one."""
        commits = dict.fromkeys((*self.commits, commit))
        (self.folder / "commits.txt").write_text("\n".join(commits) + "\n")

    @property
    def name(self) -> str:
        """As printed."""
        return f"{self.experiment}: {self.optimizer}, seed {self.seed}"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the options."""
    parser = OneLineParser(
        prog="quality", description=(__doc__ or "").split("\n")[0], allow_abbrev=False
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=tuple(EXPERIMENTS),
        default=tuple(EXPERIMENTS),
        metavar="EXPERIMENT",
        help=f"of {', '.join(EXPERIMENTS)} (default: all)",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, metavar="N", help="(default: the experiment's)"
    )
    parser.add_argument(
        "--optimizers", nargs="+", metavar="NAME", help="of the experiments' tables (default: all)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--parallel", type=int, metavar="N", help="runs side by side (default: one to a GPU)"
    )
    parser.add_argument(
        "--stagger",
        type=int,
        default=0,
        metavar="SECONDS",
        help="least time between the starts of two runs (default: 0)",
    )
    parser.add_argument(
        "--minutes", type=int, metavar="N", help="stop, with checkpoints, after this time"
    )
    parser.add_argument(
        "--report", action="store_true", help="start no run; report those that are finished"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=REPOSITORY / "quality-out",
        metavar="DIR",
        help="folder for runs and results (default: quality-out in the repository)",
    )
    parser.add_argument(
        "--corpus", type=Path, metavar="DIR", help="(default: corpus in the output folder)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="numbers (default: in --output)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="plot (default: in --output)")
    parser.add_argument("megatron", nargs="*", metavar="-- ARGUMENT", help="for Megatron, last")
    options = parser.parse_args(argv)
    options.output = options.output.absolute()
    options.corpus = (options.corpus or options.output / "corpus").absolute()
    if not (options.corpus / "corpus.json").is_file():
        parser.error(
            f"--corpus {options.corpus}: no finished corpus; "
            f"python scripts/quality_corpus.py {options.corpus}"
        )
    for name, least in (("minutes", LEAST_MINUTES), ("parallel", 1), ("stagger", 0)):
        given = getattr(options, name)
        if given is not None and given < least:
            parser.error(f"--{name} {given}: at least {least}")
    known = {name for letter in options.only for name in EXPERIMENTS[letter].optimizers}
    for name in options.optimizers or ():
        if name not in known:
            parser.error(f"--optimizers {name}: not one of {'; '.join(sorted(known))}")
    options.json = options.json or options.output / "quality.json"
    options.picture = options.picture or options.output / "quality.png"
    return options


def all_runs(options: argparse.Namespace, setup: Setup) -> list[Run]:
    """Return the runs asked for, experiments in the order of --only.

    Each folder is named by everything that its losses depend on, so that a change of the sources,
    of a package or of the device begins anew.
    """
    where = [setup.hardware, versions_of(setup)]
    corpus = json.loads((options.corpus / "corpus.json").read_text())
    runs = []
    for letter in options.only:
        experiment = EXPERIMENTS[letter]
        for seed in options.seeds or experiment.seeds:
            for optimizer, own in experiment.optimizers.items():
                if options.optimizers and optimizer not in options.optimizers:
                    continue
                arguments = (
                    *expand([f"@{REPOSITORY / experiment.model}"]),
                    *experiment.shared,
                    *_of_device(setup.device, has_experts=experiment.model == MOE),
                    *own,
                    *("--seed", str(seed)),
                    *options.megatron,
                )
                if optimizer == ACCUMULATED:
                    arguments = (*arguments, "--micro-batch-size", _half_a_micro_batch(arguments))
                made_from = [arguments, corpus["text_sha256"], source_digest(), where]
                digest = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
                name = optimizer.replace(", ", "-").replace(" ", "-")
                folder = options.output / "runs" / f"{letter}-{name}-{seed}-{digest[:8]}"
                runs.append(Run(letter, optimizer, seed, folder, arguments))
    return runs


def _half_a_micro_batch(arguments: tuple[str, ...]) -> str:
    """Return half of what is given last, which is what Megatron takes."""
    last = max(i for i, argument in enumerate(arguments) if argument == "--micro-batch-size")
    return str(int(arguments[last + 1]) // 2)


def _of_device(device: str, *, has_experts: bool) -> tuple[str, ...]:
    if device == "cpu":
        from megatron_flashoptim.megatron.cpu import MEGATRON_FLAGS

        return MEGATRON_FLAGS
    if not importlib.util.find_spec("transformer_engine"):
        # Attention that is not fused keeps 1024 x 1024 scores of each head and sequence.
        return (*CUDA_FLAGS, "--micro-batch-size", "8")
    flags = (*FUSED_LOSS, *WITHOUT_MASK, *(GROUPED if has_experts else ()))
    # Without it Megatron refuses to build its own output layer, whoever makes the others.
    fuses = importlib.util.find_spec("fused_weight_gradient_mlp_cuda")
    return flags if fuses else (*flags, "--no-gradient-accumulation-fusion")


def command_of(
    run: Run, options: argparse.Namespace, device: str, minutes: int | None
) -> list[str]:
    """Return the command that begins a run, or goes on with it."""
    checkpoints = run.folder / "checkpoints"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    command += ["--standalone", "--local-addr", "127.0.0.1"]
    command += ["-m", "megatron_flashoptim.run", "--device", device]
    command += ["--finished", str(run.finished)]
    command.append(str(REPOSITORY / "scripts" / "pretrain_gpt.py"))
    # Before the run's own, so that others can be given after "--". The last validation is made
    # after training, also where the interval does not divide the iterations.
    command += ["--eval-interval", "600", "--save-interval", "750", "--log-interval", "10"]
    command += run.arguments
    for split in ("train", "valid"):
        command += [f"--{split}-data-path", str(options.corpus / f"{split}_document")]
    # The cache of a run is its own: two that build one at a time read it half written.
    command += ["--data-cache-path", str(run.folder / "cache")]
    command += ["--full-validation", "--multiple-validation-sets"]
    # Loaded by as many ranks as have saved, so that the optimizer's state is saved as it lies.
    command += ["--save", str(checkpoints), "--load", str(checkpoints)]
    command += ["--timing-log-level", "0", "--tensorboard-dir", str(run.folder / "events")]
    command += ["--log-timers-to-tensorboard", "--log-memory-to-tensorboard"]
    if minutes is not None:
        command += ["--exit-duration-in-mins", str(minutes)]
    return command


class Workers:
    """Runs as many at a time as there are GPUs, until the time is over."""

    def __init__(self, options: argparse.Namespace, setup: Setup, gpus: list[str]) -> None:
        self._options, self._setup = options, setup
        self._places: queue.Queue[str] = queue.Queue()
        for place in gpus:
            self._places.put(place)
        self._count = len(gpus)
        self._shares_gpus = len(set(gpus)) < len(gpus)
        self._ends = None if options.minutes is None else time.monotonic() + 60 * options.minutes
        self._printing = threading.Lock()
        self._starting = threading.Lock()
        self._next_start = time.monotonic()

    def run(self, runs: list[Run]) -> None:
        """Go on with all that are not finished.

        Raises:
            RunFailed: of all that failed, once the others have ended.
        """
        begun = [run for run in runs if not run.finished.exists()]
        with ThreadPoolExecutor(self._count) as pool:
            futures = [pool.submit(self._run, run) for run in begun]
        failed = []
        for run, future in zip(begun, futures, strict=True):
            try:
                future.result()
            except RunFailed as failure:
                failed.append(f"{run.name}: {failure}")
        if failed:
            raise RunFailed("\n".join(failed))

    def _run(self, run: Run) -> None:
        with self._starting:
            time.sleep(max(0.0, self._next_start - time.monotonic()))
            self._next_start = time.monotonic() + self._options.stagger
        minutes = None
        if self._ends is not None:
            # Megatron counts whole minutes, and neither its start nor the save at the end.
            minutes = int((self._ends - time.monotonic()) / 60) - 1
            if minutes < 1:
                return
        place = self._places.get()
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            run.note_commit(git_commit() or "unknown")
            if self._shares_gpus:
                run.shared_gpu.touch()
            log = run.folder / f"log-{len(list(run.folder.glob('log-*.txt'))) + 1}.txt"
            environment = dict(os.environ)
            environment.setdefault("OMP_NUM_THREADS", "1")
            environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
            environment["CUDA_VISIBLE_DEVICES"] = place
            command = command_of(run, self._options, self._setup.device, minutes)
            self._say(f"{run.name}: starts; log in {shown(log)}")
            run_logged(command, log, lambda _: None, cwd=REPOSITORY, environment=environment)
            state = "finished" if run.finished.exists() else "stopped, to go on from its checkpoint"
            self._say(f"{run.name}: {state}")
        finally:
            self._places.put(place)

    def _say(self, text: str) -> None:
        with self._printing:
            print(f"  {text}", flush=True)


def places(options: argparse.Namespace, device: str) -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES shall be for each run that is made side by side."""
    if device == "cpu":
        return [""] * (options.parallel or 1)
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return (gpus * (options.parallel or 1))[: options.parallel or len(gpus)]


def row_of(run: Run) -> Row:
    """Return what is kept of a finished run."""
    row = quality_report.read(run.experiment, run.optimizer, run.seed, run.folder / "events")
    return replace(row, iteration_ms=None) if run.shared_gpu.exists() else row


def versions_of(setup: Setup) -> dict[str, str]:
    """Return versions of all packages that losses depend on."""
    versions = dict(setup.versions)
    for package in ("transformer_engine", "emerging_optimizers"):
        if importlib.util.find_spec(package):
            versions[package.replace("_", "-")] = importlib.metadata.version(package)
    return versions


def record_of(options: argparse.Namespace, setup: Setup, finished: list[Run]) -> dict[str, Any]:
    """Return everything that a reader needs to judge and repeat the figures."""
    rows = [row_of(run) for run in finished]
    commits = dict.fromkeys(commit for run in finished for commit in run.commits)
    return {
        "device": setup.hardware,
        "versions": versions_of(setup),
        "commit": ", ".join(commits),
        "commands": [shlex.join(["python", "scripts/quality.py", *sys.argv[1:]])],
        "corpus": json.loads((options.corpus / "corpus.json").read_text()),
        "experiments": {
            letter: {
                "title": EXPERIMENTS[letter].title,
                "optimizers": EXPERIMENTS[letter].optimizers,
            }
            for letter in sorted({row.experiment for row in rows})
        },
        "runs": [asdict(row) for row in rows],
    }


def main() -> None:
    """Make what runs are not finished; write numbers and plot of those that are."""
    options = parse()
    setup = choose_setup(argparse.Namespace(device=options.device, ranks=1))
    runs = all_runs(options, setup)
    failure = None
    if not options.report:
        try:
            Workers(options, setup, places(options, setup.device)).run(runs)
        except RunFailed as problem:
            failure = problem
    report(options, setup, runs)
    if failure:
        raise failure


def report(options: argparse.Namespace, setup: Setup, runs: list[Run]) -> None:
    """Print the table of the runs that are finished; write numbers and plot."""
    finished = [run for run in runs if run.finished.exists()]
    print(f"{len(finished)} of {len(runs)} runs are finished")
    if not finished:
        return
    record = record_of(options, setup, finished)
    options.json.write_text(json.dumps(record) + "\n")
    quality_report.draw(record, options.picture)
    print(f"\n{quality_report.table(record)}\n")
    print(f"picture  {shown(options.picture.absolute())}")
    print(f"numbers  {shown(options.json.absolute())}")


if __name__ == "__main__":
    try:
        main()
    except RunFailed as failure:
        raise SystemExit(f"quality: error: {failure}") from None
    except KeyboardInterrupt:
        raise SystemExit("quality: interrupted; finished runs are kept") from None
