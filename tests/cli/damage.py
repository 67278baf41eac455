"""What tests do to files of checkpoints."""

from __future__ import annotations

from pathlib import Path


def flip(file: Path, position: int) -> None:
    """Flip the lowest bit of a byte; doing it again undoes it."""
    with open(file, "r+b") as opened:
        opened.seek(position)
        (old,) = opened.read(1)
        opened.seek(position)
        opened.write(bytes([old ^ 1]))
