"""Which releases of Megatron-Core are refused, warned about or taken silently."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

import megatron_flashoptim
from megatron_flashoptim.megatron import versions

pytestmark = pytest.mark.smoke


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _pretend(version: str) -> _Warnings:
    """Let the imported Megatron give itself another version; returns what is warned of."""
    from megatron.core import package_info

    package_info.__version__ = version
    logging.disable(logging.NOTSET)
    seen = _Warnings()
    versions.logger.addHandler(seen)
    return seen


def _install_as(version: str) -> tuple[str, list[str]]:
    import tiny_gpt

    seen = _pretend(version)
    try:
        megatron_flashoptim.install()
        megatron_flashoptim.install()
        tiny_gpt.build(tiny_gpt.Setup(layers=1)).train(1)
    except ImportError as problem:
        return str(problem), seen.messages
    return "", seen.messages


@pytest.mark.parametrize("version", ["0.20.0", "0.20.0rc1", "0.19.99", "0.18.3", "1.0"])
def test_untested_newer_release_runs_with_one_warning(version: str) -> None:
    ((refused, warnings),) = run_ranks(1, _install_as, version)
    assert refused == ""
    assert len(warnings) == 1
    assert f"megatron-core {version} is newer" in warnings[0]
    assert all(release in warnings[0] for release in versions.TESTED)


@pytest.mark.parametrize("version", [*versions.TESTED, "0.19.0", "0.17.0", "0.19.2rc3"])
def test_tested_release_and_earlier_patches_run_silently(version: str) -> None:
    assert run_ranks(1, _install_as, version) == [("", [])]


@pytest.mark.parametrize("version", ["0.16.1", "0.9.0", "0.16"])
def test_older_release_is_refused_by_name(version: str) -> None:
    ((refused, _),) = run_ranks(1, _install_as, version)
    assert f"megatron-core {version} is older" in refused and "install 0.17 or newer" in refused


def _build_as(version: str) -> str:
    import tiny_gpt

    _pretend(version)
    try:
        tiny_gpt.build(tiny_gpt.Setup(layers=1))
    except ImportError as problem:
        return str(problem)
    return ""


def test_older_release_is_refused_without_install_too() -> None:
    (refused,) = run_ranks(1, _build_as, "0.16.1")
    assert "megatron-core 0.16.1 is older" in refused


def _each_needed_name_missing() -> list[tuple[str, str]]:
    _pretend("0.20.0")
    messages = []
    for module, paths in versions.NEEDED.items():
        for path in paths:
            owner = versions.find(module, path)
            name = path.rpartition(".")[2]
            held = [(c, vars(c)[name]) for c in _classes(owner) if name in vars(c)]
            for holder, _ in held:
                if name != "__init__":
                    delattr(holder, name)
            try:
                versions.check()
                messages.append((f"{module}.{path}", ""))
            except ImportError as problem:
                messages.append((f"{module}.{path}", str(problem)))
            for holder, value in held:
                setattr(holder, name, value)
    return messages


def _classes(owner: Any) -> tuple[Any, ...]:
    return owner.__mro__[:-1] if isinstance(owner, type) else (owner,)


def test_a_missing_name_is_named_with_the_version() -> None:
    (messages,) = run_ranks(1, _each_needed_name_missing)
    assert len(messages) > 30
    for name, message in messages:
        if not name.endswith("__init__"):  # every class has one
            # Of several classes that have it from one base, the first one looked at is named.
            attribute = name.rpartition(".")[2]
            assert f".{attribute}, which megatron-core 0.20.0 does not have" in message
            assert versions.TESTED[-1] in message


def test_every_overridden_method_of_megatron_is_looked_for() -> None:
    """An override that Megatron no longer calls by this name would be ignored silently."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    from megatron_flashoptim.megatron.chained import FlashChainedOptimizer
    from megatron_flashoptim.megatron.checkpointing import FlashCheckpointing
    from megatron_flashoptim.megatron.distrib_optimizer import FlashDistributedOptimizer

    needed = {path for paths in versions.NEEDED.values() for path in paths}
    # Differ between releases; versions.py gives them the name of the release.
    differ = {"compute_full_param_layout", "_get_grad_norm_for_group", "_step"}
    differ |= {*versions._OLDER_NAMES, *versions._OLDER_NAMES.values()}
    count = 0
    for own, base in (
        (FlashDistributedOptimizer, DistributedOptimizer),
        (FlashCheckpointing, DistributedOptimizer),
        (FlashChainedOptimizer, ChainedOptimizer),
    ):
        for name, value in vars(own).items():
            overrides = hasattr(base, name) and not hasattr(object, name) and name[:2] != "__"
            if overrides and name not in differ and callable(getattr(value, "__func__", value)):
                assert f"{base.__name__}.{name}" in needed
                count += 1
    assert count > 20


def test_gather_within_the_step_is_refused_where_it_would_not_be_ours() -> None:
    from argparse import Namespace

    from megatron_flashoptim.megatron.support import first_refusal

    asked = Namespace(overlap_param_gather_with_optimizer_step=True)
    refusal = first_refusal("flash_adamw", asked)
    assert (refusal is None) == versions.gathers_in_step()
    assert refusal is None or "use 0.18 or newer" in refusal


@pytest.mark.parametrize("expert", ["", "expert_"])
def test_weights_shared_out_further_are_refused_where_megatron_can(expert: str) -> None:
    import dataclasses

    from megatron.core.model_parallel_config import ModelParallelConfig

    from megatron_flashoptim.megatron.support import first_refusal

    shards = f"{expert}tensor_parallel_num_weight_shards"
    if shards not in {field.name for field in dataclasses.fields(ModelParallelConfig)}:
        assert tuple(map(int, versions.installed_version().split(".")[:2])) < (0, 19)
        return
    refusals = [
        first_refusal("flash_adamw", ModelParallelConfig(**{shards: count})) for count in (1, 2)
    ]
    assert refusals[0] is None and f"--{shards.replace('_', '-')} above" in str(refusals[1])


def test_version_is_that_of_the_imported_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout of Megatron-LM on the path hides the installed wheel, not its metadata."""
    from megatron.core import package_info

    monkeypatch.setattr(versions.metadata, "version", lambda _: "0.1.0")
    assert versions.installed_version() == package_info.__version__ != "0.1.0"
    monkeypatch.delattr(package_info, "__version__")
    assert versions.installed_version() == "0.1.0"


def _layout_binding_as_of_newer() -> tuple[str, ...]:
    """Megatron names neither of the two things that decide where buckets end."""
    from megatron.core.distributed import distributed_data_parallel
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    _pretend("0.20.0")
    if versions.computes_layouts():
        del DistributedOptimizer.compute_full_param_layout
    if hasattr(distributed_data_parallel, "_ParamAndGradBuffer"):
        del distributed_data_parallel._ParamAndGradBuffer
    try:
        megatron_flashoptim.install()
    except ImportError as problem:
        return (str(problem),)
    return ()


def test_a_release_whose_layout_is_not_known_is_refused() -> None:
    ((message,),) = run_ranks(1, _layout_binding_as_of_newer)
    assert "_ParamAndGradBuffer" in message and "0.20.0" in message


def _direct_import_without(module: str, name: str) -> list[str]:
    """As in a fresh process, where nothing of this package has imported Megatron yet."""
    import importlib
    import sys

    delattr(importlib.import_module(module), name)
    for imported in [m for m in sys.modules if m.startswith("megatron_flashoptim.megatron.")]:
        if not imported.endswith((".versions", ".cpu")):
            del sys.modules[imported]
            vars(megatron_flashoptim.megatron).pop(imported.rpartition(".")[2], None)
    messages = []
    for take in (
        lambda: megatron_flashoptim.get_megatron_optimizer,
        lambda: megatron_flashoptim.FlashDistributedOptimizer,
        lambda: importlib.import_module("megatron_flashoptim.megatron.hooks").chained_optimizer([]),
    ):
        try:
            take()
        except ImportError as problem:
            messages.append(str(problem))
    return messages


def test_a_missing_name_is_named_without_install_too() -> None:
    module, name = "megatron.core.dist_checkpointing.mapping", "LocalNonpersistentObject"
    (messages,) = run_ranks(1, _direct_import_without, module, name)
    assert len(messages) == 3
    assert all(f"megatron-flashoptim needs {module}.{name}" in message for message in messages)


BROKEN: dict[str, tuple[dict[str, str], str]] = {
    "a library that cannot be loaded": (
        {"transformer_engine/__init__.py": "import ctypes\nctypes.CDLL('libof_another_cuda.so')\n"},
        "OSError: libof_another_cuda.so: cannot open shared object file",
    ),
    "an undefined symbol": (
        {"transformer_engine/__init__.py": "raise ImportError('lib.so: undefined\\nsymbol: Z')"},
        "ImportError: lib.so: undefined symbol: Z",
    ),
    "an extension module": (
        {"transformer_engine/__init__.py": "", "transformer_engine/pytorch.so": "no library"},
        "ImportError: ",
    ),
    "a name it lacks": (
        {"transformer_engine/__init__.py": ""},
        "ImportError: cannot import name 'pytorch' from 'transformer_engine'",
    ),
}


def _find_with(folder: Path, source: str) -> list[str]:
    """Look for a name in a module of Megatron that imports a package of a folder."""
    import sys

    (folder / "module_of_megatron.py").write_text(source)
    sys.path.insert(0, str(folder))
    import megatron.core

    megatron.core.__path__.append(str(folder))
    messages = []
    for look in (versions.find, versions.has):
        for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
            del sys.modules[name]
        try:
            messages.append(str(look("megatron.core.module_of_megatron", "Name")))
        except ImportError as problem:
            messages.append(f"{type(problem).__name__}: {problem}")
    return messages


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_package_is_named_and_not_megatron(kind: str, tmp_path: Path) -> None:
    files, said = BROKEN[kind]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    # As where Megatron is prepared for a package that is not there.
    source = (
        "try:\n    from transformer_engine import pytorch\nexcept ModuleNotFoundError:\n    pass\n"
    )
    (messages,) = run_ranks(1, _find_with, tmp_path, source)
    for message in messages:
        assert message.startswith("BrokenPackageError: megatron.core.module_of_megatron imports")
        assert (
            f"the package transformer_engine, which is installed and does not work ({said}"
            in message
        )
        assert f"for torch {torch.__version__}, CUDA " in message
        assert "\n" not in message and "does not have" not in message


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("from megatron.core import no_such_name", "which megatron-core "),
        ("import no_such_package", "needs the package no_such_package, which is not installed"),
        ("import torch\ntorch.no_such_name", "which megatron-core "),
        ("", "which megatron-core "),
    ],
)
def test_what_megatron_itself_lacks_is_still_megatrons(
    source: str, said: str, tmp_path: Path
) -> None:
    ((message, has),) = run_ranks(1, _find_with, tmp_path, source)
    assert message.startswith("ImportError: ") and said in message
    assert has == "False"
