"""flash_lion beside Lion in fp32, and beside Megatron's ``--optimizer lion``, which is another."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from adam_checkpoints import save_not_distributed
from pretraining import (
    FLASH,
    FORMATS,
    MODEL,
    SCRIPT,
    _pretrain,
    data_flags,
    device_flags,
    losses,
    printed,
)
from ranks import run_ranks
from test_convert import _convert
from test_convert_rules import _load_flash

from megatron_flashoptim import FlashOptimConfig

STEPS = 100
# Lion's own, by Megatron's defaults, and Adam's.
LION_BETAS, ADAM_BETAS = (0.95, 0.98), (0.9, 0.95)


def _build(optimizer: str, lr: float = 3e-4, **setup: Any) -> Any:
    """Build with ``stock lion``, ``plain lion`` or ``flash_lion``."""
    import tiny_gpt
    from plain_lion import use_as_megatrons_lion

    # The package compiles its update, for which a CPU rank would need a C++ compiler.
    torch.compiler.set_stance("force_eager")
    options: dict[str, Any] = {"lr": lr, "weight_decay": 1.0}
    if optimizer == "flash_lion":
        flash = FlashOptimConfig(optimizer="flash_lion")
        return tiny_gpt.build(tiny_gpt.Setup(flash=flash, optimizer=options, **setup))
    if optimizer == "plain lion":
        use_as_megatrons_lion()
    options |= {"optimizer": "lion", "use_distributed_optimizer": False}
    ddp = {"use_distributed_optimizer": False}
    return tiny_gpt.build(tiny_gpt.Setup(flash=None, optimizer=options, ddp=ddp, **setup))


def _train(optimizer: str, lr: float = 3e-4) -> list[float]:
    return _build(optimizer, lr).train(STEPS)


def _who_has_what(optimizer: str) -> dict[str, list[tuple[str, tuple[float, float]]]]:
    """Return the optimizer's class and betas for every parameter."""
    trainer = _build(optimizer, tied=False, positions="learned_absolute")
    names = {param: name for name, param in trainer.model[0].named_parameters()}
    found: dict[str, list[tuple[str, tuple[float, float]]]] = {}
    for member in trainer.optimizer.chained_optimizers:
        for groups, masters in zip(
            member.float16_groups, member.fp32_from_float16_groups, strict=True
        ):
            for param, master in zip(groups, masters, strict=True):
                for group in member.optimizer.param_groups:
                    if any(master is other for other in group["params"]):
                        kind = type(member.optimizer).__name__
                        found.setdefault(names[param], []).append((kind, tuple(group["betas"])))
    assert found.keys() == set(names.values())
    return found


def test_megatrons_lion_has_adams_betas_and_leaves_the_rest_to_adam() -> None:
    """As docs/rules.md and docs/migration.md say; of a release that differs they must say so."""
    (stock,) = run_ranks(1, _who_has_what, "stock lion")
    lion = re.compile(r"linear_\w+\.weight|position_embeddings\.weight")
    for name, found in stock.items():
        kind = "Lion" if lion.search(name) else "AdamW"
        assert found == [(kind, ADAM_BETAS)], name
    assert any("output_layer" in name for name in stock) and any("position" in n for n in stock)
    (plain,) = run_ranks(1, _who_has_what, "plain lion")
    assert set(map(tuple, plain.values())) == {(("Lion", LION_BETAS),)}


def test_loss_follows_lion() -> None:
    exact = run_ranks(2, _train, "plain lion")[0]
    flash = run_ranks(2, _train, "flash_lion")[0]
    stock = run_ranks(2, _train, "stock lion")[0]
    # How far two exact runs part when their learning rates differ by 1 %, for scale.
    nearby = run_ranks(2, _train, "plain lion", 3.03e-4)[0]
    assert exact[-1] < 0.75 * exact[0], "the model must learn for this to mean anything"

    def apart(losses: list[float]) -> float:
        return sum(abs(a - b) / b for a, b in zip(losses, exact, strict=True)) / STEPS

    print({"flash": apart(flash), "lr + 1 %": apart(nearby), "stock lion": apart(stock)})
    assert apart(flash) <= 0.001 and apart(flash) < apart(nearby)
    assert apart(stock) > 5 * apart(nearby)


def _in_the_training_loop(corpus: Path, *flags: str) -> str:
    torch.compiler.set_stance("force_eager")
    lion = ("--lr", "3e-4", "--min-lr", "3e-5", "--log-interval", "1", "--train-iters", "30")
    return _pretrain([str(SCRIPT), *MODEL, *device_flags(), *data_flags(corpus), *lion, *flags])


def test_loss_follows_lion_as_the_quality_runs_have_it(megatron: None, corpus: Path) -> None:
    """One rank, with --use-distributed-optimizer: Megatron's layer-wise optimizer."""
    runs = {}
    for name, flags in {
        "plain": ("lion", "--plain-lion"),
        "flash": ("flash_lion",),
        "stock": ("lion",),
    }.items():
        (text,) = run_ranks(1, _in_the_training_loop, corpus, "--optimizer", *flags)
        runs[name] = [float(loss) for loss, _ in losses(text).values()]
        assert len(runs[name]) == 30
    flash, stock = (
        max(abs(a - b) / b for a, b in zip(runs[name], runs["plain"], strict=True))
        for name in ("flash", "stock")
    )
    print({"flash": flash, "stock": stock})
    assert flash < 0.001 and stock > 5 * flash


def _save_stock(folder: Path) -> dict[str, torch.Tensor]:
    torch.compiler.set_stance("force_eager")
    return save_not_distributed(folder, 2, optimizer="lion")


def test_its_checkpoint_converts_with_masters_alone(tmp_path: Path) -> None:
    """Its param groups say which optimizer each is given to; those of flash_lion do not."""
    from checkpoints import joined

    source = tmp_path / "stock"
    source.mkdir()
    (masters,) = run_ranks(1, _save_stock, source)
    with pytest.raises(ValueError, match=r"has no exp_avg_sq of decoder.*not known here"):
        _convert(source, tmp_path / "adamw", "flash")
    with pytest.raises(ValueError, match=r"has no exp_avg_sq of decoder.*not known here"):
        _convert(source, tmp_path / "adam", "adam")
    _, folder = _convert(source, tmp_path / "lion", "flash", master_bits=32, optimizer="flash_lion")
    flash = FlashOptimConfig(optimizer="flash_lion", master_bits=32)
    ((fresh, state, groups, losses),) = run_ranks(1, _load_flash, folder, layers=1, flash=flash)
    assert groups == [{**group, "lr": 1e-3, "step": 0} for group in fresh]
    assert all(0 < loss < 7 for loss in losses)
    found = joined([state])
    for key, master in masters.items():
        name = key.removeprefix("optimizer.state.fp32_param.")
        assert torch.equal(found.pop(f"master.{name}").flatten(), master.flatten()), name
    assert found and not any("master" in key or tensor.any() for key, tensor in found.items())


def _pretrain_stock(corpus: Path, folder: Path) -> None:
    torch.compiler.set_stance("force_eager")
    flags = ("--optimizer", "lion", "--train-iters", "2", "--save", str(folder))
    save = ("--save-interval", "2", *FORMATS["fully_reshardable"])
    _pretrain([str(SCRIPT), *MODEL, *device_flags(), *data_flags(corpus), *flags, *save])


def test_a_checkpoint_of_its_layer_wise_optimizer_is_refused(corpus: Path, tmp_path: Path) -> None:
    """Which ``--use-distributed-optimizer`` makes of it in Megatron's training loop."""
    run_ranks(1, _pretrain_stock, corpus, tmp_path / "stock")
    with pytest.raises(ValueError, match=r"has no param of decoder.*not known here"):
        _convert(tmp_path / "stock", tmp_path / "lion", "flash", optimizer="flash_lion")


def test_plain_lion_is_refused_with_another_optimizer(corpus: Path) -> None:
    with pytest.raises(AssertionError, match="--plain-lion is for --optimizer lion; drop it"):
        printed(corpus, *FLASH, "--plain-lion")
