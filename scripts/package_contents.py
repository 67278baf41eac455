#!/usr/bin/env python3
"""Look into a wheel and a source distribution before they are tried: what is in them, metadata.

    python scripts/package_contents.py SOURCE DIST

SOURCE is the tree they were built from, DIST the folder with both. Exits with 1 and says what is
wrong.
"""

from __future__ import annotations

import ast
import re
import sys
import tarfile
import zipfile
from pathlib import Path

from packaging.metadata import Metadata

PACKAGE = "megatron_flashoptim"
# Of the repository, what only its git and CI read.
NOT_IN_SDIST = (".ci/", ".git")
# Without extras nothing else may be needed: the smoke test runs with these alone.
DEPENDENCIES = {"torch", "triton", "megatron-core"}
EXTRAS = {"te", "apex", "train", "bridge", "inspect", "dev"}


class Wrong(Exception):
    """What is wrong with a distribution."""


def files_below(folder: Path) -> set[str]:
    """Return the files in a folder, as paths relative to it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def only(folder: Path, pattern: str) -> Path:
    """Return the one file that matches."""
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise Wrong(f"one {pattern} is expected in {folder}; there are {len(found)}")
    return found[0]


def compare(what: str, found: set[str], wanted: set[str]) -> None:
    """Compare the names in a distribution with those that should be in it."""
    if missing := sorted(wanted - found):
        raise Wrong(f"{what} lacks {', '.join(missing)}")
    if surplus := sorted(found - wanted):
        raise Wrong(f"{what} holds {', '.join(surplus)}")


def check_wheel(wheel: Path, source: Path, version: str) -> Metadata:
    """Every file of the package and nothing else is in the wheel; returns its metadata."""
    info = f"{PACKAGE}-{version}.dist-info"
    package = {name for name in files_below(source) if name.startswith(f"{PACKAGE}/")}
    about = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    with zipfile.ZipFile(wheel) as archive:
        compare(wheel.name, set(archive.namelist()), package | {f"{info}/{name}" for name in about})
        for name in sorted(package):
            if archive.read(name) != (source / name).read_bytes():
                raise Wrong(f"{wheel.name} holds another {name} than {source}")
        metadata = archive.read(f"{info}/METADATA")
    if f"{PACKAGE}/py.typed" not in package:
        raise Wrong(f"{wheel.name} lacks py.typed: type checkers would not look into it")
    return Metadata.from_email(metadata, validate=True)


def check_sdist(sdist: Path, source: Path, version: str) -> None:
    """Every file of the repository is in the source distribution, but those of git and CI."""
    top = f"{PACKAGE}-{version}/"
    wanted = {name for name in files_below(source) if not name.startswith(NOT_IN_SDIST)}
    with tarfile.open(sdist) as archive:
        names = {member.name.removeprefix(top) for member in archive if member.isfile()}
    built = {name for name in names if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    compare(sdist.name, names - built, wanted)


def check_metadata(metadata: Metadata, version: str) -> None:
    """What indexes and installers read is valid and says what is meant."""
    if (metadata.name, str(metadata.version)) != ("megatron-flashoptim", version):
        raise Wrong(f"the metadata are those of {metadata.name} {metadata.version}")
    if metadata.license_expression != "Apache-2.0":
        raise Wrong(f"the license is {metadata.license_expression}")
    if metadata.description_content_type != "text/markdown" or not metadata.description:
        raise Wrong("README.md is not the description")
    if set(metadata.provides_extra or ()) != EXTRAS:
        raise Wrong(f"the extras are {metadata.provides_extra}, not {sorted(EXTRAS)}")
    always = {
        wanted.name
        for wanted in metadata.requires_dist or ()
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""})
    }
    if always != DEPENDENCIES:
        raise Wrong(f"the dependencies are {sorted(always)}, not {sorted(DEPENDENCIES)}")


def check_version(source: Path, version: str) -> None:
    """Changelog and citation speak of the same version."""
    for name, line in (("CHANGELOG.md", r"^## \[(.*)\]"), ("CITATION.cff", r"^version: (.*)")):
        found = re.search(line, (source / name).read_text(), re.MULTILINE)
        if found is None or found[1] != version:
            raise Wrong(f"{name} speaks of {found and found[1]}, not of {version}")


def version_in(source: Path) -> str:
    """Return ``__version__``, read and not imported: an installed copy may be another."""
    for statement in ast.parse((source / PACKAGE / "__init__.py").read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__version__":
            return str(ast.literal_eval(statement.value))
    raise Wrong(f"{PACKAGE}/__init__.py has no __version__")


def main() -> None:
    """Check both distributions."""
    source, dist = map(Path, sys.argv[1:])
    try:
        version = version_in(source)
        check_version(source, version)
        check_metadata(check_wheel(only(dist, "*.whl"), source, version), version)
        check_sdist(only(dist, "*.tar.gz"), source, version)
    except Wrong as problem:
        sys.exit(f"error: {problem}")
    print(f"wheel and source distribution of {version}: contents and metadata are right")


if __name__ == "__main__":
    main()
