"""Fused AdamW step on one bucket shard: one launch reads and writes everything in place."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

from megatron_flashoptim.codec.spec import GROUP_SIZE
from megatron_flashoptim.kernels import codec, columns

LR = tl.constexpr(columns.LR)
WEIGHT_DECAY = tl.constexpr(columns.WEIGHT_DECAY)
BETA1 = tl.constexpr(columns.BETA1)
ONE_MINUS_BETA1 = tl.constexpr(columns.ONE_MINUS_BETA1)
BETA2 = tl.constexpr(columns.BETA2)
ONE_MINUS_BETA2 = tl.constexpr(columns.ONE_MINUS_BETA2)
EPS = tl.constexpr(columns.EPS)
INVERSE_BIAS_CORRECTION1 = tl.constexpr(columns.INVERSE_BIAS_CORRECTION1)
INVERSE_SQRT_BIAS_CORRECTION2 = tl.constexpr(columns.INVERSE_SQRT_BIAS_CORRECTION2)
KEY_EXP_AVG_SQ = tl.constexpr(columns.KEY_EXP_AVG_SQ)
KEY_EXP_AVG_SQ_SCALE = tl.constexpr(columns.KEY_EXP_AVG_SQ_SCALE)
KEY_MASTER = tl.constexpr(columns.KEY_MASTER)

# Groups of 32 and warps per program: within 2 % of the fastest of {16, 32, 64} x {2, 4} on an H100
# (docs/benchmarks), and the fastest with stochastic rounding.
GROUPS_PER_PROGRAM = 32
NUM_WARPS = 4


@triton.jit
def _adamw_step_kernel(
    param_ptr,
    correction_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_scale_ptr,
    exp_avg_sq_ptr,
    exp_avg_sq_scale_ptr,
    hyper_ptr,
    key_ptr,
    grad_scale_ptr,
    segment_start_ptr,
    segment_row_ptr,
    segment_tensor_id_ptr,
    segment_group_shift_ptr,
    tile_segment_ptr,
    num_groups,
    MASTER_BITS: tl.constexpr,
    STOCHASTIC_EXP_AVG_SQ: tl.constexpr,
    STOCHASTIC_MASTER: tl.constexpr,
    HYPER_COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program steps GROUPS groups of GROUP elements; MASTER_BITS 0 is an fp32 param.

    Groups of one parameter are stepped together, with its hyper-parameters as scalars. Nearly
    every program has one parameter only; a program that meets several takes a turn for each.
    A tile of the segment table has TILE groups, a multiple of GROUPS.
    """
    program = tl.program_id(0)
    program_start = program * GROUPS
    program_end = tl.minimum(program_start + GROUPS, num_groups)
    segment = tl.load(tile_segment_ptr + program // (TILE // GROUPS))
    last_segment = tl.load(tile_segment_ptr + program // (TILE // GROUPS) + 1)
    start = program_start
    while start < program_end:
        # The segment that holds group `start`, and where it ends in this program.
        end = program_end
        if segment < last_segment:
            end = tl.minimum(tl.load(segment_start_ptr + segment + 1), program_end)
        if end > start:
            _step_groups(
                param_ptr,
                correction_ptr,
                grad_ptr,
                exp_avg_ptr,
                exp_avg_scale_ptr,
                exp_avg_sq_ptr,
                exp_avg_sq_scale_ptr,
                hyper_ptr,
                key_ptr,
                grad_scale_ptr,
                tl.load(segment_row_ptr + segment),
                segment_tensor_id_ptr + segment,
                segment_group_shift_ptr + segment,
                program_start,
                start,
                end,
                MASTER_BITS=MASTER_BITS,
                STOCHASTIC_EXP_AVG_SQ=STOCHASTIC_EXP_AVG_SQ,
                STOCHASTIC_MASTER=STOCHASTIC_MASTER,
                HYPER_COLUMNS=HYPER_COLUMNS,
                GROUPS=GROUPS,
                GROUP=GROUP,
            )
            start = end
        segment += 1


@triton.jit
def _step_groups(
    param_ptr,
    correction_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_scale_ptr,
    exp_avg_sq_ptr,
    exp_avg_sq_scale_ptr,
    hyper_ptr,
    key_ptr,
    grad_scale_ptr,
    row,
    tensor_id_ptr,
    group_shift_ptr,
    program_start,
    start,
    end,
    MASTER_BITS: tl.constexpr,
    STOCHASTIC_EXP_AVG_SQ: tl.constexpr,
    STOCHASTIC_MASTER: tl.constexpr,
    HYPER_COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Step the groups from ``start`` to ``end`` of the program's GROUPS, all of one parameter."""
    hyper = hyper_ptr + row * HYPER_COLUMNS
    lr = tl.load(hyper + LR)
    weight_decay = tl.load(hyper + WEIGHT_DECAY)
    beta1 = tl.load(hyper + BETA1)
    one_minus_beta1 = tl.load(hyper + ONE_MINUS_BETA1)
    beta2 = tl.load(hyper + BETA2)
    one_minus_beta2 = tl.load(hyper + ONE_MINUS_BETA2)
    eps = tl.load(hyper + EPS)
    inverse_bias_correction1 = tl.load(hyper + INVERSE_BIAS_CORRECTION1)
    inverse_sqrt_bias_correction2 = tl.load(hyper + INVERSE_SQRT_BIAS_CORRECTION2)
    grad_scale = tl.load(grad_scale_ptr + row)

    # Elements and groups of the tile, as offsets from its start; 64 bits for the start alone.
    element_start = program_start.to(tl.int64) * GROUP
    lane = tl.arange(0, GROUP)
    local_group = tl.arange(0, GROUPS)
    group = program_start + local_group
    group_mask = (group >= start) & (group < end)
    mask = group_mask[:, None]
    offsets = local_group[:, None] * GROUP + lane[None, :]
    param_ptrs = param_ptr + element_start + offsets
    exp_avg_ptrs = exp_avg_ptr + element_start + offsets
    exp_avg_sq_ptrs = exp_avg_sq_ptr + element_start + offsets

    # Decode.
    param = tl.load(param_ptrs, mask=mask, other=0.0)
    grad = tl.load(grad_ptr + element_start + offsets, mask=mask, other=0.0)
    exp_avg_code = tl.load(exp_avg_ptrs, mask=mask, other=0)
    exp_avg_sq_code = tl.load(exp_avg_sq_ptrs, mask=mask, other=0)
    exp_avg_scale = tl.load(exp_avg_scale_ptr + group, mask=group_mask, other=0.0)
    exp_avg_sq_scale = tl.load(exp_avg_sq_scale_ptr + group, mask=group_mask, other=0.0)
    if grad_ptr.dtype.element_ty == tl.bfloat16:
        grad = codec.bf16_to_fp32(grad)
    grad = grad * grad_scale
    if MASTER_BITS == 0:
        weight = param
    elif MASTER_BITS == 16:
        weight = codec.bf16_to_fp32(param)
    else:
        correction_ptrs = correction_ptr + element_start + offsets
        correction = tl.load(correction_ptrs, mask=mask, other=0)
        weight = codec.join_master(param, correction, MASTER_BITS=MASTER_BITS)
    m = codec.decode_exp_avg(exp_avg_code, codec.bf16_to_fp32(exp_avg_scale)[:, None])
    v = codec.decode_exp_avg_sq(exp_avg_sq_code, codec.bf16_to_fp32(exp_avg_sq_scale)[:, None])

    # AdamW.
    m = beta1 * m + one_minus_beta1 * grad
    v = beta2 * v + one_minus_beta2 * (grad * grad)
    root = tl.sqrt_rn(v)
    denominator = root * inverse_sqrt_bias_correction2 + eps
    update = tl.div_rn(m * inverse_bias_correction1, denominator) + weight_decay * weight
    weight = weight - lr * update

    # Random bits, a function of (seed, step, parameter, element offset in the parameter).
    random = offsets
    scale_random = offsets
    master_random = offsets
    if STOCHASTIC_EXP_AVG_SQ or STOCHASTIC_MASTER:
        tensor_id = tl.load(tensor_id_ptr)
        group_in_tensor = group + tl.load(group_shift_ptr)
        group_offset = (group_in_tensor * GROUP).to(tl.uint32, bitcast=True)[:, None]
        element_offset = group_offset + lane.to(tl.uint32)[None, :]
        keys = key_ptr + row * HYPER_COLUMNS
    if STOCHASTIC_EXP_AVG_SQ:
        key = codec.mix32((tl.load(keys + KEY_EXP_AVG_SQ) ^ tensor_id).to(tl.uint32, bitcast=True))
        random = codec.random_bits(key, element_offset)
        key = codec.mix32(
            (tl.load(keys + KEY_EXP_AVG_SQ_SCALE) ^ tensor_id).to(tl.uint32, bitcast=True)
        )
        scale_random = codec.random_bits(key, group_offset)
    if STOCHASTIC_MASTER:
        key = codec.mix32((tl.load(keys + KEY_MASTER) ^ tensor_id).to(tl.uint32, bitcast=True))
        master_random = codec.random_bits(key, element_offset)

    # Encode and store.
    exp_avg_code, scale_bits = codec.encode_exp_avg(m)
    tl.store(exp_avg_ptrs, exp_avg_code, mask=mask)
    tl.store(exp_avg_scale_ptr + group[:, None], codec.bf16_from_bits(scale_bits), mask=mask)
    exp_avg_sq_code, scale_bits = codec.encode_exp_avg_sq(
        root, random, scale_random, STOCHASTIC=STOCHASTIC_EXP_AVG_SQ
    )
    tl.store(exp_avg_sq_ptrs, exp_avg_sq_code, mask=mask)
    tl.store(exp_avg_sq_scale_ptr + group[:, None], codec.bf16_from_bits(scale_bits), mask=mask)
    if MASTER_BITS == 0:
        tl.store(param_ptrs, weight, mask=mask)
    else:
        high, correction = codec.split_master(
            weight, master_random, MASTER_BITS=MASTER_BITS, STOCHASTIC=STOCHASTIC_MASTER
        )
        tl.store(param_ptrs, high, mask=mask)
        if MASTER_BITS == 24:
            tl.store(correction_ptrs, correction.to(tl.int8), mask=mask)
        elif MASTER_BITS == 32:
            tl.store(correction_ptrs, correction.to(tl.int16), mask=mask)


def adamw_step_(
    param: torch.Tensor,
    correction: torch.Tensor | None,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_scale: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    exp_avg_sq_scale: torch.Tensor,
    hyper: torch.Tensor,
    keys: torch.Tensor,
    grad_scale: torch.Tensor,
    segment_start: torch.Tensor,
    segment_row: torch.Tensor,
    segment_tensor_id: torch.Tensor,
    segment_group_shift: torch.Tensor,
    tile_segment: torch.Tensor,
    *,
    groups_per_tile: int,
    master_bits: int,
    stochastic_exp_avg_sq: bool,
    stochastic_master: bool,
    groups_per_program: int = GROUPS_PER_PROGRAM,
    num_warps: int = NUM_WARPS,
) -> None:
    """Launch the fused AdamW step on one shard.

    Args:
        param: bf16 or fp32, n elements (modified in place).
        correction: int8 or int16, n elements, or None (modified in place).
        grad: bf16 or fp32, n elements.
        exp_avg: int8, n elements (modified in place).
        exp_avg_scale: bf16, n / 32 elements (modified in place).
        exp_avg_sq: uint8, n elements (modified in place).
        exp_avg_sq_scale: bf16, n / 32 elements (modified in place).
        hyper: fp32 ``(rows, columns)`` of ``optim.hyper.HyperTable``.
        keys: int32 view of ``hyper``.
        grad_scale: fp32 ``(rows,)``.
        segment_start: int32, one element per segment, as all ``segment_*``.
        segment_row: row of the hyper table.
        segment_tensor_id: key of the parameter.
        segment_group_shift: group number in the parameter minus group number in the shard.
        tile_segment: int32, tiles + 1 elements.
        groups_per_tile: the tile size ``tile_segment`` was made for.
        master_bits: 16, 24 or 32; ignored for an fp32 ``param``.
        stochastic_exp_avg_sq: round the second moment stochastically.
        stochastic_master: round the master weight stochastically.
        groups_per_program: groups a program works on, a power of two that divides
            ``groups_per_tile``.
        num_warps: warps per program.

    Formula: AdamW as Transformer Engine's FusedAdam with ``adam_w_mode``, all in fp32:
    ``w -= lr * (m / bc1 / (sqrt(v / bc2) + eps) + weight_decay * w)``.
    """
    num_groups = param.numel() // GROUP_SIZE
    groups_per_program = min(groups_per_program, groups_per_tile)
    grid = (triton.cdiv(num_groups, groups_per_program),)
    _adamw_step_kernel[grid](
        param,
        correction,
        grad,
        exp_avg,
        exp_avg_scale,
        exp_avg_sq,
        exp_avg_sq_scale,
        hyper,
        keys,
        grad_scale,
        segment_start,
        segment_row,
        segment_tensor_id,
        segment_group_shift,
        tile_segment,
        num_groups,
        MASTER_BITS=0 if param.dtype == torch.float32 else master_bits,
        STOCHASTIC_EXP_AVG_SQ=stochastic_exp_avg_sq,
        STOCHASTIC_MASTER=stochastic_master,
        HYPER_COLUMNS=hyper.shape[1],
        TILE=groups_per_tile,
        GROUPS=groups_per_program,
        GROUP=GROUP_SIZE,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
