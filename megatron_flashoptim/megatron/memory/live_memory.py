"""Count the bytes an optimizer keeps alive, flash or not, from its live tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch


def optimizer_bytes(optimizer: Any, model_chunks: Iterable[Any]) -> tuple[int, int]:
    """Return (bytes, owned parameters) of an optimizer on this rank.

    Every tensor in the attributes of a chained Megatron optimizer's members, of the optimizers
    they wrap and in the parameters' ``main_param`` counts once by storage, with its gradient,
    except the model's weights and the buffers of DistributedDataParallel.

    Args:
        optimizer: a Megatron ``ChainedOptimizer`` of distributed optimizers.
        model_chunks: the model, wrapped in DistributedDataParallel.
    """
    outside: set[int] = set()
    mains: list[torch.Tensor] = []
    for chunk in model_chunks:
        for param in chunk.parameters():
            outside.add(_storage(param))
            main = getattr(param, "main_param", None)
            if main is not None:
                mains.append(main)
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            outside.update(
                _storage(t) for t in (buffer.param_data, buffer.grad_data) if t is not None
            )
            # Released gradients are views of addresses that the buffer itself does not have.
            outside.update(_storage(bucket.grad_data) for bucket in buffer.buckets)
    sizes: dict[int, int] = {}
    owned = 0
    for member in optimizer.chained_optimizers:
        if getattr(member, "is_stub_optimizer", False):
            continue
        inner = member.optimizer
        own = {key: value for key, value in vars(member).items() if key != "model_chunks"}
        tensors = [*_tensors(vars(inner)), *_tensors(own), *mains]
        for tensor in tensors:
            for held in (tensor, tensor.grad if tensor.is_leaf else None):
                if held is not None and _storage(held) not in outside:
                    sizes[_storage(held)] = held.untyped_storage().nbytes()
        for range_maps in member.gbuf_ranges:
            for bucket_ranges in range_maps.values():
                for ranges in bucket_ranges:
                    owned += sum(r["param"].size for r in ranges["param_map"].values())
    return sum(sizes.values()), owned


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(value: Any, seen: set[int] | None = None) -> Iterable[torch.Tensor]:
    """Yield the tensors in nested containers and in objects of this package.

    Args:
        value: where to look.
        seen: ids of objects that were looked into, which may refer to each other.
    """
    seen = set() if seen is None else seen
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(key, torch.Tensor):
                yield key
            yield from _tensors(item, seen)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item, seen)
    elif type(value).__module__.startswith("megatron_flashoptim") and id(value) not in seen:
        seen.add(id(value))
        yield from _tensors(vars(value), seen)
