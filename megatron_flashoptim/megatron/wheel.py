"""Work around a gap of the megatron-core wheel, for scripts run by the launcher.

``megatron.training`` compiles the dataset helpers with ``make`` at start-up and exits if that
fails. The wheel holds the compiled helpers and no Makefile.
"""

from __future__ import annotations

import importlib.util
import os


def skip_compilation_of_built_helpers() -> None:
    """Make ``compile_helpers()`` do nothing where helpers are built and no Makefile is there."""
    from megatron.core.datasets import utils

    folder = os.path.dirname(os.path.abspath(utils.__file__))
    has_makefile = os.path.isfile(os.path.join(folder, "Makefile"))
    is_built = importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None
    if is_built and not has_makefile:
        utils.compile_helpers = lambda: None
