#!/usr/bin/env python3
"""Make an environment that has, of the one this runs in, only what a wheel asks for.

    python scripts/package_environment.py FOLDER WHEEL [EXTRA ...]

The wheel itself is not installed. Its requirements, and theirs, are links to the packages of this
environment: made in a second, with nothing that nobody asked for, and without the repository.
"""

from __future__ import annotations

import sys
import venv
import zipfile
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def requirements_of(wheel: Path) -> list[Requirement]:
    """Return what a wheel requires, extras and all."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Metadata.from_email(archive.read(name), validate=True)
    return list(metadata.requires_dist or ())


def applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    """Return whether a requirement holds here, with some extras of what it belongs to."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def closure(requirements: list[Requirement], extras: list[str]) -> Iterator[Distribution]:
    """Yield the distributions that are required, directly or not.

    Raises:
        SystemExit: one is not installed.
    """
    seen = set()
    waiting = [requirement for requirement in requirements if applies(requirement, extras)]
    while waiting:
        wanted = waiting.pop()
        key = (canonicalize_name(wanted.name), frozenset(wanted.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            found = distribution(wanted.name)
        except PackageNotFoundError:
            sys.exit(f"error: {wanted} is required and not in {sys.prefix}")
        yield found
        theirs = map(Requirement, found.requires or ())
        waiting += [requirement for requirement in theirs if applies(requirement, wanted.extras)]


def entries(found: Distribution) -> set[Path]:
    """Return the files and folders at the top of site-packages that hold a distribution."""
    names = {path.parts[0] for path in found.files or ()} - {"..", "__pycache__"}
    return {Path(str(found.locate_file(name))) for name in names}


def main() -> None:
    """Make the environment."""
    folder, wheel, extras = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    venv.create(folder, symlinks=True)
    required = folder.resolve() / "required"
    required.mkdir()
    for found in closure(requirements_of(wheel), extras):
        for entry in entries(found):
            link = required / entry.name
            if not link.is_symlink():  # namespaces are shared
                link.symlink_to(entry)
    (packages,) = folder.glob("lib/python3.*/site-packages")
    # Searched after what pip installs here; .pth files in it are not run.
    (packages / "required.pth").write_text(f"{required}\n")


if __name__ == "__main__":
    main()
