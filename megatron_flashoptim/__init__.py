"""FlashOptim optimizers inside Megatron-Core's distributed optimizer.

Importing this package, or ``megatron_flashoptim.codec``, imports neither Megatron nor Triton;
the names below that need them do so when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from megatron_flashoptim.megatron.distrib_optimizer import FlashDistributedOptimizer
    from megatron_flashoptim.megatron.factory import get_megatron_optimizer
    from megatron_flashoptim.megatron.install import install, uninstall
    from megatron_flashoptim.optim.config import FlashOptimConfig

# Import Megatron; what they need of it is looked for first, so that a refusal names the release.
_NEED_MEGATRON = ("FlashDistributedOptimizer", "get_megatron_optimizer")
_HOME = {
    "FlashDistributedOptimizer": "megatron_flashoptim.megatron.distrib_optimizer",
    "FlashOptimConfig": "megatron_flashoptim.optim.config",
    "get_megatron_optimizer": "megatron_flashoptim.megatron.factory",
    "install": "megatron_flashoptim.megatron.install",
    "uninstall": "megatron_flashoptim.megatron.install",
}

__all__ = [
    "FlashDistributedOptimizer",
    "FlashOptimConfig",
    "__version__",
    "get_megatron_optimizer",
    "install",
    "uninstall",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _NEED_MEGATRON:
        from megatron_flashoptim.megatron import versions

        versions.check()
    return getattr(importlib.import_module(_HOME[name]), name)
