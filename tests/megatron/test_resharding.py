"""``fully_reshardable``: saved at one model layout, loaded at another, the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks


def _round(load: Path | None, save: Path | None, steps: int = 1, **options: Any) -> tuple[Any, Any]:
    """Load, train on, save; return the state in model space as loaded and as saved."""
    import checkpoints
    import tiny_gpt

    trainer = tiny_gpt.build(tiny_gpt.Setup(**options))
    loaded = None
    if load is not None:
        checkpoints.load(trainer, load, parallel=options.get("tp", 1) == 2)
        loaded = checkpoints.in_model_space(trainer)
    trainer.train(steps)
    if save is not None:
        checkpoints.save(
            trainer, save, checkpoints.FULLY_RESHARDABLE, parallel=options.get("pp", 1) == 2
        )
    return loaded, checkpoints.in_model_space(trainer)


# Number of ranks and options of each run, which loads what the one before saved.
DENSE = {"swiglu": True, "query_groups": 2, "layers": 4, "tied": True}
CHAINS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "dense": [
        (1, DENSE),
        (2, {**DENSE, "tp": 2}),
        (4, {**DENSE, "tp": 2, "overlap": True, "bucket_size": 30_000}),
        (4, {**DENSE, "pp": 4}),
        (4, {**DENSE}),
        (4, {**DENSE, "tp": 2, "pp": 2}),
        (2, {**DENSE}),
    ],
    "tensor parallel 4": [
        (4, {"tp": 4, "hidden": 128, "layers": 1}),
        (2, {"hidden": 128, "layers": 1}),
        (4, {"tp": 4, "hidden": 128, "layers": 1}),
    ],
    "experts": [
        (1, {"experts": 4, "swiglu": True}),
        (2, {"experts": 4, "swiglu": True, "ep": 2}),
        (4, {"experts": 4, "swiglu": True, "ep": 4}),
        (4, {"experts": 4, "swiglu": True, "ep": 2, "overlap": True, "bucket_size": 20_000}),
        (2, {"experts": 4, "swiglu": True, "pp": 2}),
        # Training with both needs sequence parallel norms, which need a GPU.
        (4, {"experts": 4, "swiglu": True, "ep": 2, "tp": 2, "steps": 0}),
        (1, {"experts": 4, "swiglu": True}),
    ],
    "padded vocabulary": [
        (1, {"vocab": 288, "tied": False, "layers": 1}),
        (2, {"vocab": 320, "tied": False, "layers": 1, "tp": 2}),
        (2, {"vocab": 264, "tied": False, "layers": 1}),
    ],
    "optimizer instances": [
        (4, {"layers": 1, "instances": 2}),
        (2, {"layers": 1}),
        (4, {"layers": 1, "instances": 2}),
    ],
    "rows that are no multiple of 32": [
        (2, {"hidden": 72, "layers": 1, "swiglu": True}),
        (4, {"hidden": 72, "layers": 1, "swiglu": True}),
        (1, {"hidden": 72, "layers": 1, "swiglu": True}),
    ],
    "rows that are no multiple of 32, tensor parallel": [
        (2, {"hidden": 96, "layers": 1, "tp": 2}),
        (4, {"hidden": 96, "layers": 1, "tp": 2}),
        (2, {"hidden": 96, "layers": 1, "tp": 2}),
    ],
    "fp32 weights": [
        (1, {"layers": 1, "bf16": False}),
        (2, {"layers": 1, "bf16": False, "tp": 2}),
    ],
}


@pytest.mark.parametrize("chain", CHAINS)
def test_state_is_the_same_bits_at_every_layout(chain: str, tmp_path: Path) -> None:
    from checkpoints import assert_same, joined

    previous = None
    for number, (world_size, options) in enumerate(CHAINS[chain]):
        folder = tmp_path / str(number)
        folder.mkdir()
        load = tmp_path / str(number - 1) if number else None
        ranks = run_ranks(world_size, _round, load, folder, **options)
        vocab = 256 if "vocab" in options else None
        if previous is not None:
            assert_same(joined([loaded for loaded, _ in ranks], vocab), previous)
        previous = joined([saved for _, saved in ranks], vocab)
        assert any("master" in key for key in previous)
        moments = [tensor for key, tensor in previous.items() if key.startswith("exp_avg_sq.")]
        assert all(tensor.any() for tensor in moments), "every parameter must have been trained"
