"""All tests here need Megatron in this process before they fork ranks."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _megatron(megatron: None) -> None:
    logging.disable(logging.WARNING)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the corpus with the project's own script, once for all runs of the training loop."""
    from pretraining import prepare_corpus

    return prepare_corpus(tmp_path_factory.mktemp("corpus"))
