#!/usr/bin/env python3
"""Time from a step to the end of the next forward pass, with and without early parameter gather.

    torchrun --nproc-per-node 2 scripts/bench_param_gather.py --json param_gather.json
    torchrun --nproc-per-node 2 scripts/bench_param_gather.py --device cpu --layers 2 --hidden 64 \\
        --vocab 256 --sequence 64 --bucket-size 30000 --repeats 3

Builds the same GPT twice in Megatron's DistributedDataParallel with --overlap-grad-reduce and
--overlap-param-gather, all ranks data parallel, and flash_adamw with and without
--flash-early-param-gather. Both train side by side on the same tokens, taking turns within each
iteration. First the check: after some iterations losses, weights and state must be the same bits on
every rank, or nothing is timed; afterwards they are compared again. Timed is what a training loop
does from ``optimizer.step()`` on: norm, clipping, update, zeroing of gradients and the forward pass
of the next iteration, from a device that has nothing to do (CUDA events; the slowest rank counts).
``step`` ends with the last launch of the step on the compute stream, gathers may go on then.
"no gather" is the same without any: what cannot be undercut. Its weights are wrong, so it comes
last. A GPT of 1.4 billion parameters is the default.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bench_gpt
import torch
from bench_gpt import Clock, check_same, environment, percentiles, tokens

MODES = ("forward", "early")
NAMES = {"forward": "in the forward pass", "early": "early", "none": "no gather"}
CHECKED = 4


@dataclass(frozen=True)
class Row:
    """Milliseconds of one way to gather; of the slowest rank in each iteration."""

    gather: str
    step_p50_ms: float
    p20_ms: float
    p50_ms: float
    p80_ms: float


class Trained(bench_gpt.TrainedGPT):
    """A GPT one forward pass ahead of its gradients."""

    def __init__(self, options: argparse.Namespace, mode: str) -> None:
        from megatron_flashoptim import FlashOptimConfig

        super().__init__(
            options,
            FlashOptimConfig(early_param_gather=mode == "early"),
            fp32_gradients=not options.bf16_gradients,
            clip_grad=1.0,
        )
        self.loss = self.forward(tokens(options, 0))

    def backward(self) -> None:
        """Take the gradients of the last forward pass and reduce them."""
        torch.autograd.backward(self.loss)
        self.finalize([self.chunk])

    def step_and_forward(self, batch: torch.Tensor, mark: Callable[[], None]) -> None:
        """Step, and run the forward pass of the next iteration, as Megatron's loop does."""
        success, _, _ = self.optimizer.step()
        assert success
        mark()
        self.zero_gradients()
        self.loss = self.forward(batch)
        mark()
        self.log.append(self.loss.detach())

    def leave_out_gathers(self) -> None:
        """Have every forward pass take the weights as they are from now on."""
        for group in self.chunk.bucket_groups:
            group.start_param_sync = lambda force_sync=False: None


def iterate(options: argparse.Namespace, trained: Trained, iteration: int) -> list[float]:
    """Run one iteration; return the ms until step and forward have ended on the slowest rank."""
    trained.backward()
    batch = tokens(options, iteration)
    clock = Clock(options)
    trained.step_and_forward(batch, clock.mark)
    return clock.milliseconds()


def check_gathers(options: argparse.Namespace, both: dict[str, Trained]) -> None:
    """See that early gather is in force, and only where it should be, after a step.

    Raises:
        SystemExit: it is not.
    """
    for mode, trained in both.items():
        groups = trained.chunk.bucket_groups
        expected = len(groups) if mode == "early" else 0
        flying: list[int] = []

        def count(groups: Any = groups, flying: list[int] = flying) -> None:
            flying.append(sum(group.param_gather_handle is not None for group in groups))

        trained.backward()
        trained.step_and_forward(tokens(options, CHECKED + 1), count)
        if flying[0] != expected:
            raise SystemExit(
                f"weights gathered {NAMES[mode]}: {flying[0]} of {len(groups)} buckets travel "
                f"after the step, expected {expected}"
            )


def row(name: str, samples: list[list[float]]) -> Row:
    """Return the percentiles of samples of (step, step and forward)."""
    step, whole = (percentiles([*column]) for column in zip(*samples, strict=True))
    return Row(NAMES[name], step["p50"], whole["p20"], whole["p50"], whole["p80"])


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    bench_gpt.add_model_options(parser)
    parser.add_argument("--micro-batch", type=int, default=2, help="sequences of a rank")
    parser.add_argument("--bf16-gradients", action="store_true", help="gradients in bf16")
    parser.add_argument("--repeats", type=int, default=30, help="iterations of each that count")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; --device cpu tries the script out")
    if "RANK" not in os.environ:
        parser.error("start it with torchrun --nproc-per-node 2")
    return options


def main() -> None:
    """Check, measure, print."""
    options = parse()
    logging.disable(logging.WARNING)
    with bench_gpt.started_rank(options):
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """Measure in a rank; the first one prints."""
    both = {mode: Trained(options, mode) for mode in MODES}
    first = torch.distributed.get_rank() == 0
    where = environment(options)
    if first:
        print(", ".join(f"{key} {value}" for key, value in where.items()))
        print(
            f"{both['early'].parameters:,} parameters in {len(both['early'].chunk.bucket_groups)} "
            f"buckets, {options.micro_batch} sequences of {options.sequence} tokens on each rank"
        )
    # Enough iterations for Triton to compile and for the allocator to settle.
    for iteration in range(1, CHECKED + 1):
        for trained in both.values():
            iterate(options, trained, iteration)
    check_same(both["forward"], both["early"], "early gather")
    check_gathers(options, both)
    if first:
        print(f"check: {CHECKED} iterations give the same losses, weights and state, bit for bit")
    samples: dict[str, list[list[float]]] = {mode: [] for mode in (*MODES, "none")}
    gc.disable()
    for repeat in range(options.repeats):
        # Who comes second finds other caches: take turns.
        for mode in MODES if repeat % 2 else reversed(MODES):
            samples[mode].append(iterate(options, both[mode], CHECKED + 2 + repeat))
    check_same(both["forward"], both["early"], "early gather")
    both["forward"].leave_out_gathers()
    for repeat in range(options.repeats):
        samples["none"].append(iterate(options, both["forward"], repeat))
    rows = [row(name, found) for name, found in samples.items()]
    pairs = zip(samples["forward"], samples["early"], strict=True)
    saved = percentiles([late[1] - early[1] for late, early in pairs])
    if first:
        print(f"{'weights gathered':>20} {'step ms':>9} {'until forward has ended: p20':>29} "
              f"{'p50':>9} {'p80 ms':>9}")  # fmt: skip
        for line in rows:
            print(
                f"{line.gather:>20} {line.step_p50_ms:9.3f} {line.p20_ms:29.3f} "
                f"{line.p50_ms:9.3f} {line.p80_ms:9.3f}"
            )
        print(
            f"early gather saves {saved['p50']:.3f} ms (p20 {saved['p20']:.3f}, "
            f"p80 {saved['p80']:.3f}; differences of the same iteration), "
            f"{saved['p50'] / rows[0].p50_ms:.1%} of the time without it"
        )
        if options.json:
            given = {key: value for key, value in vars(options).items() if key != "json"}
            report = {
                "environment": where,
                "options": given,
                "parameters": both["early"].parameters,
                "buckets": len(both["early"].chunk.bucket_groups),
                "rows": [asdict(line) for line in rows],
                "saved_ms": saved,
                "samples_ms": samples,
            }
            options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
