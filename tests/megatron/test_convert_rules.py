"""Offline conversion between update rules: masters are kept, and moments that mean the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adam_checkpoints import FULLY, save
from ranks import run_ranks
from test_convert import _contents, _convert, _described, _save_flash

from megatron_flashoptim import FlashOptimConfig


def _load_flash(folder: Path, **options: Any) -> Any:
    """Load, and train on; returns masters as loaded, param groups before and after, and losses."""
    import checkpoints
    import tiny_gpt

    trainer = tiny_gpt.build(tiny_gpt.Setup(**options))
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.5  # must come from the checkpoint
    fresh = checkpoints.plain_groups(trainer)
    checkpoints.load(trainer, folder)
    loaded = checkpoints.in_model_space(trainer), checkpoints.plain_groups(trainer)
    return fresh, *loaded, trainer.train(2)


def test_another_rule_takes_the_masters_and_starts_its_moments_at_zero(tmp_path: Path) -> None:
    """From flash_lion to flash_adamw and from Adam to flash_sgd; nothing is reinterpreted."""
    from checkpoints import joined

    from megatron_flashoptim.checkpoint.weights_file import WeightsExport

    lion, adam = tmp_path / "lion", tmp_path / "adam"
    for folder in (lion, adam):
        folder.mkdir()
    run_ranks(1, _save_flash, lion, layers=1, flash=FlashOptimConfig(optimizer="flash_lion"))
    run_ranks(1, save, adam, FULLY, layers=1)
    with pytest.raises(ValueError, match=r"is of flash_lion, .* not Adam's.*--to weights"):
        _convert(lion, tmp_path / "refused", "adam")
    export = WeightsExport(lion, tmp_path / "weights", torch.float32)
    export.run(lambda *_: None)
    from safetensors.torch import load_file

    (file,) = (tmp_path / "weights").glob("*.safetensors")
    masters = {
        lion: load_file(file),
        adam: {
            key.removeprefix("optimizer.state.param."): tensor
            for key, tensor in _contents(adam)[0].items()
            if key.startswith("optimizer.state.param.")
        },
    }
    for source, name in ((lion, "flash_adamw"), (adam, "flash_sgd")):
        flash = FlashOptimConfig(optimizer=name, master_bits=32)
        result, folder = _convert(
            source, tmp_path / name, "flash", master_bits=32, optimizer=name
        )
        said = result.report.text()
        assert "masters largest" in said and "moments" not in said and "exp_avg" not in said
        assert _described(folder)["optimizer"] == name
        ((fresh, state, groups, losses),) = run_ranks(1, _load_flash, folder, layers=1, flash=flash)
        found = joined([state])
        for key, tensor in found.items():
            kind, _, model_key = key.partition(".")
            if kind == "master":
                assert torch.equal(tensor, masters[source][model_key]), key
            else:
                assert not tensor.any(), key
        # Hyper-parameters are the run's, the learning rate is the checkpoint's.
        assert groups == [{**group, "lr": 1e-3, "step": 0} for group in fresh]
        assert all(0 < loss < 7 for loss in losses)
    # Of the same rule everything is kept.
    _, wide = _convert(lion, tmp_path / "wide", "flash", master_bits=32)
    (before, groups), (after, same) = _contents(lion), _contents(wide)
    assert _described(wide)["optimizer"] == "flash_lion" and "exp_avg_sq_code" not in _described(
        wide
    )
    assert not any("exp_avg_sq" in key for key in after)
    moments = [key for key in before if ".exp_avg" in key]
    assert moments and all(torch.equal(before[key], after[key]) for key in moments)
    assert {k: v for k, v in groups.items() if k != "grad_scaler"} == {
        **same,
        "flashoptim": groups["flashoptim"],
    }


def test_a_rule_of_another_release_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    from megatron_flashoptim.checkpoint import offline

    source = tmp_path / "flash"
    source.mkdir()
    run_ranks(1, _save_flash, source, 1, layers=1)
    monkeypatch.setattr(offline, "RULES", {"flash_lion": ""})
    with pytest.raises(ValueError, match="of the optimizer flash_adamw, which this release does"):
        _convert(source, tmp_path / "new", "adam")
