"""Texts in Python source, read from its syntax tree: messages with … where a value is put in."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "megatron_flashoptim"
VALUE = "…"
# Names of variables that hold a message until it is raised or logged.
_HELD = {"problem", "verdict", "message"}
# Classes of refused options, whose third argument is the flag.
_REFUSED_OPTION = {"Refused"}
# Methods that show a message: of parsers and of loggers.
_SHOWN = {"error", "warning", "warn"}


@dataclass(frozen=True)
class Message:
    """A text for users.

    Attributes:
        place: file and line, below the repository.
        text: the message, on one line.
    """

    place: str
    text: str


def one_line(text: str) -> str:
    """Return a text with every run of white space as one space."""
    return " ".join(text.split())


def template(node: ast.AST) -> str | None:
    """Return the text that an expression makes, values as …; None if it is no text."""
    if isinstance(node, ast.Constant):
        return re.sub(r"%[sdr]", VALUE, node.value) if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
        return "".join(str(part) for part in parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = template(node.left), template(node.right)
        if left is not None or right is not None:
            return (VALUE if left is None else left) + (VALUE if right is None else right)
    return None


@cache
def texts(folder: Path) -> list[str]:
    """Return every text in the Python files below a folder."""
    found = (template(node) for file in folder.rglob("*.py") for node in ast.walk(_tree(file)))
    return [one_line(text) for text in found if text]


def messages() -> Iterator[Message]:
    """Yield the package's texts of errors and warnings.

    The first argument of what is named ``...Error``, of ``SystemExit`` and of methods named
    ``error``, ``warning`` and ``warn``, and what is assigned to a variable of ``_HELD``. What is
    printed, logged as information or returned is not found.
    """
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(_tree(file)):
            shown = _shown(node)
            text = None if shown is None else template(shown)
            if text and text.strip(f" {VALUE}"):
                # A node that is shown is a call or a statement, and has a line.
                place = f"{file.relative_to(REPOSITORY)}:{node.lineno}"  # type: ignore[attr-defined]
                yield Message(place, one_line(text))


def refused_options() -> Iterator[Message]:
    """Yield the flag of every refused option, ``Refused(field, refused, flag, reason)``."""
    for file in sorted(PACKAGE.rglob("*.py")):
        constants = _constants(file)
        for node in ast.walk(_tree(file)):
            if not isinstance(node, ast.Call) or len(node.args) != 4:
                continue
            if ast.unparse(node.func) in _REFUSED_OPTION:
                flag = template(node.args[2]) or constants.get(ast.unparse(node.args[2]))
                place = f"{file.relative_to(REPOSITORY)}:{node.lineno}"
                assert flag, f"{place}: the flag of a refused option is not a text"
                yield Message(place, flag)


def _shown(node: ast.AST) -> ast.AST | None:
    """Return the expression of a message that a node shows to the user, or None."""
    if isinstance(node, ast.Call) and node.args:
        name = ast.unparse(node.func).rpartition(".")[2]
        if name.endswith("Error") or name in {"SystemExit", *_SHOWN}:
            return node.args[0]
    if isinstance(node, ast.Assign):
        target = node.targets[0]
        if isinstance(target, ast.Subscript):
            target = target.value
        if ast.unparse(target).rpartition(".")[2] in _HELD:
            return node.value
    return None


def _constants(file: Path) -> dict[str, str]:
    """Return the texts that a module gives names."""
    assigned = (node for node in _tree(file).body if isinstance(node, ast.Assign))
    found = ((ast.unparse(node.targets[0]), template(node.value)) for node in assigned)
    return {name: text for name, text in found if text}


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())
