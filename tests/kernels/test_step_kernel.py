"""The fused AdamW kernel equals its plain PyTorch twin bit for bit and writes nothing else.

The twin always runs on the CPU: on a GPU these tests also say that CPU and GPU train alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from rows import adam_row
from shards import GROUP, GuardedShard, Parameter, assert_same_state, is_unchanged, segments_of

from megatron_flashoptim.codec import spec
from megatron_flashoptim.kernels.step import LARGE, SMALL, Geometry
from megatron_flashoptim.optim.hyper import HyperRow, HyperTable
from megatron_flashoptim.optim.step import launch_step_kernel_, reference_step_

# Two whole tiles of 64 groups and a part of a third. Padding lies before the first parameter and
# after two others; five parameters meet the first tile, one begins with the second, one spans two.
PARAMETERS = (
    Parameter(start=2, groups=7, row=0, tensor_id=12345),
    Parameter(start=10, groups=1, row=1, tensor_id=0xDEADBEEF),
    Parameter(start=12, groups=20, row=2, tensor_id=3),
    Parameter(start=32, groups=1, row=0, tensor_id=4),
    Parameter(start=33, groups=31, row=1, tensor_id=5),
    Parameter(start=64, groups=6, row=2, tensor_id=6),
    Parameter(start=70, groups=75, row=0, tensor_id=0xFFFFFFFF),
)
GROUPS = 150
TILE = 64

FORMATS = [
    (param, grad, bits)
    for param, all_bits in ((torch.bfloat16, (24, 32, 16)), (torch.float32, (24,)))
    for grad in (torch.bfloat16, torch.float32)
    for bits in all_bits
]
# NaN and infinity are part of what is compared.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

NEAREST = {"exp_avg_sq_rounding": "nearest", "master_rounding": "nearest"}
STOCHASTIC = {"exp_avg_sq_rounding": "stochastic", "master_rounding": "stochastic"}


def _shard(
    device: str,
    param_dtype: torch.dtype = torch.bfloat16,
    grad_dtype: torch.dtype = torch.bfloat16,
    master_bits: int = 24,
    parameters: tuple[Parameter, ...] = PARAMETERS,
    groups: int = GROUPS,
    groups_per_entry: int = TILE,
    exp_avg_sq_code: spec.ExpAvgSqCode = "sqrt",
) -> GuardedShard:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(groups * GROUP, generator=generator)
    return GuardedShard(
        weight.to(device, param_dtype),
        torch.zeros(groups * GROUP, dtype=grad_dtype, device=device),
        segments_of(parameters, 0, groups, device, groups_per_entry),
        master_bits,
        exp_avg_sq_code,
    )


def _hyper(step: int) -> list[HyperRow]:
    """Three rows that differ in everything."""
    return [
        adam_row(1e-3, 0.1, 0.9, 0.95, 1e-8, step),
        adam_row(3e-2, 0.0, 0.8, 0.999, 1e-5, step + 10),
        adam_row(5e-4, 0.3, 0.0, 0.5, 1e-15, step, bias_correction=False),
    ]


def _ordinary(step: int, count: int) -> torch.Tensor:
    """Gradients that span many decades within each group."""
    generator = torch.Generator().manual_seed(step)
    spread = torch.exp(2 * torch.randn(count, generator=generator) - 8)
    return torch.randn(count, generator=generator) * spread


def _check_against_reference(
    device: str,
    gradients: Callable[[int, int], torch.Tensor] = _ordinary,
    *,
    steps: int = 2,
    rounding: dict[str, spec.Rounding],
    geometry: Geometry | None = None,
    **shard: object,
) -> tuple[GuardedShard, GuardedShard]:
    """Step the kernel on ``device`` and the reference on the CPU, side by side."""
    kernel, reference = _shard(device, **shard), _shard("cpu", **shard)
    table, reference_table = HyperTable(3, device), HyperTable(3, "cpu")
    for one in (table, reference_table):
        one.grad_scale.copy_(torch.tensor([0.7, 1.0, 0.031]))
    for step in range(1, steps + 1):
        for one in (kernel, reference):
            one.grad.copy_(gradients(step, one.grad.numel()))
        grad = kernel.grad.clone()
        table.fill(_hyper(step), seed=3)
        reference_table.fill(_hyper(step), seed=3)
        values = table.keys.clone()
        launch_step_kernel_(kernel, table, **rounding, geometry=geometry)
        reference_step_(reference, reference_table, **rounding)
        assert_same_state(kernel, reference, f"step {step}:")
        assert is_unchanged(kernel.grad, grad)
        assert torch.equal(table.keys, values)
    kernel.check_guards()
    reference.check_guards()
    return kernel, reference


@pytest.mark.parametrize("master_rounding", spec.ROUNDINGS)
@pytest.mark.parametrize("exp_avg_sq_rounding", spec.ROUNDINGS)
@pytest.mark.parametrize(("param_dtype", "grad_dtype", "master_bits"), FORMATS, ids=str)
def test_kernel_equals_reference_bit_for_bit(
    device: str,
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    master_bits: int,
    exp_avg_sq_rounding: spec.Rounding,
    master_rounding: spec.Rounding,
) -> None:
    """Every format and rounding, three sets of hyper-parameters, two steps."""
    rounding = {"exp_avg_sq_rounding": exp_avg_sq_rounding, "master_rounding": master_rounding}
    kernel, _ = _check_against_reference(
        device,
        rounding=rounding,
        param_dtype=param_dtype,
        grad_dtype=grad_dtype,
        master_bits=master_bits,
    )
    # The comparison is of something: nothing is at its initial value.
    assert kernel.exp_avg.count_nonzero() > 0.7 * kernel.exp_avg.numel()
    assert (kernel.exp_avg_sq > 0).all()


@pytest.mark.parametrize("rounding", [NEAREST, STOCHASTIC], ids=["nearest", "stochastic"])
def test_kernel_equals_reference_over_many_steps(
    device: str, rounding: dict[str, spec.Rounding]
) -> None:
    _check_against_reference(device, steps=6, rounding=rounding)


def _special(step: int, count: int) -> torch.Tensor:
    """One kind of gradient per group, in turn; odd steps are ordinary so that state is there."""
    gradient = _ordinary(step, count).view(-1, GROUP)
    if step % 2:
        return gradient.flatten()
    gradient[0::10, 3] = torch.nan
    gradient[1::10, 31] = torch.inf
    gradient[2::10, 0] = -torch.inf
    gradient[3::10] = 0.0
    gradient[4::10] = -0.0
    gradient[5::10] *= 1e30  # the square overflows
    gradient[6::10] *= 1e-18  # the square is subnormal
    gradient[7::10] *= 1e-25  # the square is zero
    gradient[8::10, 1:] = 1e-12
    gradient[8::10, 0] = 1e12
    gradient[9::10] = 2.5
    return gradient.flatten()


@pytest.mark.parametrize("rounding", [NEAREST, STOCHASTIC], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("param_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kernel_equals_reference_on_special_gradients(
    device: str,
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    rounding: dict[str, spec.Rounding],
) -> None:
    """NaN, infinity, zeros, and squares that overflow or go subnormal; two steps after each."""
    kernel, _ = _check_against_reference(
        device,
        _special,
        steps=3,
        rounding=rounding,
        param_dtype=param_dtype,
        grad_dtype=grad_dtype,
    )
    scale = kernel.exp_avg_sq_scale
    assert scale[0].isnan() and scale[1].isnan() and scale[2].isnan()
    assert scale[3].isfinite() and scale[8].isfinite()


@pytest.mark.parametrize("magnitude", [1e-30, 1e-20, 1e-12, 1e12, 1e18])
def test_kernel_equals_reference_at_any_gradient_magnitude(device: str, magnitude: float) -> None:
    _check_against_reference(
        device,
        lambda step, count: _ordinary(step, count) * magnitude,
        rounding=STOCHASTIC,
        grad_dtype=torch.float32,
    )


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kernel_equals_reference_on_subnormal_gradients(
    device: str, grad_dtype: torch.dtype
) -> None:
    """Below 2^-126, where a conversion might flush: moments so small are zero by the format."""
    kernel, _ = _check_against_reference(
        device,
        lambda step, count: _ordinary(step, count) * 1e-36,
        rounding=NEAREST,
        grad_dtype=grad_dtype,
    )
    assert not kernel.exp_avg.any() and not kernel.exp_avg_sq.any()
    assert not kernel.exp_avg_scale.any() and not kernel.exp_avg_sq_scale.any()


@pytest.mark.parametrize("groups", [1, 63, 64, 65, 128, 129])
def test_kernel_equals_reference_for_any_number_of_groups(device: str, groups: int) -> None:
    """Less than a tile, whole tiles, one group more."""
    parameters = (
        Parameter(start=0, groups=groups, row=1, tensor_id=9),
        Parameter(start=groups - 1, groups=1, row=2, tensor_id=10),
    )[: 1 + (groups > 1)]
    _check_against_reference(device, rounding=STOCHASTIC, parameters=parameters, groups=groups)


@pytest.mark.parametrize(
    ("groups_per_entry", "groups_per_tile", "tiles"),
    [(8, 8, 1), (16, 32, 1), (32, 32, 4), (64, 8, 8), (64, 16, 2), (64, 16, 4), (128, 32, 4)],
)
def test_kernel_equals_reference_for_any_tile_and_program_size(
    device: str, groups_per_entry: int, groups_per_tile: int, tiles: int
) -> None:
    """Programs work on an entry of the segment table, or on a part of one."""
    _check_against_reference(
        device,
        steps=1,
        rounding=STOCHASTIC,
        geometry=replace(SMALL, groups_per_tile=groups_per_tile, tiles_per_program=tiles),
        groups_per_entry=groups_per_entry,
    )


@pytest.mark.parametrize("geometry", [LARGE, SMALL, Geometry(32, 2, 3, 4, 255)], ids=str)
def test_kernel_equals_reference_for_any_geometry(device: str, geometry: Geometry) -> None:
    """Compiled, reductions are laid out and tiles read ahead by it; interpreted, neither."""
    _check_against_reference(device, rounding=STOCHASTIC, geometry=geometry)


@pytest.mark.parametrize("rounding", [NEAREST, STOCHASTIC], ids=["nearest", "stochastic"])
def test_kernel_equals_reference_with_the_fourth_root_code(
    device: str, rounding: dict[str, spec.Rounding]
) -> None:
    _check_against_reference(device, rounding=rounding, exp_avg_sq_code="fourth_root")


def test_a_skipped_step_changes_nothing(device: str) -> None:
    """What a step does where an overflow was found, without the host looking."""
    shard = _shard(device)
    table = HyperTable(3, device)
    shard.grad.normal_()
    for step in (1, 2):
        table.fill(_hyper(step), seed=3)
        table.skip.fill_(step - 1)
        before = {name: tensor.clone() for name, tensor in shard.state()}
        weights = shard.param.clone()
        launch_step_kernel_(shard, table, **STOCHASTIC)
        same = [is_unchanged(tensor, before[name]) for name, tensor in shard.state()]
        assert [*same, is_unchanged(shard.param, weights)] == [step == 2] * 6
    shard.check_guards()


def test_every_group_may_be_its_own_parameter(device: str) -> None:
    """As many segments as a tile can have."""
    parameters = tuple(
        Parameter(start=group, groups=1, row=group % 3, tensor_id=1000 + group)
        for group in range(TILE + 6)
    )
    _check_against_reference(
        device, steps=1, rounding=STOCHASTIC, parameters=parameters, groups=TILE + 6
    )


def test_each_parameter_steps_by_its_own_row(device: str) -> None:
    """A row whose learning rate and gradient scale are zero leaves its parameters alone."""
    shard = _shard(device)
    shard.grad.fill_(1.0)
    before = shard.param.clone()
    table = HyperTable(3, device)
    table.grad_scale.copy_(torch.tensor([1.0, 0.0, 1.0]))
    moving = adam_row(0.5, 0.0, 0.9, 0.95, 1e-8, 1)
    still = adam_row(0.0, 0.5, 0.9, 0.95, 1e-8, 1)
    table.fill([moving, still, moving], seed=0)
    launch_step_kernel_(shard, table, **NEAREST)
    changed = (shard.param != before).view(-1, GROUP)
    of_row_1 = torch.zeros(GROUPS, dtype=torch.bool, device=device)
    of_row_1[10:12] = True  # with the padding that follows
    of_row_1[33:64] = True
    assert not changed[of_row_1].any() and changed[~of_row_1].all()
    codes = shard.exp_avg.view(-1, GROUP)
    assert not codes[of_row_1].any() and (codes[~of_row_1] == 127).all()


def test_bits_depend_on_the_offset_in_the_parameter_not_in_the_shard(device: str) -> None:
    """The same parameter elsewhere in a bucket, in another tile, after other parameters."""
    parameter = Parameter(start=0, groups=20, row=0, tensor_id=77)
    moved = Parameter(start=55, groups=20, row=0, tensor_id=77)
    other = Parameter(start=3, groups=30, row=1, tensor_id=5)
    here = _shard(device, parameters=(parameter,), groups=20)
    there = _shard(device, parameters=(other, moved), groups=80)
    window = slice(55 * GROUP, 75 * GROUP)
    there.param[window] = here.param
    table = HyperTable(2, device)
    for step in (1, 2, 3):
        here.grad.copy_(_ordinary(step, here.grad.numel()))
        there.grad.copy_(_ordinary(step + 50, there.grad.numel()))
        there.grad[window] = here.grad
        table.fill(_hyper(step)[:2], seed=3)
        launch_step_kernel_(here, table, **STOCHASTIC)
        launch_step_kernel_(there, table, **STOCHASTIC)
    assert is_unchanged(there.param[window], here.param)
    assert is_unchanged(there.correction[window], here.correction)
    assert is_unchanged(there.exp_avg[window], here.exp_avg)
    assert is_unchanged(there.exp_avg_sq[window], here.exp_avg_sq)
    assert is_unchanged(there.exp_avg_sq_scale[55:75], here.exp_avg_sq_scale)
