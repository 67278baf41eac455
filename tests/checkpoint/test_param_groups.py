"""Param groups of a checkpoint find those of the run by their options, not by their order."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


@pytest.fixture
def param_groups(megatron: None) -> ModuleType:
    """Return the module, imported after Megatron."""
    from megatron_flashoptim.checkpoint import param_groups

    return param_groups


def _group(step: int, **options: Any) -> dict[str, Any]:
    defaults = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "max_lr": 1e-3}
    return {**defaults, **options, "step": step, "params": []}


def test_groups_are_matched_by_their_options(param_groups: ModuleType) -> None:
    saved = [_group(1, wd_mult=0.0), _group(2)]
    found = param_groups.match([_group(0), _group(0, wd_mult=0.0)], saved)
    assert [group["step"] for group in found] == [2, 1]


def test_experts_take_the_dense_group_where_they_have_none(
    param_groups: ModuleType,
) -> None:
    """Saved without expert parallelism, loaded with it; and theirs where there is one."""
    dense, experts = _group(1), _group(2, is_expert_parallel=True)
    current = [_group(0), _group(0, is_expert_parallel=True)]
    assert [g["step"] for g in param_groups.match(current, [dense])] == [1, 1]
    assert [g["step"] for g in param_groups.match(current, [experts, dense])] == [1, 2]


def test_groups_of_other_learning_rates_are_told_apart_and_may_change(
    param_groups: ModuleType,
) -> None:
    """In Megatron before 0.19 the rates were no part of what identifies a group."""
    saved = [_group(1), _group(2, max_lr=5e-3), _group(3, max_lr=5e-3, is_expert_parallel=True)]
    for current, steps in (
        ([_group(0, max_lr=5e-3), _group(0)], [2, 1]),
        ([_group(0, max_lr=5e-4), _group(0, max_lr=5e-3)], [1, 2]),  # --lr is another
        ([_group(0), _group(0, max_lr=6e-3)], [1, 2]),  # --decoupled-lr is another
        ([_group(0, is_expert_parallel=True, max_lr=5e-4), _group(0)], [3, 1]),
    ):
        assert [group["step"] for group in param_groups.match(current, saved)] == steps
    only = [_group(0), _group(0, max_lr=6e-3)]  # --decoupled-lr is new
    assert [group["step"] for group in param_groups.match(only, [saved[0]])] == [1, 1]


def test_the_name_of_an_optimizer_tells_no_groups_apart(param_groups: ModuleType) -> None:
    """Megatron 0.19 lets overrides give groups to several; here one steps them all."""
    for current, saved in (("adam", None), (None, "adam"), ("lion", "adam")):
        groups = [_group(0, optimizer=current), _group(0, optimizer=current, wd_mult=0.0)]
        found = [_group(1, optimizer=saved, wd_mult=0.0), _group(2, optimizer=saved)]
        assert [group["step"] for group in param_groups.match(groups, found)] == [2, 1]


def test_groups_that_nothing_tells_apart_keep_their_order(param_groups: ModuleType) -> None:
    saved = [_group(1, betas=(0.9, 0.95)), _group(2, betas=(0.5, 0.6))]
    current = [_group(0, betas=(0.8, 0.95)), _group(0, betas=(0.5, 0.6))]
    assert [group["step"] for group in param_groups.match(current, saved)] == [1, 2]
    with pytest.raises(ValueError, match="or more than one"):
        param_groups.match(current[:1], saved)
    with pytest.raises(ValueError, match="or more than one"):
        param_groups.match([*current, _group(0)], saved)
    # Two that are equal are as good as one.
    (found,) = param_groups.match(current[:1], [saved[0], dict(saved[0])])
    assert found["step"] == 1


def test_a_group_without_counterpart_is_refused_with_both_options(
    param_groups: ModuleType,
) -> None:
    with pytest.raises(ValueError, match=r"wd_mult.*0\.5.*wd_mult.*1\.0"):
        param_groups.match([_group(0, wd_mult=0.5)], [_group(1)])


@pytest.mark.parametrize(
    ("in_groups", "in_args", "found"),
    [
        ([False, False], True, False),  # torch's Adam steps by its groups
        ([None, 1], False, True),
        ([None, None], 0, False),  # as files of other code may have it
        ([None, None], None, None),
        ([], False, False),
    ],
)
def test_adams_decay_is_that_of_its_groups_then_of_the_arguments(
    param_groups: ModuleType, in_groups: list[Any], in_args: Any, found: bool | None
) -> None:
    groups = [_group(1, decoupled_weight_decay=value) for value in in_groups]
    args = SimpleNamespace(decoupled_weight_decay=in_args)
    assert param_groups.decoupled_by_adam(groups, args) is found
    if in_args is None:
        assert param_groups.decoupled_by_adam(groups, None) is None
