"""Saving and loading a tiny GPT in each checkpoint format, and its state in model space."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

from megatron_flashoptim.codec import join_master

DP_RESHARDABLE = "dp_reshardable"
FULLY_RESHARDABLE = "fully_reshardable"
MEMORY_EFFICIENT = "fully_reshardable, memory efficient"
LEGACY = "torch"


def save(
    trainer: Any,
    folder: Path,
    sharding_type: str = DP_RESHARDABLE,
    *,
    parallel: bool = False,
    **beside: Any,
) -> None:
    """Save model, optimizer and step count, as Megatron's training loop does.

    Args:
        trainer, folder, sharding_type: what to save, where, and how.
        parallel: save as with ``--ckpt-fully-parallel-save``.
        beside: what else is in a ``torch_dist`` checkpoint, such as ``args``.
    """
    trainer.sync_params()
    if sharding_type == LEGACY:
        _save_legacy(trainer, folder)
        return
    fork_queue_of_results()
    metadata = metadata_of(sharding_type)
    strategy = TorchDistSaveShardedStrategy()
    if parallel:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelSaveStrategyWrapper(strategy, group)
    state = {**saved_state(trainer, metadata), **beside}
    dist_checkpointing.save(state, str(folder), strategy, content_metadata=metadata)


def fork_queue_of_results() -> None:
    """Fork the process that serves Megatron's queue, which imports all again where spawned."""
    if filesystem_async._results_queue is None:
        manager = multiprocessing.get_context("fork").Manager()
        filesystem_async._results_queue = manager.Queue()


def saved_state(trainer: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the sharded state dict that is saved; describes the state in ``metadata``."""
    model = sharded_model(trainer)
    return {
        **model,
        "optimizer": trainer.optimizer.sharded_state_dict(model, metadata=metadata),
        "step_number": trainer.step_number,
    }


def sharded_model(trainer: Any) -> dict[str, Any]:
    """Return the model's sharded state dict under Megatron's keys: of each virtual stage."""
    return {
        name: chunk.module.sharded_state_dict()
        for name, chunk in zip(_chunk_names(trainer), trainer.model, strict=True)
    }


def _chunk_names(trainer: Any) -> list[str]:
    several = len(trainer.model) > 1
    return [f"model{n}" if several else "model" for n in range(len(trainer.model))]


def metadata_of(sharding_type: str) -> dict[str, Any]:
    """Return the content metadata that Megatron makes of its flags."""
    return {
        "distrib_optim_sharding_type": sharding_type.split(",")[0],
        "distrib_optim_fully_reshardable_mem_efficient": sharding_type == MEMORY_EFFICIENT,
        "chained_optim_avoid_prefix": True,
    }


def load(trainer: Any, folder: Path, *, parallel: bool = False) -> None:
    """Load what ``save`` saved, in the format it was saved in."""
    if (folder / "0.pt").exists():
        _load_legacy(trainer, folder)
        return
    metadata = dist_checkpointing.load_content_metadata(str(folder))
    model = sharded_model(trainer)
    state = {
        **model,
        "optimizer": trainer.optimizer.sharded_state_dict(
            model, is_loading=True, metadata=metadata
        ),
        "step_number": 0,
    }
    strategy = TorchDistLoadShardedStrategy()
    if parallel:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelLoadStrategyWrapper(strategy, group)
    loaded = dist_checkpointing.load(state, str(folder), strategy)
    for name, chunk in zip(_chunk_names(trainer), trainer.model, strict=True):
        chunk.module.load_state_dict(loaded[name])
    trainer.optimizer.load_state_dict(loaded["optimizer"])
    trainer.step_number = loaded["step_number"]


def _legacy_names(folder: Path) -> tuple[Path, Path]:
    # As Megatron names them: weights of each rank, state of each model-parallel rank.
    model_rank = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
    )
    rank = torch.distributed.get_rank()
    return folder / f"{rank}.pt", folder / f"optimizer_{'_'.join(map(str, model_rank))}.pt"


def _save_legacy(trainer: Any, folder: Path) -> None:
    weights, state = _legacy_names(folder)
    saved = {
        "model": [chunk.state_dict_for_save_checkpoint() for chunk in trainer.model],
        "optimizer": trainer.optimizer.state_dict(),
        "step_number": trainer.step_number,
    }
    torch.save(saved, weights)
    trainer.optimizer.save_parameter_state(str(state))
    torch.distributed.barrier()


def _load_legacy(trainer: Any, folder: Path) -> None:
    path, state = _legacy_names(folder)
    loaded = torch.load(path, weights_only=False)  # Megatron's extra states are BytesIO
    for chunk, weights in zip(trainer.model, loaded["model"], strict=True):
        chunk.load_state_dict(weights)
    trainer.optimizer.load_state_dict(loaded["optimizer"])
    trainer.optimizer.load_parameter_state(str(state))
    trainer.step_number = loaded["step_number"]


def collect_log() -> list[str]:
    """Return a list that takes what this package logs in this process from now on."""
    logged: list[str] = []
    handler = logging.Handler()
    # A handler is a class to override; this is one to use once.
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.disable(logging.NOTSET)
    logging.getLogger("megatron_flashoptim").addHandler(handler)
    return logged


def everything(trainer: Any) -> dict[str, Any]:
    """Return copies of weights, flat state and param groups of this rank."""
    members = [m for m in trainer.optimizer.chained_optimizers if not m.is_stub_optimizer]
    state = {
        f"{m}.{s}.{name}": tensor.clone()
        for m, member in enumerate(members)
        for s, shard in enumerate(member.optimizer.shards)
        for name, tensor in shard.state()
    }
    return {"weights": trainer.weights(), "state": state, "groups": plain_groups(trainer)}


def plain_groups(trainer: Any) -> list[dict[str, Any]]:
    """Return copies of the param groups without parameters."""
    return [
        {key: value for key, value in group.items() if key != "params"}
        for member in trainer.optimizer.chained_optimizers
        if not member.is_stub_optimizer
        for group in member.optimizer.param_groups
    ]


Pieces = list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]


def in_model_space(trainer: Any) -> Pieces:
    """Return this rank's parameters' state as pieces of global tensors.

    Gathered over data-parallel ranks and mapped by Megatron's own sharded state dict of the
    model, with no code of the checkpoint package: key, global shape, global offset and data of
    fp32 masters, codes, and scales repeated for each element. Stock: of masters and moments.
    """
    trainer.sync_params()
    numbers = {id(param): n for n, param in enumerate(_parameters(trainer))}
    found: Pieces = []
    for member in trainer.optimizer.chained_optimizers:
        if member.is_stub_optimizer:
            continue
        own = list(_flash_ranges(member) if trainer.setup.flash else _stock_ranges(member))
        numbered = [(numbers[id(param)], start, parts) for param, start, parts in own]
        found += _gathered(trainer, member.data_parallel_group, numbered)
    return found


def _parameters(trainer: Any) -> Iterator[Any]:
    return (param for chunk in trainer.model for param in chunk.parameters())


def _flash_ranges(member: Any) -> Iterator[tuple[Any, int, dict[str, torch.Tensor]]]:
    for item in member.shard_params:
        shard = member.optimizer.shards[item.shard]
        parts = {"master": _master(shard)[item.start : item.end].clone()}
        for name, tensor in shard.state():
            if name == "correction":
                continue
            if name.endswith("scale"):
                tensor = tensor.view(torch.int16).repeat_interleave(32)
            parts[name] = tensor[item.start : item.end].clone()
        yield item.param, item.param_start, parts


def _stock_ranges(member: Any) -> Iterator[tuple[Any, int, dict[str, torch.Tensor]]]:
    for range_maps in member.gbuf_ranges:
        for bucket_ranges in range_maps.values():
            for ranges in bucket_ranges:
                for param, ranges_of_param in ranges["param_map"].items():
                    tensors = member._get_main_param_and_optimizer_states(param)
                    parts = {name: tensor.detach().clone() for name, tensor in tensors.items()}
                    parts["master"] = parts.pop("param")
                    yield param, ranges_of_param["param"].start, parts


def _gathered(trainer: Any, group: Any, own: list[Any]) -> Pieces:
    """Return the pieces of whole parameters, given the numbered ranges of this rank."""
    model, _ = extract_sharded_tensors_and_factories(sharded_model(trainer))
    sharded_of = {id(base.data): base for base in nested_values(model)}
    everyone: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(everyone, own, group=group)
    found: Pieces = []
    for number, param in enumerate(_parameters(trainer)):
        ranges = sorted(
            ((start, parts) for rank in everyone for n, start, parts in rank if n == number),
            key=lambda entry: entry[0],
        )
        for name in ranges[0][1] if ranges else ():
            whole = torch.cat([parts[name] for _, parts in ranges]).view(param.shape)
            found += _mapped(sharded_of[id(param)], name, whole)
    return found


def _master(shard: Any) -> torch.Tensor:
    if shard.param.dtype == torch.float32:
        return shard.param
    return join_master(shard.param, shard.correction)


def _mapped(base: Any, name: str, data: torch.Tensor) -> Pieces:
    if isinstance(base, ShardedTensor):
        parts = [replace(base, data=data, dtype=data.dtype)]
    else:
        parts = replace(base, data=data).build()
    return [
        (
            f"{name}.{part.key}",
            part.global_shape,
            part.global_offset,
            part.data.reshape((1,) * part.prepend_axis_num + part.local_shape).clone(),
        )
        for part in parts
    ]


def joined(ranks: list[Pieces], vocab: int | None = None) -> dict[str, torch.Tensor]:
    """Return whole tensors; fails where replicas differ or an element is missing.

    Args:
        ranks: what ``in_model_space`` returned on each rank.
        vocab: rows of embeddings to keep, without padding.
    """
    whole: dict[str, torch.Tensor] = {}
    seen: dict[str, torch.Tensor] = {}
    for key, shape, offset, data in (piece for rank in ranks for piece in rank):
        if key not in whole:
            whole[key] = torch.zeros(shape, dtype=data.dtype)
            seen[key] = torch.zeros(shape, dtype=torch.bool)
        part = tuple(slice(o, o + s) for o, s in zip(offset, data.shape, strict=True))
        before = seen[key][part]
        assert torch.equal(whole[key][part][before], data[before]), f"replicas of {key} differ"
        whole[key][part] = data
        seen[key][part] = True
    assert whole and all(mask.all() for mask in seen.values())
    if vocab is not None:
        for key in whole:
            if "word_embeddings" in key or "output_layer" in key:
                whole[key] = whole[key][:vocab]
    return whole


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Fail unless both hold the same keys with the same bits."""
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype, key
        same = torch.equal(tensor.view(torch.uint8), theirs[key].view(torch.uint8))
        assert same, (key, int((tensor != theirs[key]).sum()), tensor.numel())
