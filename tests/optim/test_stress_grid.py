"""A part of the stress grid: what docs/stress-grid.md says of its cells, and how it measures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from stress_grid import (
    BARS,
    BIAS_BAR,
    KINDS,
    PAPER,
    RELATIVE_EPS,
    Cell,
    Comparison,
    ExactAdamW,
    FlashAdamW,
    Gradients,
    PaperAdamW,
    run_cells,
    table,
)

from megatron_flashoptim.codec.spec import EXP_AVG_SQ_CODES, ExpAvgSqCode
from megatron_flashoptim.optim.config import RoundingPolicy

# Fewer groups than in the full grid; with half as many, biases scatter past 3 % by the sizes drawn.
GROUPS = 64
# Steps by beta2 and gradient scale; fp16 scales are subnormal at 1e-8 and zero at 1e-10. At 0.999
# the overshoot of "sqrt" with shrinking gradients passes 4 only in longer runs.
RUNS = {(0.95, 1.0): 300, (0.95, 1e-8): 300, (0.95, 1e-10): 300, (0.999, 1e-8): 1000}
CELLS = [(kind, beta2, scale) for beta2, scale in RUNS for kind in KINDS]
ORDINARY = [kind for kind in KINDS if kind != "heavy_sizes"]
Cells = dict[tuple[str, float, float], Cell]

# Bars that docs/stress-grid.md reports as missed, by format and (kind, beta2).
KNOWN_MISSES = {
    # An element not hit for long is less than the smallest code: 3.1 % in the full grid.
    ("sqrt auto", "sparse", 0.95): {"bias"},
    # Sizes of six decades in a group are more than either moment's codes span.
    ("sqrt auto", "heavy_sizes", 0.95): {"bias"},
    ("sqrt auto", "heavy_sizes", 0.999): {"bias"},
    ("fourth_root auto", "heavy_sizes", 0.95): {"bias", "overshoot"},
    ("fourth_root auto", "heavy_sizes", 0.999): {"bias", "overshoot"},
}


@pytest.fixture(scope="module")
def cells() -> Cells:
    torch.set_num_threads(1)
    found: Cells = {}
    for (beta2, scale), steps in RUNS.items():
        for cell in run_cells(list(KINDS), scale=scale, beta2=beta2, steps=steps, groups=GROUPS):
            found[cell.kind, beta2, scale] = cell
    return found


@pytest.mark.parametrize("name", ["sqrt auto", "fourth_root auto"])
@pytest.mark.parametrize(("kind", "beta2", "scale"), CELLS)
def test_our_formats_meet_every_bar_but_the_documented(
    cells: Cells, kind: str, beta2: float, scale: float, name: str
) -> None:
    """The bars are the issue's: error 0.20 and 0.35, overshoot 4, bias 3 %."""
    result = cells[kind, beta2, scale].results[name]
    missed = set(result.missed(kind, beta2))
    assert missed <= KNOWN_MISSES.get((name, kind, beta2), set()), result


@pytest.mark.parametrize("kind", KINDS)
def test_the_papers_format_explodes_where_v_has_code_0(cells: Cells, kind: str) -> None:
    """The full grid has 2,000 and more here, the bar is 4; ours meet it in the same cells."""
    assert cells[kind, 0.999, 1e-8].results[PAPER].overshoot > 40


@pytest.mark.parametrize("kind", ORDINARY)
def test_the_papers_format_has_no_v_where_fp16_has_no_scale(cells: Cells, kind: str) -> None:
    assert cells[kind, 0.95, 1e-10].results[PAPER].bias < -0.8
    assert abs(cells[kind, 0.95, 1.0].results[PAPER].bias) < BIAS_BAR


def test_the_papers_v_sticks_at_the_smallest_fp16_scale(cells: Cells) -> None:
    """Gradients of 1e-8 that shrink leave v at a subnormal scale that no longer halves."""
    assert cells["shrinking", 0.95, 1e-8].results[PAPER].bias > 1


@pytest.mark.parametrize("kind", ORDINARY)
@pytest.mark.parametrize("name", ["sqrt auto", "fourth_root auto"])
def test_our_errors_do_not_depend_on_the_gradient_scale(cells: Cells, kind: str, name: str) -> None:
    """0 to 10 % apart in the full grid; a single large update moves these smaller cells by 20 %."""
    error, small = (cells[kind, 0.95, scale].results[name].error for scale in (1.0, 1e-10))
    assert small == pytest.approx(error, rel=0.25)


@pytest.mark.parametrize("kind", ORDINARY)
def test_the_fourth_root_code_is_closer_to_exact_adamw_at_0_999(cells: Cells, kind: str) -> None:
    """Its error is 0.5 to 0.75 of that of "sqrt" in the full grid."""
    results = cells[kind, 0.999, 1e-8].results
    assert results["fourth_root auto"].error < 0.85 * results["sqrt auto"].error


@pytest.mark.parametrize(("beta2", "steps", "stalls"), [(0.99, 600, False), (0.995, 800, True)])
def test_nearest_rounding_of_the_scale_biases_v_and_stochastic_does_not(
    beta2: float, steps: int, stalls: bool
) -> None:
    """A step without gradient shrinks sqrt(v) by (1 - beta2) / 2.

    Half a bf16 ulp of the scale is 0.2 to 0.4 %: more than that at 0.995, where the scale stalls
    (bias beyond 100 %), and not much less at 0.99, where it runs ahead of exact AdamW.
    """
    policies: tuple[RoundingPolicy, ...] = ("nearest", "stochastic")
    (cell,) = run_cells(
        ["shrinking"], scale=1.0, beta2=beta2, steps=steps, groups=GROUPS, policies=policies
    )
    for code in ("sqrt", "fourth_root"):
        nearest = cell.results[f"{code} nearest"].bias
        assert nearest > 1 if stalls else nearest < -BIAS_BAR
        assert not cell.results[f"{code} stochastic"].missed("shrinking", beta2)


def _gradient(step: int = 1, scale: float = 1.0) -> torch.Tensor:
    gradients = Gradients(list(KINDS), scale=scale, groups=GROUPS, steps=10, seed=1)
    return [gradients.draw(i) for i in range(1, step + 1)][-1]


@pytest.mark.parametrize("code", EXP_AVG_SQ_CODES)
def test_first_update_is_exact_since_no_state_is_rounded_yet(code: ExpAvgSqCode) -> None:
    """From empty state every format computes in fp32: fewer than 32 roundings of 2^-24."""
    gradient = _gradient(scale=1e-10)
    shape = (gradient.shape[0], gradient.shape[1])
    eps = RELATIVE_EPS * 1e-10
    exact = ExactAdamW(shape, beta2=0.95).step(gradient, step=1, eps=eps)
    assert exact.abs().max() == pytest.approx(1.0)
    flash = FlashAdamW(shape, beta2=0.95, code=code, rounding="nearest", seed=0)
    for adam in (flash, PaperAdamW(shape, beta2=0.95)):
        update = adam.step(gradient, step=1, eps=eps).double()
        assert (update - exact).abs().max() <= 32 * 2.0**-24


@pytest.mark.parametrize("code", EXP_AVG_SQ_CODES)
def test_preview_shows_the_step_and_changes_nothing(code: ExpAvgSqCode) -> None:
    first, second = _gradient(1), _gradient(2)
    shape = (first.shape[0], first.shape[1])
    flash = FlashAdamW(shape, beta2=0.999, code=code, rounding="stochastic", seed=0)
    for adam in (ExactAdamW(shape, beta2=0.999), PaperAdamW(shape, beta2=0.999), flash):
        adam.step(first, step=1, eps=1e-8)
        before = [tensor.clone() for tensor in adam.state]
        preview = adam.preview(second, step=2, eps=1e-8).clone()
        for tensor, value in zip(adam.state, before, strict=True):
            assert torch.equal(tensor, value)
        assert torch.equal(adam.step(second, step=2, eps=1e-8), preview)
        assert not torch.equal(adam.state[0], before[0])


def test_gradients_are_what_their_names_say() -> None:
    gradients = Gradients(list(KINDS), scale=1e-6, groups=1024, steps=2, seed=0)
    first, last = (dict(zip(KINDS, gradients.draw(step), strict=True)) for step in (1, 2))
    assert (last["shrinking"] * 30).tolist() == pytest.approx(last["stationary"].tolist())
    assert (last["growing"] / 30).tolist() == pytest.approx(last["stationary"].tolist())
    zeros = (first["sparse"] == 0).double().mean()
    assert zeros == pytest.approx(0.95, abs=0.01)  # eight standard errors of 32,768 draws
    spread = {kind: first[kind].abs().log().std().item() for kind in KINDS if kind != "sparse"}
    # ln |normal| has a standard deviation of 1.11, to which that of the sizes adds in squares.
    assert spread["stationary"] == pytest.approx((1 + 1.11**2) ** 0.5, rel=0.03)
    assert spread["heavy_sizes"] == pytest.approx((9 + 1.11**2) ** 0.5, rel=0.03)
    ratio = first["heavy_draws"].abs().amax() / first["stationary"].abs().amax()
    assert ratio > 2


def test_measures_of_updates_twice_too_large_from_roots_half_too_small() -> None:
    exact = torch.tensor([[1.0, -3.0, 0.0], [2.0, 0.5, 1.0]], dtype=torch.float64)
    root = torch.tensor([[4.0, 2.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    comparison = Comparison()
    comparison.add(10 * exact, exact)
    comparison.add(2 * exact, exact)
    comparison.add_last(
        updates=(2 * exact, exact), updates_default_eps=(1.5 * exact, exact), roots=(root / 2, root)
    )
    for result in comparison.results():
        assert result.error == pytest.approx(1.0)
        assert result.error_step == pytest.approx(1.0)
        assert result.error_default_eps == pytest.approx(0.5)
        assert (result.overshoot, result.overshoot_step) == (2.0, 2.0)
        assert result.overshoot_run == 10.0
        assert (result.bias, result.bias_used) == (-0.5, -0.5)
    cell = Cell("stationary", 1.0, 0.95, 2, {PAPER: comparison.results()[0]})
    assert cell.results[PAPER].missed("stationary", 0.95) == ["error", "bias"]
    assert cell.results[PAPER].missed("shrinking", 0.95) == ["bias"]
    assert "| 1.00! 2 -0.500! " in table([cell])


def test_a_nan_misses_every_bar() -> None:
    nan = torch.full((1, 2), torch.nan, dtype=torch.float64)
    one = torch.ones_like(nan)
    comparison = Comparison()
    comparison.add(nan, one)
    comparison.add_last(updates=(nan, one), updates_default_eps=(nan, one), roots=(nan, one))
    (result,) = comparison.results()
    assert result.missed("stationary", 0.95) == list(BARS)
