"""All tests here need Megatron in this process before they fork ranks."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _megatron(megatron: None) -> None:
    logging.disable(logging.WARNING)


@pytest.fixture(scope="session")
def whole(
    megatron: None, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, dict]]:
    """Return checkpoints and losses of an uninterrupted run that saved in each format."""
    from pretraining import FLASH, FORMATS, pretrain

    found = {}
    for name, flags in FORMATS.items():
        folder = tmp_path_factory.mktemp(name)
        save = ("--save", str(folder), "--save-interval", "4")
        found[name] = (folder, pretrain(corpus, *FLASH, *save, *flags))
    return found
