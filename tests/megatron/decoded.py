"""Master and moments of one parameter, of stock Megatron's optimizer and decoded of ours."""

from __future__ import annotations

from typing import Any

import torch

from megatron_flashoptim.codec import decode_exp_avg, decode_exp_avg_sq, join_master


def stock_state(member: Any, param: Any) -> dict[str, torch.Tensor]:
    """Return copies of the fp32 master and moments of this rank's part of a parameter.

    Not by ``_get_main_param_and_optimizer_states``: it takes another parameter's where one param
    group has bf16 and fp32 ones (seen in 0.19.2).
    """
    main = _main_param(member, param)
    state = member.optimizer.state[main]
    tensors = {"param": main, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _main_param(member: Any, param: Any) -> torch.Tensor:
    pairs = (
        (member.model_float16_groups, member.shard_fp32_from_float16_groups),
        (member.model_fp32_groups, member.shard_fp32_groups),
    )
    (found,) = (
        main
        for models, mains in pairs
        for model_group, main_group in zip(models, mains, strict=True)
        for model, main in zip(model_group, main_group, strict=True)
        if model is param
    )
    return found


def flash_state(member: Any, param: Any) -> dict[str, torch.Tensor]:
    """Return decoded master and moments of this rank's part, and the moments' scales."""
    (item,) = [i for i in member.shard_params if i.param is param]
    shard = member.optimizer.shards[item.shard]
    elements = slice(item.start, item.end)
    groups = slice(item.start // 32, -(-item.end // 32))
    correction = None if shard.correction is None else shard.correction[elements]
    is_bf16 = shard.param.dtype == torch.bfloat16
    master = join_master(shard.param[elements], correction) if is_bf16 else shard.param[elements]
    return {
        "param": master.detach().clone(),
        "exp_avg": decode_exp_avg(shard.exp_avg[elements], shard.exp_avg_scale[groups]),
        "exp_avg_sq": decode_exp_avg_sq(shard.exp_avg_sq[elements], shard.exp_avg_sq_scale[groups]),
        "exp_avg_scale": shard.exp_avg_scale[groups].float(),
        "exp_avg_sq_scale": shard.exp_avg_sq_scale[groups].float(),
    }
