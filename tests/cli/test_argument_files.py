"""Files of arguments are read as a shell reads words, quotes and comments."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron_flashoptim.cli.argument_files import expand, read_arguments

LINES = {
    "--wandb-exp-name run#3 --bf16": ["--wandb-exp-name", "run#3", "--bf16"],
    "--bf16 # comment": ["--bf16"],
    "# --bf16": [],
    "  # --bf16 'open": [],
    '--bf16 #comment "open': ["--bf16"],
    "--name 'a # b' --bf16 # c": ["--name", "a # b", "--bf16"],
    '--name "a # \\"b" --bf16': ["--name", 'a # "b', "--bf16"],
    "--name 'a'# --bf16": ["--name", "a#", "--bf16"],
    "--name \\#1 a\\ # b": ["--name", "#1", "a #", "b"],
    "--name '' ## c": ["--name", ""],
    "\t--freq\t'([0]*1+[1]*2)'\t# c": ["--freq", "([0]*1+[1]*2)"],
}


def test_words_quotes_and_comments_are_those_of_a_shell(tmp_path: Path) -> None:
    shell = tmp_path / "shell.sh"
    shell.write_text("".join(f"printf '%s\\0' {line}\nprintf '\\n'\n" for line in LINES))
    printed = subprocess.run(["bash", str(shell)], capture_output=True, text=True, check=True)
    file = tmp_path / "one.args"
    for (line, words), of_shell in zip(LINES.items(), printed.stdout.splitlines(), strict=True):
        file.write_text(line)
        assert read_arguments(file) == words, line
        # printf without arguments prints one empty word.
        assert of_shell.split("\0")[:-1] == (words or [""]), line
    file.write_text("\n".join(LINES))
    every = [word for words in LINES.values() for word in words]
    assert expand(["--a", f"@{file}", "--b"]) == ["--a", *every, "--b"]


@pytest.mark.parametrize("line", ["--name 'run # 3", '--name "a\\"', "--name run#'3", "--name \\"])
def test_an_open_quote_is_told_with_file_and_line(line: str, tmp_path: Path) -> None:
    file = tmp_path / "one.args"
    file.write_text(f"--bf16\n{line}\n")
    with pytest.raises(ValueError, match=r"one\.args, line 2: No ") as problem:
        read_arguments(file)
    assert str(problem.value).endswith(line)
