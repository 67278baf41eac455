"""FlashOptimConfig: bad values are named when it is built; what "auto" rounding resolves to."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from megatron_flashoptim.optim import FlashOptimConfig


@pytest.mark.parametrize(
    ("field", "flag", "choices"),
    [
        ("optimizer", "--optimizer", "flash_adamw"),
        ("master_bits", "--flash-master-bits", "16, 24, 32"),
        ("rounding", "--flash-rounding", "auto, nearest, stochastic"),
        ("master_rounding", "--flash-master-rounding", "nearest, stochastic"),
    ],
)
@pytest.mark.parametrize("value", ["adam", "", None, 8, "24", "Nearest"])
def test_a_value_that_is_not_a_choice_is_refused_by_flag_choices_and_value(
    field: str, flag: str, choices: str, value: Any
) -> None:
    message = re.escape(f"{flag} must be one of {choices}; got {value!r}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        FlashOptimConfig(**{field: value})


def test_auto_is_no_rounding_of_masters() -> None:
    with pytest.raises(ValueError, match="--flash-master-rounding must be one of"):
        FlashOptimConfig(master_rounding="auto")  # type: ignore[arg-type]  # the bad value tested


def test_16_bit_masters_need_stochastic_rounding_and_the_error_says_so() -> None:
    with pytest.raises(ValueError, match="add --flash-master-rounding stochastic, or use 24 or 32"):
        FlashOptimConfig(master_bits=16)
    assert FlashOptimConfig(master_bits=16, master_rounding="stochastic").master_bits == 16


def test_every_allowed_combination_builds() -> None:
    for bits in (24, 32):
        for rounding in ("auto", "nearest", "stochastic"):
            for master in ("nearest", "stochastic"):
                FlashOptimConfig(master_bits=bits, rounding=rounding, master_rounding=master)


def test_defaults_are_24_bits_with_automatic_rounding() -> None:
    config = FlashOptimConfig()
    assert (config.optimizer, config.master_bits) == ("flash_adamw", 24)
    assert (config.rounding, config.master_rounding) == ("auto", "nearest")


def test_a_config_cannot_change_after_its_checks() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FlashOptimConfig().master_bits = 16  # type: ignore[misc]  # the refusal tested


@pytest.mark.parametrize(
    ("beta2", "expected"),
    [
        (0.0, "nearest"),
        (0.95, "nearest"),
        (0.99, "nearest"),
        (0.996, "nearest"),
        (1 - 1 / 255, "stochastic"),
        (0.9961, "stochastic"),
        (0.999, "stochastic"),
        (0.99999, "stochastic"),
    ],
)
def test_auto_is_stochastic_from_where_the_top_code_cannot_decay(
    beta2: float, expected: str
) -> None:
    """255 (1 - beta2) / 2 must exceed half a code: beta2 < 1 - 1/255 = 0.99608."""
    assert FlashOptimConfig().resolve_rounding(beta2) == expected


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("beta2", [0.5, 0.95, 0.999])
def test_a_rounding_that_is_asked_for_is_used_at_any_beta2(rounding: Any, beta2: float) -> None:
    assert FlashOptimConfig(rounding=rounding).resolve_rounding(beta2) == rounding
