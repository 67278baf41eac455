#!/usr/bin/env python3
"""Memory and time of training with and without gradient release.

    scripts/bench_gradient_release.py --out results
    scripts/bench_gradient_release.py --device cpu --layers 2 --hidden 64 --heads 4 --vocab 256 \\
        --sequence 64 --bucket-size 30000 --repeats 3 --out results

For 1 and for 2 data-parallel ranks (--ranks), starts torchrun three times. Two runs train one GPT
each, without and with --flash-gradient-release, and note memory: persistent is what is allocated
between two iterations, peak the most in an iteration, activations included; both are torch's count
and the pool's, which torch's does not have, and the device's own count stands beside them, as does
the peak while model and optimizer are built. The third run trains both side by side on the same
tokens, taking turns. First the check: losses, gradient norms, weights and state must be the same
bits, or nothing is timed; afterwards they are compared again. Timed are whole iterations of one
micro-batch, several in a row as in training, from a device that has nothing to do (CUDA events; the
slowest rank counts). Then one iteration of each is profiled: a Chrome trace, and a picture of its
kernels by stream, with how much of the steps' time lies before the end of the backward pass, and
the gap from kernel to kernel on the stream of the backward pass. Both ways have no clipping,
--overlap-grad-reduce and --overlap-param-gather. A GPT of 1.4 billion parameters is the default.
Small micro-batches (--micro-batch) make an iteration host-bound: what is timed then is how long
Python takes, and no longer what the device does.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bench_gpt
import torch
from bench_gpt import Clock, check_same, environment, percentiles, tokens

MODES = ("off", "on")
CHECKED = 4


@dataclass(frozen=True)
class MemoryRow:
    """Bytes of one way on the rank that has most; per parameter of the model."""

    ranks: int
    release: str
    parameters: int
    persistent_bytes: int
    peak_bytes: int
    build_peak_bytes: int
    device_bytes: int
    gradient_bytes: int
    buckets: int
    slots: int

    def line(self) -> str:
        """Return the row as printed."""
        figures = (self.persistent_bytes, self.peak_bytes, self.gradient_bytes)
        shown = " ".join(f"{value / 1e9:9.3f} {value / self.parameters:8.3f}" for value in figures)
        others = f"{self.build_peak_bytes / 1e9:9.3f} {self.device_bytes / 1e9:9.3f}"
        return f"{self.ranks:5} {self.release:>7} {shown} {others}"


class Trained(bench_gpt.TrainedGPT):
    """A GPT with or without gradient release."""

    def __init__(self, options: argparse.Namespace, mode: str) -> None:
        from megatron_flashoptim import FlashOptimConfig

        recompute = dict(
            recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
        )
        flash = FlashOptimConfig()
        if mode == "on":
            flash = FlashOptimConfig(gradient_release=True, release_slots=options.slots)
        super().__init__(
            options,
            flash,
            fp32_gradients=options.fp32_gradients,
            clip_grad=0.0,
            tied=options.tied,
            **(recompute if options.recompute else {}),
        )
        self.marks_end = False
        self.build_peak_bytes = torch.cuda.max_memory_allocated()

    def iterate(self, batch: torch.Tensor) -> None:
        """Train on tokens (batch, sequence + 1), as Megatron's loop does."""
        self.zero_gradients()
        with torch.profiler.record_function("forward"):
            loss = self.forward(batch)
        with torch.profiler.record_function("backward"):
            torch.autograd.backward(loss)
            if self.marks_end:
                # A kernel that is found in the trace.
                torch.cuda._sleep(1)  # type: ignore[no-untyped-call]  # torch has no types
            self.finalize([self.chunk])
        with torch.profiler.record_function("optimizer.step"):
            success, norm, _ = self.optimizer.step()
        assert success and norm is not None
        self.log += [loss.detach(), norm]

    def memory(self, ranks: int, mode: str) -> MemoryRow:
        """Return the bytes of this rank, between two iterations."""
        gc.collect()
        torch.cuda.synchronize()
        release = self.optimizer.release
        buckets = [bucket for group in self.chunk.bucket_groups for bucket in group.buckets]
        pool = 0 if release is None else release.pool.memory.nbytes
        used = 0
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            used = total - free
        return MemoryRow(
            ranks=ranks,
            release=mode,
            parameters=self.parameters,
            persistent_bytes=torch.cuda.memory_allocated() + pool,
            peak_bytes=torch.cuda.max_memory_allocated() + pool,
            build_peak_bytes=self.build_peak_bytes,
            device_bytes=used,
            gradient_bytes=pool if release else sum(b.grad_data.nbytes for b in buckets),
            buckets=len(buckets),
            slots=0 if release is None else len(release.pool.slots),
        )


def timed(options: argparse.Namespace, trained: Trained, first: int) -> float:
    """Run iterations one after the other; return the ms of each on the slowest rank."""
    batches = [tokens(options, first + number) for number in range(options.in_a_row)]
    clock = Clock(options)
    for batch in batches:
        trained.iterate(batch)
    clock.mark()
    (milliseconds,) = clock.milliseconds()
    return milliseconds / len(batches)


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Train one GPT; return its memory on the rank that has most."""
    trained = Trained(options, options.mode)
    torch.cuda.reset_peak_memory_stats()
    for iteration in range(CHECKED):
        trained.iterate(tokens(options, iteration))
    row = asdict(trained.memory(torch.distributed.get_world_size(), options.mode))
    rows: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(rows, row)
    return {"memory": max(rows, key=lambda found: float(found["peak_bytes"]))}


def measure_time(options: argparse.Namespace) -> dict[str, Any]:
    """Train both GPTs side by side; check, time and profile."""
    both = {mode: Trained(options, mode) for mode in MODES}
    # Enough iterations for Triton to compile and for the allocator to settle.
    for iteration in range(CHECKED):
        for trained in both.values():
            trained.iterate(tokens(options, iteration))
    check_same(both["off"], both["on"], "release")
    samples: dict[str, list[float]] = {mode: [] for mode in MODES}
    gc.disable()
    for repeat in range(options.repeats):
        # Who comes second finds other caches: take turns.
        for mode in MODES if repeat % 2 else reversed(MODES):
            first = CHECKED + repeat * options.in_a_row
            samples[mode].append(timed(options, both[mode], first))
    gc.enable()
    check_same(both["off"], both["on"], "release")
    profiles = {mode: profiled(options, both[mode], mode) for mode in MODES}
    pairs = zip(samples["off"], samples["on"], strict=True)
    return {
        "environment": environment(options),
        "parameters": both["on"].parameters,
        "buckets": len(both["on"].chunk.bucket_groups),
        "checked_iterations": CHECKED + options.repeats * options.in_a_row,
        "iteration_ms": {mode: percentiles(found) for mode, found in samples.items()},
        "saved_ms": percentiles([off - on for off, on in pairs]),
        "samples_ms": samples,
        "profiles": profiles,
    }


def profiled(options: argparse.Namespace, trained: Trained, mode: str) -> dict[str, float]:
    """Profile one iteration on the first rank: trace, picture, times of its kernels."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if options.device == "cuda":
        # The mark's kernel is loaded at its first launch.
        torch.cuda._sleep(1)  # type: ignore[no-untyped-call]  # torch has no types
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    trained.marks_end = options.device == "cuda"
    # Of two iterations the second is recorded: ranks begin the first one at different times.
    second = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=second) as profile:
        for _ in range(2):
            trained.iterate(tokens(options, 0))
            torch.cuda.synchronize()
            profile.step()
    if torch.distributed.get_rank():
        return {}
    stem = f"dp{torch.distributed.get_world_size()}_release_{mode}"
    trace = options.out / f"{stem}.json"
    profile.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy")]
    if not kernels:
        return {}
    draw(kernels, f"{stem}, {environment(options)['device']}", options.out / f"{stem}.png")
    return steps_and_backward(kernels)


def steps_and_backward(kernels: list[dict[str, Any]]) -> dict[str, float]:
    """Return how long the steps of an iteration took, and when, beside its backward pass."""
    steps = [event for event in kernels if kind_of(event) == "step"]
    (ended,) = (event["ts"] for event in kernels if kind_of(event) == "mark")
    within = sum(event["dur"] for event in steps if event["ts"] + event["dur"] <= ended)
    (stream,) = (event["args"]["stream"] for event in kernels if kind_of(event) == "mark")
    on_it = sorted((e for e in kernels if e["args"]["stream"] == stream), key=lambda e: e["ts"])
    gaps = [then["ts"] - e["ts"] - e["dur"] for e, then in itertools.pairwise(on_it)]
    return {
        "median_gap_of_its_kernels_us": statistics.median(gaps),
        "steps": len(steps),
        "steps_ms": sum(event["dur"] for event in steps) / 1e3,
        "of_these_before_the_backward_pass_ended_ms": within / 1e3,
        "last_step_ended_after_it_ms": max(e["ts"] + e["dur"] - ended for e in steps) / 1e3,
    }


def kind_of(event: dict[str, Any]) -> str:
    """Return whether a kernel is the fused step's, NCCL's, of the model or the mark."""
    name = event["name"].lower()
    if "nccl" in name:
        return "communication"
    if "spin_kernel" in name:
        return "mark"
    return "step" if "adamw" in name or "step_kernel" in name else "compute"


def draw(kernels: list[dict[str, Any]], title: str, file: Path) -> None:
    """Draw the kernels of an iteration, one row per stream."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed", file=sys.stderr)
        return
    colors = {"compute": "gray", "communication": "tab:blue", "step": "tab:red"}
    streams = sorted({event["args"]["stream"] for event in kernels})
    begin = min(event["ts"] for event in kernels)
    figure = Figure(figsize=(14, 1.2 + 0.6 * len(streams)))
    axes = figure.subplots()
    for kind, color in colors.items():
        for row, stream in enumerate(streams):
            bars = [
                ((event["ts"] - begin) / 1e3, event["dur"] / 1e3)
                for event in kernels
                if event["args"]["stream"] == stream and kind_of(event) == kind
            ]
            axes.broken_barh(bars, (row - 0.4, 0.8), color=color, label=kind if row == 0 else None)
    axes.set_yticks(range(len(streams)), [f"stream {stream}" for stream in streams])
    axes.set_xlabel("ms")
    axes.set_title(title)
    axes.legend(loc="upper left")
    for event in kernels:
        if kind_of(event) == "mark":
            at = (event["ts"] - begin) / 1e3
            axes.axvline(at, color="black", linewidth=1, label="end of the backward pass")
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def run_rank(options: argparse.Namespace) -> None:
    """Measure in a rank that torchrun has started."""
    logging.disable(logging.WARNING)
    with bench_gpt.started_rank(options):
        found = measure_time(options) if options.mode == "both" else measure_memory(options)
        if torch.distributed.get_rank() == 0:
            options.result.write_text(json.dumps(found))


def started(options: argparse.Namespace, ranks: int, mode: str) -> dict[str, Any]:
    """Start torchrun on this script; return what its first rank found.

    Raises:
        SystemExit: the run failed.
    """
    result = options.out / f"dp{ranks}_{mode}.part.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", *sys.argv, "--mode", mode, "--result", str(result)]
    began = time.perf_counter()
    if subprocess.run(command).returncode:
        raise SystemExit(f"the run of {ranks} ranks, release {mode}, failed")
    print(f"({ranks} ranks, release {mode}: {time.perf_counter() - began:.0f} s)", flush=True)
    found: dict[str, Any] = json.loads(result.read_text())
    result.unlink()
    return found


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    bench_gpt.add_model_options(parser)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="default 1 2")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences of a rank")
    parser.add_argument("--tied", action="store_true", help="tie input and output embeddings")
    parser.add_argument("--recompute", action="store_true", help="recompute every layer")
    parser.add_argument("--slots", type=int, default=3, help="--flash-release-slots")
    parser.add_argument("--fp32-gradients", action="store_true", help="gradients in fp32")
    parser.add_argument("--repeats", type=int, default=15, help="samples of each that count")
    parser.add_argument("--in-a-row", type=int, default=5, help="iterations of a sample")
    parser.add_argument("--time-only", action="store_true", help="leave out the runs for memory")
    parser.add_argument("--out", type=Path, default=Path("gradient_release"), help="folder")
    parser.add_argument("--mode", choices=(*MODES, "both"), help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and torch.cuda.device_count() < max(options.ranks):
        parser.error(
            f"--ranks {max(options.ranks)}: torch sees {torch.cuda.device_count()} GPUs here; "
            "give fewer, or try the script out with --device cpu"
        )
    return options


def main() -> None:
    """Start all runs, print, write ``report.json``."""
    options = parse()
    if options.mode is not None:
        run_rank(options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "options": {k: v for k, v in vars(options).items() if k not in ("out", "mode", "result")},
        "ranks": {},
    }
    for ranks in options.ranks:
        modes = () if options.time_only else MODES
        memory = [started(options, ranks, mode)["memory"] for mode in modes]
        report["ranks"][str(ranks)] = {"memory": memory, **started(options, ranks, "both")}
    first = report["ranks"][str(options.ranks[0])]
    print(", ".join(f"{key} {value}" for key, value in first["environment"].items()))
    print(f"{first['parameters']:,} parameters in {first['buckets']} buckets")
    if first["memory"]:
        print("ranks release  persistent: GB, B/par  peak: GB, B/par  gradients: GB, B/par "
              "build GB device GB")  # fmt: skip
    for found in report["ranks"].values():
        for row in found["memory"]:
            print(MemoryRow(**row).line())
    for ranks, found in report["ranks"].items():
        print(f"{ranks} ranks: {found['checked_iterations']} iterations, the same bits")
        for mode, times in found["iteration_ms"].items():
            spread = ", ".join(f"{name} {value:.2f}" for name, value in times.items())
            print(f"  iteration with release {mode}: {spread} ms {found['profiles'][mode] or ''}")
        saved = ", ".join(f"{name} {value:.2f}" for name, value in found["saved_ms"].items())
        print(f"  release saves {saved} ms an iteration (differences of the same sample)")
    (options.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"traces, pictures and report.json in {options.out}")


if __name__ == "__main__":
    main()
