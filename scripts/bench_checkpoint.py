#!/usr/bin/env python3
"""Time and weigh checkpoints of a GPT: flash optimizers beside Megatron's own Adam, in one run.

    torchrun --nproc-per-node 2 scripts/bench_checkpoint.py --device cpu
    torchrun --nproc-per-node 8 scripts/bench_checkpoint.py --layers 24 --hidden 2048 --heads 16 \\
        --vocab 50304 --json checkpoint.json

All ranks are data parallel. For each optimizer and format the script saves, overwrites weights and
state, loads, and compares every bit with what was saved; a difference ends it without a report.
Times are medians over ``--repeats`` of the slowest rank, after a first save and load that are not
counted; loads come from the page cache. Memory is the growth of the peak during a call, on the rank
and in the call where it grows most: resident host memory, and memory allocated on the device.
Without Transformer Engine, Megatron's Adam is the plain fp32 one of the tests, which does not
change what is stored.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import importlib.metadata
import json
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bench_gpt
import torch
from exact_adamw import use_as_megatrons_adam

from megatron_flashoptim import FlashOptimConfig
from megatron_flashoptim.optim.rules import RULES

ROOT = Path(__file__).resolve().parents[1]
FORMATS = ("dp_reshardable", "fully_reshardable")
OPTIMIZERS = ("adam", *RULES)


@dataclass(frozen=True)
class Row:
    """One optimizer and format; times in seconds, memory in bytes."""

    optimizer: str
    format: str
    parameters: int
    ranks: int
    save_s: float
    load_s: float
    save_host_bytes: int
    load_host_bytes: int
    save_device_bytes: int
    load_device_bytes: int
    disk_bytes: int
    bytes_per_parameter: float


@dataclass
class Peak:
    """Growth of this process's peak memory during a call."""

    seconds: float = 0.0
    host_bytes: int = 0
    device_bytes: int = 0


def measure(call: Callable[[], None]) -> Peak:
    """Time a call between barriers and return the largest figures of all ranks."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed must not hide growth
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of resident memory
    host, device = _host_peak(), torch.cuda.max_memory_allocated()
    torch.distributed.barrier()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    torch.distributed.barrier()
    figures = [
        time.perf_counter() - start,
        _host_peak() - host,
        torch.cuda.max_memory_allocated() - device,
    ]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, figures)
    return Peak(*(max(column) for column in zip(*everyone, strict=True)))


def _host_peak() -> int:
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


class Trained:
    """A GPT and its optimizer after one step on random gradients."""

    def __init__(self, options: argparse.Namespace, optimizer: str) -> None:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
        )
        from megatron.core.optimizer import OptimizerConfig
        from megatron.core.optimizer import get_megatron_optimizer as get_stock_optimizer
        from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

        from megatron_flashoptim import FlashDistributedOptimizer, get_megatron_optimizer

        flash = optimizer in RULES
        device = torch.device("cuda", torch.cuda.current_device()) if _on_gpu() else "cpu"
        config, model = bench_gpt.build(options, device, tied=True)
        ddp_config = DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=not options.bf16_gradients
        )
        layout_class = FlashDistributedOptimizer if flash else DistributedOptimizer
        ranks = torch.distributed.get_world_size()
        params = list(model.parameters())
        layout = layout_class.compute_full_param_layout(params, None, ranks, ddp_config)
        self.chunk = DistributedDataParallel(config, ddp_config, model, full_param_layout=layout)
        self.parameters = sum(param.numel() for param in params)
        build = get_megatron_optimizer if flash else get_stock_optimizer
        optimizer_config = OptimizerConfig(
            optimizer="adam",
            lr=1e-3,
            min_lr=1e-3,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=True,
        )
        options_of_flash = {"flash": FlashOptimConfig(optimizer=optimizer)} if flash else {}
        self.optimizer = build(optimizer_config, [self.chunk], **options_of_flash)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-3
        generator = torch.Generator(device).manual_seed(torch.distributed.get_rank())
        for buffer in self.chunk.buffers:
            buffer.grad_data.normal_(generator=generator)
        self.optimizer.step()

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield weights and this rank's state."""
        yield from (param.data for param in self.chunk.parameters())
        for member in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            shards = getattr(member.optimizer, "shards", None)
            if shards is not None:
                for item in member.shard_params:  # not the padding, which no checkpoint holds
                    shard = shards[item.shard]
                    for _, tensor in shard.state():
                        each = shard.param.numel() // tensor.numel()
                        yield tensor[item.start // each : -(-item.end // each)]
                continue
            for group in member.optimizer.param_groups:
                for main_param in group["params"]:
                    yield main_param.data
                    state = member.optimizer.state[main_param]
                    yield from (state[name] for name in ("exp_avg", "exp_avg_sq"))

    def digest(self) -> list[int]:
        """Return sums over every byte, plain and weighted by where it is, computed in place."""
        sums: list[torch.Tensor] = []
        for tensor in self.tensors():
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
            for chunk in torch.split(flat, 1 << 24):
                values = chunk.to(torch.int64)
                places = torch.arange(1, len(chunk) + 1, device=chunk.device)
                sums += [values.sum(), (values * places).sum()]
        found: list[int] = torch.stack(sums).tolist()
        return found

    def overwrite(self) -> None:
        """Replace weights and state by ones, which no checkpoint holds."""
        for tensor in self.tensors():
            tensor.fill_(1)

    def save(self, folder: Path, sharding_type: str) -> None:
        """Save weights and state, fully in parallel as Megatron does by default."""
        from megatron.core import dist_checkpointing, parallel_state
        from megatron.core.dist_checkpointing.strategies.fully_parallel import (
            FullyParallelSaveStrategyWrapper,
        )
        from megatron.core.dist_checkpointing.strategies.torch import (
            TorchDistSaveShardedStrategy,
        )

        metadata = {
            "distrib_optim_sharding_type": sharding_type,
            "chained_optim_avoid_prefix": True,
        }
        model = self.chunk.module.sharded_state_dict()
        state = {
            "model": model,
            "optimizer": self.optimizer.sharded_state_dict(model, metadata=metadata),
        }
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy(), group)
        dist_checkpointing.save(state, str(folder), strategy, content_metadata=metadata)

    def load(self, folder: Path) -> None:
        """Load what ``save`` saved."""
        from megatron.core import dist_checkpointing

        metadata = dist_checkpointing.load_content_metadata(str(folder))
        model = self.chunk.module.sharded_state_dict()
        state = {
            "model": model,
            "optimizer": self.optimizer.sharded_state_dict(
                model, is_loading=True, metadata=metadata
            ),
        }
        loaded = dist_checkpointing.load(state, str(folder))
        self.chunk.module.load_state_dict(loaded["model"])
        self.optimizer.load_state_dict(loaded["optimizer"])


def run(options: argparse.Namespace, optimizer: str, sharding_type: str, folder: Path) -> Row:
    """Measure one optimizer and format.

    Raises:
        SystemExit: what was loaded differs from what was saved.
    """
    trained = Trained(options, optimizer)
    saves, loads = [], []
    first = torch.distributed.get_rank() == 0
    disk_bytes = 0
    warm_up = 0 if options.no_warm_up else 1
    for _ in range(options.repeats + warm_up):
        if first:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        torch.distributed.barrier()
        digest = trained.digest()
        saves.append(measure(lambda: trained.save(folder, sharding_type)))
        trained.overwrite()
        loads.append(measure(lambda: trained.load(folder)))
        if trained.digest() != digest:
            raise SystemExit(
                f"{optimizer}, {sharding_type}: loaded state differs from what was saved"
            )
        if first:
            disk_bytes = sum(file.stat().st_size for file in folder.iterdir())
    return Row(
        optimizer=optimizer,
        format=sharding_type,
        parameters=trained.parameters,
        ranks=torch.distributed.get_world_size(),
        save_s=statistics.median(peak.seconds for peak in saves[warm_up:]),
        load_s=statistics.median(peak.seconds for peak in loads[warm_up:]),
        save_host_bytes=max(peak.host_bytes for peak in saves),
        load_host_bytes=max(peak.host_bytes for peak in loads),
        save_device_bytes=max(peak.device_bytes for peak in saves),
        load_device_bytes=max(peak.device_bytes for peak in loads),
        disk_bytes=disk_bytes,
        bytes_per_parameter=disk_bytes / trained.parameters,
    )


def table(rows: list[Row]) -> str:
    """Return the rows as a table, memory and sizes in MB (10^6 bytes)."""
    head = ("optimizer", "format", "save s", "load s", "host MB", "device MB", "disk MB", "B/param")
    lines = [
        (
            row.optimizer,
            row.format,
            f"{row.save_s:.2f}",
            f"{row.load_s:.2f}",
            f"{row.save_host_bytes / 1e6:.0f} / {row.load_host_bytes / 1e6:.0f}",
            f"{row.save_device_bytes / 1e6:.0f} / {row.load_device_bytes / 1e6:.0f}",
            f"{row.disk_bytes / 1e6:.1f}",
            f"{row.bytes_per_parameter:.3f}",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number < 2 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (head, *lines)
    )


def _on_gpu() -> bool:
    return torch.cuda.is_available()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--bf16-gradients", action="store_true", help="gradients in bf16")
    parser.add_argument("--repeats", type=int, default=3, help="counted saves and loads")
    parser.add_argument(
        "--no-warm-up", action="store_true", help="count the first save and load too"
    )
    measured = ["adam", "flash_adamw"]
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=measured)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--folder", type=Path, help="where to save; default: a temporary folder")
    parser.add_argument(
        "--keep", action="store_true", help="leave the last checkpoint in --folder/checkpoint"
    )
    parser.add_argument("--json", type=Path, help="file for the rows")
    return parser.parse_args(arguments)


def _use_plain_adam_without_transformer_engine() -> None:
    try:
        importlib.import_module("transformer_engine.pytorch.optimizers")
    except ImportError:
        use_as_megatrons_adam()


def _shared_folder(options: argparse.Namespace) -> tuple[Path, bool]:
    """Return the folder of all ranks, and whether to remove it at the end."""
    made: list[str | None] = [None]
    if options.folder is None and torch.distributed.get_rank() == 0:
        made[0] = tempfile.mkdtemp(prefix="bench_checkpoint_")
    torch.distributed.broadcast_object_list(made, src=0)
    return (options.folder, False) if made[0] is None else (Path(made[0]), True)


def main() -> None:
    """Run every combination and print the table on rank 0."""
    options = parse()
    logging.disable(logging.WARNING)
    with bench_gpt.started_rank(options):
        measure_all(options)


def measure_all(options: argparse.Namespace) -> None:
    """Run every combination in a rank."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    _use_plain_adam_without_transformer_engine()
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    folder, temporary = _shared_folder(options)
    environment = bench_gpt.environment(options)
    rows = []
    for optimizer in options.optimizers:
        for sharding_type in options.formats:
            rows.append(run(options, optimizer, sharding_type, folder / "checkpoint"))
            gc.collect()
            if options.json and torch.distributed.get_rank() == 0:
                stored = {"environment": environment, "rows": [asdict(row) for row in rows]}
                options.json.write_text(json.dumps(stored, indent=1) + "\n")
    if torch.distributed.get_rank() == 0:
        if temporary or not options.keep:
            shutil.rmtree(folder if temporary else folder / "checkpoint")
        print(f"{rows[0].parameters:,} parameters, {rows[0].ranks} data-parallel ranks")
        print(", ".join(f"{name} {value}" for name, value in environment.items()))
        print(table(rows))
        print("host and device MB: growth of the peak during save / load, on the worst rank")


if __name__ == "__main__":
    main()
