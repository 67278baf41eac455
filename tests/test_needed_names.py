"""Whatever training imports from Megatron is looked for by ``versions`` before it is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from test_layers import MODULES, PACKAGE

from megatron_flashoptim.megatron import install, versions

# Imported by no training run, or looked for where it is used.
FILES_APART = {
    "checkpoint/offline.py": "megatron-flashoptim convert",
    "megatron/bridge.py": "Megatron-Bridge's recipes, which it looks for itself",
    "megatron/cpu.py": "--device cpu, which runs before Megatron is imported",
    "megatron/memory/activations.py": "megatron-flashoptim memory",
    "megatron/memory/nominal.py": "megatron-flashoptim memory",
    "megatron/memory/planned_args.py": "megatron-flashoptim memory",
    "megatron/memory/planner.py": "megatron-flashoptim memory, with 0.18 and newer",
}
# Modules that versions.py takes names from beside those.
VERSIONS = "megatron/versions.py"
MODULES_APART = {
    "megatron.core.package_info": "asked for the version; there may be none",
    "megatron.training": "versions.pretrain, for scripts of this project",
    "megatron.training.arguments": "versions.pretrain, for scripts of this project",
    "megatron.training.argument_utils": "versions.pretrain, which asks what is in it",
    "megatron.core.enums": "versions.pretrain, for scripts of this project",
}


def used(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield line, module and name of what a source takes from Megatron when it runs.

    The name is empty where a module is imported whole; what is then taken from it by its name in
    the source comes beside.
    """
    tree = ast.parse(source)
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    modules = {}
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                modules[alias.asname or alias.name] = alias.name
                yield node.lineno, alias.name, ""
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            for alias in node.names:
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield node.lineno, node.module, alias.name
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            if isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value), ""
        elif isinstance(node, ast.Assign) and len(node.targets) == 1:
            taken = node.value
            if isinstance(taken, ast.Call) and ast.unparse(taken.func) == "importlib.import_module":
                modules[ast.unparse(node.targets[0])] = ast.literal_eval(taken.args[0])
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in modules:
            yield node.lineno, modules[ast.unparse(node.value)], node.attr


def not_looked_for(source: str, place: str) -> list[str]:
    """Return what a source takes from Megatron that ``versions`` does not look for."""
    found = []
    for line, module, name in used(source):
        if f"{module}.{name}" in LOOKED_FOR or name.startswith("__"):
            continue  # a module, whose names are found where they are taken
        missing = name not in LOOKED_FOR.get(module, ()) if name else module not in LOOKED_FOR
        # What is taken from a class or a function that was imported is not followed.
        of_a_name = module.rpartition(".")[2] in LOOKED_FOR.get(module.rpartition(".")[0], ())
        is_apart = place == VERSIONS and module in MODULES_APART
        in_megatron = module.partition(".")[0] == "megatron"
        if in_megatron and missing and not of_a_name and not is_apart:
            found.append(f"{place}:{line} {module}.{name}".rstrip("."))
    return found


def _looked_for() -> dict[str, set[str]]:
    """Return the first parts of the paths that are looked for, by module."""
    names: dict[str, set[str]] = {}
    for needed in (versions.NEEDED, versions.NEEDED_BY_INSTALL):
        for module, paths in needed.items():
            names.setdefault(module, set()).update(path.partition(".")[0] for path in paths)
    for binding in install.BINDINGS:
        names.setdefault(binding.module, set()).add(binding.path.partition(".")[0])
    return names


LOOKED_FOR = _looked_for()


def test_what_training_takes_from_megatron_is_looked_for() -> None:
    missing, taken = [], 0
    for path in MODULES.values():
        place = str(path.relative_to(PACKAGE))
        if place not in FILES_APART:
            taken += sum(m.partition(".")[0] == "megatron" for _, m, _ in used(path.read_text()))
            missing += not_looked_for(path.read_text(), place)
    assert taken > 40
    assert not missing, (
        "add to NEEDED of megatron_flashoptim/megatron/versions.py, to NEEDED_BY_INSTALL if it is "
        "megatron.training's, or with a reason to this test: " + ", ".join(missing)
    )


def test_what_is_apart_is_there() -> None:
    for place in FILES_APART:
        assert not_looked_for((PACKAGE / place).read_text(), place), place
    assert set(MODULES_APART) <= {m for _, m, _ in used((PACKAGE / VERSIONS).read_text())}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from megatron.core.dist_checkpointing.mapping import NewName", "mapping.NewName"),
        ("def late():\n    from megatron.core.utils import new_name", "utils.new_name"),
        ("from megatron.core import new_module", "core.new_module"),
        ("import megatron.core.new_module", "core.new_module"),
        ("import importlib\nimportlib.import_module('megatron.new_module')", "new_module"),
        (
            "from megatron.core import parallel_state as state\nstate.get_new_group()",
            "parallel_state.get_new_group",
        ),
        ("import megatron.core.optimizer\nmegatron.core.optimizer.new()", "optimizer.new"),
        (
            "import importlib\nt = importlib.import_module('megatron.core.tensor_parallel')\nt.new",
            "tensor_parallel.new",
        ),
    ],
)
def test_what_is_not_looked_for_is_found(source: str, name: str) -> None:
    (found,) = not_looked_for(source, "module.py")
    assert found.endswith(name)


@pytest.mark.parametrize(
    "source",
    [
        "from megatron.core.optimizer.optimizer import ChainedOptimizer\nChainedOptimizer.step",
        "from megatron.core import parallel_state\nparallel_state.get_tensor_model_parallel_group",
        "if TYPE_CHECKING:\n    from megatron.core.utils import new_name",
        "from megatron.core.datasets import utils\nutils.__file__",
        "import torch\ntorch.new",
    ],
)
def test_what_is_looked_for_is_not(source: str) -> None:
    assert not_looked_for(source, "module.py") == []
