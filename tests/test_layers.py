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
        ("kernels.step", "from megatron_flashoptim.optim import shard"),
        ("kernels.step", "from ..optim import shard"),
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
        "from megatron_flashoptim.kernels import step\nfrom . import shard",
        "from ..codec import spec",
        "import torch, megatron_flashoptim",
    ],
)
def test_an_import_that_points_down_is_not(source: str) -> None:
    assert wrong(source, "megatron_flashoptim.optim.optimizer") == []


def run_at_import(tree: ast.AST) -> Iterator[ast.stmt]:
    """Yield the import statements that run when a module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield from run_at_import(node)


# Modules of the tests, which import one another by their names alone, and of the package.
FILES = {path.stem: path for path in sorted((REPOSITORY / "tests").rglob("*.py"))}
FILES |= {module.removesuffix(".__init__"): path for module, path in MODULES.items()}


def way_to_megatron(source: str, package: str = "", seen: frozenset[str] = frozenset()) -> str:
    """Return by way of which modules importing a source imports Megatron; empty: it does not."""
    for statement in run_at_import(ast.parse(source)):
        for _, name in imports(statement, package):
            if name.partition(".")[0] == "megatron":
                return name
            if layer_of(name) is not None:
                name = megatron_flashoptim._HOME.get(name.partition(".")[2], name)
            # Importing a module runs the packages that it is in.
            parts = name.split(".")
            names = {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
            for each in sorted((names & FILES.keys()) - seen):
                seen |= {each}
                path = FILES[each]
                own = each if path.name == "__init__.py" else each.rpartition(".")[0]
                if way := way_to_megatron(path.read_text(), own, seen):
                    return f"{each} > {way}"
    return ""


def test_checkpoint_tests_import_megatron_only_when_they_run() -> None:
    """The fixture ``megatron`` must come first: without a GPU it changes torch before."""
    files = sorted((REPOSITORY / "tests" / "checkpoint").glob("*.py"))
    assert files
    assert [
        f"{file.name} > {way}" for file in files if (way := way_to_megatron(file.read_text()))
    ] == []


@pytest.mark.parametrize(
    ("source", "way"),
    [
        ("import tiny_gpt", "tiny_gpt > "),
        ("from megatron_flashoptim.checkpoint import offline", "checkpoint.offline > "),
        (
            "try:\n    from megatron_flashoptim import FlashDistributedOptimizer\nfinally: ...",
            " > ",
        ),
        ("def late():\n    import megatron.core", None),
        ("if TYPE_CHECKING:\n    import megatron.core", None),
        ("from megatron_flashoptim import FlashOptimConfig, codec, kernels, optim", None),
    ],
)
def test_megatron_is_found_behind_what_is_imported(source: str, way: str | None) -> None:
    found = way_to_megatron(source)
    assert found == "" if way is None else way in found and "megatron.core" in found
