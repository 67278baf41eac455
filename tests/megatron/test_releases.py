"""The smoke set's own tests: the training loop trains, saves, resumes and converts.

The smoke set is every test marked ``smoke``; ``scripts/test_versions.sh`` runs it with each tested
release of Megatron-Core.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from pretraining import FLASH, FORMATS, pretrain, saved_tensors

pytestmark = pytest.mark.smoke

# Where the legs of scripts/test_versions.sh leave checkpoints for each other.
EXCHANGE = os.environ.get("FLASHOPTIM_CHECKPOINTS")


@pytest.mark.parametrize("name", FORMATS)
def test_a_resumed_run_is_the_uninterrupted_one(
    name: str, whole: dict, corpus: Path, tmp_path: Path
) -> None:
    folder, losses = whole[name]
    save = ("--save", str(tmp_path), "--save-interval", "4")
    load = ("--load", str(folder), "--ckpt-step", "4")
    resumed = pretrain(corpus, *FLASH, *load, *save, *FORMATS[name])
    assert sorted(resumed) == [5, 6, 8], "the checkpoint must have been loaded"
    assert {i: losses[i] for i in (6, 8)} == {i: resumed[i] for i in (6, 8)}
    ours, theirs = (saved_tensors(run / "iter_0000008") for run in (folder, tmp_path))
    assert ours.keys() == theirs.keys()
    assert {t.dtype for t in ours.values()} >= {torch.int8, torch.uint8, torch.bfloat16}
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key


def test_adam_is_followed_and_its_checkpoint_converted(
    whole: dict, corpus: Path, tmp_path: Path
) -> None:
    save = ("--save", str(tmp_path), "--save-interval", "4")
    adam = pretrain(corpus, "--optimizer", "adam", "--train-iters", "8", *save)
    converted = pretrain(corpus, *FLASH, "--load", str(tmp_path), "--ckpt-step", "4")
    assert sorted(converted) == [5, 6, 8]
    _, flash = whole["dp_reshardable"]
    assert sorted(flash) == sorted(adam) == [1, 2, 4, 6, 8]
    for run in (flash, {i: converted[i] for i in (6, 8)}):
        for iteration, (loss, norm) in run.items():
            assert float(loss) == pytest.approx(float(adam[iteration][0]), rel=2e-3)
            # The masters' norm, though the weights are bf16.
            assert float(norm) == pytest.approx(float(adam[iteration][1]), rel=1e-4)


@pytest.mark.skipif(
    EXCHANGE is None, reason="needs FLASHOPTIM_CHECKPOINTS, set by scripts/test_versions.sh"
)
@pytest.mark.parametrize("name", FORMATS)
def test_releases_load_each_others_checkpoints(name: str, whole: dict, corpus: Path) -> None:
    """Every release trains to the same losses; one that goes on with another's checkpoint too."""
    import shutil

    from megatron_flashoptim.megatron.versions import installed_version

    assert EXCHANGE is not None
    folder, losses = whole[name]
    others = [other for other in Path(EXCHANGE).iterdir() if (other / name).is_dir()]
    for other in others:
        load = ("--load", str(other / name), "--ckpt-step", "4")
        resumed = pretrain(corpus, *FLASH, *load, *FORMATS[name])
        assert {i: losses[i] for i in (6, 8)} == {i: resumed[i] for i in (6, 8)}, other.name
    shutil.copytree(folder, Path(EXCHANGE, installed_version(), name))
