"""How a process of a pool starts: one thread, and without what Megatron says when imported.

Ctrl-C ends it without a word: the first process says what there is to say. Where that is killed, it
ends too: it would go on with what it was given, into what the next command writes, and then wait
for more for ever.

Imports nothing of Megatron, so that this is done before anything is.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import warnings


def start() -> None:
    """Be quiet about a GPU and packages that training needs and reading does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    import torch  # only now: it takes seconds, in which Ctrl-C would be told with a traceback

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def _end_with_the_first() -> None:
    first = multiprocessing.parent_process()
    if first is not None:
        first.join()
        os._exit(1)
