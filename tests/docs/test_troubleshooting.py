"""docs/troubleshooting*.md quote messages that exist, and have every message for users.

On the page a message is in backticks at the start of a list item (several in one item are
separated by commas), … standing for values; an … at either end for more text.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest
from source_messages import (
    REPOSITORY,
    VALUE,
    Message,
    messages,
    one_line,
    refused_options,
    template,
    texts,
)

from megatron_flashoptim.megatron.arguments import add_flash_arguments

PAGE = REPOSITORY / "docs" / "troubleshooting.md"
OF_CHECKPOINTS = REPOSITORY / "docs" / "troubleshooting-checkpoints.md"
SAID_BY_MEGATRON = "## Said by Megatron"
# Not for users: arguments of single functions of the codec and of a step, called by this
# package's own code with values it has checked, and texts that are part of another message.
INTERNAL_FILES = (
    "megatron_flashoptim/codec/",
    "megatron_flashoptim/optim/hyper.py",
    "megatron_flashoptim/optim/segments.py",
    "megatron_flashoptim/optim/shard.py",
    "megatron_flashoptim/checkpoint/torch_file.py",
    "megatron_flashoptim/megatron/memory/nominal.py",
)
INTERNAL = {
    "module … has no attribute …": "Python's own message for a name that is not there",
    "segment row … of … rows": "built by FlashDistributedOptimizer only",
    "cannot convert a correction from … to …": "both dtypes are this package's own",
    "unrecognized arguments: …": "argparse's own message",
    "… takes …; got …": "FlashDistributedOptimizer gives a rule its own options only",
    "rank …: …": "the beginning of the warning that the pool of gradients grows",
    "… cannot be used with …": "Megatron-Bridge's beginning of the rules' own refusals",
}

# What the job scripts log of a start that goes as it should.
PROGRESS = {"on …", "on …, from ……", "finished", "finished…", "requeued"}

WITHOUT_LAUNCHER = "--optimizer flash_adamw"
WRONG_LINES = (
    WITHOUT_LAUNCHER,
    "--optimizer flash_adamw --flash-master-bits 20",
    "--optimizer adam --flash-master-bit 24",
)


def quoted(text: str) -> list[str]:
    """Return the messages at the starts of a page's list items."""
    items = re.findall(r"^- ((?:`[^`]+`(?:,\s+)?)+)", text, re.MULTILINE)
    return [one_line(message) for item in items for message in re.findall(r"`([^`]+)`", item)]


@cache
def pattern(message: str) -> re.Pattern[str]:
    """Return what matches the texts that a quoted message stands for."""
    return re.compile(".*".join(re.escape(part) for part in message.split(VALUE)), re.DOTALL)


def covers(message: str, text: str) -> bool:
    """Return whether a quoted message is that text."""
    return pattern(message).fullmatch(text) is not None


def test_every_quoted_message_is_in_the_source(capsys: pytest.CaptureFixture[str]) -> None:
    ours, megatrons = _pages()
    written = [*texts(REPOSITORY / "megatron_flashoptim"), *texts(REPOSITORY / "scripts")]
    written += _said_by_argparse(capsys)
    unknown = [
        message
        for message in quoted(ours)
        if not any(covers(message, text) for text in written) and not _in_shell(message)
    ]
    assert not unknown, "docs/troubleshooting*.md quote what no source says: " + "; ".join(unknown)
    named = re.findall(r"^- `([^`]+)`\s+\((?:`([\w./]+)`)\)", megatrons, re.MULTILINE)
    assert len(named) == len(quoted(megatrons)), "each of Megatron's messages names its file"
    for message, file in named:
        found = _megatrons_texts(file)
        assert any(covers(one_line(message), text) for text in found), f"{file}: {message}"


def test_every_message_for_users_is_quoted() -> None:
    page = quoted(_pages()[0])
    assert all(len(message.replace(VALUE, "").strip()) > 10 for message in page), "too vague"
    missing = [
        message
        for message in messages()
        if not message.place.startswith(INTERNAL_FILES)
        and message.text not in INTERNAL
        and not any(covers(quote, message.text) for quote in page)
    ]
    assert not missing, _told(missing, "or, if no user can meet it, to INTERNAL in this test")


def test_every_line_of_a_job_that_did_not_go_on_is_quoted() -> None:
    page = quoted(_pages()[0])
    logged = set()
    for script in (REPOSITORY / "scripts" / "slurm").glob("*.sh"):
        text = script.read_text().replace("\\\n", "")
        for said in re.findall(r'\bsay "([^"]*)"', text):
            logged.add(re.sub(r"\$\(\(.*?\)\)|\$\{[^}]*\}|\$\w+", VALUE, said))
    missing = {text for text in logged if not any(covers(quote, text) for quote in page)}
    assert missing == PROGRESS


def test_every_refused_option_is_in_a_table() -> None:
    cells = set(re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(), re.MULTILINE))
    rules = list(refused_options())
    assert len(rules) > 20
    missing = [rule for rule in rules if rule.text not in cells]
    assert not missing, _told(missing, "in the table of its group")


def test_internal_messages_are_still_there() -> None:
    found = list(messages())
    gone = [text for text in INTERNAL if not any(message.text == text for message in found)]
    gone += [
        file
        for file in INTERNAL_FILES
        if not any(message.place.startswith(file) for message in found)
    ]
    assert not gone, f"take out of INTERNAL or INTERNAL_FILES: {gone}"


def _pages() -> tuple[str, str]:
    """Return what is said of this package's messages, and of Megatron's."""
    ours, megatrons = PAGE.read_text().split(f"\n{SAID_BY_MEGATRON}\n")
    return f"{ours}\n{OF_CHECKPOINTS.read_text()}", megatrons


def _said_by_argparse(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return what is said of wrong command lines, without the plugin and with it."""
    said = []
    for wrong in WRONG_LINES:
        parser = argparse.ArgumentParser(prog="pretrain_gpt.py", allow_abbrev=False)
        parser.add_argument("--optimizer", choices=["adam", "sgd"])
        if wrong != WITHOUT_LAUNCHER:
            add_flash_arguments(parser)
        with pytest.raises(SystemExit):
            parser.parse_args(wrong.split())
        last = capsys.readouterr().err.splitlines()[-1]
        said.append(last.removeprefix("pretrain_gpt.py: error: "))
    return said


def _told(missing: list[Message], where: str) -> str:
    lines = "\n".join(f"  {message.place}\n    {message.text}" for message in missing)
    return (
        f"add to docs/troubleshooting.md or docs/troubleshooting-checkpoints.md, {where}:\n{lines}"
    )


def _in_shell(message: str) -> bool:
    """Return whether a line of a shell script has the text, with its variables."""
    lines = [
        line
        for script in (REPOSITORY / "scripts").rglob("*.sh")
        for line in script.read_text().replace("\\\n", "").splitlines()
    ]
    return any(pattern(message).search(line) for line in lines)


def _megatrons_texts(file: str) -> list[str]:
    """Return the texts of a file of Megatron, found without importing it."""
    namespace = importlib.util.find_spec("megatron")
    assert namespace is not None and namespace.submodule_search_locations is not None
    # pytest's path has a folder of that name too: tests/megatron.
    places = (Path(place).parent / file for place in namespace.submodule_search_locations)
    path = next(place for place in places if place.is_file())
    nodes = ast.walk(ast.parse(path.read_text()))
    return [one_line(text) for text in map(template, nodes) if text]
