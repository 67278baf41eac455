"""Imports point one way, and Megatron stays where it may be: read from the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_flashoptim

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "megatron_flashoptim"
# Each may import those before it. The launcher is a command line as the commands are.
LAYERS = ("codec", "kernels", "optim", "checkpoint", "megatron", "cli")
LAUNCHER = "run"
MAY_IMPORT_MEGATRON = ("checkpoint", "megatron", "cli")


def imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Yield line and full name of everything imported, in functions and for types only too.

    Args:
        tree: a module, or a part of one.
        package: package that the module is in, for relative imports.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            above = ".".join(parents) if node.level else ""
            module = ".".join(part for part in (above, node.module) if part)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else None
            name = node.func.id if isinstance(node.func, ast.Name) else name
            first = node.args[0] if node.args else None
            if name in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value)


def layer_of(name: str) -> str | None:
    """Return the layer a name of this package is in; None for its version and other packages."""
    top, _, rest = name.partition(".")
    if top != "megatron_flashoptim" or not rest:
        return None
    # Public names of the package stand for those of the modules where they are.
    name = megatron_flashoptim._HOME.get(rest, name)
    layer = name.split(".")[1]
    return None if layer.startswith("__") else layer


def wrong(source: str, module: str) -> list[str]:
    """Return what a module imports and must not, as "module:line imports name"."""
    package, _, _ = module.rpartition(".")
    own = module.split(".")[1]
    rank = LAYERS.index("cli" if own == LAUNCHER else own)
    found = []
    for line, name in imports(ast.parse(source), package):
        layer = layer_of(name)
        upwards = layer is not None and (layer not in LAYERS or LAYERS.index(layer) > rank)
        foreign = name.partition(".")[0] == "megatron" and own not in MAY_IMPORT_MEGATRON
        if upwards or foreign:
            found.append(f"{module}:{line} imports {name}")
    return found


MODULES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"  # imports lazily, for users: in no layer
}


def test_every_folder_is_a_layer() -> None:
    assert {module.split(".")[1] for module in MODULES} == {*LAYERS, LAUNCHER}


def test_imports_point_down() -> None:
    assert [
        line for module, path in MODULES.items() for line in wrong(path.read_text(), module)
    ] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("codec.moments", "import megatron_flashoptim.kernels.codec"),
        ("kernels.adamw", "from megatron_flashoptim.optim import shard"),
        ("kernels.adamw", "from ..optim import shard"),
        ("optim.shard", "def late():\n    from megatron_flashoptim.checkpoint.boxes import cut"),
        ("optim.shard", "from megatron_flashoptim import FlashDistributedOptimizer"),
        ("optim.shard", "import megatron.core"),
        ("optim.shard", "import importlib\nimportlib.import_module('megatron.core.optimizer')"),
        ("checkpoint.boxes", "if TYPE_CHECKING:\n    from megatron_flashoptim.megatron import cpu"),
        ("megatron.cpu", "from megatron_flashoptim import cli"),
        ("megatron.cpu", "from megatron_flashoptim import run"),
        ("run", "import megatron.training"),
    ],
)
def test_an_import_that_points_up_is_found(module: str, source: str) -> None:
    (found,) = wrong(source, f"megatron_flashoptim.{module}")
    assert found.startswith(f"megatron_flashoptim.{module}:")


@pytest.mark.parametrize(
    "source",
    [
        "from megatron_flashoptim import FlashOptimConfig, __version__",
        "from megatron_flashoptim.kernels import adamw\nfrom . import shard",
        "from ..codec import spec",
        "import torch, megatron_flashoptim",
    ],
)
def test_an_import_that_points_down_is_not(source: str) -> None:
    assert wrong(source, "megatron_flashoptim.optim.optimizer") == []


def test_checkpoint_tests_import_megatron_only_when_they_run() -> None:
    """The fixture ``megatron`` must come first: without a GPU it changes torch before."""
    found = []
    for path in sorted((REPOSITORY / "tests" / "checkpoint").glob("*.py")):
        for statement in ast.parse(path.read_text()).body:
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                names = imports(statement, "")
                found += [f"{path.name} {n}" for _, n in names if n.partition(".")[0] == "megatron"]
    assert found == []
