"""HyperTable: what the kernel reads is what was given, rounded to fp32 once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_flashoptim.codec import rounding, spec
from megatron_flashoptim.kernels import columns
from megatron_flashoptim.optim.hyper import HyperRow, HyperTable
from megatron_flashoptim.optim.rules import rule_of

GROUPS: list[dict[str, Any]] = [
    {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "step": 1},
    {"lr": 3e-7, "weight_decay": 0.0, "betas": (0.0, 0.999), "eps": 1e-15, "step": 100_000},
    {"lr": 2.0, "weight_decay": 0.01, "betas": (0.5, 0.5), "eps": 0.0, "step": 3},
]
RULE = rule_of("flash_adamw")
ROWS = [HyperRow.of(RULE, group) for group in GROUPS]
BETAS = [group["betas"] for group in GROUPS]
STEP_SIZE, DECAY, BETA1, REST1, ROOT_BETA2, ROOT_REST2, EPS, PER_ROOT = range(columns.VALUES)


def _filled(seed: int = 7) -> HyperTable:
    table = HyperTable(len(ROWS), "cpu")
    table.fill(ROWS, seed=seed)
    return table


def _column(table: HyperTable, column: int) -> list[np.float32]:
    return [np.float32(value) for value in table.values[:, column].tolist()]


def test_every_value_is_read_back_rounded_to_fp32() -> None:
    table = _filled()
    assert _column(table, BETA1) == [np.float32(beta1) for beta1, _ in BETAS]
    assert _column(table, EPS) == [np.float32(group["eps"]) for group in GROUPS]


def test_decay_is_the_learning_rate_times_the_weight_decay_in_one_rounding() -> None:
    products = [np.float32(group["lr"] * group["weight_decay"]) for group in GROUPS]
    assert _column(_filled(), DECAY) == products


def test_complements_and_roots_of_the_betas_are_taken_before_rounding() -> None:
    """1 - beta2 from fp32 beta2 = 0.999 would be off by 5e-5."""
    table = _filled()
    for column, expected in (
        (REST1, [1 - beta1 for beta1, _ in BETAS]),
        (ROOT_BETA2, [beta2**0.5 for _, beta2 in BETAS]),
        (ROOT_REST2, [(1 - beta2) ** 0.5 for _, beta2 in BETAS]),
    ):
        assert _column(table, column) == [np.float32(value) for value in expected]


def test_bias_corrections_are_of_the_step() -> None:
    sizes = [g["lr"] / (1 - g["betas"][0] ** g["step"]) for g in GROUPS]
    assert _column(_filled(), STEP_SIZE) == [np.float32(size) for size in sizes]
    second = [(1 - g["betas"][1] ** g["step"]) ** -0.5 for g in GROUPS]
    assert _column(_filled(), PER_ROOT) == [np.float32(value) for value in second]


def test_columns_that_a_rule_does_not_use_are_zero() -> None:
    table = HyperTable(1, "cpu")
    table.fill([HyperRow((1.0, 2.0), 1)], seed=0)
    assert table.values[0, : columns.VALUES].tolist() == [1.0, 2.0] + [0.0] * 6


@pytest.mark.parametrize("seed", [0, 7, -1, 2**40])
def test_keys_are_those_of_seed_step_and_stream(seed: int) -> None:
    """All 32 bits survive: as fp32 some keys would be NaNs whose bits a copy may change."""
    keys = _filled(seed).keys.to(torch.int64) & 0xFFFFFFFF
    for column, stream in (
        (columns.KEY_EXP_AVG_SQ, spec.STREAM_EXP_AVG_SQ),
        (columns.KEY_MASTER, spec.STREAM_MASTER),
    ):
        expected = [rounding.launch_key(seed, row.step, stream) for row in ROWS]
        assert keys[:, column].tolist() == expected


def test_values_and_keys_are_one_storage_of_distinct_columns() -> None:
    table = _filled()
    assert table.values.data_ptr() == table.keys.data_ptr()
    keys = [columns.KEY_EXP_AVG_SQ, columns.KEY_MASTER]
    assert [*range(columns.VALUES), *keys] == list(range(columns.COLUMNS))
    assert table.keys.shape == (3, columns.COLUMNS)


def test_refilling_replaces_every_row() -> None:
    table = _filled()
    table.fill(ROWS[::-1], seed=8)
    fresh = HyperTable(3, "cpu")
    fresh.fill(ROWS[::-1], seed=8)
    assert torch.equal(table.keys, fresh.keys)


def test_gradients_are_not_scaled_nor_steps_skipped_until_asked() -> None:
    table = HyperTable(2, "cpu")
    assert table.grad_scale.tolist() == [1.0, 1.0]
    assert table.skip.dtype == torch.float32 and table.skip.tolist() == [0.0]


def test_refilling_keeps_gradient_scales_and_skip() -> None:
    """Both are written by Megatron's part before the step fills the table."""
    table = _filled()
    table.grad_scale.fill_(0.5)
    table.skip.fill_(1.0)
    table.fill(ROWS, seed=8)
    assert table.grad_scale.tolist() == [0.5] * 3 and table.skip.tolist() == [1.0]


@pytest.mark.parametrize("count", [0, 2, 4])
def test_another_number_of_rows_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"the table has 3 rows, got {count}"):
        HyperTable(3, "cpu").fill((ROWS * 2)[:count], seed=0)


def test_a_table_without_rows_can_be_filled() -> None:
    table = HyperTable(0, "cpu")
    table.fill([], seed=0)
    assert len(table) == 0 and table.nbytes() == table.skip.nbytes


def test_nbytes_counts_table_gradient_scales_and_skip() -> None:
    assert HyperTable(3, "cpu").nbytes() == 3 * (columns.COLUMNS + 1) * 4 + 4
