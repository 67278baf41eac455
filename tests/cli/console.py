"""The command ``megatron-flashoptim``, as users call it: in a fork of this process, or installed.

A fork has what this process has imported, which is seconds less than the installed script takes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Protocol, TextIO

from megatron_flashoptim.cli import main

COMMAND = str(Path(sys.executable).parent / "megatron-flashoptim")
Done = subprocess.CompletedProcess[str]


class Runs(Protocol):
    """Runs ``megatron-flashoptim ARGUMENTS``."""

    def __call__(self, *arguments: str) -> Done:
        """Return exit code and what was printed."""


def run(*arguments: str) -> Done:
    """Run ``megatron-flashoptim ARGUMENTS`` in a fork and return what it printed."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            _main(arguments, out, err)
        _, status = os.waitpid(child, 0)
        out.seek(0)
        err.seek(0)
        code = os.waitstatus_to_exitcode(status)
        return subprocess.CompletedProcess(list(arguments), code, out.read(), err.read())


def _main(arguments: tuple[str, ...], out: TextIO, err: TextIO) -> None:
    code = 1
    try:
        for number, file in ((1, out), (2, err)):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = out, err
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for file in (out, err):
            file.flush()
        os._exit(code)


def run_installed(*arguments: str, **environment: str) -> Done:
    """Run the installed console script and return what it printed."""
    return subprocess.run(
        [COMMAND, *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )


def error(*arguments: str, code: int, run: Runs = run) -> str:
    """Run it to its failure with an exit code and return its error, which must be one line."""
    done = run(*arguments)
    assert done.returncode == code, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("megatron-flashoptim") and ": error: " in lines[0]
    return lines[0]
