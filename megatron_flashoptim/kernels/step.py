"""Fused step on one bucket shard: one launch reads and writes everything in place.

What the step computes is the update rule's, two Triton functions that the kernel is given; what is
here is the same for all: segments, tiles, decoding, encoding.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from megatron_flashoptim.codec import spec
from megatron_flashoptim.codec.moments import exp_avg_sq_step
from megatron_flashoptim.kernels import codec, columns
from megatron_flashoptim.kernels.bytes import store_group_scale

KEY_EXP_AVG_SQ = tl.constexpr(columns.KEY_EXP_AVG_SQ)
KEY_MASTER = tl.constexpr(columns.KEY_MASTER)

UNIT = tl.constexpr(spec.STEP_UNIT)
INVERSE_UNIT = tl.constexpr(1 / spec.STEP_UNIT)
ROOT_OF_ZERO = tl.constexpr(spec.STEP_EXP_AVG_SQ_ZERO**0.5)
EXP_AVG_SQ_STEP = tl.constexpr(exp_avg_sq_step("sqrt"))
FOURTH_ROOT_STEP = tl.constexpr(exp_avg_sq_step("fourth_root"))


@dataclass(frozen=True)
class Geometry:
    """How a launch divides its work.

    Attributes:
        groups_per_tile: groups a program works on at once, a power of two.
        tiles_per_program: tiles a program steps one after the other, a power of two.
        num_stages: tiles in flight, the one worked on included.
        num_warps: warps per program.
        max_registers: registers per thread.
    """

    groups_per_tile: int
    tiles_per_program: int
    num_stages: int
    num_warps: int
    max_registers: int


# Found by scripts/bench_step.py on an H100, see docs/kernel.md. In a large shard a program is one
# warp, so that it waits for no other, and steps four tiles of 512 elements, the next of which are
# on the way. A small shard has too few tiles for that: its programs are many and short.
LARGE = Geometry(16, 4, 4, 1, 128)
SMALL = Geometry(16, 1, 1, 2, 64)
# Elements from which a shard is large.
LARGE_NUMEL = 1 << 26


@triton.jit
def _step_kernel(
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
    skip_ptr,
    segment_start_ptr,
    segment_row_ptr,
    segment_tensor_id_ptr,
    segment_group_shift_ptr,
    entry_segment_ptr,
    num_groups,
    PREPARE: tl.constexpr,
    UPDATE: tl.constexpr,
    HAS_EXP_AVG_SQ: tl.constexpr,
    MASTER_BITS: tl.constexpr,
    FOURTH_ROOT: tl.constexpr,
    STOCHASTIC_EXP_AVG_SQ: tl.constexpr,
    STOCHASTIC_MASTER: tl.constexpr,
    HYPER_COLUMNS: tl.constexpr,
    ENTRY: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program steps TILES tiles of GROUPS groups of GROUP elements, one after the other.

    Groups of one parameter are stepped together, with its hyper-parameters as scalars. Nearly
    every program has one parameter only; a program that meets several takes a turn for each.
    MASTER_BITS 0 is an fp32 param. An entry of the segment table has ENTRY groups, a multiple of
    a program's.
    """
    program = tl.program_id(0)
    entry = program // (ENTRY // (TILES * GROUPS))
    segment = tl.load(entry_segment_ptr + entry)
    last_segment = tl.load(entry_segment_ptr + entry + 1)
    start = program * (TILES * GROUPS)
    program_end = tl.minimum(start + TILES * GROUPS, num_groups)
    if tl.load(skip_ptr) != 0.0:
        start = program_end
    while start < program_end:
        # The segment that holds group `start`, and where it ends in this program.
        end = program_end
        if segment < last_segment:
            end = tl.minimum(tl.load(segment_start_ptr + segment + 1), program_end)
        if end > start:
            row = tl.load(segment_row_ptr + segment)
            _step_segment(
                param_ptr,
                correction_ptr,
                grad_ptr,
                exp_avg_ptr,
                exp_avg_scale_ptr,
                exp_avg_sq_ptr,
                exp_avg_sq_scale_ptr,
                hyper_ptr + row * HYPER_COLUMNS,
                key_ptr + row * HYPER_COLUMNS,
                grad_scale_ptr + row,
                segment_tensor_id_ptr + segment,
                segment_group_shift_ptr + segment,
                program * TILES,
                start,
                end,
                PREPARE=PREPARE,
                UPDATE=UPDATE,
                HAS_EXP_AVG_SQ=HAS_EXP_AVG_SQ,
                MASTER_BITS=MASTER_BITS,
                FOURTH_ROOT=FOURTH_ROOT,
                STOCHASTIC_EXP_AVG_SQ=STOCHASTIC_EXP_AVG_SQ,
                STOCHASTIC_MASTER=STOCHASTIC_MASTER,
                TILES=TILES,
                STAGES=STAGES,
                GROUPS=GROUPS,
                GROUP=GROUP,
            )
            start = end
        segment += 1


@triton.jit
def _step_segment(
    param_ptr,
    correction_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_scale_ptr,
    exp_avg_sq_ptr,
    exp_avg_sq_scale_ptr,
    hyper,
    keys,
    grad_scale_ptr,
    tensor_id_ptr,
    group_shift_ptr,
    first_tile,
    start,
    end,
    PREPARE: tl.constexpr,
    UPDATE: tl.constexpr,
    HAS_EXP_AVG_SQ: tl.constexpr,
    MASTER_BITS: tl.constexpr,
    FOURTH_ROOT: tl.constexpr,
    STOCHASTIC_EXP_AVG_SQ: tl.constexpr,
    STOCHASTIC_MASTER: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Step the groups from ``start`` to ``end``, all of one parameter, tile by tile."""
    scalars = PREPARE(hyper, grad_scale_ptr)
    if STOCHASTIC_EXP_AVG_SQ or STOCHASTIC_MASTER:
        tensor_id = tl.load(tensor_id_ptr)
        group_shift = tl.load(group_shift_ptr)
        exp_avg_sq_key = (tl.load(keys + KEY_EXP_AVG_SQ) ^ tensor_id).to(tl.uint32, bitcast=True)
        master_key = (tl.load(keys + KEY_MASTER) ^ tensor_id).to(tl.uint32, bitcast=True)

    for index in tl.range(TILES, num_stages=STAGES):
        element_start, offsets, group, owned = _tile(first_tile + index, start, end, GROUPS, GROUP)
        mask = owned[:, None]
        grad = tl.load(grad_ptr + element_start + offsets, mask=mask, other=0.0)
        param = tl.load(param_ptr + element_start + offsets, mask=mask, other=0.0)
        if MASTER_BITS > 16:
            correction = tl.load(correction_ptr + element_start + offsets, mask=mask, other=0)
        exp_avg = tl.load(exp_avg_ptr + element_start + offsets, mask=mask, other=0)
        if HAS_EXP_AVG_SQ:
            exp_avg_sq = tl.load(exp_avg_sq_ptr + element_start + offsets, mask=mask, other=0)
        exp_avg_scale = tl.load(exp_avg_scale_ptr + group, mask=owned, other=0.0)
        if HAS_EXP_AVG_SQ:
            exp_avg_sq_scale = tl.load(exp_avg_sq_scale_ptr + group, mask=owned, other=0.0)

        # Decode.
        if grad_ptr.dtype.element_ty == tl.bfloat16:
            g = codec.bf16_to_fp32(grad)
        else:
            g = grad
        if MASTER_BITS == 0:
            weight = param
        elif MASTER_BITS == 16:
            weight = codec.bf16_to_fp32(param)
        else:
            weight = codec.join_master(param, correction, MASTER_BITS=MASTER_BITS)
        scale = codec.bf16_to_fp32(exp_avg_scale)
        if HAS_EXP_AVG_SQ:
            # Roots of v come in units of UNIT.
            root_of_level = codec.bf16_to_fp32(exp_avg_sq_scale) * INVERSE_UNIT
            root_of_level *= FOURTH_ROOT_STEP if FOURTH_ROOT else EXP_AVG_SQ_STEP
            weight, m, root = UPDATE(
                scalars, weight, g, exp_avg, scale, exp_avg_sq, root_of_level, FOURTH_ROOT
            )
        else:
            weight, m = UPDATE(scalars, weight, g, exp_avg, scale)
            weight = _kept_in_one_layout(weight)

        # Encode and store.
        draw = 0
        scale_draw = 0
        if STOCHASTIC_EXP_AVG_SQ or STOCHASTIC_MASTER:
            group_in_tensor = (group + group_shift).to(tl.uint32, bitcast=True)
        if STOCHASTIC_EXP_AVG_SQ:
            group_keys = codec.group_key(exp_avg_sq_key, group_in_tensor)
            draw = codec.element_draws(group_keys, GROUP)
            scale_draw = codec.scale_draws(group_keys)
        code, scale = codec.encode_exp_avg(m)
        tl.store(exp_avg_ptr + element_start + offsets, code, mask=mask)
        store_group_scale(exp_avg_scale_ptr, group, scale, owned)
        if HAS_EXP_AVG_SQ:
            code, scale = codec.encode_exp_avg_sq(
                root,
                ROOT_OF_ZERO,
                UNIT,
                draw,
                scale_draw,
                FOURTH_ROOT=FOURTH_ROOT,
                STOCHASTIC=STOCHASTIC_EXP_AVG_SQ,
            )
            tl.store(exp_avg_sq_ptr + element_start + offsets, code, mask=mask)
            store_group_scale(exp_avg_sq_scale_ptr, group, scale, owned)
        if MASTER_BITS == 0:
            tl.store(param_ptr + element_start + offsets, weight, mask=mask)
        else:
            draw = 0
            if STOCHASTIC_MASTER:
                draw = codec.element_draws(codec.group_key(master_key, group_in_tensor), GROUP)
            high, low = codec.split_master(
                weight, draw, MASTER_BITS=MASTER_BITS, STOCHASTIC=STOCHASTIC_MASTER
            )
            tl.store(param_ptr + element_start + offsets, high, mask=mask)
            if MASTER_BITS > 16:
                tl.store(correction_ptr + element_start + offsets, low, mask=mask)


@triton.jit
def _kept_in_one_layout(weight):
    """Return the weight: two operations for Triton to count, of which the machine executes none.

    The tile is computed in the layout of the codes, 16 to a thread, and bf16 weights are stored 8
    to a thread. Where a rule is short Triton would rather compute it once more in the other layout
    than convert 1 KiB: half as many instructions again, seen with scripts/compile_step.py.
    """
    bits = weight.to(tl.int32, bitcast=True)
    return (bits & (bits | 1)).to(tl.float32, bitcast=True)


@triton.jit
def _tile(tile, start, end, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """Return where a tile lies: its first element, and its elements, groups and owned groups."""
    # Offsets within the tile fit 32 bits; its start may not.
    element_start = tile.to(tl.int64) * (GROUPS * GROUP)
    local_group = tl.arange(0, GROUPS)
    offsets = local_group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    group = tile * GROUPS + local_group
    return element_start, offsets, group, (group >= start) & (group < end)


class FusedStep:
    """The fused step on the tensors of one shard, launched by calling it.

    The first call compiles the kernel, or finds it compiled; later ones hand the same arguments to
    the compiled kernel, without Triton looking at each of them again.

    Args:
        param: bf16 or fp32, n elements (modified in place).
        correction: int8 or int16, n elements, or None (modified in place).
        grad: bf16 or fp32, n elements.
        exp_avg: int8, n elements (modified in place).
        exp_avg_scale: bf16, n / 32 elements (modified in place).
        exp_avg_sq: uint8, n elements, or None (modified in place).
        exp_avg_sq_scale: bf16, n / 32 elements, or None (modified in place).
        hyper: fp32 ``(rows, columns)`` of ``optim.hyper.HyperTable``.
        keys: int32 view of ``hyper``.
        grad_scale: fp32 ``(rows,)``.
        skip: fp32, one element; where it is not 0 the launch changes nothing.
        segment_start: int32, one element per segment, as all ``segment_*``.
        segment_row: row of the hyper table.
        segment_tensor_id: key of the parameter.
        segment_group_shift: group number in the parameter minus group number in the shard.
        entry_segment: int32, entries + 1 elements.
        prepare, update: Triton functions of the rule, see ``optim.rules.rule``.
        groups_per_entry: groups per entry of ``entry_segment``.
        master_bits: 16, 24 or 32; ignored for an fp32 ``param``.
        fourth_root: code of the second moment, see ``codec.spec``.
        stochastic_exp_avg_sq: round the second moment stochastically.
        stochastic_master: round the master weight stochastically.
        geometry: how the launch divides its work; chosen by the size of the shard if None.
    """

    def __init__(
        self,
        param: torch.Tensor,
        correction: torch.Tensor | None,
        grad: torch.Tensor,
        exp_avg: torch.Tensor,
        exp_avg_scale: torch.Tensor,
        exp_avg_sq: torch.Tensor | None,
        exp_avg_sq_scale: torch.Tensor | None,
        hyper: torch.Tensor,
        keys: torch.Tensor,
        grad_scale: torch.Tensor,
        skip: torch.Tensor,
        segment_start: torch.Tensor,
        segment_row: torch.Tensor,
        segment_tensor_id: torch.Tensor,
        segment_group_shift: torch.Tensor,
        entry_segment: torch.Tensor,
        *,
        prepare: Any,
        update: Any,
        groups_per_entry: int,
        master_bits: int,
        fourth_root: bool,
        stochastic_exp_avg_sq: bool,
        stochastic_master: bool,
        geometry: Geometry | None = None,
    ) -> None:
        num_groups = param.numel() // spec.GROUP_SIZE
        if geometry is None:
            geometry = LARGE if param.numel() >= LARGE_NUMEL else SMALL
        groups_per_tile = min(geometry.groups_per_tile, groups_per_entry)
        tiles_per_program = min(geometry.tiles_per_program, groups_per_entry // groups_per_tile)
        self._grid = (triton.cdiv(num_groups, groups_per_tile * tiles_per_program), 1, 1)
        # In the order of the kernel's parameters, as the compiled kernel takes them.
        self._arguments = (
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
            skip,
            segment_start,
            segment_row,
            segment_tensor_id,
            segment_group_shift,
            entry_segment,
            num_groups,
            prepare,
            update,
            exp_avg_sq is not None,
            0 if param.dtype == torch.float32 else master_bits,
            fourth_root,
            stochastic_exp_avg_sq,
            stochastic_master,
            hyper.shape[1],
            groups_per_entry,
            tiles_per_program,
            geometry.num_stages,
            groups_per_tile,
            spec.GROUP_SIZE,
        )
        self._options = {
            "num_warps": geometry.num_warps,
            "maxnreg": geometry.max_registers,
            "enable_fp_fusion": False,
        }
        self._compiled: Any = None

    def __call__(self) -> None:
        """Step once, asynchronously."""
        if self._compiled is None:
            # None again in Triton's interpreter, which compiles nothing.
            self._compiled = _step_kernel[self._grid](*self._arguments, **self._options)
        else:
            self._compiled[self._grid](*self._arguments)
