"""The rule that docs/rules.md adds by example, as a module."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_flashoptim.optim import rules

NAME = "flash_signum"


def register(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write the page's module to a folder, add its line to the registry, and return the name."""
    page = Path(__file__).parents[1] / "docs" / "rules.md"
    (source,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    module = "signum_of_the_docs"
    (folder / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(rules.RULES, NAME, module)
    return NAME
