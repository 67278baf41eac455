"""What benchmarks of whole models share: a GPT of Megatron's own parts, its training, the clock."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the device and the sizes of a GPT; the defaults are 1.4 billion parameters."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--bucket-size", type=int, default=40_000_000, help="Megatron's default")


@contextlib.contextmanager
def started_rank(options: argparse.Namespace) -> Iterator[None]:
    """Be a rank that torchrun has started, all of them data parallel."""
    if options.device == "cpu":
        from megatron_flashoptim.megatron import cpu

        cpu.enable()
    else:
        # As in scripts/slurm. With CUDA's default, times differ from process to process.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("nccl" if options.device == "cuda" else "gloo")
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel()
    yield
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


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


def build(
    options: argparse.Namespace, device: torch.device | str, *, tied: bool, **more: Any
) -> tuple[Any, Any]:
    """Return the model's configuration and the model, bf16, on a device.

    Args:
        options: with ``layers``, ``hidden``, ``heads``, ``vocab`` and ``sequence``.
        device: of the weights.
        tied: whether input and output embeddings are one.
        more: further fields of Megatron's ``TransformerConfig``.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=options.layers,
        hidden_size=options.hidden,
        num_attention_heads=options.heads,
        use_cpu_initialization=torch.device(device).type == "cpu",
        bf16=True,
        params_dtype=torch.bfloat16,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        bias_dropout_fusion=False,
        **more,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=options.vocab,
        max_sequence_length=options.sequence,
        share_embeddings_and_output_weights=tied,
        position_embedding_type="rope",
    )
    return config, model.to(device=device, dtype=torch.bfloat16)


class TrainedGPT:
    """A GPT that trains on random tokens with flash_adamw, its gradients and gathers overlapped.

    Args:
        options: those of ``add_model_options``, and ``micro_batch``, the sequences of a rank.
        flash: ``FlashOptimConfig``.
        fp32_gradients: whether gradients are reduced in fp32.
        clip_grad: the norm to clip to; 0 clips nothing.
        tied: whether input and output embeddings are one.
        more: further fields of Megatron's ``TransformerConfig``.

    Attributes:
        chunk: the model in Megatron's DistributedDataParallel.
        optimizer: the flash optimizer.
        parameters: their number.
        log: detached scalars of each iteration, to be compared.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        flash: Any,
        *,
        fp32_gradients: bool,
        clip_grad: float,
        tied: bool = False,
        **more: Any,
    ) -> None:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        from megatron_flashoptim import FlashDistributedOptimizer, get_megatron_optimizer

        torch.manual_seed(1)
        model_parallel_cuda_manual_seed(1)
        config, model = build(
            options,
            device_of(options),
            tied=tied,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            masked_softmax_fusion=False,
            **more,
        )
        ddp_config = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=fp32_gradients,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            bucket_size=options.bucket_size,
        )
        params = list(model.parameters())
        layout = FlashDistributedOptimizer.compute_full_param_layout(
            params, options.bucket_size, torch.distributed.get_world_size(), ddp_config
        )
        released = FlashDistributedOptimizer.released_buffers()
        # On a stream of its own, as in Megatron's training loop: gradients then come on that.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no types
        stream.wait_stream(torch.cuda.current_stream())
        with (
            torch.cuda.stream(stream),
            released if flash.gradient_release else contextlib.nullcontext(),
        ):
            self.chunk = DistributedDataParallel(
                config, ddp_config, model, full_param_layout=layout
            )
        torch.cuda.current_stream().wait_stream(stream)
        self.parameters = sum(param.numel() for param in params)
        optimizer_config = OptimizerConfig(
            optimizer="adam",
            lr=1e-4,
            weight_decay=0.1,
            adam_beta2=0.95,
            clip_grad=clip_grad,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=True,
            overlap_param_gather=True,
        )
        self.optimizer = get_megatron_optimizer(optimizer_config, [self.chunk], flash=flash)
        for group in self.optimizer.param_groups:
            group["lr"] = optimizer_config.lr
        self.finalize = finalize_model_grads
        positions = torch.arange(options.sequence, device=device_of(options))
        self._positions = positions.expand(options.micro_batch, -1)
        self._mask = (positions[None, :] > positions[:, None])[None, None]
        self.log: list[torch.Tensor] = []

    def zero_gradients(self) -> None:
        """Begin an iteration, as Megatron's loop does."""
        self.chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the loss on tokens (batch, sequence + 1)."""
        losses: torch.Tensor = self.chunk(
            batch[:, :-1], self._positions, self._mask, labels=batch[:, 1:]
        )
        return losses.float().mean()

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield the log, gathered weights and this rank's state."""
        self.chunk.disable_forward_pre_hook(param_sync=True)
        self.chunk.enable_forward_pre_hook()
        yield torch.stack(self.log)
        yield from (param.data for param in self.chunk.parameters())
        for member in self.optimizer.chained_optimizers:
            yield from (tensor for shard in member.optimizer.shards for _, tensor in shard.state())


def tokens(options: argparse.Namespace, iteration: int) -> torch.Tensor:
    """Return this rank's random tokens (batch, sequence + 1) of an iteration."""
    seed = iteration * torch.distributed.get_world_size() + torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(seed)
    shape = (options.micro_batch, options.sequence + 1)
    return torch.randint(options.vocab, shape, generator=generator).to(device_of(options))


def check_same(one: TrainedGPT, other: TrainedGPT, what: str) -> None:
    """Compare log, weights and state of two ways to train, a collective.

    Args:
        one, other: as long trained on the same tokens.
        what: the way that is new, for the message.

    Raises:
        SystemExit: a bit differs on some rank.
    """
    pairs = zip(one.tensors(), other.tensors(), strict=True)
    differ = sum(not torch.equal(_bits(ours), _bits(theirs)) for ours, theirs in pairs)
    counts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(counts, differ)
    if any(counts):
        raise SystemExit(f"{what} trains other bits: tensors that differ by rank: {counts}")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


class Clock:
    """Marks moments on the device, or on a CPU in the process, from one that has nothing to do."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._device = device_of(options)
        self._marks: list[Any] = []
        torch.cuda.synchronize()
        torch.distributed.barrier()
        torch.cuda.synchronize()
        self.mark()

    def mark(self) -> None:
        """Mark where the current stream stands."""
        if self._device.type == "cuda":
            event: Any = torch.cuda.Event  # which has no types
            self._marks.append(event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Return the times from the first mark to each other one, on the slowest rank."""
        first, *others = self._marks
        if self._device.type == "cuda":
            others[-1].synchronize()
            own = [first.elapsed_time(other) for other in others]
        else:
            own = [(other - first) * 1e3 for other in others]
        times = torch.tensor(own, device=self._device)
        torch.distributed.all_reduce(times, op=torch.distributed.ReduceOp.MAX)
        return [float(value) for value in times.tolist()]


def percentiles(values: list[float]) -> dict[str, float]:
    """Return the 20th, 50th and 80th percentiles."""
    ordered = sorted(values)
    return {f"p{q}": ordered[round(q / 100 * (len(ordered) - 1))] for q in (20, 50, 80)}
