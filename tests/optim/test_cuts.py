"""However a bucket is cut into data-parallel shards, a parameter's state is the same bytes."""

from __future__ import annotations

import pytest
import torch
from bitwise import assert_same_bits
from rows import adam_row
from shards import GROUP, GuardedShard, Parameter, assert_same_state, segments_of, tensors

from megatron_flashoptim.codec import spec
from megatron_flashoptim.optim.hyper import HyperTable
from megatron_flashoptim.optim.step import step_

# A bucket as Megatron lays it out: starts padded to 64 elements, the end to lcm(32 * dp, 128).
BUCKET = (
    Parameter(start=0, groups=1, row=1, tensor_id=20),
    Parameter(start=2, groups=37, row=0, tensor_id=21),
    Parameter(start=40, groups=3, row=1, tensor_id=0xFFFFFFFF),
    Parameter(start=44, groups=80, row=0, tensor_id=23),
)
GROUPS = 128
STEPS = 3


def _step_cut(
    cuts: list[int],
    rounding: spec.Rounding,
    dtype: torch.dtype = torch.bfloat16,
    master_bits: int = 24,
    code: spec.ExpAvgSqCode = "sqrt",
) -> list[GuardedShard]:
    """Step the bucket cut at these groups, each shard as a rank of its own would."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(GROUPS * GROUP, generator=generator).to(dtype)
    gradients = torch.randn(STEPS, GROUPS * GROUP, generator=generator).to(torch.bfloat16)
    shards = []
    for begin, end in zip([0, *cuts], [*cuts, GROUPS], strict=True):
        elements = slice(begin * GROUP, end * GROUP)
        shard = GuardedShard(
            weight[elements].clone(),
            torch.zeros((end - begin) * GROUP, dtype=torch.bfloat16),
            segments_of(BUCKET, begin, end),
            master_bits,
            code,
        )
        table = HyperTable(2, "cpu")
        table.grad_scale.copy_(torch.tensor([0.8, 0.3]))
        for step in range(1, STEPS + 1):
            shard.grad.copy_(gradients[step - 1][elements])
            rows = [
                adam_row(1e-2, 0.1, 0.9, 0.999, 1e-8, step),
                adam_row(1e-3, 0.0, 0.9, 0.999, 1e-8, step),
            ]
            table.fill(rows, seed=2)
            step_(shard, table, exp_avg_sq_rounding=rounding, master_rounding=rounding)
        shard.check_guards()
        shards.append(shard)
    return shards


def _state_of_parameters(shards: list[GuardedShard]) -> dict[str, torch.Tensor]:
    """Return each tensor of each parameter, put together from the shards (padding left out)."""
    whole: dict[str, torch.Tensor] = {}
    names = [name for name, _ in tensors(shards[0])]
    for name in names:
        joined = torch.cat([dict(tensors(shard))[name] for shard in shards])
        size = joined.numel() // GROUPS
        for p in BUCKET:
            values = joined[p.start * size : (p.start + p.groups) * size]
            whole[f"{name} of parameter {p.tensor_id}"] = values
    return whole


@pytest.mark.parametrize(
    ("dtype", "master_bits", "code"),
    [
        (torch.bfloat16, 24, "sqrt"),
        (torch.bfloat16, 24, "fourth_root"),
        (torch.bfloat16, 32, "sqrt"),
        (torch.bfloat16, 16, "sqrt"),
        (torch.float32, 24, "fourth_root"),
    ],
    ids=str,
)
@pytest.mark.parametrize("rounding", spec.ROUNDINGS)
@pytest.mark.parametrize("dp", [2, 4, 8])
def test_state_of_a_parameter_is_the_same_bytes_for_every_dp(
    dp: int,
    rounding: spec.Rounding,
    dtype: torch.dtype,
    master_bits: int,
    code: spec.ExpAvgSqCode,
) -> None:
    options = (rounding, dtype, master_bits, code)
    whole = _state_of_parameters(_step_cut([], *options))
    cuts = [GROUPS // dp * rank for rank in range(1, dp)]
    cut = _state_of_parameters(_step_cut(cuts, *options))
    assert whole.keys() == cut.keys()
    for name in whole:
        assert_same_bits(cut[name], whole[name], name)


@pytest.mark.parametrize("cut", [1, 3, 20, 39, 43, 45, 100, 127])
def test_a_cut_at_any_group_changes_no_bit_of_stochastic_rounding(cut: int) -> None:
    """Within parameters, at their ends, and in padding."""
    whole = _state_of_parameters(_step_cut([], "stochastic"))
    halves = _state_of_parameters(_step_cut([cut], "stochastic"))
    for name in whole:
        assert_same_bits(halves[name], whole[name], name)


def test_counting_groups_from_the_cut_would_draw_other_bits() -> None:
    """The tests above see it if ``first_group`` were ignored."""
    right = GuardedShard(
        torch.ones(32 * GROUP, dtype=torch.bfloat16),
        torch.ones(32 * GROUP, dtype=torch.bfloat16),
        segments_of([Parameter(0, 64, 0, 7)], 32, 64),
    )
    wrong = GuardedShard(
        torch.ones(32 * GROUP, dtype=torch.bfloat16),
        torch.ones(32 * GROUP, dtype=torch.bfloat16),
        segments_of([Parameter(0, 32, 0, 7)], 0, 32),
    )
    table = HyperTable(1, "cpu")
    table.fill([adam_row(1e-4, 0.1, 0.9, 0.999, 1e-8, 1)], seed=2)
    for shard in (right, wrong):
        step_(shard, table, exp_avg_sq_rounding="stochastic", master_rounding="stochastic")
    with pytest.raises(AssertionError, match="correction"):
        assert_same_state(wrong, right)
