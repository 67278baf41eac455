"""Shared by all tests: one thread; Megatron, on CPU ranks where there is no GPU; a corpus."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Compute with one thread: tensors are small, and threads that wait for a busy core spin.

    torch replaces its thread pool at the first use after a fork, without a lock: where a rank and
    gloo's thread are first at once, one of them finds none ("Invalid thread pool"). So a forked
    rank uses it while it has one thread.
    """
    torch.set_num_threads(1)
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


@pytest.fixture(scope="session")
def megatron() -> None:
    """Import Megatron in this process, so that forked ranks have it already."""
    if not torch.cuda.is_available():
        from megatron_flashoptim.megatron import cpu

        cpu.enable()
    import megatron.training.training  # noqa: F401  (imported for the forked ranks)

    from megatron_flashoptim.megatron.versions import installed_version

    # Megatron adds the commit of the git repository that it is installed within, such as .venv's.
    installed = installed_version().partition("+")[0]
    wanted = os.environ.get("FLASHOPTIM_MEGATRON_CORE", installed)
    assert installed == wanted, "scripts/test_versions.sh put another release on the path"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the corpus with the project's own script."""
    folder = tmp_path_factory.mktemp("corpus")
    script = Path(__file__).resolve().parents[1] / "scripts" / "prepare_corpus.py"
    subprocess.run([sys.executable, str(script), str(folder)], check=True)
    return folder
