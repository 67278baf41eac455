"""Shared by all tests: Megatron is imported once, on CPU ranks where there is no GPU."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def megatron() -> None:
    """Import Megatron in this process, so that forked ranks have it already."""
    if not torch.cuda.is_available():
        from megatron_flashoptim.megatron import cpu

        cpu.enable()
    import megatron.training.training  # noqa: F401  (imported for the forked ranks)
