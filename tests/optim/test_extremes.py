"""What a step does at the ends of its range: tiny and huge moments, NaN, no denominator."""

from __future__ import annotations

import pytest
import torch
from bitwise import assert_same_bits, bf16, patterns
from rows import adam_row
from shards import GROUP, GuardedShard, Parameter, is_unchanged, segments_of, tensors
from tolerances import SETTLED_ROOT_RELATIVE

from megatron_flashoptim.codec import spec
from megatron_flashoptim.optim import step as one_step
from megatron_flashoptim.optim.hyper import HyperRow, HyperTable

each_code = pytest.mark.parametrize("code", spec.EXP_AVG_SQ_CODES)
# A root is computed as sqrt(v + ADDED).
ADDED = 2.0**-148
NAN_SCALE = bf16([0x7FC0])


def _stepped(
    gradient: torch.Tensor,
    *,
    code: spec.ExpAvgSqCode = "sqrt",
    dtype: torch.dtype = torch.float32,
    eps: float = 0.0,
    beta1: float = 0.0,
    beta2: float = 0.0,
    weight: float = 0.0,
    decay: float = 0.0,
) -> GuardedShard:
    """Take one step at lr 1 from zero state; at betas of 0, m is the gradient and v its square."""
    groups = gradient.numel() // GROUP
    shard = GuardedShard(
        torch.full((gradient.numel(),), weight, dtype=dtype),
        gradient.clone(),
        segments_of([Parameter(0, groups)], 0, groups),
        exp_avg_sq_code=code,
    )
    _step(shard, adam_row(1.0, decay, beta1, beta2, eps, 1, bias_correction=False))
    return shard


def _step(shard: GuardedShard, hyper: HyperRow) -> None:
    table = HyperTable(1, "cpu")
    table.fill([hyper], seed=0)
    one_step.reference_step_(shard, table, exp_avg_sq_rounding="nearest", master_rounding="nearest")
    shard.check_guards()


def _one_per_group(values: list[float]) -> torch.Tensor:
    gradient = torch.zeros(len(values), GROUP)
    gradient[:, 3] = torch.tensor(values)
    return gradient.flatten()


@each_code
def test_roots_are_those_of_v_and_2_to_minus_148(code: spec.ExpAvgSqCode) -> None:
    """So a root is 2^-74 at least, where v is not lost, and its own from 2^-60 on."""
    exponents = range(-84, 40)
    values = [factor * 2.0**exponent for exponent in exponents for factor in (1.0, 1.3, 1.99)]
    shard = _stepped(_one_per_group(values), code=code)
    exact = (torch.tensor(values).double() ** 2 + ADDED).sqrt()
    assert_same_bits(shard.exp_avg_sq_scale, exact.float().to(torch.bfloat16))
    assert (shard.exp_avg_sq.view(-1, GROUP)[:, 3] == 255).all()
    assert shard.exp_avg_sq.count_nonzero() == len(values)
    assert shard.exp_avg_sq_scale.min() == 2.0**-74
    plain = torch.tensor(values) >= 2.0**-60
    expected = torch.tensor(values)[plain].to(torch.bfloat16)
    assert_same_bits(shard.exp_avg_sq_scale[plain], expected)


@each_code
def test_gradients_too_small_to_show_beside_2_to_minus_148_leave_v_zero(
    code: spec.ExpAvgSqCode,
) -> None:
    """v must reach 1.5 ulp (of 2^-171) for the root of 2^-148 + v to leave 2^-74."""
    largest_lost = 1.5**0.5 * 2.0**-85.5
    lost = [0.0, 2.0**-149, 2.0**-100, 2.0**-86, largest_lost * 0.999]
    shard = _stepped(_one_per_group(lost), code=code)
    assert not shard.exp_avg_sq.any() and not shard.exp_avg_sq_scale.any()
    kept = _stepped(_one_per_group([largest_lost * 1.001]), code=code)
    assert kept.exp_avg_sq_scale == 2.0**-74 and kept.exp_avg_sq[3] == 255


@each_code
def test_v_settles_where_decay_and_2_to_minus_148_cancel_and_zero_stays_zero(
    code: spec.ExpAvgSqCode,
) -> None:
    """Decay stalls where a step moves the scale by less than half a bf16 ulp."""
    gradient = _one_per_group([2.0**-66])
    gradient[5] = 2.0**-70
    shard = _stepped(gradient, code=code)
    shard.grad.zero_()
    for step in range(2, 200):
        _step(shard, adam_row(1.0, 0.0, 0.9, 0.9, 1e-8, step))
    settled = (ADDED / (1 - 0.9)) ** 0.5
    assert shard.exp_avg_sq_scale.item() == pytest.approx(settled, rel=SETTLED_ROOT_RELATIVE)
    assert shard.exp_avg_sq[3] == 255 and shard.exp_avg_sq.count_nonzero() == 2


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_where_v_is_zero_the_denominator_is_2_to_minus_74_and_eps(beta1: float) -> None:
    """No division by zero at eps 0, and a gradient of zero moves nothing."""
    gradient = _one_per_group([2.0**-90, -(2.0**-90), 0.0])
    shard = _stepped(gradient, beta1=beta1)
    m = torch.tensor(1 - beta1) * 2.0**-90
    expected = torch.zeros(3, GROUP)
    expected[0, 3], expected[1, 3] = -m * 2.0**74, m * 2.0**74
    assert torch.equal(shard.param.view(3, GROUP), expected)


def test_first_moments_below_2_to_minus_100_are_stored_as_zero() -> None:
    """The step that they were computed in still uses them."""
    below = 2.0**-100 * (1 - 2.0**-24)
    shard = _stepped(_one_per_group([2.0**-100, below]))
    assert shard.exp_avg_scale.tolist() == [2.0**-100, 0.0]
    assert shard.exp_avg.nonzero().flatten().tolist() == [3]
    assert shard.param[3] == -(2.0**-26) and shard.param[GROUP + 3] == -below * 2.0**74


@each_code
@pytest.mark.parametrize("gradient", [2.0**40, -(2.0**40), 2.0**60, 3e38])
def test_a_root_of_2_to_40_overflows_and_poisons_its_group_for_good(
    gradient: float, code: spec.ExpAvgSqCode
) -> None:
    """The weight at once, the rest of its group in the next step, other groups never."""
    shard = _stepped(_one_per_group([gradient, 1.0]), code=code, weight=1.0)
    assert_same_bits(shard.exp_avg_sq_scale, torch.cat([NAN_SCALE, bf16([0x3F80])]))
    assert shard.param.isnan().nonzero().flatten().tolist() == [3]
    shard.grad.zero_()
    _step(shard, adam_row(1.0, 0.0, 0.9, 0.9, 1e-8, 2))
    assert shard.param[:GROUP].isnan().all() and shard.param[GROUP:].isfinite().all()
    assert shard.exp_avg_sq_scale.isnan().tolist() == [True, False]


@each_code
def test_the_largest_root_that_a_step_computes_is_just_below_2_to_40(
    code: spec.ExpAvgSqCode,
) -> None:
    largest = 2.0**40 * (1 - 2.0**-24)
    shard = _stepped(_one_per_group([largest, -largest]), code=code)
    assert shard.exp_avg_sq_scale.tolist() == [2.0**40] * 2
    assert shard.param.view(2, GROUP)[:, 3].tolist() == [-1.0, 1.0]
    # Its scale, rounded up, is 2^40: a beta2 below 1 keeps the next step within range.
    shard.grad.zero_()
    _step(shard, adam_row(1.0, 0.0, 0.9, 0.999, 1e-8, 2))
    assert shard.param.isfinite().all() and shard.exp_avg_sq_scale.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("poison", [torch.inf, -torch.inf, torch.nan])
def test_an_infinite_or_nan_gradient_poisons_its_group_and_no_other(
    poison: float, dtype: torch.dtype
) -> None:
    gradient = torch.randn(3 * GROUP, generator=torch.Generator().manual_seed(0))
    clean = _stepped(gradient, dtype=dtype, weight=1.0, beta1=0.9, beta2=0.9)
    gradient[GROUP + 7] = poison
    shard = _stepped(gradient, dtype=dtype, weight=1.0, beta1=0.9, beta2=0.9)
    for name in ("exp_avg_scale", "exp_avg_sq_scale"):
        assert_same_bits(getattr(shard, name)[1:2], NAN_SCALE)
    assert shard.param.isnan().nonzero().flatten().tolist() == [GROUP + 7]
    for (name, tensor), (_, expected) in zip(tensors(shard), tensors(clean), strict=True):
        group = tensor.numel() // 3
        assert is_unchanged(tensor[:group], expected[:group]), name
        assert is_unchanged(tensor[2 * group :], expected[2 * group :]), name


@pytest.mark.parametrize("poison", [torch.nan, -torch.nan, torch.inf])
def test_a_nan_weight_is_stored_as_the_positive_quiet_nan(poison: float) -> None:
    """As a GPU's arithmetic makes them, so that reference and kernel agree to the bit."""
    shard = _stepped(_one_per_group([poison]), dtype=torch.bfloat16, weight=-1.0)
    assert patterns(shard.param)[3] == 0x7FC0
    assert shard.correction is not None and shard.correction[3] == 0


def test_a_denominator_above_2_to_126_leaves_the_decay_alone() -> None:
    """Its reciprocal would be subnormal, and counts as 0."""
    gradient = torch.ones(GROUP)
    shard = _stepped(gradient, eps=2.0**126 * 1.01, weight=1.0, decay=0.25)
    assert (shard.param == 0.75).all()
    just_below = _stepped(gradient * 2.0**30, eps=2.0**126 * 0.99)
    assert (just_below.param < 0.0).all()
