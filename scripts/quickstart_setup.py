"""What training runs of the quickstart's model share: options, device, corpus, arguments."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from quickstart_runs import Launcher, RunFailed, run_logged, shown, value_of

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL_FILE = REPOSITORY / "configs" / "quickstart_gpt.args"
# From its file: options are checked before anything is installed that the package imports.
read_arguments: Callable[[Path], list[str]] = runpy.run_path(
    str(REPOSITORY / "megatron_flashoptim" / "cli" / "argument_files.py")
)["read_arguments"]
PACKAGES = ("torch", "triton", "megatron-core", "numpy", "megatron-flashoptim")

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


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{Path(self.prog).stem}: error: {message} (--help lists the options)\n")


def add_run_options(parser: argparse.ArgumentParser, output: str) -> None:
    """Add the options of device, model and folder; output is a folder in the repository."""
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
        default=REPOSITORY / output,
        metavar="DIR",
        help=f"folder for corpus, runs and results (default: {output} in the repository)",
    )
    parser.add_argument("--fresh", action="store_true", help="discard the runs of earlier calls")


def check_run_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse wrong values, and make the output folder's path absolute."""
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


@dataclasses.dataclass(frozen=True)
class Setup:
    """What runs are made on."""

    device: str
    ranks: int
    hardware: str
    versions: dict[str, str]


def choose_setup(options: argparse.Namespace) -> Setup:
    """Choose the device and print it; RunFailed where the wanted one is not there."""
    device, ranks, hardware = choose_device(options.device, options.ranks)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    versions["python"] = platform.python_version()
    print(
        f"Python {versions['python']}, torch {versions['torch']}, "
        f"megatron-core {versions['megatron-core']}; {ranks} {device} rank(s) on {hardware}"
    )
    return Setup(device, ranks, hardware, versions)


def make_launcher(setup: Setup, options: argparse.Namespace, iterations: int) -> Launcher:
    """Build the corpus and return what starts runs of so many iterations on it."""
    runs = options.output / "runs"
    if options.fresh and runs.exists():
        shutil.rmtree(runs)
    options.output.mkdir(parents=True, exist_ok=True)
    corpus = options.output / "corpus"
    corpus_digest = build_corpus(corpus)
    arguments = read_arguments(options.config)
    batch = int(value_of(arguments, "--global-batch-size"))
    arguments += ["--micro-batch-size", str(batch // setup.ranks)]
    arguments += ["--train-iters", str(iterations)]
    for split in ("train", "valid"):
        arguments += [f"--{split}-data-path", str(corpus / f"{split}_document")]
    # Megatron's cached indexes do not notice that the corpus changed.
    arguments += ["--data-cache-path", str(options.output / "cache" / corpus_digest[:12])]
    if setup.device == "cpu":
        from megatron_flashoptim.megatron.cpu import MEGATRON_FLAGS

        arguments += MEGATRON_FLAGS
    else:
        # A configuration may ask for Transformer Engine.
        chosen = "--transformer-impl" in arguments
        arguments += CUDA_FLAGS[2:] if chosen else CUDA_FLAGS
    identity = {
        "versions": setup.versions,
        "hardware": setup.hardware,
        "sources": source_digest(),
        "corpus": corpus_digest,
    }
    return Launcher(REPOSITORY, runs, setup.device, setup.ranks, iterations, arguments, identity)


def choose_device(wanted: str, ranks: int | None) -> tuple[str, int, str]:
    """Return (cpu or cuda, ranks, name of the hardware); RunFailed where there is none."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = ("cuda" if gpus else "cpu") if wanted == "auto" else wanted
    if device == "cpu":
        return device, ranks or 2, processor_name()
    if not gpus:
        raise RunFailed("--device cuda: torch sees no GPU here")
    ranks = ranks or min(gpus, 2)
    if ranks > gpus:
        raise RunFailed(f"--ranks {ranks}: torch sees {gpus} GPU(s) here")
    check_triton_can_compile()
    return device, ranks, torch.cuda.get_device_name(0)


def check_triton_can_compile() -> None:
    """Raise with what to install where Triton would fail on its first kernel."""
    import sysconfig

    version = platform.python_version().rpartition(".")[0]
    missing = []
    if not any(shutil.which(name) for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name):
        missing.append("a C compiler (package gcc)")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append(f"Python.h (package python{version}-dev or python{version}-devel)")
    if missing:
        raise RunFailed(
            f"on a GPU, Triton needs {' and '.join(missing)}; install that, or choose --device cpu"
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
    for name in ("pretrain_gpt.py", "exact_adamw.py"):
        digest.update((REPOSITORY / "scripts" / name).read_bytes())
    return digest.hexdigest()


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
