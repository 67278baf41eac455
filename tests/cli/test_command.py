"""What all commands have in common."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
from console import COMMAND, error, run_installed

from megatron_flashoptim.checkpoint import quiet
from megatron_flashoptim.cli import COMMANDS
from megatron_flashoptim.cli.command import Command
from megatron_flashoptim.cli.command import main as command_main

EXIT_CODES = ("exit codes:", "  0    success", "  1    ", "  2    wrong command line", "  130  int")
NAMES = [command.name for command in COMMANDS]


@pytest.mark.parametrize("name", NAMES)
def test_help_has_examples_and_exit_codes(name: str) -> None:
    done = run_installed(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[lines.index("examples:") + 1].startswith(f"  megatron-flashoptim {name} ")
    for text in EXIT_CODES:
        assert any(line.startswith(text) for line in lines), text


def test_help_lists_every_command() -> None:
    done = run_installed("--help")
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f"    {command.name} " in done.stdout and command.summary in done.stdout
    for text in EXIT_CODES:
        assert f"\n{text}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "megatron-flashoptim: error: the following arguments are required: COMMAND"),
        (("train",), "invalid choice: 'train'"),
    ],
)
def test_wrong_command_exits_with_2_and_one_line(arguments: tuple[str, ...], message: str) -> None:
    said = error(*arguments, code=2)
    assert message in said and said.endswith("; see megatron-flashoptim --help")


def test_missing_megatron_exits_with_1_and_says_what_to_install(tmp_path: Path) -> None:
    # A module of that name which holds nothing, found before the installed package.
    (tmp_path / "megatron.py").touch()
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    without = partial(run_installed, PYTHONPATH=path)
    said = error("memory", "--gpus", "1", "--num-layers", "1", code=1, run=without)
    assert said.startswith("megatron-flashoptim memory: error: No module named 'megatron.")
    assert "pip install 'megatron-flashoptim[train]'" in said


def test_an_interrupted_command_exits_with_130_and_one_line(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def interrupted(_: argparse.Namespace) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        return 0

    command = Command("wait", "", "", (), lambda _: None, interrupted)
    # A shell that starts the tests in the background has them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert command_main([command], "0", ["wait"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().err == "megatron-flashoptim wait: interrupted\n"


def test_processes_of_a_pool_end_at_ctrl_c_without_a_word() -> None:
    with ProcessPoolExecutor(1, get_context("fork"), initializer=quiet.start) as pool:
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_DFL


def test_a_reader_that_stops_early_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as output:
        done = subprocess.run(
            [COMMAND, "memory", "--parameters", "1e9"],
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr) == (0, "")
