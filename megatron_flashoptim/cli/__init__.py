"""The command ``megatron-flashoptim``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_flashoptim import __version__
from megatron_flashoptim.cli import memory


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns 0, or exits with 2 on a wrong command line."""
    parser = argparse.ArgumentParser(
        prog="megatron-flashoptim", description="Tools for FlashOptim in Megatron-Core."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    memory.add_parser(commands)
    options, more = parser.parse_known_args(argv)
    if more and not getattr(options, "takes_more", False):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    options.more = more
    return int(options.run(options))
