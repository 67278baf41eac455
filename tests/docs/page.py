"""Run the ``bash`` blocks of a page, in order and in one shell, as a reader would paste them.

Blocks after a comment ``<!-- not run: why -->`` are left out. The launchers (``torchrun``,
``python``, ``megatron-flashoptim``) are shell functions here that hand their arguments to this
process, where Megatron is imported already: a fork does what the command would do, in seconds.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import re
import runpy
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ranks import run_ranks

_BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n)?^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SHELL = """
set -euo pipefail
call() {
    printf '%s\\0' "$@" "" > "$PAGE/request"
    read -r code < "$PAGE/answer"
    cat "$PAGE/printed"
    return "$code"
}
torchrun() { call torchrun "$@"; }
python() { call python "$@"; }
megatron-flashoptim() { call megatron-flashoptim "$@"; }
"""
_SECONDS = 240


def blocks(page: str, language: str) -> list[str]:
    """Return a page's blocks of a language, without those that are marked as not run."""
    found = _BLOCK.findall(page)
    return [text for skipped, name, text in found if name == language and not skipped]


def run(page: str, folder: Path) -> str:
    """Run the bash blocks of a page in a folder; returns what they printed.

    Raises:
        AssertionError: a command failed; what was printed until then is the message.
    """
    pipes = folder / ".page"
    pipes.mkdir()
    for name in ("request", "answer"):
        os.mkfifo(pipes / name)
    (pipes / "script").write_text(_SHELL + "\n".join(blocks(page, "bash")))
    # Open in both directions, so that neither ends when one message has been read.
    requests, answers = (os.open(pipes / name, os.O_RDWR) for name in ("request", "answer"))
    with (pipes / "output").open("w") as output:
        shell = subprocess.Popen(
            ["bash", str(pipes / "script")],
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PAGE": str(pipes)},
        )
    try:
        deadline = time.monotonic() + _SECONDS
        while shell.poll() is None:
            assert time.monotonic() < deadline, "the page took too long"
            if select.select([requests], [], [], 0.1)[0]:
                code = _answer(_read(requests), pipes / "printed", folder)
                os.write(answers, f"{code}\n".encode())
    finally:
        shell.kill()
        os.close(requests)
        os.close(answers)
    printed = (pipes / "output").read_text()
    if shell.returncode:
        logs = "".join(path.read_text()[-3000:] for path in sorted(folder.glob("*/*.log"))[-1:])
        raise AssertionError(f"exit code {shell.returncode}:\n{printed}\n{logs}")
    return printed


def quoted_lines(page: str) -> list[re.Pattern[str]]:
    """Return what finds each line of a page's ``text`` blocks in real output.

    Numbers may be others, "..." stands for anything, and white space is all the same.
    """
    lines = [line.strip() for block in blocks(page, "text") for line in block.splitlines()]
    return [_loosely(line) for line in lines if line]


def _loosely(line: str) -> re.Pattern[str]:
    number = r"\d[\d.]*(?:[eE][+-]\d+)?"
    parts = []
    for words in re.split(
        r"(?<!\.)\.\.\.(?!\.)", line
    ):  # not the dots that Megatron fills lines with
        fixed = [re.escape(part) for part in re.split(number, words)]
        parts.append(re.sub(r"(?:\\ )+", r"\\s+", number.join(fixed)))
    return re.compile(".*".join(parts))


def _read(requests: int) -> list[str]:
    """Return the words of one command, each with a NUL behind it, and an empty one at the end."""
    read = b""
    while not read.endswith(b"\0\0"):
        read += os.read(requests, select.PIPE_BUF)
    return read.decode().split("\0")[:-2]


def _answer(words: list[str], printed: Path, folder: Path) -> int:
    """Do what a command says, its output going to a file; returns its exit code."""
    command, *arguments = words
    printed.write_text("")
    if command == "torchrun":
        ranks, arguments = _of_torchrun(arguments)
        try:
            run_ranks(ranks, _train, arguments, printed, folder, timeout=_SECONDS)
        except AssertionError as problem:
            with printed.open("a") as output:
                output.write(str(problem))
            return 1
        return 0
    body = _script if command == "python" else _tool
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_in_fork, args=(body, arguments, printed, folder))
    process.start()
    process.join(_SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
        with printed.open("a") as output:
            output.write(f"killed after {_SECONDS} s: {' '.join(words)}\n")
        return 1
    return process.exitcode


def _of_torchrun(arguments: list[str]) -> tuple[int, list[str]]:
    """Return the number of ranks and the arguments of megatron_flashoptim.run."""
    standalone, flag, ranks, module, name, *rest = arguments
    assert (standalone, flag, module) == ("--standalone", "--nproc-per-node", "-m")
    assert name == "megatron_flashoptim.run"
    return int(ranks), rest


def _print_to(printed: Path) -> None:
    output = os.open(printed, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    # pytest's handlers are in the place of the one that logging would make by itself.
    logging.basicConfig(level=logging.INFO, force=True)


def _train(arguments: list[str], printed: Path, folder: Path) -> None:
    import torch
    from checkpoints import fork_queue_of_results

    from megatron_flashoptim import run

    fork_queue_of_results()
    torch.distributed.destroy_process_group = lambda *_: None  # run_ranks does
    os.chdir(folder)
    _print_to(printed)
    try:
        run.main(arguments)
    except SystemExit as end:  # as after --exit-interval
        assert not end.code, end
    sys.stdout.flush()


def _script(arguments: list[str]) -> None:
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")


def _tool(arguments: list[str]) -> None:
    from megatron_flashoptim.cli import main

    sys.exit(main(arguments))


def _in_fork(
    body: Callable[[list[str]], Any], arguments: list[str], printed: Path, folder: Path
) -> None:
    os.chdir(folder)
    _print_to(printed)
    with contextlib.ExitStack() as last:
        last.callback(sys.stdout.flush)
        body(arguments)
