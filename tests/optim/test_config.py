"""FlashOptimConfig: bad values are named when it is built; what "auto" rounding resolves to."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import pytest

from megatron_flashoptim.codec import spec
from megatron_flashoptim.optim import FlashOptimConfig


@pytest.mark.parametrize(
    ("field", "flag", "choices"),
    [
        ("optimizer", "--optimizer", "flash_adamw"),
        ("master_bits", "--flash-master-bits", "16, 24, 32"),
        ("exp_avg_sq_code", "--flash-exp-avg-sq-code", "sqrt, fourth_root"),
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
    allowed = itertools.product(
        (24, 32), spec.EXP_AVG_SQ_CODES, ("auto", *spec.ROUNDINGS), spec.ROUNDINGS
    )
    for bits, code, rounding, master in allowed:
        FlashOptimConfig(
            master_bits=bits, exp_avg_sq_code=code, rounding=rounding, master_rounding=master
        )


def test_defaults_are_24_bits_and_the_papers_code_with_automatic_rounding() -> None:
    config = FlashOptimConfig()
    assert (config.optimizer, config.master_bits) == ("flash_adamw", 24)
    assert config.exp_avg_sq_code == "sqrt"
    assert (config.rounding, config.master_rounding) == ("auto", "nearest")


def test_a_config_cannot_change_after_its_checks() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FlashOptimConfig().master_bits = 16  # type: ignore[misc]  # the refusal tested


@pytest.mark.parametrize(
    ("code", "beta2", "expected"),
    [
        ("sqrt", 0.0, "nearest"),
        ("sqrt", 0.95, "nearest"),
        ("sqrt", 0.996, "nearest"),
        ("sqrt", 1 - 1 / 255, "stochastic"),
        ("sqrt", 0.9961, "stochastic"),
        ("sqrt", 0.99999, "stochastic"),
        ("fourth_root", 0.0, "nearest"),
        ("fourth_root", 0.95, "nearest"),
        ("fourth_root", 0.9921, "nearest"),
        ("fourth_root", 1 - 2 / 255, "stochastic"),
        ("fourth_root", 0.9922, "stochastic"),
        ("fourth_root", 0.996, "stochastic"),
        ("fourth_root", 0.99999, "stochastic"),
    ],
)
def test_auto_is_stochastic_from_where_the_top_code_cannot_decay(
    code: spec.ExpAvgSqCode, beta2: float, expected: str
) -> None:
    """255 (1 - beta2) / 2 must exceed half a code: beta2 < 1 - 1/255 = 0.99608. A fourth root
    decays half as fast: 255 (1 - beta2) / 4 > 1/2 for beta2 < 1 - 2/255 = 0.99216.
    """
    assert FlashOptimConfig(exp_avg_sq_code=code).resolve_rounding(beta2) == expected


@pytest.mark.parametrize("code", spec.EXP_AVG_SQ_CODES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("beta2", [0.5, 0.95, 0.999])
def test_a_rounding_that_is_asked_for_is_used_at_any_beta2(
    rounding: Any, beta2: float, code: spec.ExpAvgSqCode
) -> None:
    config = FlashOptimConfig(rounding=rounding, exp_avg_sq_code=code)
    assert config.resolve_rounding(beta2) == rounding
