"""Work around gaps of the megatron-core wheel, for scripts run by the launcher.

``megatron.training`` compiles the dataset helpers with ``make`` at start-up and exits if that
fails. The wheel holds the compiled helpers and no Makefile.

It configures logging when it is imported, which does nothing once a module that was imported
before has logged something: timers and all else of level INFO are lost then.
"""

from __future__ import annotations

import importlib.util
import logging
import os


def skip_compilation_of_built_helpers() -> None:
    """Make ``compile_helpers()`` do nothing where helpers are built and no Makefile is there."""
    from megatron.core.datasets import utils

    folder = os.path.dirname(os.path.abspath(utils.__file__))
    has_makefile = os.path.isfile(os.path.join(folder, "Makefile"))
    is_built = importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None
    if is_built and not has_makefile:
        utils.compile_helpers = lambda: None


def log_as_megatron() -> None:
    """Configure logging as ``megatron.training`` does, if an import came before it."""
    from megatron.training.log_handler import CustomHandler

    if not any(isinstance(handler, CustomHandler) for handler in logging.getLogger().handlers):
        logging.basicConfig(handlers=[CustomHandler()], level=logging.INFO, force=True)
