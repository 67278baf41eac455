"""Hyper-parameters computed on the device equal those that the host computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_flashoptim.optim import FlashOptimConfig, FlashOptimizer
from megatron_flashoptim.optim.capture import DeviceHyper
from megatron_flashoptim.optim.hyper import AdamHyper, HyperTable

GROUPS: list[dict[str, Any]] = [
    {"lr": 3e-4, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "step": 0},
    {"lr": 1e-3, "weight_decay": 0.0, "betas": (0.8, 0.999), "eps": 1e-15, "step": 0},
    {"lr": 0.0, "weight_decay": 0.3, "betas": (0.0, 0.99), "eps": 1e-5, "step": 0},
]
ROWS = (0, 2, 1, 1)


def _host_row(group: dict[str, Any], lr: float, step: int) -> AdamHyper:
    beta1, beta2 = group["betas"]
    return AdamHyper(lr, group["weight_decay"], beta1, beta2, group["eps"], step)


@pytest.mark.parametrize("seed", [0, 1234, 2**63 + 5])
def test_every_bit_equals_the_host_s_table_over_many_steps(seed: int) -> None:
    groups = [dict(group) for group in GROUPS]
    table, expected = HyperTable(len(ROWS), "cpu"), HyperTable(len(ROWS), "cpu")
    device = DeviceHyper(table, groups, ROWS)
    for step in range(1, 200):
        rates = [0.7**step * GROUPS[index]["lr"] for index in range(3)]
        for group, lr in zip(groups, rates, strict=True):
            group["lr"].fill_(lr)
        device.advance(seed)
        expected.fill([_host_row(GROUPS[row], rates[row], step) for row in ROWS], seed=seed)
        assert torch.equal(table.keys, expected.keys), step
    device.store()
    assert [group["step"] for group in groups] == [199] * 3


def _optimizer(capturable: bool) -> FlashOptimizer:
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in GROUPS]
    optimizer = FlashOptimizer(
        [{**group, "params": [param]} for group, param in zip(GROUPS, params, strict=True)],
        FlashOptimConfig(),
        capturable=capturable,
    )
    optimizer.attach([], ROWS, "cpu")
    return optimizer


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
