"""One step of a bucket shard: the fused kernel on GPU tensors, the reference on CPU tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megatron_flashoptim.codec import moments, rounding, spec
from megatron_flashoptim.codec.master import join_master, split_master_with_draws
from megatron_flashoptim.kernels import columns
from megatron_flashoptim.optim.hyper import HyperTable
from megatron_flashoptim.optim.shard import BucketShard

if TYPE_CHECKING:
    from megatron_flashoptim.kernels.step import Geometry

# Groups the reference works on at once: bounds its temporary memory to about 100 MB.
_REFERENCE_CHUNK = 1 << 15


def step_(
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
        launch_step_kernel_(
            shard,
            table,
            exp_avg_sq_rounding=exp_avg_sq_rounding,
            master_rounding=master_rounding,
        )
    else:
        reference_step_(
            shard,
            table,
            exp_avg_sq_rounding=exp_avg_sq_rounding,
            master_rounding=master_rounding,
        )


def launch_step_kernel_(
    shard: BucketShard,
    table: HyperTable,
    *,
    exp_avg_sq_rounding: spec.Rounding,
    master_rounding: spec.Rounding,
    geometry: Geometry | None = None,
) -> None:
    """Step one shard with the Triton kernel (modified in place).

    Args:
        shard: parameters, gradients and state.
        table: hyper-parameters of this step.
        exp_avg_sq_rounding: rounding of the second moment.
        master_rounding: rounding of the master weight.
        geometry: how the launch divides its work; chosen by the size of the shard if None.
    """
    segments = shard.segments
    tensors = (
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
        table.skip,
        segments.start,
        segments.row,
        segments.tensor_id,
        segments.group_shift,
        segments.entry_segment,
    )
    options = (exp_avg_sq_rounding, master_rounding, geometry)
    made_for, launch = shard.launches.get(options, (None, None))
    if launch is None or any(was is not now for was, now in zip(made_for, tensors, strict=True)):
        # As the rules, only when it is used: Triton decides how its functions run, compiled or
        # interpreted, when they are imported.
        from megatron_flashoptim.kernels.step import FusedStep

        launch = FusedStep(
            *tensors,
            prepare=shard.rule.prepare,
            update=shard.rule.update,
            groups_per_entry=segments.groups_per_entry,
            master_bits=shard.master_bits,
            fourth_root=shard.exp_avg_sq_code == "fourth_root",
            stochastic_exp_avg_sq=exp_avg_sq_rounding == "stochastic",
            stochastic_master=master_rounding == "stochastic",
            geometry=geometry,
        )
        shard.launches[options] = (tensors, launch)
    launch()


def reference_step_(
    shard: BucketShard,
    table: HyperTable,
    *,
    exp_avg_sq_rounding: spec.Rounding,
    master_rounding: spec.Rounding,
) -> None:
    """Step one shard in plain PyTorch (modified in place); the oracle of the kernel."""
    if table.skip.item():
        return
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
            shard.exp_avg_sq_code,
            exp_avg_sq_rounding == "stochastic",
            master_rounding == "stochastic",
        )


class _RandomBits:
    """Keys of the random bits of a run of groups, see ``codec.rounding``."""

    def __init__(
        self, keys: torch.Tensor, tensor_id: torch.Tensor, group_in_tensor: torch.Tensor
    ) -> None:
        self._keys = keys.to(torch.int64)
        self._tensor_id = tensor_id
        self._group_in_tensor = group_in_tensor

    def group_keys(self, key_column: int) -> torch.Tensor:
        key = (self._keys[:, key_column] ^ self._tensor_id) & 0xFFFFFFFF
        return rounding.group_key(key, self._group_in_tensor)


def _reference_step_groups_(
    shard: BucketShard,
    table: HyperTable,
    groups: slice,
    row: torch.Tensor,
    bits: _RandomBits,
    code: spec.ExpAvgSqCode,
    stochastic_exp_avg_sq: bool,
    stochastic_master: bool,
) -> None:
    elements = slice(groups.start * spec.GROUP_SIZE, groups.stop * spec.GROUP_SIZE)

    def tile(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[elements].view(-1, spec.GROUP_SIZE)

    param = tile(shard.param)
    correction = None if shard.correction is None else tile(shard.correction)
    is_fp32 = param.dtype == torch.float32
    weight = param if is_fp32 else join_master(param, correction)
    grad = tile(shard.grad).to(torch.float32)
    grad_scale = table.grad_scale[row].unsqueeze(1)
    hyper = table.values[row, : columns.VALUES].unsqueeze(1).unbind(dim=2)
    ratio = moments.exp_avg_ratio(tile(shard.exp_avg))
    scale = shard.exp_avg_scale[groups].to(torch.float32).unsqueeze(1)
    arguments = [hyper, grad_scale, weight, grad, ratio, scale]
    if shard.exp_avg_sq is not None and shard.exp_avg_sq_scale is not None:
        # Second moments are computed in units of STEP_UNIT squared.
        root_scale = shard.exp_avg_sq_scale[groups].to(torch.float32).unsqueeze(1) / spec.STEP_UNIT
        level = moments.exp_avg_sq_level(tile(shard.exp_avg_sq), code=code)
        arguments += [level, root_scale * moments.exp_avg_sq_step(code)]
    weight, m, *roots = shard.rule.reference(*arguments)

    codes, scale = moments.encode_exp_avg_groups(m)
    tile(shard.exp_avg).copy_(codes)
    shard.exp_avg_scale[groups].copy_(scale)
    if shard.exp_avg_sq is not None and shard.exp_avg_sq_scale is not None:
        (root,) = roots
        draw = scale_draw = None
        if stochastic_exp_avg_sq:
            keys = bits.group_keys(columns.KEY_EXP_AVG_SQ)
            draw, scale_draw = rounding.element_draws(keys), rounding.scale_draws(keys)
        root = torch.where(root == spec.STEP_EXP_AVG_SQ_ZERO**0.5, 0.0, root * spec.STEP_UNIT)
        codes, scale = moments.encode_exp_avg_sq_groups(
            root, code=code, draw=draw, scale_draw=scale_draw
        )
        tile(shard.exp_avg_sq).copy_(codes)
        shard.exp_avg_sq_scale[groups].copy_(scale)
    if is_fp32:
        param.copy_(weight)
        return
    draw = None
    if stochastic_master:
        draw = rounding.element_draws(bits.group_keys(columns.KEY_MASTER))
    # The NaN of a GPU's arithmetic is positive.
    weight = torch.where(weight.isnan(), torch.nan, weight)
    high, new_correction = split_master_with_draws(weight, bits=shard.master_bits, draw=draw)
    param.copy_(high)
    if correction is not None and new_correction is not None:
        correction.copy_(new_correction)
