"""The kernels run compiled on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
import sys

import pytest
import torch

_HAS_GPU = torch.cuda.is_available()

if not _HAS_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    # Triton decides how its own functions run when it is imported.
    if "triton" in sys.modules:
        raise pytest.UsageError(
            "triton was imported before tests/kernels; set TRITON_INTERPRET=1 for this run"
        )
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> str:
    """Device of the tensors that kernels work on."""
    return "cuda" if _HAS_GPU else "cpu"
