"""One way to declare a command of ``megatron-flashoptim``: its help, exit codes and errors.

Whatever the command, an error is one line on stderr, ``megatron-flashoptim COMMAND: error: ...``,
and the exit code says whose it is: 1 where the job could not be done, 2 where the command line is
wrong.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

PROGRAM = "megatron-flashoptim"
INTERRUPTED = 130  # 128 + SIGINT, as of a shell


class UsageError(Exception):
    """The command line is wrong in a way that only the command itself can tell."""


@dataclass(frozen=True)
class Command:
    """What ``megatron-flashoptim NAME`` is.

    Attributes:
        name: of the command.
        summary: one line for the list of commands.
        description: what it does, for its own help.
        examples: whole command lines, without ``megatron-flashoptim``.
        add_arguments: adds its options to a parser.
        run: does the job and prints to stdout. It raises ``UsageError`` for a wrong command line
            (exit code 2), ``ValueError``, ``OSError`` or ``ImportError`` where the job cannot be
            done (exit code 1), with a message that says what to do; may return 1 itself.
        failure: what exit code 1 means.
        takes_more: options it does not know are not refused but passed on in ``options.more``.
    """

    name: str
    summary: str
    description: str
    examples: tuple[str, ...]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    failure: str = "the job could not be done; one line on stderr says why and what to do"
    takes_more: bool = False

    def add_to(self, commands: argparse._SubParsersAction[Parser]) -> None:
        """Add the command's parser."""
        examples = "".join(f"  {PROGRAM} {example}\n" for example in self.examples)
        parser = commands.add_parser(
            self.name,
            help=self.summary,
            description=self.description,
            epilog=f"examples:\n{examples}\n{exit_codes(self.failure)}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_arguments(parser)
        parser.set_defaults(command=self, parser=parser)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and exit with 2."""
        self.exit(2, f"{self.prog}: error: {_one_line(message)}; see {self.prog} --help\n")


def exit_codes(failure: str) -> str:
    """Return the help's table of exit codes."""
    return (
        f"exit codes:\n  0    success\n  1    {failure}\n  2    wrong command line\n"
        f"  {INTERRUPTED}  interrupted"
    )


def main(commands: Sequence[Command], version: str, argv: Sequence[str] | None = None) -> int:
    """Run one of the commands and return its exit code.

    Raises:
        SystemExit: 2 for a wrong command line, 0 for ``--help`` and ``--version``.
    """
    parser = Parser(
        prog=PROGRAM,
        description="Tools for FlashOptim in Megatron-Core.",
        epilog=f"{PROGRAM} COMMAND --help shows the options and examples of a command.\n\n"
        + exit_codes("the job could not be done; one line on stderr says why and what to do"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=version)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in commands:
        command.add_to(subparsers)
    options, more = parser.parse_known_args(argv)
    chosen: Any = options.command
    if more and not chosen.takes_more:
        options.parser.error(f"unrecognized arguments: {' '.join(more)}")
    options.more = more
    _silence_imports()
    try:
        code = chosen.run(options)
        sys.stdout.flush()
    except UsageError as problem:
        options.parser.error(str(problem))
    except KeyboardInterrupt:
        print(f"{PROGRAM} {chosen.name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read has enough, as `head` has; nothing may be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as problem:
        message = _one_line(str(problem))
        if isinstance(problem, ModuleNotFoundError):
            message += "; install what the command needs: pip install 'megatron-flashoptim[train]'"
        print(f"{PROGRAM} {chosen.name}: error: {message}", file=sys.stderr)
        return 1
    return int(code or 0)


def _silence_imports() -> None:
    """Keep quiet about GPUs, ranks and packages that training needs and these commands do not."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(megatron|torch)\.")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # That GPTModel is deprecated, told where a package has set up logging before Megatron does.
    logging.getLogger("megatron.core.models").setLevel(logging.ERROR)
    # That common.pt, in checkpoints of older releases, is old.
    logging.getLogger("megatron.core.dist_checkpointing.strategies.common").setLevel(logging.ERROR)


def _one_line(message: str) -> str:
    return " ".join(message.split())
