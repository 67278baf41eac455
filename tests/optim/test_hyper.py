"""HyperTable: what the kernel reads is what was given, rounded to fp32 once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_flashoptim.codec import rounding, spec
from megatron_flashoptim.kernels import columns
from megatron_flashoptim.optim.hyper import AdamHyper, HyperTable

ROWS = [
    AdamHyper(lr=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, step=1),
    AdamHyper(lr=3e-7, weight_decay=0.0, beta1=0.0, beta2=0.999, eps=1e-15, step=100_000),
    AdamHyper(2.0, 0.01, 0.5, 0.5, 0.0, step=3, bias_correction=False),
]


def _filled(seed: int = 7) -> HyperTable:
    table = HyperTable(len(ROWS), "cpu")
    table.fill(ROWS, seed=seed)
    return table


def _column(table: HyperTable, column: int) -> list[np.float32]:
    return [np.float32(value) for value in table.values[:, column].tolist()]


def test_every_value_is_read_back_rounded_to_fp32() -> None:
    table = _filled()
    for column, name in ((columns.BETA1, "beta1"), (columns.EPS, "eps")):
        assert _column(table, column) == [np.float32(getattr(row, name)) for row in ROWS], name


def test_decay_is_the_learning_rate_times_the_weight_decay_in_one_rounding() -> None:
    products = [np.float32(row.lr * row.weight_decay) for row in ROWS]
    assert _column(_filled(), columns.DECAY) == products


def test_complements_and_roots_of_the_betas_are_taken_before_rounding() -> None:
    """1 - beta2 from fp32 beta2 = 0.999 would be off by 5e-5."""
    table = _filled()
    for column, expected in (
        (columns.ONE_MINUS_BETA1, [1 - row.beta1 for row in ROWS]),
        (columns.SQRT_BETA2, [row.beta2**0.5 for row in ROWS]),
        (columns.SQRT_ONE_MINUS_BETA2, [(1 - row.beta2) ** 0.5 for row in ROWS]),
    ):
        assert _column(table, column) == [np.float32(value) for value in expected]


def test_step_sizes_are_the_learning_rate_over_1_minus_beta1_to_the_step() -> None:
    sizes = _column(_filled(), columns.STEP_SIZE)
    assert sizes[:2] == [np.float32(r.lr / (1 - r.beta1**r.step)) for r in ROWS[:2]]
    assert sizes[2] == np.float32(ROWS[2].lr)  # no bias correction asked for


def test_second_bias_corrections_are_inverse_roots_of_1_minus_beta2_to_the_step() -> None:
    second = _column(_filled(), columns.INVERSE_SQRT_BIAS_CORRECTION2)
    assert second[:2] == [np.float32((1 - r.beta2**r.step) ** -0.5) for r in ROWS[:2]]
    assert second[2] == 1  # no bias correction asked for


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
    numbers = [n for name, n in vars(columns).items() if name.isupper() and name != "COLUMNS"]
    assert sorted(numbers) == list(range(columns.COLUMNS))
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
