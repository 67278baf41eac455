"""FlashOptimConfig: bad values are named when it is built; what "auto" rounding resolves to."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import pytest

from megatron_flashoptim.codec import spec
from megatron_flashoptim.optim import FlashOptimConfig
from megatron_flashoptim.optim.rules import RULES


@pytest.mark.parametrize(
    ("field", "flag", "choices"),
    [
        ("optimizer", "--optimizer", ", ".join(RULES)),
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


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("master_bits", 24.0, "a whole number"),
        ("release_slots", 2.5, "a whole number"),
        ("seed", "1", "a whole number"),
        ("seed", True, "a whole number"),
        ("early_param_gather", "no", "True or False"),
        ("gradient_release", 1, "True or False"),
        ("bucket_clip_grad", "1", "a number"),
        ("bucket_clip_grad", True, "a number"),
    ],
)
def test_a_value_of_another_type_is_refused(field: str, value: Any, what: str) -> None:
    """In code, or in a recipe's file, where no parser looks."""
    message = re.escape(f"FlashOptimConfig.{field} must be {what}; got {value!r}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        FlashOptimConfig(**{field: value})


def test_a_whole_number_is_a_number() -> None:
    assert FlashOptimConfig(bucket_clip_grad=1).bucket_clip_grad == 1


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
    ("beta2", "expected"),
    [
        (0.0, "nearest"),
        (0.95, "nearest"),
        (0.98, "nearest"),
        (0.9843, "nearest"),
        (1 - 2.0**-6, "stochastic"),
        (0.99, "stochastic"),
        (0.999, "stochastic"),
        (0.99999, "stochastic"),
    ],
)
@pytest.mark.parametrize("code", spec.EXP_AVG_SQ_CODES)
def test_auto_is_stochastic_where_a_scale_would_not_decay_as_it_should(
    code: spec.ExpAvgSqCode, beta2: float, expected: str
) -> None:
    """A step's loss (1 - beta2) / 2 must exceed two half ulps of bf16, 2 * 2^-8."""
    assert FlashOptimConfig(exp_avg_sq_code=code).resolve_rounding(beta2) == expected


@pytest.mark.parametrize("code", spec.EXP_AVG_SQ_CODES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("beta2", [0.5, 0.95, 0.999])
def test_a_rounding_that_is_asked_for_is_used_at_any_beta2(
    rounding: Any, beta2: float, code: spec.ExpAvgSqCode
) -> None:
    config = FlashOptimConfig(rounding=rounding, exp_avg_sq_code=code)
    assert config.resolve_rounding(beta2) == rounding
