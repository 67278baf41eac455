"""Links between the pages lead to files and headings that are there."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from source_messages import REPOSITORY

PAGES = [
    *REPOSITORY.glob("*.md"),
    *(
        page
        for folder in ("docs", "configs", "patches")
        for page in REPOSITORY.glob(f"{folder}/**/*.md")
    ),
]


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub names them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def test_every_link_leads_somewhere() -> None:
    broken, followed = [], 0
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" in target:
                continue
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            if not file.exists() or (anchor and anchor not in anchors(file)):
                broken.append(f"{page.relative_to(REPOSITORY)}: {target}")
            followed += 1
    assert not broken, "\n".join(broken)
    assert followed > 50
