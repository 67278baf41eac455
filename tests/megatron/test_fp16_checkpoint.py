"""Checkpoints of Megatron's Adam with fp16 weights: what they are, and the way to a flash one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adam_checkpoints import BUCKETS, FULLY, load
from ranks import run_ranks

from megatron_flashoptim import FlashOptimConfig

# As --fp16 sets them; the loss scale is one at which no step is skipped.
FP16 = {"fp16": True, "params_dtype": torch.float16}
OPTIONS: dict[str, Any] = {
    "layers": 1,
    "bf16": False,
    "transformer": {**FP16, "pipeline_dtype": torch.float16},
    "optimizer": {**FP16, "initial_loss_scale": 256.0},
}


def _adam(**options: Any) -> Any:
    import tiny_gpt
    from exact_adamw import use_as_megatrons_adam

    use_as_megatrons_adam()
    return tiny_gpt.build(tiny_gpt.Setup(flash=None, **options))


def _save(folder: Path) -> None:
    import checkpoints

    trainer = _adam(**OPTIONS, prepare_model=lambda model: model.half())
    trainer.train(3)
    for save_as in (FULLY, BUCKETS):
        (folder / save_as).mkdir()
        checkpoints.save(trainer, folder / save_as, save_as)


def _go_on_in_bf16(folder: Path, new: Path) -> dict[str, torch.Tensor]:
    """Load into Adam with bf16 weights, train a step and save; returns the state before it."""
    import checkpoints

    trainer = _adam(layers=1)
    checkpoints.load(trainer, folder)
    loaded = checkpoints.in_model_space(trainer)
    trainer.train(1)
    new.mkdir()
    checkpoints.save(trainer, new, FULLY)
    return loaded


def test_fp16_weights_are_refused_by_name_and_go_on_through_adam_in_bf16(tmp_path: Path) -> None:
    from checkpoints import joined

    from megatron_flashoptim.checkpoint.boxes import Box
    from megatron_flashoptim.checkpoint.folder import open_folder
    from megatron_flashoptim.checkpoint.offline import Conversion, Request
    from megatron_flashoptim.checkpoint.recoding import Recoding

    run_ranks(1, _save, tmp_path)
    named = r"are float16: flash optimizers take bf16 or fp32\. .* --bf16, train a step and save"
    for target, repair in (("flash", False), ("flash", True), ("adam", True)):
        request = Request(tmp_path / FULLY, tmp_path / "new", target, repair=repair)
        with pytest.raises(ValueError, match=named):
            Conversion(request)
    for save_as in (FULLY, BUCKETS):
        (rank,) = run_ranks(1, load, tmp_path / save_as, layers=1)
        assert "are float16: flash optimizers take bf16 or fp32" in rank["error"]
        assert "does not belong" not in rank["error"]
    # Nothing is wrong with the checkpoint itself: its weights are its masters, in fp16.
    folder = open_folder(tmp_path / FULLY)
    recoding = Recoding(folder, "adam", FlashOptimConfig())
    chunks = recoding.chunks_to_check()
    assert len(chunks) > 8 and all(map(recoding.belongs, chunks))
    # What the message says to do.
    (state,) = run_ranks(1, _go_on_in_bf16, tmp_path / FULLY, tmp_path / "bf16")
    masters = {k: v for k, v in joined([state]).items() if k.startswith("master.")}
    assert len(masters) > 8
    for key, master in masters.items():
        saved = f"optimizer.state.param.{key.removeprefix('master.')}"
        whole = Box((0,) * master.dim(), tuple(master.shape))
        assert torch.equal(master, folder.reader.read(saved, whole)), key
    (rank,) = run_ranks(1, load, tmp_path / "bf16", layers=1)
    assert rank["logged"] and all(0 < loss < 7 for loss in rank["losses"])
