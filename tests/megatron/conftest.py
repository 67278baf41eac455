"""All tests here need Megatron in this process before they fork ranks."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _megatron(megatron: None) -> None:
    logging.disable(logging.WARNING)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the corpus with the project's own script."""
    folder = tmp_path_factory.mktemp("corpus")
    script = Path(__file__).resolve().parents[2] / "scripts" / "prepare_corpus.py"
    subprocess.run([sys.executable, str(script), str(folder)], check=True)
    return folder
