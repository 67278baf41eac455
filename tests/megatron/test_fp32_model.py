"""A model in fp32 throughout: Megatron's training loop, its checkpoint, and what is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from console import run
from pretraining import MODEL, pretrain, saved_tensors

FP32 = [flag for flag in MODEL if flag != "--bf16"]
FULL = ("--dist-ckpt-optim-fully-reshardable",)


def test_training_loop_resumes_bitwise_and_its_checkpoint_plans_and_converts(
    corpus: Path, tmp_path: Path
) -> None:
    flash = ("--optimizer", "flash_adamw", "--train-iters", "8", "--save-interval", "4", *FULL)
    whole = pretrain(corpus, *flash, "--save", str(tmp_path / "whole"), model=FP32)
    resumed = pretrain(
        corpus,
        *(*flash, "--save", str(tmp_path / "resumed")),
        *("--load", str(tmp_path / "whole"), "--ckpt-step", "4"),
        model=FP32,
    )
    assert min(resumed) == 5 and {i: whole[i] for i in (6, 8)} == {i: resumed[i] for i in (6, 8)}
    ours, theirs = (saved_tensors(tmp_path / run / "iter_0000008") for run in ("whole", "resumed"))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key
    weights = {key: tensor for key, tensor in ours.items() if not key.startswith("optimizer.")}
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert not any("correction" in key for key in ours), "the weights are the masters"

    planned = run("memory", "--checkpoint", str(tmp_path / "whole"))
    assert "32-bit weights, 32-bit gradients" in planned.stdout, planned.stderr

    converted = run("convert", str(tmp_path / "whole"), str(tmp_path / "adam"), "--to", "adam")
    assert converted.returncode == 0, converted.stderr
    back = run("convert", str(tmp_path / "adam"), str(tmp_path / "back"), "--to", "flash")
    assert back.returncode == 0, back.stderr
    again = saved_tensors(tmp_path / "back" / "iter_0000008")
    assert again.keys() == ours.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, again[key]), key
    adam = pretrain(
        corpus,
        *("--optimizer", "adam", "--train-iters", "8", *FULL, "--save-interval", "4"),
        *("--save", str(tmp_path / "stock")),
        model=FP32,
    )
    for iteration, (loss, norm) in adam.items():
        assert float(whole[iteration][0]) == pytest.approx(float(loss), rel=5e-3)
        assert float(whole[iteration][1]) == pytest.approx(float(norm), rel=1e-4)
    loaded = pretrain(
        corpus,
        *flash,
        *("--load", str(tmp_path / "stock"), "--ckpt-step", "4"),
        model=FP32,
    )
    assert min(loaded) == 5, "Adam's checkpoint must have been loaded"
    assert float(loaded[8][0]) == pytest.approx(float(adam[8][0]), rel=2e-3)
