"""Updates far below a master's precision: what docs/master-weights.md says of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from tiny_updates import COPIES, final_weights

CASE = {"weight": 1.0, "update": 1e-7, "steps": 500}


@pytest.fixture(scope="module")
def fp32() -> torch.Tensor:
    final = final_weights(None, "nearest", **CASE)
    assert (final < 1.0).all()
    return final


def test_32_bits_are_fp32_bit_for_bit(fp32: torch.Tensor) -> None:
    assert torch.equal(final_weights(32, "nearest", **CASE), fp32)


def test_24_bits_nearest_lose_every_update_below_half_a_quantum() -> None:
    assert torch.equal(final_weights(24, "nearest", **CASE), torch.ones(COPIES))
    # Values below 1.0 are 2^-16 apart: an update of more than half of that is never lost.
    large = {**CASE, "update": 2.0**-17 * 1.01, "steps": 1}
    assert (final_weights(24, "nearest", **large) == 1.0 - 2.0**-16).all()


@pytest.mark.parametrize("bits", [16, 24])
def test_stochastic_rounding_follows_fp32_on_average(bits: int, fp32: torch.Tensor) -> None:
    final = final_weights(bits, "stochastic", **CASE).double()
    standard_error = final.std() / COPIES**0.5
    assert final.std() > 0
    assert (final.mean() - fp32.double().mean()).abs() < 4 * standard_error
