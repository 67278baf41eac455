"""The installed console script, as users call it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

COMMAND = str(Path(sys.executable).parent / "megatron-flashoptim")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``megatron-flashoptim ARGUMENTS`` and return what it printed."""
    return subprocess.run(
        [COMMAND, *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )


def error(*arguments: str, code: int, **environment: str) -> str:
    """Run it to its failure with an exit code and return its error, which must be one line."""
    done = run(*arguments, **environment)
    assert done.returncode == code, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("megatron-flashoptim") and ": error: " in lines[0]
    return lines[0]
