"""What the launcher sets right in Megatron before it runs a script."""

from __future__ import annotations

import importlib.util
import logging
import os


def skip_compilation_of_built_helpers() -> None:
    """Make ``compile_helpers()`` do nothing where helpers are built and no Makefile is there.

    ``megatron.training`` compiles the dataset helpers with ``make`` at start-up and exits if that
    fails. The megatron-core wheel holds the compiled helpers and no Makefile.
    """
    from megatron.core.datasets import utils

    folder = os.path.dirname(os.path.abspath(utils.__file__))
    has_makefile = os.path.isfile(os.path.join(folder, "Makefile"))
    is_built = importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None
    if is_built and not has_makefile:
        utils.compile_helpers = lambda: None


def log_as_megatron() -> None:
    """Configure logging as ``megatron.training`` does when it is imported.

    That does nothing once a module that was imported before it has logged something. Megatron's
    timers, and all else of level INFO, would be lost.
    """
    from megatron.training.log_handler import CustomHandler

    if not any(isinstance(handler, CustomHandler) for handler in logging.getLogger().handlers):
        logging.basicConfig(handlers=[CustomHandler()], level=logging.INFO, force=True)
