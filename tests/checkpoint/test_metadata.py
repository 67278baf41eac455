"""Metadata: plain, versioned, and every difference refused naming both sides."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
import torch

from megatron_flashoptim import FlashOptimConfig


def _described(**changes: Any) -> dict[str, Any]:
    from megatron_flashoptim.checkpoint import metadata

    return {**metadata.describe(FlashOptimConfig(), "bfloat16"), **changes}


def test_description_is_made_of_plain_values(megatron: None) -> None:
    stored = io.BytesIO()
    torch.save(_described(), stored)
    stored.seek(0)
    assert torch.load(stored, weights_only=True) == _described()


REFUSED = {
    "group_size": (64, "group_size 64, this run has 32"),
    "weights": ("float32", "weights float32, this run has bfloat16"),
    "optimizer": ("flash_lion", "optimizer flash_lion, this run has flash_adamw"),
    "exp_avg_sq_code": (
        "fourth_root",
        "exp_avg_sq_code fourth_root, this run has sqrt; "
        "`megatron-flashoptim convert --to flash --exp-avg-sq-code sqrt` changes it and keeps",
    ),
    "version": (99, "format version 99, this release reads up to 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_difference_is_refused_naming_both_sides(megatron: None, name: str) -> None:
    from megatron_flashoptim.checkpoint import metadata

    value, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        metadata.check(_described(**{name: value}), FlashOptimConfig(), "bfloat16")


@pytest.mark.parametrize("saved", [{}, {"version": "1"}, 7])
def test_metadata_without_a_version_is_refused(megatron: None, saved: Any) -> None:
    from megatron_flashoptim.checkpoint import metadata

    with pytest.raises(ValueError, match="no version"):
        metadata.check(saved, FlashOptimConfig(), "bfloat16")


def test_master_bits_convert_or_are_refused(megatron: None) -> None:
    from megatron_flashoptim.checkpoint import metadata

    metadata.check(_described(master_bits=32), FlashOptimConfig(), "bfloat16")
    metadata.check(_described(), FlashOptimConfig(master_bits=32), "bfloat16")
    sixteen = FlashOptimConfig(master_bits=16, master_rounding="stochastic")
    metadata.check(_described(master_bits=16), FlashOptimConfig(), "bfloat16")
    with pytest.raises(ValueError, match="master_bits 24, this run has 16"):
        metadata.check(_described(), sixteen, "bfloat16")


def test_field_that_older_checkpoints_lack_has_its_old_value(
    megatron: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What adding a format field takes: one line in the table."""
    from megatron_flashoptim.checkpoint import metadata

    @dataclasses.dataclass(frozen=True)
    class Config(FlashOptimConfig):
        code: str = "sqrt"

    old = _described()
    monkeypatch.setitem(metadata._FORMAT_FIELDS, "code", "sqrt")
    metadata.check(old, Config(), "bfloat16")
    with pytest.raises(ValueError, match="code sqrt, this run has other"):
        metadata.check(old, Config(code="other"), "bfloat16")
