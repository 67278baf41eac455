#!/usr/bin/env python3
"""Time Megatron's whole ``optimizer.step()`` on a GPT: gradient norm, clipping and update.

Builds a real Megatron GPT in Megatron's DistributedDataParallel, fills its gradient buffers with
random numbers and steps the optimizer. First the checks: a step must not make the host wait for
the device, and steps replayed from a CUDA graph through Megatron's own wrapper must give every bit
that the same steps give without. Then the times, beside the floor: one pass over the gradients for
the norm, and one over everything the fused step reads and writes, both at the bandwidth of a
device-to-device copy. The default model has 1.4 billion parameters.

    python scripts/bench_optimizer_step.py --json optimizer_step.json

Needs an NVIDIA GPU. Communication is left out: one rank has none to speak of.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench_step import Bench, environment, time_ms

import megatron_flashoptim
from megatron_flashoptim.megatron.versions import installed_version

# Bytes per parameter that the fused step reads and writes with 24-bit masters, but the gradient.
STATE_TRAFFIC = 10.25
GRAD_BYTES = {"bf16": 2, "fp32": 4}
COMPARED_STEPS = 6
COMPARED_LAYERS = 2


@dataclass(frozen=True)
class Row:
    """One measurement of a whole step."""

    grad_dtype: str
    parameters: int
    cuda_graph: bool
    p20_ms: float
    p50_ms: float
    p80_ms: float
    ms_per_1b: float
    floor_ms_per_1b: float
    share_of_floor: float
    norm_ms_per_1b: float
    host_ms: float
    temporary_bytes_per_param: float


def build(args: argparse.Namespace, grad: str, *, layers: int, graph: bool = False) -> Any:
    """Return a model chunk in DDP and its flash optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    torch.manual_seed(0)
    model_parallel_cuda_manual_seed(0)
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=args.hidden,
        num_attention_heads=args.hidden // 128,
        bf16=True,
        params_dtype=torch.bfloat16,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=args.vocab,
        max_sequence_length=1024,
    )
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True, grad_reduce_in_fp32=grad == "fp32"
    )
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=1e-4,
        weight_decay=0.1,
        adam_beta2=0.95,
        clip_grad=1.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=True,
        optimizer_cuda_graph=graph,
    )
    chunk = DistributedDataParallel(config, ddp_config, model.cuda().to(torch.bfloat16))
    return chunk, megatron_flashoptim.get_megatron_optimizer(optimizer_config, [chunk])


def fill_gradients(chunk: Any, seed: int) -> None:
    """Put random numbers into the gradient buffers."""
    generator = torch.Generator("cuda").manual_seed(seed)
    for buffer in chunk.buffers:
        for part in buffer.grad_data.split(1 << 26):
            part.normal_(std=1e-3, generator=generator)


def everything(chunk: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """Return every bit a step may change: weights and state."""
    tensors = {name: param.detach() for name, param in chunk.named_parameters()}
    for member in optimizer.chained_optimizers:
        for index, shard in enumerate(member.optimizer.shards):
            tensors |= {f"{index}.{name}": tensor for name, tensor in shard.state()}
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def trained(args: argparse.Namespace, grad: str, graph: bool) -> dict[str, torch.Tensor]:
    """Step a small model with learning rates and gradients that differ from step to step."""
    from megatron.core.optimizer.optimizer_cuda_graph import OptimizerCudaGraphWrapper

    chunk, optimizer = build(args, grad, layers=COMPARED_LAYERS, graph=graph)
    step: Callable[[], Any] = optimizer.step
    if graph:
        step = OptimizerCudaGraphWrapper(optimizer.step, cuda_graph_warmup_steps=2)
    for number in range(COMPARED_STEPS):
        fill_gradients(chunk, number)
        for group in optimizer.param_groups:
            lr = 1e-3 / (number + 1)
            if graph:
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        success, norm, _ = step()
        assert success and torch.isfinite(norm)
    state = everything(chunk, optimizer)
    groups = [m.optimizer.plain_param_groups() for m in optimizer.chained_optimizers]
    steps = {group["step"] for member in groups for group in member}
    assert steps == {COMPARED_STEPS}, steps
    return state


def check_graph(args: argparse.Namespace, grad: str) -> None:
    """Compare steps replayed from a CUDA graph with ordinary ones.

    Raises:
        SystemExit: names the first tensor that differs.
    """
    eager, replayed = trained(args, grad, False), trained(args, grad, True)
    for name, tensor in eager.items():
        if not torch.equal(tensor.view(torch.uint8), replayed[name].view(torch.uint8)):
            raise SystemExit(f"{name} differs between eager and replayed steps, {grad} gradients")
    print(f"{grad} gradients: {COMPARED_STEPS} steps from a CUDA graph give the same bits")


def measure(args: argparse.Namespace, grad: str, copy_gb_per_s: float) -> list[Row]:
    """Check that a step never waits for the device, and time it."""
    from megatron.core.optimizer.optimizer_cuda_graph import OptimizerCudaGraphWrapper

    rows = []
    for graph in (False, True):
        chunk, optimizer = build(args, grad, layers=args.layers, graph=graph)
        parameters = sum(p.numel() for p in chunk.parameters())
        fill_gradients(chunk, 0)
        step: Callable[[], Any] = optimizer.step
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        step()
        torch.cuda.set_sync_debug_mode("default")
        temporary = torch.cuda.max_memory_allocated() - before
        if graph:
            OptimizerCudaGraphWrapper.curr_iteration = 0
            OptimizerCudaGraphWrapper.cuda_graph = None
            step = OptimizerCudaGraphWrapper(optimizer.step, cuda_graph_warmup_steps=1)
            step()
            step()
        p20, p50, p80 = time_ms([step], args.repeats)
        norm_ms = time_ms([optimizer.get_grad_norm], args.repeats)[1]
        floor_bytes = parameters * (STATE_TRAFFIC + 2 * GRAD_BYTES[grad])
        floor_ms = floor_bytes / copy_gb_per_s / 1e6
        per_1b = 1e9 / parameters
        rows.append(
            Row(
                grad_dtype=grad,
                parameters=parameters,
                cuda_graph=graph,
                p20_ms=p20,
                p50_ms=p50,
                p80_ms=p80,
                ms_per_1b=p50 * per_1b,
                floor_ms_per_1b=floor_ms * per_1b,
                share_of_floor=floor_ms / p50,
                norm_ms_per_1b=norm_ms * per_1b,
                host_ms=host_ms(step, args.repeats),
                temporary_bytes_per_param=temporary / parameters,
            )
        )
        row = rows[-1]
        print(
            f"{grad:>5} {'graph' if graph else 'eager':>6} {parameters / 1e9:7.3f} {p20:8.3f} "
            f"{p50:8.3f} {p80:8.3f} {row.ms_per_1b:7.3f} {row.floor_ms_per_1b:7.3f} "
            f"{row.share_of_floor:7.1%} {row.norm_ms_per_1b:7.3f} {row.host_ms:8.3f} "
            f"{row.temporary_bytes_per_param:9.6f}",
            flush=True,
        )
        del chunk, optimizer, step
        OptimizerCudaGraphWrapper.cuda_graph = OptimizerCudaGraphWrapper.result = None
        torch.cuda.empty_cache()
    return rows


def host_ms(step: Callable[[], Any], repeats: int) -> float:
    """Return the median milliseconds of the host until a step's launches are all queued."""
    import time

    samples = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        samples.append((time.perf_counter() - start) * 1e3)
    torch.cuda.synchronize()
    return sorted(samples)[repeats // 2]


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--grad-dtype", choices=GRAD_BYTES, nargs="+", default=list(GRAD_BYTES))
    parser.add_argument("--repeats", type=int, default=20, help="samples per row")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU")
    from megatron.core import parallel_state

    for name, value in (("MASTER_ADDR", "localhost"), ("MASTER_PORT", "29531")):
        os.environ.setdefault(name, value)
    torch.distributed.init_process_group(
        "nccl", rank=0, world_size=1, device_id=torch.device("cuda:0")
    )
    parallel_state.initialize_model_parallel()
    where = environment()
    where["megatron-core"] = installed_version()
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    for grad in args.grad_dtype:
        check_graph(args, grad)
    bench = Bench(args.repeats)
    print("a device-to-device copy, the ceiling:")
    bench.copy()
    assert bench.copy_gb_per_s is not None
    print(
        f"{'grad':>5} {'':>6} {'1B':>7} {'p20 ms':>8} {'p50 ms':>8} {'p80 ms':>8} {'ms/1B':>7} "
        f"{'floor':>7} {'share':>7} {'norm':>7} {'host ms':>8} {'temp B/p':>9}"
    )
    rows = []
    for grad in args.grad_dtype:
        rows += measure(args, grad, bench.copy_gb_per_s)
    if args.json:
        report = {
            "environment": where,
            "copy_gb_per_s": bench.copy_gb_per_s,
            "rows": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
