"""What one rank of a run of any size holds and writes, found in this process alone.

Megatron's own training code builds the rank's model, DDP buffers and optimizer, on the meta device
and within process groups that exist in name only; the checkpoint code that a training run uses
makes the sharded state dicts, and Megatron's planner the list of writes. Nothing is computed by
formulas. Changes global state of torch and Megatron: for a process of its own, without a GPU.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_flashoptim.megatron.memory import planned_args, planner


@dataclass(frozen=True)
class RankPlan:
    """One rank's memory, launches and writes.

    Attributes:
        rank: number of the rank.
        stage: its pipeline stage.
        data_parallel_rank: its place among the ranks that share the state of dense parameters.
        parameters: elements of the model on this rank.
        expert_parameters: those of experts, which other ranks share than the dense ones.
        owned: elements whose optimizer state it has.
        ranges: parameters that it has elements of, each counted once.
        pieces: the same in the checkpoint's tensors: 2 for a parameter that is saved in halves.
        buffer: elements of the param buffers, padding included.
        weight_bytes, grad_bytes: bytes of the param and of the grad buffers.
        state_bytes: bytes of optimizer state, tables included.
        table_bytes: bytes of the tables of segments.
        launches: kernel launches of an optimizer step.
        boxes: for each format, sharded tensors of optimizer state that the rank writes.
        writes: for each format, Megatron's save plan of model and optimizer for the rank.
        seconds: what it took to build groups, model and optimizer, and to plan each format.
    """

    rank: int
    stage: int
    data_parallel_rank: int
    parameters: int
    expert_parameters: int
    owned: int
    ranges: int
    pieces: int
    buffer: int
    weight_bytes: int
    grad_bytes: int
    state_bytes: int
    table_bytes: int
    launches: int
    boxes: dict[str, int]
    writes: dict[str, Any]
    seconds: dict[str, float]


def parse(arguments: Sequence[str], world_size: int) -> Any:
    """Return Megatron's validated arguments of a run, ready for ``plan_rank``.

    Args:
        arguments: of ``pretrain_gpt.py``, with an ``--optimizer`` of ours.
        world_size: number of GPUs of the run.

    Raises:
        ArgumentsError: Megatron refuses the arguments, with its message, the model is no GPT, or
            gradients are released.
        RuntimeError: a GPU is visible, to which Megatron would move the model.
    """
    if torch.cuda.is_available():
        raise RuntimeError("the simulation needs no GPU and must see none: CUDA_VISIBLE_DEVICES=")
    with planner.prepared():
        args = planned_args.parse(arguments, world_size)
    if args.flash_gradient_release:
        raise planned_args.ArgumentsError(
            "--flash-gradient-release gives the gradient buffers no memory of their own, which is "
            "what is counted here; drop it, and see `megatron-flashoptim memory` for the slots"
        )
    # A run that loads or saves asks all ranks before training whether it can.
    args.load = args.save = None
    return args


def plan_rank(args: Any, rank: int) -> RankPlan:
    """Return what a rank of the run holds and writes.

    Args:
        args: of ``parse``.
        rank: number of the rank, below the run's number of GPUs.

    Raises:
        ValueError: a parameter's rows are cut within quantization groups; how it is saved then is
            decided by all ranks together.
    """
    from megatron.core import parallel_state
    from megatron.training import global_vars, training

    from megatron_flashoptim.checkpoint import metadata as flash_metadata

    start = time.perf_counter()
    seconds = {}
    given, global_vars._GLOBAL_ARGS = global_vars._GLOBAL_ARGS, args
    instances = args.num_distributed_optimizer_instances
    try:
        with (
            planner.nominal_rank(args, rank, args.world_size, instances=instances),
            planner.on_meta_device(),
        ):
            seconds["groups"] = time.perf_counter() - start
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):  # Megatron counts parameters aloud
                chunks = training.get_model(_provider(args))
            config, overrides = training.get_megatron_optimizer_config(args)
            optimizer = training.get_megatron_optimizer(
                config, chunks, config_overrides=overrides, use_gloo_process_groups=False
            )
            seconds["build"] = time.perf_counter() - start
            boxes, writes, pieces = {}, {}, 0
            for sharding_type in flash_metadata.SUPPORTED_SHARDING_TYPES:
                start = time.perf_counter()
                content = _content(args, optimizer, sharding_type)
                model = _model_state(chunks, content)
                pieces = _pieces(optimizer, model)
                state = _optimizer_state(optimizer, model, content)
                boxes[sharding_type] = len(_sharded(state))
                writes[sharding_type] = _save_plan({"model": model, "optimizer": state})
                seconds[sharding_type] = time.perf_counter() - start
            members = [m for m in optimizer.chained_optimizers if not m.is_stub_optimizer]
            shards = [shard for member in members for shard in member.optimizer.shards]
            buffers = [b for c in chunks for b in (*c.buffers, *c.expert_parallel_buffers)]
            params = [param for chunk in chunks for param in chunk.parameters()]
            dense = [param for param in params if getattr(param, "allreduce", True)]
            numel = sum(param.numel() for param in params)
            return RankPlan(
                rank=rank,
                stage=parallel_state.get_pipeline_model_parallel_rank(),
                data_parallel_rank=parallel_state.get_data_parallel_rank(
                    with_context_parallel=True
                ),
                parameters=numel,
                expert_parameters=numel - sum(param.numel() for param in dense),
                owned=optimizer.owned_parameters(),
                ranges=sum(len(member.shard_params) for member in members),
                pieces=pieces,
                buffer=sum(buffer.param_data.numel() for buffer in buffers),
                weight_bytes=sum(buffer.param_data.nbytes for buffer in buffers),
                grad_bytes=sum(buffer.grad_data.nbytes for buffer in buffers),
                state_bytes=optimizer.state_bytes(),
                table_bytes=sum(shard.segments.nbytes() for shard in shards),
                launches=sum(bool(shard.segments) for shard in shards),
                boxes=boxes,
                writes=writes,
                seconds=seconds,
            )
    finally:
        global_vars._GLOBAL_ARGS = given


def _provider(args: Any) -> Callable[..., Any]:
    """Return what ``training.get_model`` calls for each model chunk, in order."""
    chunks = planner.model_chunks(args)
    return lambda **_: next(chunks)


def _content(args: Any, optimizer: Any, sharding_type: str) -> dict[str, Any]:
    """Return the content metadata that such a save has."""
    from megatron.training.checkpointing import _build_sharded_state_dict_metadata

    from megatron_flashoptim.checkpoint import metadata as flash_metadata

    content: dict[str, Any] = _build_sharded_state_dict_metadata(args)
    content[flash_metadata.SHARDING_TYPE] = sharding_type
    member = optimizer.chained_optimizers[0]
    described = flash_metadata.describe(member.flash, member.weights_dtype())
    content[flash_metadata.KEY] = described | flash_metadata.describe_groups(())
    return content


def _model_state(chunks: Sequence[Any], content: dict[str, Any]) -> dict[str, Any]:
    from megatron.core.utils import unwrap_model

    return {
        f"model{number}": chunk.sharded_state_dict(metadata=content)
        for number, chunk in enumerate(unwrap_model(list(chunks)))
    }


def _pieces(optimizer: Any, model: dict[str, Any]) -> int:
    """Return the number of owned pieces.

    Raises:
        ValueError: a group runs over the end of a row.
    """
    found = 0
    for member in optimizer.chained_optimizers:
        if member.is_stub_optimizer:
            continue
        space = member.model_space(model)
        broken = space.keys_with_broken_groups()
        if broken:
            raise ValueError(
                f"rows of {', '.join(sorted(broken))} are no multiple of 32 on a rank; the "
                "simulation takes models whose rows are"
            )
        found += sum(
            1 for owned in space.ranges for piece in owned.pieces if any(owned.boxes(piece))
        )
    return found


def _optimizer_state(optimizer: Any, model: dict[str, Any], content: dict[str, Any]) -> Any:
    """Return the optimizer's sharded state dict, or the part of it with all its tensors."""
    from megatron_flashoptim.checkpoint import metadata as flash_metadata

    if content[flash_metadata.SHARDING_TYPE] == flash_metadata.DP_RESHARDABLE:
        for chunk in optimizer.model_chunks:  # there is nothing in the weights to be gathered
            for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                group.param_gather_dispatched = True
        return optimizer.sharded_state_dict(model, metadata=content)
    # The chain would ask all ranks which keys have scales per element; here none has.
    return {
        str(number): member.sharded_param_state_fully_reshardable(model, False, content)
        for number, member in enumerate(optimizer.chained_optimizers)
        if not member.is_stub_optimizer
    }


def _sharded(state: dict[str, Any]) -> list[Any]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    return [value for value in nested_values(state) if isinstance(value, ShardedTensor)]


def _save_plan(state: dict[str, Any]) -> Any:
    """Return torch's save plan of a sharded state dict, as Megatron's ``torch_dist`` makes it."""
    from megatron.core.dist_checkpointing.mapping import apply_factories
    from megatron.core.dist_checkpointing.strategies import torch as torch_dist
    from megatron.core.dist_checkpointing.utils import extract_sharded_base

    apply_factories(state)
    sharded, _ = extract_sharded_base(state)
    by_key, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(
        sharded, keep_only_main_replica=True
    )
    planner_of_rank = save_planner()
    planner_of_rank.set_up_planner(torch_dist.mcore_to_pyt_state_dict(by_key), is_coordinator=False)
    return planner_of_rank.create_local_plan()


def save_planner() -> Any:
    """Return the planner that Megatron's ``torch_dist`` save uses, of a rank or of all of them."""
    from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner

    return MCoreSavePlanner(
        dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False
    )
