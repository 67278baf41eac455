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
import importlib.metadata
import json
import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bench_gpt
import torch

ROOT = Path(__file__).resolve().parents[1]
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


class Trained:
    """A GPT that trains on random tokens, and its optimizer."""

    def __init__(self, options: argparse.Namespace, mode: str) -> None:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        from megatron_flashoptim import (
            FlashDistributedOptimizer,
            FlashOptimConfig,
            get_megatron_optimizer,
        )

        torch.manual_seed(1)
        model_parallel_cuda_manual_seed(1)
        config, model = bench_gpt.build(
            options,
            device_of(options),
            tied=False,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            masked_softmax_fusion=False,
        )
        ddp_config = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=not options.bf16_gradients,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            bucket_size=options.bucket_size,
        )
        ranks = torch.distributed.get_world_size()
        params = list(model.parameters())
        layout = FlashDistributedOptimizer.compute_full_param_layout(
            params, options.bucket_size, ranks, ddp_config
        )
        self.chunk = DistributedDataParallel(config, ddp_config, model, full_param_layout=layout)
        self.parameters = sum(param.numel() for param in params)
        optimizer_config = OptimizerConfig(
            optimizer="adam",
            lr=1e-4,
            weight_decay=0.1,
            adam_beta2=0.95,
            clip_grad=1.0,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=True,
            overlap_param_gather=True,
        )
        flash = FlashOptimConfig(early_param_gather=mode == "early")
        self.optimizer = get_megatron_optimizer(optimizer_config, [self.chunk], flash=flash)
        for group in self.optimizer.param_groups:
            group["lr"] = optimizer_config.lr
        self.finalize = finalize_model_grads
        positions = torch.arange(options.sequence, device=device_of(options))
        self.positions = positions.expand(options.micro_batch, -1)
        self.mask = (positions[None, :] > positions[:, None])[None, None]
        self.loss = self.forward(tokens(options, 0))
        self.losses: list[torch.Tensor] = []

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the loss on tokens (batch, sequence + 1)."""
        losses: torch.Tensor = self.chunk(
            batch[:, :-1], self.positions, self.mask, labels=batch[:, 1:]
        )
        return losses.float().mean()

    def backward(self) -> None:
        """Take the gradients of the last forward pass and reduce them."""
        torch.autograd.backward(self.loss)
        self.finalize([self.chunk])

    def step_and_forward(self, batch: torch.Tensor, mark: Callable[[], None]) -> None:
        """Step, and run the forward pass of the next iteration, as Megatron's loop does."""
        success, _, _ = self.optimizer.step()
        assert success
        mark()
        self.chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.loss = self.forward(batch)
        mark()
        self.losses.append(self.loss.detach())

    def leave_out_gathers(self) -> None:
        """Have every forward pass take the weights as they are from now on."""
        for group in self.chunk.bucket_groups:
            group.start_param_sync = lambda force_sync=False: None

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield losses, gathered weights and this rank's state."""
        self.chunk.disable_forward_pre_hook(param_sync=True)
        self.chunk.enable_forward_pre_hook()
        yield torch.stack(self.losses)
        yield from (param.data for param in self.chunk.parameters())
        for member in self.optimizer.chained_optimizers:
            yield from (tensor for shard in member.optimizer.shards for _, tensor in shard.state())


def tokens(options: argparse.Namespace, iteration: int) -> torch.Tensor:
    """Return this rank's random tokens (batch, sequence + 1) of an iteration."""
    seed = iteration * torch.distributed.get_world_size() + torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(seed)
    shape = (options.micro_batch, options.sequence + 1)
    return torch.randint(options.vocab, shape, generator=generator).to(device_of(options))


class Clock:
    """Marks moments on the device, or on a CPU in the process."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Mark where the current stream stands."""
        if self._cuda:
            # torch.cuda.Event has no annotations.
            self._marks.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Return the times from the first mark to each other one."""
        first, *others = self._marks
        if self._cuda:
            others[-1].synchronize()
            return [first.elapsed_time(other) for other in others]
        return [(other - first) * 1e3 for other in others]


def iterate(options: argparse.Namespace, trained: Trained, iteration: int) -> list[float]:
    """Run one iteration; return the ms until step and forward have ended on the slowest rank."""
    trained.backward()
    batch = tokens(options, iteration)
    torch.cuda.synchronize()
    torch.distributed.barrier()
    torch.cuda.synchronize()
    clock = Clock(options.device == "cuda")
    clock.mark()
    trained.step_and_forward(batch, clock.mark)
    times = torch.tensor(clock.milliseconds(), device=device_of(options))
    torch.distributed.all_reduce(times, op=torch.distributed.ReduceOp.MAX)
    return [float(value) for value in times.tolist()]


def check_same(both: dict[str, Trained]) -> None:
    """Compare losses, weights and state of both ways, a collective.

    Raises:
        SystemExit: a bit differs on some rank.
    """
    pairs = zip(both["forward"].tensors(), both["early"].tensors(), strict=True)
    differ = sum(not torch.equal(bits(one), bits(other)) for one, other in pairs)
    counts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(counts, differ)
    if any(counts):
        raise SystemExit(f"early gather trains other bits: tensors that differ by rank: {counts}")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor's bytes."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


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
    step, whole = ([*map(float, column)] for column in zip(*samples, strict=True))

    def quantile(values: list[float], q: float) -> float:
        return sorted(values)[round(q * (len(values) - 1))]

    return Row(NAMES[name], quantile(step, 0.5), *(quantile(whole, q) for q in (0.2, 0.5, 0.8)))


def device_of(options: argparse.Namespace) -> torch.device:
    """Return the device of this rank."""
    if options.device == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def environment(options: argparse.Namespace) -> dict[str, str]:
    """Return device, versions and commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    packages = ("torch", "triton", "megatron-core")
    return {
        "device": device,
        "ranks": str(torch.distributed.get_world_size()),
        **{name: importlib.metadata.version(name) for name in packages},
        "CUDA_DEVICE_MAX_CONNECTIONS": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "not set"),
        "commit": commit or "unknown",
    }


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--micro-batch", type=int, default=2, help="sequences of a rank")
    parser.add_argument("--bucket-size", type=int, default=40_000_000, help="Megatron's default")
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
    if options.device == "cpu":
        from megatron_flashoptim.megatron import cpu

        cpu.enable()
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("nccl" if options.device == "cuda" else "gloo")
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel()
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
    check_same(both)
    check_gathers(options, both)
    if first:
        print(f"check: {CHECKED} iterations give the same losses, weights and state, bit for bit")
    samples: dict[str, list[list[float]]] = {mode: [] for mode in (*MODES, "none")}
    gc.disable()
    for repeat in range(options.repeats):
        # Who comes second finds other caches: take turns.
        for mode in MODES if repeat % 2 else reversed(MODES):
            samples[mode].append(iterate(options, both[mode], CHECKED + 2 + repeat))
    check_same(both)
    both["forward"].leave_out_gathers()
    for repeat in range(options.repeats):
        samples["none"].append(iterate(options, both["forward"], repeat))
    rows = [row(name, found) for name, found in samples.items()]
    pairs = zip(samples["forward"], samples["early"], strict=True)
    saved = sorted(late[1] - early[1] for late, early in pairs)
    p20, p50, p80 = (saved[round(q * (len(saved) - 1))] for q in (0.2, 0.5, 0.8))
    if first:
        print(f"{'weights gathered':>20} {'step ms':>9} {'until forward has ended: p20':>29} "
              f"{'p50':>9} {'p80 ms':>9}")  # fmt: skip
        for line in rows:
            print(
                f"{line.gather:>20} {line.step_p50_ms:9.3f} {line.p20_ms:29.3f} "
                f"{line.p50_ms:9.3f} {line.p80_ms:9.3f}"
            )
        print(
            f"early gather saves {p50:.3f} ms (p20 {p20:.3f}, p80 {p80:.3f}; differences of the "
            f"same iteration), {p50 / rows[0].p50_ms:.1%} of the time without it"
        )
        if options.json:
            given = {key: value for key, value in vars(options).items() if key != "json"}
            report = {
                "environment": where,
                "options": given,
                "parameters": both["early"].parameters,
                "buckets": len(both["early"].chunk.bucket_groups),
                "rows": [asdict(line) for line in rows],
                "saved_ms": {"p20": p20, "p50": p50, "p80": p80},
                "samples_ms": samples,
            }
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
