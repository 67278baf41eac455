"""Statistics: the estimated quantization error is that of known data, counts are exact."""

from __future__ import annotations

import pytest
import torch

from megatron_flashoptim.codec import (
    decode_exp_avg,
    decode_exp_avg_sq,
    encode_exp_avg,
    encode_exp_avg_sq,
)
from megatron_flashoptim.codec.spec import ExpAvgSqCode

NUMEL = 32 * 4000


def _values(kind: str) -> torch.Tensor:
    """Return values spread over some binades; each 32 have their own size."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(NUMEL, generator=generator)
    if kind == "heavy tails":
        values = values * torch.randn(NUMEL, generator=generator).exp() ** 2
    sizes = 2.0 ** torch.randint(-40, 10, (NUMEL // 32,), generator=generator)
    return values * sizes.repeat_interleave(32)


def _true_error(moment: str, values: torch.Tensor, code: ExpAvgSqCode) -> tuple[float, ...]:
    """Return the true and the estimated sum of squares of the error relative to the scales.

    Relative, because the groups of the largest values would else be all that counts.
    """
    from megatron_flashoptim.checkpoint.statistics import implied_error

    if moment == "exp_avg":
        codes, scale = encode_exp_avg(values)
        decoded, exact = decode_exp_avg(codes, scale), values
    else:
        codes, scale = encode_exp_avg_sq(values.square(), code=code)
        decoded, exact = decode_exp_avg_sq(codes, scale, code=code).sqrt(), values.abs()
    # A power of two near each scale, so that scaling by it changes no code.
    size = 2.0 ** torch.frexp(scale.double()).exponent.double()
    error = (decoded.double() - exact.double()) / size.repeat_interleave(32)
    estimated = implied_error(moment, codes, (scale.double() / size).to(torch.bfloat16), code=code)
    return float(error.square().sum()), estimated


CODES: list[tuple[str, ExpAvgSqCode]] = [
    ("exp_avg", "sqrt"),
    ("exp_avg_sq", "sqrt"),
    ("exp_avg_sq", "fourth_root"),
]


@pytest.mark.parametrize(("moment", "code"), CODES)
def test_estimated_error_is_the_true_one(megatron: None, moment: str, code: ExpAvgSqCode) -> None:
    true, estimated = _true_error(moment, _values("normal"), code)
    assert estimated == pytest.approx(true, rel=0.02)


@pytest.mark.parametrize(("moment", "code"), CODES)
def test_estimated_error_of_heavy_tails_is_within_a_factor_of_two(
    megatron: None, moment: str, code: ExpAvgSqCode
) -> None:
    true, estimated = _true_error(moment, _values("heavy tails"), code)
    assert 0.5 < (estimated / true) ** 0.5 < 2


def test_scales_per_element_give_the_error_of_those_per_group(megatron: None) -> None:
    from megatron_flashoptim.checkpoint.statistics import implied_error

    codes, scale = encode_exp_avg(_values("normal"))
    per_group = implied_error("exp_avg", codes, scale)
    per_element = implied_error("exp_avg", codes, scale.repeat_interleave(32))
    # The largest of each group counts as one of the top code's interval.
    assert per_group < per_element < 1.15 * per_group


def test_groups_of_zeros_and_of_nan_have_no_error(megatron: None) -> None:
    from megatron_flashoptim.checkpoint.statistics import implied_error

    values = torch.zeros(64)
    values[40] = torch.nan
    codes, scale = encode_exp_avg(values)
    assert implied_error("exp_avg", codes, scale) == 0.0


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("decoder.layers.mlp.linear_fc1.weight", ("decoder.layers.*.mlp.linear_fc1.weight", None)),
        ("decoder.layers.17.mlp.linear_fc1.weight", ("decoder.layers.*.mlp.linear_fc1.weight", 17)),
        ("embedding.word_embeddings.weight", ("embedding.word_embeddings.weight", None)),
    ],
)
def test_layers_stacked_and_numbered_have_one_name(
    megatron: None, key: str, expected: tuple[str, int | None]
) -> None:
    from megatron_flashoptim.checkpoint.state_parts import split_name

    assert split_name(key)[:2] == expected
