"""AdamW on one bucket shard: the fused kernel on GPU tensors, the reference on CPU tensors."""

from __future__ import annotations

import torch

from megatron_flashoptim.codec import moments, rounding, spec
from megatron_flashoptim.codec.master import join_master, split_master_with_bits
from megatron_flashoptim.kernels import columns
from megatron_flashoptim.optim.hyper import HyperTable
from megatron_flashoptim.optim.shard import BucketShard

# Groups the reference works on at once: bounds its temporary memory to about 100 MB.
_REFERENCE_CHUNK = 1 << 15


def adamw_step_(
    shard: BucketShard,
    table: HyperTable,
    *,
    exp_avg_sq_rounding: spec.Rounding,
    master_rounding: spec.Rounding,
) -> None:
    """Step one shard (modified in place): one kernel launch on a GPU, plain PyTorch on a CPU.

    Args:
        shard: parameters, gradients and state.
        table: hyper-parameters of this step.
        exp_avg_sq_rounding: rounding of the second moment.
        master_rounding: rounding of the master weight.
    """
    if not shard.segments:
        return  # the shard is padding only
    if shard.param.is_cuda:
        launch_adamw_kernel_(
            shard,
            table,
            exp_avg_sq_rounding=exp_avg_sq_rounding,
            master_rounding=master_rounding,
        )
    else:
        reference_adamw_step_(
            shard,
            table,
            exp_avg_sq_rounding=exp_avg_sq_rounding,
            master_rounding=master_rounding,
        )


def launch_adamw_kernel_(
    shard: BucketShard,
    table: HyperTable,
    *,
    exp_avg_sq_rounding: spec.Rounding,
    master_rounding: spec.Rounding,
    **tuning: int,
) -> None:
    """Step one shard with the Triton kernel (modified in place); ``tuning`` is passed to it."""
    # Imported here so that a machine without Triton can use the reference.
    from megatron_flashoptim.kernels.adamw import adamw_step_ as launch

    segments = shard.segments
    launch(
        shard.param,
        shard.correction,
        shard.grad,
        shard.exp_avg,
        shard.exp_avg_scale,
        shard.exp_avg_sq,
        shard.exp_avg_sq_scale,
        table.values,
        table.keys,
        table.grad_scale,
        segments.start,
        segments.row,
        segments.tensor_id,
        segments.group_shift,
        segments.tile_segment,
        groups_per_tile=segments.groups_per_tile,
        master_bits=shard.master_bits,
        stochastic_exp_avg_sq=exp_avg_sq_rounding == "stochastic",
        stochastic_master=master_rounding == "stochastic",
        **tuning,
    )


def reference_adamw_step_(
    shard: BucketShard,
    table: HyperTable,
    *,
    exp_avg_sq_rounding: spec.Rounding,
    master_rounding: spec.Rounding,
) -> None:
    """Step one shard in plain PyTorch (modified in place); the oracle of the kernel."""
    segments = shard.segments
    row = segments.per_group(segments.row)
    tensor_id = segments.per_group(segments.tensor_id).to(torch.int64)
    shift = segments.per_group(segments.group_shift).to(torch.int64)
    group_in_tensor = torch.arange(shard.num_groups, device=row.device) + shift
    for begin in range(0, shard.num_groups, _REFERENCE_CHUNK):
        groups = slice(begin, min(begin + _REFERENCE_CHUNK, shard.num_groups))
        _reference_step_groups_(
            shard,
            table,
            groups,
            row[groups],
            _RandomBits(table.keys[row[groups]], tensor_id[groups], group_in_tensor[groups]),
            exp_avg_sq_rounding == "stochastic",
            master_rounding == "stochastic",
        )


class _RandomBits:
    """Random bits of a run of groups, see ``codec.rounding``."""

    def __init__(
        self, keys: torch.Tensor, tensor_id: torch.Tensor, group_in_tensor: torch.Tensor
    ) -> None:
        self._keys = keys.to(torch.int64)
        self._tensor_id = tensor_id
        first = (group_in_tensor * spec.GROUP_SIZE).unsqueeze(1)
        self.element_offsets = first + torch.arange(spec.GROUP_SIZE, device=keys.device)
        self.group_offsets = first

    def draw(self, key_column: int, offsets: torch.Tensor) -> torch.Tensor:
        mixed = (self._keys[:, key_column] ^ self._tensor_id) & 0xFFFFFFFF
        unique, inverse = torch.unique(mixed, return_inverse=True)
        key = torch.tensor([rounding.mix32(k) for k in unique.tolist()], device=offsets.device)
        return rounding.random_bits(key[inverse].unsqueeze(1), offsets)


def _reference_step_groups_(
    shard: BucketShard,
    table: HyperTable,
    groups: slice,
    row: torch.Tensor,
    bits: _RandomBits,
    stochastic_exp_avg_sq: bool,
    stochastic_master: bool,
) -> None:
    elements = slice(groups.start * spec.GROUP_SIZE, groups.stop * spec.GROUP_SIZE)

    def tile(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[elements].view(-1, spec.GROUP_SIZE)

    def column(index: int) -> torch.Tensor:
        return table.values[row, index].unsqueeze(1)

    param = tile(shard.param)
    correction = None if shard.correction is None else tile(shard.correction)
    is_fp32 = param.dtype == torch.float32
    weight = param if is_fp32 else join_master(param, correction)
    grad = tile(shard.grad).to(torch.float32) * table.grad_scale[row].unsqueeze(1)
    m = moments.decode_exp_avg_groups(tile(shard.exp_avg), shard.exp_avg_scale[groups])
    v = moments.decode_exp_avg_sq_groups(tile(shard.exp_avg_sq), shard.exp_avg_sq_scale[groups])

    m = column(columns.BETA1) * m + column(columns.ONE_MINUS_BETA1) * grad
    v = column(columns.BETA2) * v + column(columns.ONE_MINUS_BETA2) * (grad * grad)
    root = rounding.sqrt_fp32(v)
    denominator = root * column(columns.INVERSE_SQRT_BIAS_CORRECTION2) + column(columns.EPS)
    update = m * column(columns.INVERSE_BIAS_CORRECTION1) / denominator
    update = update + column(columns.WEIGHT_DECAY) * weight
    weight = weight - column(columns.LR) * update

    codes, scale = moments.encode_exp_avg_groups(m)
    tile(shard.exp_avg).copy_(codes)
    shard.exp_avg_scale[groups].copy_(scale)
    random = scale_random = None
    if stochastic_exp_avg_sq:
        random = bits.draw(columns.KEY_EXP_AVG_SQ, bits.element_offsets)
        scale_random = bits.draw(columns.KEY_EXP_AVG_SQ_SCALE, bits.group_offsets).squeeze(1)
    codes, scale = moments.encode_exp_avg_sq_groups(root, random=random, scale_random=scale_random)
    tile(shard.exp_avg_sq).copy_(codes)
    shard.exp_avg_sq_scale[groups].copy_(scale)
    if is_fp32:
        param.copy_(weight)
        return
    random = bits.draw(columns.KEY_MASTER, bits.element_offsets) if stochastic_master else None
    high, new_correction = split_master_with_bits(weight, bits=shard.master_bits, random=random)
    param.copy_(high)
    if correction is not None and new_correction is not None:
        correction.copy_(new_correction)
