"""The command ``megatron-flashoptim``."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_flashoptim import __version__
from megatron_flashoptim.cli import command, convert, inspect, memory

COMMANDS = (memory.COMMAND, convert.COMMAND, inspect.COMMAND)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code, or exits with 2 on a wrong command line."""
    return command.main(COMMANDS, __version__, argv)
