"""How a process of a pool starts: one thread, and without what Megatron says when imported.

Imports nothing of Megatron, so that this is done before anything is.
"""

from __future__ import annotations

import logging
import warnings

import torch


def start() -> None:
    """Be quiet about a GPU and packages that training needs and reading does not."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
