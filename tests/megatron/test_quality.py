"""Training quality against exact fp32 AdamW, on Megatron's own GPT and real text."""

from __future__ import annotations

from typing import Any

import pytest
from ranks import run_ranks

STEPS = 200
# The bar: mean relative difference of the loss over the run, and of the mean of the last steps.
MEAN_BOUND = 0.005
LAST = 20


def _train(flash: bool, lr: float, beta2: float = 0.95, **options: Any) -> list[float]:
    import tiny_gpt
    from exact_adamw import use_as_megatrons_adam

    if not flash:
        use_as_megatrons_adam()
        options["flash"] = None
    setup = tiny_gpt.Setup(layers=2, optimizer={"lr": lr, "adam_beta2": beta2}, **options)
    return tiny_gpt.build(setup).train(STEPS)


def _compare(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Return mean and largest relative difference per step, and that of the last steps' mean."""
    relative = [abs(a - b) / b for a, b in zip(ours, theirs, strict=True)]
    last, reference = (sum(losses[-LAST:]) / LAST for losses in (ours, theirs))
    return sum(relative) / len(relative), max(relative), abs(last - reference) / reference


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_loss_follows_exact_adamw_over_200_steps(beta2: float) -> None:
    exact = run_ranks(2, _train, False, 1e-3, beta2)[0]
    flash = run_ranks(2, _train, True, 1e-3, beta2)[0]
    # How far two exact runs part when their learning rates differ by 1e-4, for scale.
    nearby = run_ranks(2, _train, False, 1e-3 * (1 + 1e-4), beta2)[0]
    for name, losses in (("flash_adamw", flash), ("adamw, lr + 0.01 %", nearby)):
        mean, largest, last = _compare(losses, exact)
        print(
            f"beta2 {beta2}: {name} against exact AdamW over {STEPS} steps: mean {mean:.3%}, "
            f"largest step {largest:.3%}, mean of the last {LAST} {last:.3%}"
        )
    assert exact[-1] < 0.75 * exact[0], "the model must learn for this to mean anything"
    mean, _, last = _compare(flash, exact)
    assert mean <= MEAN_BOUND
    assert last <= MEAN_BOUND
