"""Checkpoints of Megatron's own Adam: training and saving it, loading it into flash_adamw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_flashoptim.codec import (
    encode_exp_avg,
    encode_exp_avg_sq,
    join_master,
    split_master,
)

FULLY, BUCKETS = "fully_reshardable", "dp_reshardable"
FLATTENED = "fully_sharded_model_space"


def save(folder: Path, save_as: str, steps: int = 3, **options: Any) -> Any:
    """Train stock Adam; returns its state in model space and its param groups."""
    import checkpoints
    import tiny_gpt
    from exact_adamw import use_as_megatrons_adam

    use_as_megatrons_adam()
    trainer = tiny_gpt.build(tiny_gpt.Setup(flash=None, **options))
    trainer.train(steps)
    checkpoints.save(trainer, folder, save_as)
    return checkpoints.in_model_space(trainer), checkpoints.plain_groups(trainer)


def save_not_distributed(folder: Path, steps: int, **optimizer: Any) -> dict[str, torch.Tensor]:
    """Save what Megatron does without ``--use-distributed-optimizer``; returns the masters."""
    import checkpoints
    import tiny_gpt
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    off = {"use_distributed_optimizer": False}
    trainer = tiny_gpt.build(
        tiny_gpt.Setup(
            flash=None, layers=1, ddp=off, optimizer=off | optimizer, foreign_layout=True
        )
    )
    trainer.train(steps)
    checkpoints.fork_queue_of_results()
    metadata = {"chained_optim_avoid_prefix": True}
    state = checkpoints.saved_state(trainer, metadata)
    masters = {
        saved.key: saved.data.clone()
        for saved in nested_values(state["optimizer"])
        if ".fp32_param." in getattr(saved, "key", "")
    }
    strategy = checkpoints.TorchDistSaveShardedStrategy()
    dist_checkpointing.save(state, str(folder), strategy, content_metadata=metadata)
    return masters


def save_flattened(folder: Path, **options: Any) -> Any:
    """Save stock Adam's state as releases before 0.16 did by default; 0.19 cannot write it.

    As Megatron's own description of the format has it: a tensor of global shape (X, Y) and local
    shape (x, y) is stored as (X / x, Y / y, x * y), each rank's range a piece of the last axis.
    """
    import checkpoints
    import tiny_gpt
    from exact_adamw import use_as_megatrons_adam
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    use_as_megatrons_adam()
    trainer = tiny_gpt.build(tiny_gpt.Setup(flash=None, **options))
    trainer.train(3)
    checkpoints.fork_queue_of_results()
    model = trainer.model[0].module.sharded_state_dict()
    bases, _ = extract_sharded_tensors_and_factories(model)
    base_of = {id(base.data): base for base in nested_values(bases)}
    state: dict[str, Any] = {}
    (member,) = trainer.optimizer.chained_optimizers
    for param, start, parts in checkpoints._stock_ranges(member):
        base = base_of[id(param)]
        counts = base.axis_fragmentations
        in_front = base.prepend_axis_num
        whole = (*(1,) * in_front, *base.local_shape)
        fragment = tuple(o // s for o, s in zip(base.global_offset, whole, strict=True))
        for kind, tensor in parts.items():
            name = "fp32_param" if kind == "master" else kind
            data = tensor.view((1,) * len(counts) + (-1,))
            state[f"{name}.{id(param)}"] = ShardedTensor(
                f"optimizer.state.{name}.{base.key}",
                data,
                data.dtype,
                tuple(data.shape),
                (*counts, param.numel()),
                (*fragment, start),
                axis_fragmentations=None,
                replica_id=(*base.replica_id[:2], 0),
            )
    saved = {
        "model": model,
        "optimizer": {**trainer.optimizer.state_dict(), "param_state": state},
        "step_number": 3,
    }
    metadata = checkpoints.metadata_of("fully_sharded_model_space")
    strategy = checkpoints.TorchDistSaveShardedStrategy()
    dist_checkpointing.save(saved, str(folder), strategy, content_metadata=metadata)
    return checkpoints.in_model_space(trainer), checkpoints.plain_groups(trainer)


def load(folder: Path, *, install: bool = True, **options: Any) -> dict[str, Any]:
    """Load into flash_adamw; returns state, groups, weights and what was logged or raised."""
    import checkpoints
    import tiny_gpt

    import megatron_flashoptim

    if install:
        megatron_flashoptim.install()
    logged = checkpoints.collect_log()
    trainer = tiny_gpt.build(tiny_gpt.Setup(**options))
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.5  # must come from the checkpoint
    before = trainer.weights()
    try:
        checkpoints.load(trainer, folder, parallel=options.get("tp", 1) == 2)
    except ValueError as problem:
        return {"error": str(problem)}
    loaded = checkpoints.in_model_space(trainer)
    weights = trainer.weights()
    assert not all(torch.equal(before[name], weights[name]) for name in before)
    return {
        "state": loaded,
        "groups": checkpoints.plain_groups(trainer),
        "weights": weights,
        "logged": [message for message in logged if message.startswith("converted")],
        "told": [message for message in logged if message.startswith("took over")],
        "losses": trainer.train(2),
    }


def encoded(
    stock: dict[str, torch.Tensor],
    bits: int | None,
    is_fp32: Callable[[str], bool] = lambda key: False,
) -> dict[str, torch.Tensor]:
    """Return what stock state becomes by the public codec, in the shape of ``joined``.

    Args:
        stock: masters and moments.
        bits: of bf16 weights' masters; None for an fp32 model.
        is_fp32: whether the weights under a key are fp32 in a bf16 model.
    """
    found = {}
    for key, tensor in stock.items():
        kind, _, name = key.partition(".")
        flat = tensor.flatten()
        if kind == "master" and (bits is None or is_fp32(name)):
            found[key] = tensor
            continue
        if kind == "master":
            found[key] = join_master(*split_master(flat, bits=bits)).view(tensor.shape)
            continue
        encode = encode_exp_avg if kind == "exp_avg" else encode_exp_avg_sq
        codes, scale = encode(flat)
        found[key] = codes.view(tensor.shape)
        per_element = scale.view(torch.int16).repeat_interleave(32)[: flat.numel()]
        found[f"{kind}_scale.{name}"] = per_element.view(tensor.shape)
    return found


def save_remainders(folder: Path, save_as: str, **options: Any) -> None:
    """Save stock's state with masters as Transformer Engine's precision-aware FusedAdam has them.

    That needs a GPU. Its ``get_unscaled_state`` hands Megatron the int16 remainder of a bf16
    weight in place of the master (``store_param_remainders``, in force with bf16 since its 2.1).
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer._get_main_param_and_optimizer_states

    def with_remainder(self: Any, param: Any) -> Any:
        tensors = original(self, param)
        _, remainder = split_master(tensors["param"].detach().flatten(), bits=32)
        return {**tensors, "param": remainder}

    DistributedOptimizer._get_main_param_and_optimizer_states = with_remainder
    save(folder, save_as, **options)
