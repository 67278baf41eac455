"""README.md has every flag, and the versions of Python that pyproject.toml says are supported."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields

from source_messages import REPOSITORY

from megatron_flashoptim import FlashOptimConfig

README = (REPOSITORY / "README.md").read_text()


def test_every_flag_is_in_the_table() -> None:
    rows = set(re.findall(r"^\| `(--[\w-]+)` \|", README, re.MULTILINE))
    # The seed is Megatron's own --seed, the optimizer its --optimizer.
    names = {field.name.replace("_", "-") for field in fields(FlashOptimConfig)} - {"seed"}
    flags = {f"--flash-{name}" for name in names - {"optimizer"}} | {"--optimizer"}
    assert flags <= rows and {row for row in rows if row.startswith("--flash-")} <= flags


def test_classifiers_name_the_python_that_is_tested() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    classified = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    said = re.search(r"^Python ([\d., ]+) \((3\.\d+): allowed, not tested\)", README, re.MULTILINE)
    assert said is not None
    assert classified == said[1].split(", ")
    assert project["requires-python"] == f">={classified[0]}"
    for file in (".ci/run", "CONTRIBUTING.md", "docs/getting-started.md", "scripts/quickstart.sh"):
        text = " ".join((REPOSITORY / file).read_text().replace("\n# ", "\n").split())
        assert f"{said[1]} ({said[2]} is allowed and not tested)" in text, file


def test_what_the_base_install_needs_it_needs_everywhere() -> None:
    """The update rules import Triton on CPU ranks too: no marker leaves a requirement out."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=; ]", line)[0] for line in project["dependencies"]}
    assert names == {"torch", "triton", "megatron-core"}
    assert not [line for line in project["dependencies"] if ";" in line]
