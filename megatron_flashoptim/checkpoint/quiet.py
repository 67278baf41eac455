"""How a process of a pool starts: one thread, and without what Megatron says when imported.

Ctrl-C ends it without a word: the first process says what there is to say.

Imports nothing of Megatron, so that this is done before anything is.
"""

from __future__ import annotations

import logging
import signal
import warnings


def start() -> None:
    """Be quiet about a GPU and packages that training needs and reading does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    import torch  # only now: it takes seconds, in which Ctrl-C would be told with a traceback

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
