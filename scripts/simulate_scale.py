#!/usr/bin/env python3
"""Lay out a model and plan its checkpoint on thousands of ranks, without a GPU.

    python scripts/simulate_scale.py --all-ranks-of 1 --processes 2 --json scale_1t.json

Megatron builds model, DDP buffers and optimizer of one rank after the other on the meta device, and
the code that a training run uses lays them out and lists what the rank writes
(megatron_flashoptim/megatron/nominal.py). Stages named by ``--all-ranks-of`` have all their ranks
planned, which gives what rank 0 has to join and check for them at a save: torch's own planner does
it here, timed. Of the other stages the first, the middle and the last data-parallel ranks are
planned. Refuses to report sums that do not come out: owned elements that are not the model's, ranks
that write otherwise than ranks of the same kind.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pickle
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from megatron_flashoptim.cli.argument_files import read_arguments

# Megatron would move the model to a GPU that it sees.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "moe_1t_4096_ranks.args"
# Of a rank, summarized over the ranks of a stage.
QUANTITIES = (
    *("parameters", "owned", "ranges", "pieces", "buffer", "weight_bytes", "grad_bytes"),
    *("state_bytes", "table_bytes", "launches"),
)

_args: Any = None


def start(arguments: Sequence[str], world_size: int) -> None:
    """Prepare a worker process."""
    global _args
    from megatron_flashoptim.megatron.memory import nominal

    _args = nominal.parse(arguments, world_size)


def sizes(arguments: Sequence[str], world_size: int) -> tuple[float, list[dict[str, int]]]:
    """Return the stages' sizes under Megatron's and our layout, and what it took to plan them."""
    from megatron_flashoptim.megatron.memory import planner

    begin = time.perf_counter()
    run = planner.plan(arguments, world_size)
    return time.perf_counter() - begin, [dataclasses.asdict(stage) for stage in run.stages]


def plan(rank: int) -> Any:
    """Plan a rank of the worker's run."""
    from megatron_flashoptim.megatron.memory import nominal

    return nominal.plan_rank(_args, rank)


def join(plans: Sequence[Any]) -> dict[str, float]:
    """Let torch join and check the ranks' save plans as rank 0 does; return time and sizes.

    Args:
        plans: save plans of all ranks that write any part of the tensors in them.

    Raises:
        ValueError: the ranks' boxes do not cover each tensor once.
    """
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import MetadataIndex

    from megatron_flashoptim.megatron.memory import nominal

    begin = time.perf_counter()
    _, metadata = nominal.save_planner().create_global_plan(list(plans))
    seconds = time.perf_counter() - begin
    # What torch's writer adds: where each item lies.
    metadata.storage_data = {
        MetadataIndex(item.index.fqn, item.index.offset): _StorageInfo(
            f"__{rank}_0.distcp", number, 1
        )
        for rank, plan_of_rank in enumerate(plans)
        for number, item in enumerate(plan_of_rank.items)
    }
    size = len(pickle.dumps(metadata))
    metadata.all_local_plans = list(plans)  # as Megatron keeps them there
    return {
        "items": sum(len(plan_of_rank.items) for plan_of_rank in plans),
        "tensors": len(metadata.state_dict_metadata),
        "largest_tensor_items": max(
            len(getattr(value, "chunks", ())) for value in metadata.state_dict_metadata.values()
        ),
        "seconds": round(seconds, 2),
        "gathered_bytes": sum(len(pickle.dumps(plan_of_rank)) for plan_of_rank in plans),
        "metadata_bytes": size,
        "metadata_with_plans_bytes": len(pickle.dumps(metadata)),
    }


def without_optimizer(plan_of_rank: Any) -> Any:
    """Return a save plan of the model's weights alone."""
    items = [item for item in plan_of_rank.items if "optimizer." not in item.index.fqn]
    return dataclasses.replace(plan_of_rank, items=items)


def spread(values: Iterable[float]) -> dict[str, float]:
    """Return the extremes and the mean."""
    values = list(values)
    mean = round(sum(values) / len(values), 3)
    return {"min": round(min(values), 3), "mean": mean, "max": round(max(values), 3)}


def summarize(stage: int, ranks: Sequence[Any], complete: bool) -> dict[str, Any]:
    """Return what the planned ranks of a stage have in common."""
    formats = list(ranks[0].boxes)
    row: dict[str, Any] = {"stage": stage, "ranks_planned": len(ranks), "all_ranks": complete}
    row |= {name: spread(getattr(rank, name) for rank in ranks) for name in QUANTITIES}
    for name in formats:
        row[f"{name}_boxes"] = spread(rank.boxes[name] for rank in ranks)
    row["seconds"] = {
        name: spread(rank.seconds[name] for rank in ranks) for name in ranks[0].seconds
    }
    if complete:
        row["owned_total"] = sum(rank.owned for rank in ranks)
        for name in formats:
            row[name] = join([rank.writes[name] for rank in ranks])
        weights = join([without_optimizer(rank.writes[formats[0]]) for rank in ranks])
        row["weights_alone"] = weights
    return row


def check_owned(ranks: Sequence[Any], args: Any) -> None:
    """Check that all ranks of a stage together own each parameter's state once per instance.

    Raises:
        SystemExit: they do not.
    """
    tensor = args.tensor_model_parallel_size
    expert = args.expert_tensor_parallel_size * args.expert_model_parallel_size
    instances = args.num_distributed_optimizer_instances
    first = ranks[0]
    dense = first.parameters - first.expert_parameters
    expected = instances * (tensor * dense + expert * first.expert_parameters)
    found = sum(rank.owned for rank in ranks)
    if found != expected:
        sys.exit(f"stage {first.stage}: {found} elements owned, {expected} in the model")


def machine() -> dict[str, Any]:
    """Return what the numbers depend on."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.processor(),
        "commit": commit,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "megatron-core")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", type=Path, default=CONFIG, help="file of Megatron's arguments")
    parser.add_argument("--gpus", type=int, default=4096)
    parser.add_argument("--all-ranks-of", type=int, nargs="*", default=[], metavar="STAGE")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    arguments = read_arguments(options.config)

    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as pool:
        layout_seconds, stages = pool.submit(sizes, arguments, options.gpus).result()
    start(arguments, options.gpus)
    per_stage = options.gpus // len(stages)
    rows = []
    with ProcessPoolExecutor(options.processes, spawn, start, (arguments, options.gpus)) as pool:
        for stage, size in enumerate(stages):
            complete = stage in options.all_ranks_of
            some = range(per_stage) if complete else (0, per_stage // 2, per_stage - 1)
            ranks = list(pool.map(plan, [stage * per_stage + number for number in some]))
            if complete:
                check_owned(ranks, _args)
            row = summarize(stage, ranks, complete)
            for name in ("stock", "flash"):
                row[f"{name}_padding"] = size[f"{name}_buffer"] - size["parameters"]
            if any(rank.buffer != size["flash_buffer"] for rank in ranks):
                sys.exit(f"stage {stage}: DDP's buffers are not as large as planned")
            rows.append(row)
            print(f"stage {stage}: {len(ranks)} ranks planned", flush=True)
    report = {
        "machine": machine(),
        "gpus": options.gpus,
        "arguments": arguments,
        "layout_of_all_stages_seconds": round(layout_seconds, 2),
        "stages": rows,
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
