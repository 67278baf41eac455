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
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class StageSize:
    """Elements on the first data-parallel rank of a pipeline stage.

    Attributes:
        stage: number of the pipeline stage.
        parameters: of the stage on one rank.
        stock_buffer, flash_buffer: elements of param and of grad buffers, padding included.
        owned: parameter elements whose state this rank has under Megatron's layout.
        flash_shard: elements of its bucket shards under ours, padding included.
    """

    stage: int
    parameters: int
    stock_buffer: int
    flash_buffer: int
    owned: int
    flash_shard: int


@dataclass(frozen=True)
class RunSize:
    """What a run's memory depends on.

    Attributes:
        stages: sizes of each pipeline stage.
        weight_bytes, grad_bytes: bytes per element of param and grad buffers.
        data_parallel_size: ranks that share the state of dense parameters.
    """

    stages: tuple[StageSize, ...]
    weight_bytes: int
    grad_bytes: int
    data_parallel_size: int


def plan(arguments: Sequence[str], world_size: int) -> RunSize:
    """Return the sizes of a GPT run.

    Args:
        arguments: of ``pretrain_gpt.py``.
        world_size: number of GPUs.

    Raises:
        ValueError: Megatron refuses the arguments; with its message.
        SystemExit: an argument Megatron does not know.
    """
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world_size))
    with contextlib.redirect_stdout(io.StringIO()):  # Megatron prints what it is given
        return _plan(arguments, world_size)


def _plan(arguments: Sequence[str], world_size: int) -> RunSize:
    from megatron_flashoptim.megatron import cpu, versions
    from megatron_flashoptim.megatron.install import install

    if not torch.cuda.is_available():
        cpu.enable()
    try:
        versions.check_layout_can_be_computed("give --parameters and --data-parallel-size instead")
    except ImportError as problem:
        raise ValueError(str(problem)) from problem
    install()
    args = _parsed(arguments)
    expert_ranks = args.expert_tensor_parallel_size * args.expert_model_parallel_size
    model_ranks = args.tensor_model_parallel_size * args.context_parallel_size
    # The fewest ranks that have all model-parallel groups; data parallelism adds copies of them.
    ranks = math.lcm(model_ranks, expert_ranks)
    pipeline = args.pipeline_model_parallel_size
    instances = args.num_distributed_optimizer_instances
    dense = args.data_parallel_size * args.context_parallel_size // instances
    expert = world_size // (pipeline * expert_ranks * instances)
    stages = []
    for stage in range(pipeline):
        with _nominal_ranks(args, stage * ranks, ranks * pipeline), _on_meta_device():
            stages.append(_stage_size(stage, _chunks(args), args, dense, expert))
    return RunSize(
        tuple(stages),
        weight_bytes=2 if args.bf16 or args.fp16 else 4,
        grad_bytes=4 if args.accumulate_allreduce_grads_in_fp32 or not args.bf16 else 2,
        data_parallel_size=dense,
    )


def _parsed(arguments: Sequence[str]) -> Any:
    from megatron.training import arguments as megatron_arguments

    if not torch.cuda.is_available():
        megatron_arguments.get_device_arch_version = lambda: 10
    before = sys.argv
    sys.argv = ["pretrain_gpt.py", *arguments]
    try:
        args = megatron_arguments.validate_args(megatron_arguments.parse_args())
    except (AssertionError, RuntimeError, ValueError) as problem:
        raise ValueError(f"Megatron refuses the arguments: {problem}") from problem
    finally:
        sys.argv = before
    if not args.vocab_size and not args.padded_vocab_size:
        raise ValueError("the vocabulary's size is unknown; add --vocab-size")
    # None of these changes a parameter's shape, and each may need a GPU or another package.
    args.transformer_impl = "local"
    args.fp8 = None
    args.apply_rope_fusion = args.gradient_accumulation_fusion = args.tp_comm_overlap = False
    args.use_cpu_initialization = True
    args.perform_initialization = False
    return args


@contextlib.contextmanager
def _nominal_ranks(args: Any, rank: int, world_size: int) -> Iterator[None]:
    """Have this process be one of ``world_size`` ranks that never exchange anything."""
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
        create_gloo_process_groups=False,
    )
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _on_meta_device() -> Iterator[None]:
    """Make new tensors without storage, also where Megatron asks for the current GPU."""
    current_device = torch.cuda.current_device
    # Megatron passes it on as a device; torch declares an index.
    torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment, return-value]
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.cuda.current_device = current_device


def _chunks(args: Any) -> Iterator[Any]:
    """Yield the model chunks of this rank."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.training.arguments import core_transformer_config_from_args
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    vocab = args.padded_vocab_size or calculate_padded_vocab_size(
        args.vocab_size,
        args.make_vocab_size_divisible_by,
        args.tensor_model_parallel_size,
        logging_enabled=False,
    )
    config = core_transformer_config_from_args(args)
    # As in _parsed; not there, where other checks would see them.
    config.persist_layer_norm = config.sequence_parallel = config.moe_grouped_gemm = False
    virtual = args.virtual_pipeline_model_parallel_size
    for vp_stage in range(virtual or 1):
        of_chunk = {"ignore_virtual": False, "vp_stage": vp_stage} if virtual else {}
        model = GPTModel(
            config=config,
            transformer_layer_spec=get_gpt_decoder_block_spec(
                config,
                use_transformer_engine=False,
                normalization=args.normalization,
                vp_stage=vp_stage if virtual else None,
            ),
            vocab_size=vocab,
            max_sequence_length=args.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(**of_chunk),
            post_process=parallel_state.is_pipeline_last_stage(**of_chunk),
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type=args.position_embedding_type,
            vp_stage=vp_stage if virtual else None,
        )
        yield model.to(torch.bfloat16) if args.bf16 else model


def _stage_size(stage: int, chunks: Iterator[Any], args: Any, dense: int, expert: int) -> StageSize:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from megatron_flashoptim.megatron.layout import compute_group_aligned_layout

    stock = inspect.unwrap(DistributedOptimizer.compute_full_param_layout)
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=args.accumulate_allreduce_grads_in_fp32,
        pad_buckets_for_high_nccl_busbw=args.ddp_pad_buckets_for_high_nccl_busbw,
    )
    default = max(40_000_000, 1_000_000 * dense)  # as Megatron's training loop has it
    found = dict.fromkeys(("parameters", "stock", "flash", "owned", "shard"), 0)
    for number, chunk in enumerate(chunks):
        bucketed = args.overlap_grad_reduce and stage == 0 and number == 0
        bucket_size = (args.ddp_bucket_size or default) if bucketed else None
        params = [param for param in chunk.parameters() if param.requires_grad]
        found["parameters"] += sum(param.numel() for param in params)
        for key, layout in stock(params, bucket_size, dense, config, expert).layouts.items():
            ranks = expert if key.is_expert_parallel else dense
            found["stock"] += layout.bucket_indices[-1][1]
            found["owned"] += _owned(layout, ranks)
        ours = compute_group_aligned_layout(stock, params, bucket_size, dense, config, expert)
        for key, layout in ours.layouts.items():
            ranks = expert if key.is_expert_parallel else dense
            found["flash"] += layout.bucket_indices[-1][1]
            found["shard"] += layout.bucket_indices[-1][1] // ranks
    return StageSize(stage, *found.values())


def _owned(layout: Any, ranks: int) -> int:
    """Return the parameter elements in the first of each bucket's shards."""
    ends = [start + (end - start) // ranks for start, end in layout.bucket_indices]
    return sum(
        max(0, min(end, ends[bucket]) - start)
        for start, end, bucket in layout.param_index_map.values()
    )
