"""What several tests of the commands start from."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_ranks


def _save(folder: Path) -> None:
    import checkpoints
    import tiny_gpt
    from exact_adamw import use_as_megatrons_adam

    use_as_megatrons_adam()
    trainer = tiny_gpt.build(tiny_gpt.Setup(flash=None, layers=1))
    trainer.train(2)
    folder.mkdir()
    checkpoints.save(trainer, folder, "fully_reshardable")


@pytest.fixture(scope="session")
def adam(megatron: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an iteration that Adam saved. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("adam") / "iter_0000002"
    run_ranks(1, _save, folder)
    return folder
