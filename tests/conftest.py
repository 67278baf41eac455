"""Shared by all tests: one thread; Megatron imported once, on CPU ranks where there is no GPU."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Compute with one thread: tensors are small, and threads that wait for a busy core spin."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def megatron() -> None:
    """Import Megatron in this process, so that forked ranks have it already."""
    if not torch.cuda.is_available():
        from megatron_flashoptim.megatron import cpu

        cpu.enable()
    import megatron.training.training  # noqa: F401  (imported for the forked ranks)
