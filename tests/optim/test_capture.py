"""Hyper-parameters computed on the device equal those that the host computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rows import adam_row

from megatron_flashoptim.optim import FlashOptimConfig, FlashOptimizer
from megatron_flashoptim.optim.hyper import HyperRow, HyperTable

GROUPS: list[dict[str, Any]] = [
    {"lr": 3e-4, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "step": 0},
    {"lr": 1e-3, "weight_decay": 0.0, "betas": (0.8, 0.999), "eps": 1e-15, "step": 0},
    {"lr": 0.0, "weight_decay": 0.3, "betas": (0.0, 0.99), "eps": 1e-5, "step": 0},
]
ROWS = (0, 2, 1, 1)


def _host_row(group: dict[str, Any], lr: float, step: int) -> HyperRow:
    beta1, beta2 = group["betas"]
    return adam_row(lr, group["weight_decay"], beta1, beta2, group["eps"], step)


def _optimizer(
    capturable: bool, seed: int = 0, rows: tuple[int, ...] = ROWS, **defaults: Any
) -> FlashOptimizer:
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in GROUPS]
    optimizer = FlashOptimizer(
        [
            {**group, **defaults, "params": [param]}
            for group, param in zip(GROUPS, params, strict=True)
        ],
        FlashOptimConfig(seed=seed),
        capturable=capturable,
    )
    optimizer.attach([], rows, "cpu")
    return optimizer


@pytest.mark.parametrize("seed", [0, 1234, 2**63 + 5])
def test_every_bit_equals_the_host_s_table_over_many_steps(seed: int) -> None:
    optimizer = _optimizer(True, seed)
    expected = HyperTable(len(ROWS), "cpu")
    for step in range(1, 200):
        rates = [0.7**step * group["lr"] for group in GROUPS]
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"].fill_(lr)
        optimizer.step()
        expected.fill([_host_row(GROUPS[row], rates[row], step) for row in ROWS], seed=seed)
        assert torch.equal(optimizer.table.keys, expected.keys), step
    assert [group["step"] for group in optimizer.plain_param_groups()] == [199] * 3


# Three param groups of each other rule, of which two options are no numbers.
OF_RULES: dict[str, list[dict[str, Any]]] = {
    "flash_adam": [
        {"betas": betas, "eps": 1e-8} for betas in ((0.9, 0.95), (0.8, 0.999), (0, 0.5))
    ],
    "flash_lion": [{"betas": betas} for betas in ((0.95, 0.98), (0.9, 0.99), (0.0, 0.5))],
    "flash_sgd": [
        {"momentum": 0.9, "nesterov": False, "decoupled_weight_decay": True},
        {"momentum": 0.7, "nesterov": True, "decoupled_weight_decay": True},
        {"momentum": 0.3, "nesterov": True, "decoupled_weight_decay": False},
    ],
}


def _of_rule(name: str, capturable: bool) -> FlashOptimizer:
    optimizer = FlashOptimizer(
        [
            {"lr": group["lr"], "weight_decay": group["weight_decay"], **options}
            | {"params": [torch.nn.Parameter(torch.zeros(1))]}
            for group, options in zip(GROUPS, OF_RULES[name], strict=True)
        ],
        FlashOptimConfig(optimizer=name),
        capturable=capturable,
    )
    optimizer.attach([], ROWS, "cpu")
    return optimizer


@pytest.mark.parametrize("name", OF_RULES)
def test_every_rule_s_table_is_the_host_s_while_rates_and_options_change(name: str) -> None:
    ours, expected = _of_rule(name, True), _of_rule(name, False)
    for step in range(20):
        for optimizer in (ours, expected):
            optimizer.param_groups[1]["lr"] = 1e-2 * 0.9**step
            optimizer.param_groups[0]["weight_decay"] = 0.1 * (step // 5)
            if step == 10:
                optimizer.param_groups[0].update(OF_RULES[name][2])
            optimizer.step()
        assert torch.equal(ours.table.keys, expected.table.keys), step
    assert ours.table.values[:, :3].any() and ours.plain_param_groups()[0]["step"] == 20


def test_what_a_scheduler_writes_on_the_host_reaches_the_device() -> None:
    """Weight decay before the first step and after some, and a learning rate put as a number."""
    ours, expected = _optimizer(True), _optimizer(False)
    for decay in (0.0, 0.2, 0.2, 0.7):
        for optimizer in (ours, expected):
            optimizer.param_groups[0]["weight_decay"] = decay
            optimizer.param_groups[1]["lr"] = 1e-2 * decay
            optimizer.step()
        assert torch.equal(ours.table.keys, expected.table.keys)


@pytest.mark.parametrize("rows", [(), (1,)])
def test_groups_without_a_row_on_this_rank_count_their_steps_too(rows: tuple[int, ...]) -> None:
    """The rank that writes the common part of a checkpoint may own nothing of a group."""
    optimizer = _optimizer(True, rows=rows)
    for _ in range(3):
        optimizer.step()
    assert [group["step"] for group in optimizer.plain_param_groups()] == [3] * 3


def test_loaded_decay_rates_and_eps_are_used() -> None:
    source = _optimizer(False)
    source.step()
    groups = source.plain_param_groups()
    other = {"betas": (0.5, 0.5), "eps": 1.0, "weight_decay": 0.9}
    loaded, through_torch = _optimizer(True, **other), _optimizer(True, **other)
    loaded.load_param_groups(groups)
    rate = through_torch.param_groups[0]["lr"]
    through_torch.load_state_dict(source.state_dict())
    assert through_torch.param_groups[0]["lr"] is rate, "which a graph reads"
    for optimizer in (source, loaded, through_torch):
        optimizer.step()
    assert torch.equal(loaded.table.keys, source.table.keys)
    assert torch.equal(through_torch.table.keys, source.table.keys)


def test_param_groups_are_saved_as_plain_values_and_loaded_on_the_device() -> None:
    saved, plain = _optimizer(True), _optimizer(False)
    for _ in range(3):
        for group in saved.param_groups:
            group["lr"].mul_(0.5)
        saved.step()
    groups = saved.plain_param_groups()
    assert [group["step"] for group in groups] == [3] * 3
    assert [group["lr"] for group in groups] == [group["lr"] / 8 for group in GROUPS]
    assert all(type(group["lr"]) is float for group in groups)
    plain.load_param_groups(groups)
    loaded = _optimizer(True)
    rate = loaded.param_groups[0]["lr"]
    loaded.load_param_groups(groups)
    assert loaded.param_groups[0]["lr"] is rate and rate.item() == groups[0]["lr"]
    for optimizer in (saved, plain, loaded):
        optimizer.step()
    assert torch.equal(saved.table.keys, plain.table.keys)
    assert torch.equal(saved.table.keys, loaded.table.keys)
