"""Files of Megatron's arguments, as in ``configs/``; on a command line, ``@FILE``."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

# Blanks and whole words up to a comment, as in a shell: a "#" within a word or quotes begins none,
# which it does wherever it stands for shlex.
_BEFORE_COMMENT = re.compile(
    r"""(?: \s++ | (?!\#) (?: \\. | '[^']*' | "(?: \\. | [^"\\] )*+" | [^\s'"\\] )++ )*+""",
    re.VERBOSE,
)


def read_arguments(file: str | Path) -> list[str]:
    """Return the words of a file; quotes as in a shell, ``#`` before a word starts a comment.

    Raises:
        ValueError: names the file that cannot be read, or the line with an open quote.
    """
    try:
        lines = Path(file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"cannot read the file of arguments {file}: {problem}") from problem
    words = []
    for number, line in enumerate(lines, 1):
        try:
            words += shlex.split(_without_comment(line))
        except ValueError as problem:
            raise ValueError(
                f"cannot read the file of arguments {file}, line {number}: {problem}: {line}"
            ) from problem
    return words


def expand(arguments: Iterable[str]) -> list[str]:
    """Return arguments with each ``@FILE`` replaced by the file's words.

    What is given after a file stands instead of what is in it, as argparse takes the last.

    Raises:
        ValueError: as ``read_arguments``.
    """
    words = []
    for argument in arguments:
        words += read_arguments(argument[1:]) if argument.startswith("@") else [argument]
    return words


def _without_comment(line: str) -> str:
    before = _BEFORE_COMMENT.match(line)
    assert before is not None  # it matches nothing too
    # Where the rest is no comment it is a quote that is not closed, for shlex to tell.
    return before[0] if line[before.end() :].startswith("#") else line
