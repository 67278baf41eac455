"""Training runs of the quickstart: start one under torchrun, show its progress, measure it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ITERATION = re.compile(
    r"iteration +(\d+)/ *\d+ \|.*elapsed time per iteration \(ms\): ([\d.]+).*"
    r"lm loss: ([\dE.+-]+|nan|inf)"
)
_OPTIMIZER_TIME = re.compile(r"^ +optimizer \.+: \([\d.]+, ([\d.]+)\)")
_VALIDATION_LOSS = re.compile(r"on validation set \| lm loss value: ([\dE.+-]+|nan|inf)")
_FP32_GRADIENTS = re.compile(r"accumulate_allreduce_grads_in_fp32 \.+ (True|False)")
# Where torchrun begins to say which rank failed; nothing after it tells why.
_RANK_FAILED = re.compile(r"torch/distributed/elastic/.* failed \(exitcode")
_TORCH_ADAM = "Falling back to Torch optimizers"
SHOWN_ON_FAILURE = 30


class RunFailed(Exception):
    """A training run ended with an error, or its log lacks what it should hold."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run and what was measured in it."""

    name: str
    log: str
    checkpoints: str
    finished_at: float
    losses: dict[int, float]
    validation_loss: float
    iteration_ms: float
    """Median over iterations, the slowest rank's."""
    optimizer_ms: float
    """The part of it in ``optimizer.step()``, gradient clipping included."""
    parameters: int
    state_bytes: int
    """Of the optimizer's live tensors, all ranks together."""
    gradient_bytes: int
    """Per parameter, in the gradient buffer."""
    peak_device_bytes: int
    checkpoint_bytes: int
    """Size of the last checkpoint's files; 0 for a run that saves none."""
    torch_adam: bool
    """Megatron found neither Transformer Engine nor Apex and took torch's optimizer."""


def value_of(arguments: list[str], flag: str) -> str:
    """Return the word after a flag."""
    return arguments[arguments.index(flag) + 1]


def shown(path: Path) -> str:
    """Return a path as short as it can be typed here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def run_logged(
    command: list[str],
    log: Path,
    on_line: Callable[[str], None],
    *,
    cwd: Path,
    environment: dict[str, str],
) -> None:
    """Run a command, its whole output going to the log and each line to on_line as well.

    Raises:
        RunFailed: it ended with an error; the last lines of its output are on stderr, without
            torchrun's own traceback.
    """
    tail: deque[str] = deque(maxlen=SHOWN_ON_FAILURE)
    reported = False
    with (
        log.open("w", buffering=1) as file,
        subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        file.write(f"$ {shlex.join(command)}\n")
        try:
            for line in process.stdout:
                file.write(line)
                if not reported:
                    tail.append(line)
                    reported = _RANK_FAILED.search(line) is not None
                on_line(line)
            code = process.wait()
        except BaseException:
            process.terminate()  # torchrun ends its ranks
            raise
    if code:
        print("".join(["\n", *tail]), file=sys.stderr)
        raise RunFailed(f"exit code {code}; above are the last lines of {shown(log)}")


@dataclasses.dataclass(frozen=True)
class Launcher:
    """Starts runs that share model, data and device."""

    repository: Path
    folder: Path
    device: str
    ranks: int
    iterations: int
    arguments: list[str]
    """Megatron's, the same for every run."""
    identity: dict[str, Any]
    """What a run depends on beside its arguments; a run is reused only if nothing changed."""

    def train(self, name: str, optimizer: str, *, save_interval: int) -> Run:
        """Train from scratch; checkpoints after save_interval iterations and at the end."""
        checkpoints = self.folder / name / "checkpoints"
        arguments = ["--optimizer", optimizer, "--save", str(checkpoints)]
        # So that the checkpoints can be converted, and inspected layer by layer.
        arguments += ["--save-interval", str(save_interval), "--dist-ckpt-optim-fully-reshardable"]
        return self.run(name, arguments)

    def resume(self, name: str, run: Run, *, iteration: int) -> Run:
        """Repeat the last iterations of a flash_adamw run from one of its checkpoints."""
        arguments = ["--optimizer", "flash_adamw", "--load", run.checkpoints]
        arguments += ["--ckpt-step", str(iteration), "--exit-on-missing-checkpoint"]
        return self.run(name, arguments, first=iteration + 1, depends_on=run.finished_at)

    def run(
        self, name: str, own_arguments: list[str], *, first: int = 1, depends_on: float = 0.0
    ) -> Run:
        """Run to the last iteration, or reuse a run that was made with the same settings.

        Args:
            name: folder of the run.
            own_arguments: Megatron's; they win over those that all runs share.
            first: iteration that it starts with.
            depends_on: when what it loads was made.

        Raises:
            RunFailed: it ended with an error, or its log lacks what it should hold.
        """
        folder = self.folder / name
        log = folder / "log.txt"
        memory = folder / "memory.json"
        checkpoints = folder / "checkpoints"
        record = folder / "run.json"
        arguments = [*self.arguments, *own_arguments, "--memory-report", str(memory)]
        settings = {
            "arguments": arguments,
            "device": self.device,
            "ranks": self.ranks,
            "depends_on": depends_on,
            **self.identity,
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        finished_at = self._finished_before(record, digest)
        if finished_at is None:
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
            self._launch(arguments, log)
            finished_at = time.time()
        else:
            print(f"  reusing {shown(folder)}")
        run = _measure(
            name, log, memory, checkpoints, finished_at, range(first, self.iterations + 1)
        )
        record.write_text(
            json.dumps({"digest": digest, "finished_at": finished_at, **settings}, indent=2) + "\n"
        )
        return run

    @staticmethod
    def _finished_before(record: Path, digest: str) -> float | None:
        """Return when a run with the same settings finished, or None."""
        if not record.is_file():
            return None
        stored = json.loads(record.read_text())
        return float(stored["finished_at"]) if stored["digest"] == digest else None

    def _launch(self, arguments: list[str], log: Path) -> None:
        """Run the training script under torchrun, its output going to the log."""
        command = [sys.executable, "-m", "torch.distributed.run"]
        command += ["--nproc-per-node", str(self.ranks)]
        command += ["--standalone", "--local-addr", "127.0.0.1"]
        command += ["-m", "megatron_flashoptim.run", "--device", self.device]
        command += [str(self.repository / "scripts" / "pretrain_gpt.py"), *arguments]
        environment = dict(os.environ)
        environment.setdefault("OMP_NUM_THREADS", "1")
        environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron: tensor parallelism
        if self.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        print(f"  starting; its output is in {shown(log)}", flush=True)
        run_logged(command, log, self._show_progress, cwd=self.repository, environment=environment)

    def _show_progress(self, line: str) -> None:
        match = _ITERATION.search(line)
        if match is None:
            return
        iteration, milliseconds, loss = int(match[1]), float(match[2]), float(match[3])
        every = max(1, self.iterations // 10)
        if iteration == 1 or iteration % every == 0 or iteration == self.iterations:
            print(
                f"  {iteration:5d}/{self.iterations}  loss {loss:.4f}  {milliseconds:6.1f} ms",
                flush=True,
            )


def read_losses(log: str) -> tuple[dict[int, float], list[float]]:
    """Return each iteration's training loss, and the validation losses, of one process's log."""
    losses: dict[int, float] = {}
    validation = []
    for line in log.splitlines():
        if match := _ITERATION.search(line):
            # Megatron keeps its running sum after the first iteration of a process, so that the
            # second line's loss is the mean of both.
            loss = float(match[3])
            if len(losses) == 1:
                loss = 2 * loss - next(iter(losses.values()))
            losses[int(match[1])] = loss
        elif match := _VALIDATION_LOSS.search(line):
            validation.append(float(match[1]))
    return losses, validation


def _measure(
    name: str, log: Path, memory: Path, checkpoints: Path, finished_at: float, expected: range
) -> Run:
    """Read a finished run's log, memory report and checkpoint."""
    text = log.read_text()
    losses, validation = read_losses(text)
    iteration_ms = [float(found[2]) for found in map(_ITERATION.search, text.splitlines()) if found]
    optimizer_ms = [
        float(found[1]) for found in map(_OPTIMIZER_TIME.search, text.splitlines()) if found
    ]
    fp32_gradients = _FP32_GRADIENTS.search(text)
    missing = sorted(set(expected) - set(losses))
    if missing or len(losses) > len(expected):
        raise RunFailed(
            f"{log} should hold the losses of iterations {expected[0]} to {expected[-1]} and holds "
            f"{len(losses)}" + (f"; the first one missing is {missing[0]}" if missing else "")
        )
    if not (optimizer_ms and validation and fp32_gradients):
        lacking = {
            "the optimizer's timers": optimizer_ms,
            "the validation loss": validation,
            "the arguments": fp32_gradients,
        }
        raise RunFailed(f"{log} lacks {', '.join(what for what, it in lacking.items() if not it)}")
    report = json.loads(memory.read_text())
    saved = checkpoints / f"iter_{expected[-1]:07d}"
    return Run(
        name=name,
        log=str(log),
        checkpoints=str(checkpoints),
        finished_at=finished_at,
        losses=losses,
        validation_loss=validation[-1],
        iteration_ms=statistics.median(iteration_ms),
        optimizer_ms=statistics.median(optimizer_ms),
        parameters=report["owned_parameters"],
        state_bytes=report["optimizer_state_bytes"],
        gradient_bytes=4 if fp32_gradients[1] == "True" else 2,
        peak_device_bytes=report["peak_device_bytes"],
        checkpoint_bytes=sum(f.stat().st_size for f in saved.rglob("*") if f.is_file()),
        torch_adam=_TORCH_ADAM in text,
    )
