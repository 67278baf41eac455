"""Offline conversion between update rules: masters are kept, and moments that mean the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adam_checkpoints import FULLY, save
from mixed_precision import EXPERTS as MIXED_EXPERTS
from mixed_precision import is_kept_in_fp32
from ranks import run_ranks
from test_convert import _contents, _convert, _described, _save_flash

from megatron_flashoptim import FlashOptimConfig
from megatron_flashoptim.cli import main


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


@pytest.fixture(scope="module")
def lion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lion")
    run_ranks(1, _save_flash, folder, layers=1, flash=FlashOptimConfig(optimizer="flash_lion"))
    return folder


@pytest.fixture(scope="module")
def adam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adam")
    run_ranks(1, save, folder, FULLY, layers=1)
    return folder


def test_another_rule_takes_the_masters_and_starts_its_moments_at_zero(
    lion: Path, adam: Path, tmp_path: Path
) -> None:
    """From flash_lion to flash_adamw and from Adam to flash_sgd; nothing is reinterpreted."""
    from checkpoints import joined

    from megatron_flashoptim.checkpoint.weights_file import WeightsExport

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
        result, folder = _convert(source, tmp_path / name, "flash", master_bits=32, optimizer=name)
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


def test_the_format_stays_until_another_is_asked_for(
    adam: Path, lion: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what the command says of masters is so: kept to the last bit, or rounded."""

    def said(source: Path, folder: str, *options: str) -> str:
        assert (
            main(["convert", "--to", "flash", *options, str(source), str(tmp_path / folder)]) == 0
        )
        return capsys.readouterr().out

    wide = {"master_bits": 32, "exp_avg_sq_code": "fourth_root"}
    _, source = _convert(adam, tmp_path / "wide", "flash", **wide)
    assert "masters are" not in said(source, "l2", "--optimizer", "flash_adam")
    to_lion = said(source, "lion", "--optimizer", "flash_lion")
    assert (
        "masters are kept; the moments and the step number of flash_lion start at zero" in to_lion
    )
    before, _ = _contents(source)
    for name, kept in (("l2", "optimizer.state."), ("lion", "optimizer.state.correction.")):
        after, _ = _contents(tmp_path / name / "release")
        keys = [k for k in before if k.startswith(kept) or not k.startswith("optimizer.state.")]
        assert any(kept in key for key in keys)
        assert all(torch.equal(before[key], after[key]) for key in keys), name
    l2 = _described(tmp_path / "l2" / "release")
    assert l2 == {**_described(source), "optimizer": "flash_adam"}
    assert _described(tmp_path / "lion" / "release")["master_bits"] == 32
    # Of Adam and of a rule without a second moment, the defaults of a run.
    _convert(lion, tmp_path / "of lion", "flash", optimizer="flash_adamw")
    defaults = _described(tmp_path / "of lion" / "release")
    assert (defaults["master_bits"], defaults["exp_avg_sq_code"]) == (24, "sqrt")
    for from_, bits in ((adam, ()), (source, ("--master-bits", "24"))):
        rounded = said(from_, "new", "--dry-run", "--optimizer", "flash_sgd", *bits)
        assert "masters are rounded to 24 bits; the moments" in rounded


@pytest.mark.parametrize("options", [[], ["--optimizer", "flash_sgd"]])
def test_a_code_of_a_moment_that_is_not_kept_is_a_wrong_command_line(
    options: list[str], lion: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = ["--exp-avg-sq-code", "fourth_root"]
    with pytest.raises(SystemExit) as exit_:
        main(["convert", "--to", "flash", *options, *code, str(lion), str(tmp_path / "new")])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    name = options[-1] if options else "flash_lion"
    assert f"--exp-avg-sq-code fourth_root is of the second moment, and {name} keeps none" in line
    assert not (tmp_path / "new").exists()


def test_a_rule_of_another_release_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    from megatron_flashoptim.checkpoint import offline

    source = tmp_path / "flash"
    source.mkdir()
    run_ranks(1, _save_flash, source, 1, layers=1)
    monkeypatch.setattr(offline, "RULES", {"flash_lion": ""})
    with pytest.raises(ValueError, match="of the optimizer flash_adamw, which this release does"):
        _convert(source, tmp_path / "new", "adam")


def test_what_older_checkpoints_do_not_say_is_shown_as_it_was(
    adam: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_flashoptim.checkpoint import description
    from megatron_flashoptim.checkpoint.folder import open_folder
    from megatron_flashoptim.cli import convert

    folder = open_folder(_convert(adam, tmp_path, "flash")[1])
    for name in ("optimizer", "master_bits", "exp_avg_sq_code"):
        del folder.flash[name]
    convert._print_source(folder)
    assert "/release: flash_adamw, fully_reshardable" in capsys.readouterr().out
    shown = description.describe(folder)["optimizer"]
    assert shown.startswith("flash_adamw, 24-bit masters, sqrt code, ")


def test_weights_in_bf16_are_the_models_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """fp32 norms and routers of a bf16 model lose nothing."""
    from safetensors.torch import load_file

    source = tmp_path / "flash"
    source.mkdir()
    run_ranks(1, _save_flash, source, **MIXED_EXPERTS)
    saved, _ = _contents(source)
    for dtype in ("bf16", "fp32"):
        new = tmp_path / dtype
        command = ("convert", "--to", "weights", "--dtype", dtype, str(source), str(new))
        assert main(command) == 0
        (file,) = new.glob("*.safetensors")
        written = load_file(file)
        fp32 = [key for key in written if is_kept_in_fp32(key)]
        assert 1 < len(fp32) < len(written)
        kept = f"{len(fp32)} of {len(written)} tensors are fp32 in the model and stay so\n"
        assert (kept in capsys.readouterr().out) == (dtype == "bf16")
        for key, tensor in written.items():
            if dtype == "bf16" or key in fp32:
                assert tensor.dtype == saved[key].dtype and torch.equal(tensor, saved[key]), key
            else:
                assert tensor.dtype == torch.float32 and not torch.equal(tensor, saved[key]), key
