"""Sizes of buffers and optimizer shards of a run, from Megatron's arguments, without a GPU.

The model is built by Megatron itself, on the meta device and within a process group that exists in
name only, and laid out by the same code that lays out DDP's buffers. Changes global state of torch
and Megatron: for a process of its own.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_flashoptim.checkpoint.iterations import iteration_folder
from megatron_flashoptim.checkpoint.saved_args import read_saved_args
from megatron_flashoptim.megatron.arguments import FIELD
from megatron_flashoptim.megatron.memory import planned_args
from megatron_flashoptim.megatron.memory.activations import activation_bytes
from megatron_flashoptim.megatron.memory.planned_args import ArgumentsError
from megatron_flashoptim.megatron.memory.theoretical_memory import bucket_size
from megatron_flashoptim.optim.config import FlashOptimConfig
from megatron_flashoptim.optim.footprint import buffer_bytes


@dataclass(frozen=True)
class StageSize:
    """Elements on the first data-parallel rank of a pipeline stage.

    Attributes:
        stage: number of the pipeline stage.
        parameters: of the stage on one rank.
        stock_buffer, flash_buffer: elements of param and of grad buffers, padding included.
        owned: parameter elements whose state this rank has under Megatron's layout.
        flash_shard: elements of its bucket shards under ours, padding included.
        flash_bucket: elements of the largest bucket under ours.
    """

    stage: int
    parameters: int
    stock_buffer: int
    flash_buffer: int
    owned: int
    flash_shard: int
    flash_bucket: int


@dataclass(frozen=True)
class RunSize:
    """What a run's memory depends on.

    Attributes:
        stages: sizes of each pipeline stage.
        weight_bytes, grad_bytes: bytes per element of param and grad buffers.
        data_parallel_size: ranks that share the state of dense parameters.
        optimizer: the flash optimizer that the arguments name, or that stands in for Adam.
        release_slots: buckets that have memory for gradients with gradient release; 0 without.
        activations: bytes that Megatron estimates for them on a rank of the first stage, or 0.
        distributed: with ``--use-distributed-optimizer``; without, Adam's state is not shared.
    """

    stages: tuple[StageSize, ...]
    weight_bytes: int
    grad_bytes: int
    data_parallel_size: int
    optimizer: str
    release_slots: int = 0
    activations: float = 0.0
    distributed: bool = True


def plan(arguments: Sequence[str], world_size: int) -> RunSize:
    """Return the sizes of a GPT run.

    Args:
        arguments: of ``pretrain_gpt.py``.
        world_size: number of GPUs.

    Raises:
        ArgumentsError: Megatron refuses the arguments, with its message, or the model is no GPT.
    """
    with prepared():
        return _run_size(planned_args.parse(arguments, world_size))


def plan_checkpoint(
    folder: str, arguments: Sequence[str] = (), world_size: int | None = None
) -> RunSize:
    """Return the sizes of the run that saved a checkpoint, or of one that continues it otherwise.

    Args:
        folder: a checkpoint of ``megatron.training``, or a folder of several.
        arguments: of ``pretrain_gpt.py``, where they differ from the checkpoint's.
        world_size: number of GPUs; as many as saved the checkpoint if None.

    Raises:
        ArgumentsError: Megatron refuses ``arguments`` or ``world_size``, with its message.
        ValueError: the checkpoint cannot be read, or is not of a GPT.
    """
    found = iteration_folder(folder)
    with prepared():
        saved = read_saved_args(found)
        planned_args.refuse_other_checkpoints(saved)
        ranks = world_size or getattr(saved.args, "world_size", None)
        if ranks is None:
            raise ValueError(f"{saved.folder} does not say how many ranks saved it; add --gpus")
        try:
            args = planned_args.parse(arguments, ranks, saved)
        except ArgumentsError as problem:
            if arguments or world_size:
                raise
            # Not a word of the command line is to blame.
            raise ValueError(f"the arguments saved in {saved.folder}: {problem}") from problem
        return _run_size(args)


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """Make Megatron importable without a GPU, with our flags, and silent on stdout."""
    from megatron_flashoptim.megatron import cpu, versions
    from megatron_flashoptim.megatron.install import install

    with contextlib.redirect_stdout(io.StringIO()):  # Megatron prints what it is given
        if not torch.cuda.is_available():
            cpu.enable()
        versions.check_layout_can_be_computed("give --parameters and --data-parallel-size instead")
        install()
        yield


def _run_size(args: Any) -> RunSize:
    expert_ranks = args.expert_tensor_parallel_size * args.expert_model_parallel_size
    model_ranks = args.tensor_model_parallel_size * args.context_parallel_size
    # The fewest ranks that have all model-parallel groups; data parallelism adds copies of them.
    ranks = math.lcm(model_ranks, expert_ranks)
    pipeline = args.pipeline_model_parallel_size
    instances = args.num_distributed_optimizer_instances
    dense = args.data_parallel_size * args.context_parallel_size // instances
    expert = args.world_size // (pipeline * expert_ranks * instances)
    stages = []
    for stage in range(pipeline):
        with nominal_rank(args, stage * ranks, ranks * pipeline), on_meta_device():
            stages.append(_stage_size(stage, model_chunks(args), args, dense, expert))
    weight, grad = buffer_bytes(args.bf16, args.accumulate_allreduce_grads_in_fp32)
    return RunSize(
        tuple(stages),
        weight_bytes=weight,
        grad_bytes=grad,
        data_parallel_size=dense,
        optimizer=getattr(args, FIELD) or FlashOptimConfig().optimizer,
        release_slots=args.flash_release_slots if args.flash_gradient_release else 0,
        activations=activation_bytes(args),
        distributed=args.use_distributed_optimizer,
    )


@contextlib.contextmanager
def nominal_rank(args: Any, rank: int, world_size: int, *, instances: int = 1) -> Iterator[None]:
    """Have this process be one of ``world_size`` ranks that never exchange anything.

    Args:
        args: Megatron's arguments, with the parallel sizes.
        rank: number of the rank.
        world_size: number of ranks, a multiple of what the parallel sizes need.
        instances: number of distributed optimizer instances.
    """
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group(
        "fake", rank=rank, world_size=world_size, store=FakeStore()
    )
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        num_distributed_optimizer_instances=instances,
        create_gloo_process_groups=False,
    )
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _meta_device() -> Any:
    """Stand in for ``torch.cuda.current_device``, whose index Megatron passes on as a device."""
    return torch.device("meta")


@contextlib.contextmanager
def on_meta_device() -> Iterator[None]:
    """Make new tensors without storage, also where Megatron asks for the current GPU."""
    current_device = torch.cuda.current_device
    torch.cuda.current_device = _meta_device
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.cuda.current_device = current_device


def model_chunks(args: Any) -> Iterator[Any]:
    """Yield the model chunks of this rank, built by Megatron's own builder.

    Raises:
        ArgumentsError: Megatron cannot build such a model here.
    """
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models import GPTModelBuilder

    config = gpt_config_from_args(args)
    # As in planned_args; not there, where other checks would see them.
    transformer = config.transformer
    transformer.persist_layer_norm = transformer.sequence_parallel = False
    transformer.moe_grouped_gemm = False
    if transformer.multi_latent_attention:
        # The local core does not take MLA's head sizes, and has no parameters to count.
        LocalSpecProvider.core_attention = lambda self: IdentityOp
    builder = GPTModelBuilder(config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    virtual = args.virtual_pipeline_model_parallel_size
    for vp_stage in range(virtual or 1):
        try:
            model = builder.build_model(groups, vp_stage=vp_stage if virtual else None)
        except (AssertionError, ImportError, TypeError, ValueError) as problem:
            raise ArgumentsError(f"Megatron cannot build the model here: {problem}") from problem
        yield model.to(torch.bfloat16) if args.bf16 else model


def _stage_size(stage: int, chunks: Iterable[Any], args: Any, dense: int, expert: int) -> StageSize:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from megatron_flashoptim.megatron.layout import compute_group_aligned_layout

    stock = inspect.unwrap(DistributedOptimizer.compute_full_param_layout)
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=args.accumulate_allreduce_grads_in_fp32,
        pad_buckets_for_high_nccl_busbw=args.ddp_pad_buckets_for_high_nccl_busbw,
    )
    chunks = list(chunks)  # all are counted before the first is laid out
    parameters = sum(param.numel() for chunk in chunks for param in chunk.parameters())
    limit = int(bucket_size(args, parameters))
    found = dict.fromkeys(("parameters", "stock", "flash", "owned", "shard", "bucket"), 0)
    for number, chunk in enumerate(chunks):
        bucketed = args.overlap_grad_reduce and stage == 0 and number == 0
        size = limit if bucketed else None
        params = [param for param in chunk.parameters() if param.requires_grad]
        found["parameters"] += sum(param.numel() for param in params)
        for key, layout in stock(params, size, dense, config, expert).layouts.items():
            ranks = expert if key.is_expert_parallel else dense
            found["stock"] += layout.bucket_indices[-1][1]
            found["owned"] += _owned(layout, ranks)
        ours = compute_group_aligned_layout(stock, params, size, dense, config, expert)
        for key, layout in ours.layouts.items():
            ranks = expert if key.is_expert_parallel else dense
            found["flash"] += layout.bucket_indices[-1][1]
            found["shard"] += layout.bucket_indices[-1][1] // ranks
            sizes = [end - start for start, end in layout.bucket_indices]
            found["bucket"] = max(found["bucket"], *sizes)
    return StageSize(stage, *found.values())


def _owned(layout: Any, ranks: int) -> int:
    """Return the parameter elements in the first of each bucket's shards."""
    ends = [start + (end - start) // ranks for start, end in layout.bucket_indices]
    return sum(
        max(0, min(end, ends[bucket]) - start)
        for start, end, bucket in layout.param_index_map.values()
    )
