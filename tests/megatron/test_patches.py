"""``patches/`` on the files of the installed release, which then train without the launcher."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from in_patched import shifted_parameters

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).resolve().parents[2]
PATCHES = ROOT / "patches"
# Each is named by the newest tag of its release; the package may be of a later patch release.
INTEGRATION, RESHARDING = "flashoptim", "fully-reshardable"

PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")


def _patch(name: str) -> Path:
    from megatron_flashoptim.megatron.versions import installed_version

    series = ".".join(installed_version().split(".")[:2])
    (found,) = PATCHES.glob(f"{name}-core_v{series}.*.patch")
    return found


@pytest.fixture
def patched(tmp_path: Path) -> Path:
    """Copy the installed ``megatron``, apply both patches, and return its parent folder."""
    import megatron.core

    folder = tmp_path / "patched"
    shutil.copytree(Path(megatron.core.__file__).parents[1], folder / "megatron")
    for name in (INTEGRATION, RESHARDING):
        # The package has no tests.
        command = ["git", "apply", "--exclude=tests/*", str(_patch(name))]
        ceiling = {"GIT_CEILING_DIRECTORIES": str(tmp_path)}  # no part of a repository around it
        subprocess.run(command, cwd=folder, check=True, env={**os.environ, **ceiling})
    return folder


def test_a_patched_megatron_trains_and_saves_alike_without_the_launcher(
    whole: dict, corpus: Path, patched: Path
) -> None:
    assert shifted_parameters(), "the defect must be there without the patch"
    checkpoints, losses = whole["dp_reshardable"]
    expected = {
        "patched": str(patched),
        "corpus": str(corpus),
        "checkpoints": str(checkpoints),
        "losses": losses,
    }
    path = [patched, ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "FLASHOPTIM_PATCHED": json.dumps(expected),
    }
    # A process of its own: here Megatron is imported already.
    done = subprocess.run(
        [*PYTEST, str(Path(__file__).with_name("in_patched.py"))],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert "skipped" not in done.stdout, done.stdout


def test_every_tested_release_has_both_patches() -> None:
    from megatron_flashoptim.megatron.versions import TESTED

    for name in (INTEGRATION, RESHARDING):
        tags = {file.stem.removeprefix(f"{name}-core_v") for file in PATCHES.glob(f"{name}-*")}
        assert {tag.rpartition(".")[0] for tag in tags} == {
            release.rpartition(".")[0] for release in TESTED
        }


def test_every_integration_patch_names_every_rule() -> None:
    """Where the package is missing, its choices are refused with its name, not as unknown."""
    from megatron_flashoptim.optim.rules import RULES

    for file in PATCHES.glob(f"{INTEGRATION}-*"):
        added = [line for line in file.read_text().splitlines() if line.startswith("+")]
        (choices,) = [line for line in added if "'flash_adamw'" in line]
        assert [name for name in RULES if f"'{name}'" not in choices] == [], file.name
