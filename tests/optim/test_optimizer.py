"""FlashOptimizer: param groups, steps, state dicts; what a step depends on and what it does not."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rows import adam_row
from shards import (
    GROUP,
    GuardedShard,
    Parameter,
    assert_same_state,
    is_unchanged,
    segments_of,
    tensors,
)

from megatron_flashoptim.optim import FlashOptimConfig, FlashOptimizer
from megatron_flashoptim.optim.hyper import HyperTable
from megatron_flashoptim.optim.segments import SegmentTable
from megatron_flashoptim.optim.step import reference_step_

# Rows 0 and 1 in turn, in one bucket.
PARAMETERS = (
    Parameter(start=0, groups=3, row=0, tensor_id=11),
    Parameter(start=4, groups=2, row=1, tensor_id=12),
    Parameter(start=6, groups=4, row=0, tensor_id=13),
)
GROUPS = 10
STOCHASTIC = {"rounding": "stochastic", "master_rounding": "stochastic"}


def _shard(parameters: tuple[Parameter, ...] = PARAMETERS) -> GuardedShard:
    weight = torch.randn(GROUPS * GROUP, generator=torch.Generator().manual_seed(0))
    return GuardedShard(
        weight.to(torch.bfloat16),
        torch.zeros(GROUPS * GROUP, dtype=torch.bfloat16),
        segments_of(parameters, 0, GROUPS),
    )


def _groups(**second: Any) -> list[dict[str, Any]]:
    first = torch.nn.Parameter(torch.zeros(2))
    other = torch.nn.Parameter(torch.zeros(3))
    return [
        {"params": [first], "lr": 1e-2, "weight_decay": 0.1, "is_expert_parallel": False},
        {"params": [other], "lr": 1e-3, "weight_decay": 0.0, **second},
    ]


def _optimizer(
    *shards: GuardedShard, groups: list[dict[str, Any]] | None = None, **flash: Any
) -> FlashOptimizer:
    flash = {"rounding": "nearest", "seed": 5} | flash
    config = FlashOptimConfig(**flash)
    optimizer = FlashOptimizer(groups or _groups(), config, betas=(0.9, 0.95), eps=1e-8)
    optimizer.attach(shards, [0, 1], "cpu")
    return optimizer


def _run(optimizer: FlashOptimizer, steps: int, first: int = 1) -> None:
    for step in range(first, first + steps):
        for i, shard in enumerate(optimizer.shards):
            generator = torch.Generator().manual_seed(100 * step + i)
            shard.grad.copy_(torch.randn(shard.grad.numel(), generator=generator))
        optimizer.step()


def _stepped(steps: int = 2, shard: GuardedShard | None = None, **flash: Any) -> GuardedShard:
    shard = shard or _shard()
    _run(_optimizer(shard, **flash), steps)
    shard.check_guards()
    return shard


def test_param_groups_in_one_bucket_step_by_their_own_hyper_parameters() -> None:
    """Equal to one shard per parameter, each stepped with a table of its own."""
    together = _stepped(3)
    for p in PARAMETERS:
        window = slice(p.start * GROUP, (p.start + p.groups) * GROUP)
        alone = GuardedShard(
            _shard().param[window].clone(),
            torch.zeros(p.groups * GROUP, dtype=torch.bfloat16),
            segments_of([Parameter(0, p.groups, 0, p.tensor_id)], 0, p.groups),
        )
        lr, decay = ((1e-2, 0.1), (1e-3, 0.0))[p.row]
        table = HyperTable(1, "cpu")
        for step in (1, 2, 3):
            generator = torch.Generator().manual_seed(100 * step)
            alone.grad.copy_(torch.randn(GROUPS * GROUP, generator=generator)[window])
            table.fill([adam_row(lr, decay, 0.9, 0.95, 1e-8, step)], seed=5)
            reference_step_(alone, table, exp_avg_sq_rounding="nearest", master_rounding="nearest")
        assert is_unchanged(together.param[window], alone.param)
        assert is_unchanged(together.correction[window], alone.correction)
        assert is_unchanged(together.exp_avg[window], alone.exp_avg)
        assert is_unchanged(together.exp_avg_sq[window], alone.exp_avg_sq)


def test_rows_follow_row_groups_not_the_order_of_param_groups() -> None:
    swapped = tuple(Parameter(p.start, p.groups, 1 - p.row, p.tensor_id) for p in PARAMETERS)
    shard = _shard(swapped)
    optimizer = _optimizer(shard)
    optimizer.attach([shard], [1, 0], "cpu")
    _run(optimizer, 2)
    assert_same_state(shard, _stepped(2))


def test_two_rows_may_share_a_param_group() -> None:
    """Rows exist for gradient scales too: dense and expert parameters of one group."""
    shard, expected = _shard(), _shard()
    optimizer = _optimizer(shard)
    optimizer.attach([shard], [0, 0], "cpu")
    optimizer.table.grad_scale.copy_(torch.tensor([1.0, 0.25]))
    _run(optimizer, 1)
    reference = _optimizer(expected, groups=_groups(lr=1e-2, weight_decay=0.1))
    reference.table.grad_scale.copy_(torch.tensor([1.0, 0.25]))
    _run(reference, 1)
    assert_same_state(shard, expected)


def test_gradient_scale_acts_on_its_row_as_if_the_gradients_had_been_scaled() -> None:
    scaled, expected = _shard(), _shard()
    one, other = _optimizer(scaled), _optimizer(expected)
    one.table.grad_scale.copy_(torch.tensor([0.5, 0.125]))
    factor = torch.tensor([0.5, 0.125])[scaled.segments.per_group(scaled.segments.row)]
    for step in (1, 2):
        generator = torch.Generator().manual_seed(step)
        gradient = torch.randn(GROUPS * GROUP, generator=generator).to(torch.bfloat16)
        scaled.grad.copy_(gradient)
        expected.grad.copy_(gradient * factor.repeat_interleave(GROUP))
        one.step()
        other.step()
    assert_same_state(scaled, expected)


def test_changed_learning_rates_count_from_the_next_step_on() -> None:
    shard = _shard()
    optimizer = _optimizer(shard)
    _run(optimizer, 1)
    before = shard.param.clone(), shard.correction.clone()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    _run(optimizer, 1, first=2)
    assert is_unchanged(shard.param, before[0]) and is_unchanged(shard.correction, before[1])


def test_step_counts_live_in_every_param_group_from_zero() -> None:
    optimizer = _optimizer(_shard())
    assert [group["step"] for group in optimizer.param_groups] == [0, 0]
    _run(optimizer, 3)
    assert [group["step"] for group in optimizer.param_groups] == [3, 3]
    assert all(type(group["step"]) is int for group in optimizer.param_groups)


def test_a_param_group_counts_its_own_steps() -> None:
    """A group resumed at step 40 is bias-corrected as at step 41."""
    shard = _shard()
    optimizer = _optimizer(shard, groups=_groups(step=40))
    _run(optimizer, 1)
    packed = adam_row(1e-3, 0.0, 0.9, 0.95, 1e-8, 41).pack(seed=5)
    assert bytes(optimizer.table.keys[1].numpy().tobytes()) == packed


def test_state_dict_holds_plain_types_that_load_with_weights_only() -> None:
    optimizer = _optimizer(_shard())
    _run(optimizer, 2)
    state = optimizer.state_dict()
    assert state["state"] == {}
    plain = (bool, int, float, str, tuple, list, type(None))
    for group in state["param_groups"]:
        assert all(type(value) in plain for value in group.values())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == state


def test_an_interrupted_run_resumes_bit_for_bit() -> None:
    """Through the state dict and the shard's tensors, with everything rounded stochastically."""
    whole = _stepped(5, **STOCHASTIC)
    first = _shard()
    optimizer = _optimizer(first, **STOCHASTIC)
    _run(optimizer, 2)
    second = _shard()
    for (_, source), (_, target) in zip(tensors(first), tensors(second), strict=True):
        target.copy_(source)
    resumed = _optimizer(second, **STOCHASTIC)
    resumed.load_state_dict(optimizer.state_dict())
    _run(resumed, 3, first=3)
    assert_same_state(second, whole)


def test_keys_of_param_groups_that_are_not_ours_are_kept() -> None:
    optimizer = _optimizer(_shard())
    assert optimizer.param_groups[0]["is_expert_parallel"] is False
    assert optimizer.state_dict()["param_groups"][0]["is_expert_parallel"] is False


def test_a_closure_is_refused() -> None:
    optimizer = _optimizer(_shard())
    with pytest.raises(ValueError, match="takes no closure"):
        optimizer.step(lambda: 0.0)
    assert optimizer.param_groups[0]["step"] == 0


@pytest.mark.parametrize("row", [2, -1])
def test_a_segment_of_a_row_that_does_not_exist_is_refused(row: int) -> None:
    shard = _shard((Parameter(0, 4, row=row),))
    with pytest.raises(ValueError, match=f"segment row {row} of 2 rows"):
        _optimizer(shard)


def test_a_shard_of_padding_only_is_left_alone() -> None:
    padding = GuardedShard(
        torch.ones(64, dtype=torch.bfloat16), torch.ones(64), SegmentTable([], 2, "cpu")
    )
    shard = _shard()
    _run(_optimizer(shard, padding), 2)
    assert (padding.param == 1.0).all() and not padding.exp_avg.any()
    assert_same_state(shard, _stepped(2))


def test_an_optimizer_without_shards_still_counts_steps() -> None:
    optimizer = FlashOptimizer(_groups(), FlashOptimConfig())
    optimizer.attach([], [], "cpu")
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1
    assert optimizer.nbytes() == optimizer.table.nbytes() == 4


def test_auto_rounding_follows_the_largest_beta2_of_all_rows() -> None:
    """One launch has one rounding: where one row would stall, all are stochastic."""
    slow = {"groups": _groups(betas=(0.9, 0.999))}
    assert_same_state(_stepped(rounding="auto"), _stepped(rounding="nearest"))
    by_auto = _stepped(rounding="auto", **slow)
    assert_same_state(by_auto, _stepped(rounding="stochastic", groups=_groups(betas=(0.9, 0.999))))
    nearest = _stepped(rounding="nearest", groups=_groups(betas=(0.9, 0.999)))
    assert not torch.equal(by_auto.exp_avg_sq, nearest.exp_avg_sq)


def test_auto_rounding_is_the_same_on_ranks_that_own_parts_of_different_groups() -> None:
    """Data-parallel ranks hold the same bytes together, however many they are."""
    found = []
    for owned in ([0], [1], [0, 1], []):
        optimizer = FlashOptimizer(_groups(betas=(0.9, 0.999)), FlashOptimConfig(), eps=1e-8)
        optimizer.param_groups[0]["betas"] = (0.9, 0.95)
        optimizer.attach([], owned, "cpu")
        optimizer.step()
        found.append(optimizer.exp_avg_sq_rounding())
    assert found == ["stochastic"] * 4


@pytest.mark.parametrize(
    ("option", "changed"),
    [
        ({"rounding": "stochastic"}, {"exp_avg_sq", "exp_avg_sq_scale"}),
        ({"master_rounding": "stochastic"}, {"correction"}),
    ],
    ids=["second moment", "master weight"],
)
def test_each_rounding_option_changes_what_it_names(
    option: dict[str, str], changed: set[str]
) -> None:
    """After one step, in which nothing has fed back yet."""
    nearest, stochastic = _stepped(1), _stepped(1, **option)
    differs = {
        name
        for (name, got), (_, want) in zip(tensors(stochastic), tensors(nearest), strict=True)
        if not torch.equal(got, want)
    }
    assert changed <= differs <= changed | ({"param"} if "correction" in changed else set())


def test_stochastic_bits_depend_on_seed_step_and_parameter() -> None:
    base = _stepped(1, **STOCHASTIC)
    assert_same_state(_stepped(1, **STOCHASTIC), base)

    renamed = tuple(Parameter(p.start, p.groups, p.row, p.tensor_id + 1) for p in PARAMETERS)
    other_seed = _stepped(1, **STOCHASTIC, seed=6)
    other_parameter = _stepped(1, _shard(renamed), **STOCHASTIC)
    for other in (other_seed, other_parameter):
        assert not torch.equal(other.exp_avg_sq, base.exp_avg_sq)
        assert not torch.equal(other.exp_avg_sq_scale, base.exp_avg_sq_scale)
        assert not torch.equal(other.correction, base.correction)
        assert torch.equal(other.exp_avg, base.exp_avg)  # always rounded to nearest


def test_stochastic_bits_of_another_step_differ() -> None:
    """lr 0 and beta 0 make every step the same but for its number."""
    groups = [{**group, "lr": 0.0, "betas": (0.0, 0.0)} for group in _groups()]
    shard = _shard()
    optimizer = _optimizer(shard, groups=groups, **STOCHASTIC)
    shard.grad.copy_(torch.randn(GROUPS * GROUP, generator=torch.Generator().manual_seed(0)))
    optimizer.step()
    first = shard.exp_avg_sq.clone()
    optimizer.step()
    assert not torch.equal(shard.exp_avg_sq, first)


def test_a_skipped_step_counts_but_changes_nothing_else() -> None:
    """As where an overflow was found on the device; the next step is not skipped by itself."""
    shard, expected = _shard(), _shard()
    optimizer, reference = _optimizer(shard), _optimizer(expected)
    optimizer.table.skip.fill_(1.0)
    _run(optimizer, 1)
    assert_same_state(shard, _shard())
    assert [group["step"] for group in optimizer.param_groups] == [1, 1]
    optimizer.table.skip.zero_()
    for group in reference.param_groups:
        group["step"] = 1
    _run(optimizer, 1, first=2)
    _run(reference, 1, first=2)
    assert_same_state(shard, expected)


def test_nbytes_is_the_state_and_the_tables() -> None:
    shard, other = _shard(), _shard()
    optimizer = _optimizer(shard, other)
    expected = shard.nbytes() + other.nbytes() + optimizer.table.nbytes()
    assert optimizer.nbytes() == expected
