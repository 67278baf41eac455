"""Arguments of Megatron's training loop, for code that also runs without one."""

from __future__ import annotations

import sys
from typing import Any


def training_args() -> Any | None:
    """Return this process's arguments, or None where ``megatron.core`` is used alone."""
    # Not imported for those who have no training loop.
    global_vars = sys.modules.get("megatron.training.global_vars")
    return getattr(global_vars, "_GLOBAL_ARGS", None)
