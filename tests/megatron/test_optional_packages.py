"""Transformer Engine, Apex and the packages of training may be there or not: the bits are equal.

Neither can be built without a GPU. What Megatron takes from them, and what takes its place without
them, are three names: the Adam it builds, and the multi-tensor norm with its applier.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixed_precision import MIXED
from ranks import run_ranks

OPTIONAL = """transformer_engine apex amp_C einops matplotlib nvidia_resiliency_ext omegaconf psutil
sentencepiece tensorboard tiktoken wandb yaml""".split()


def _trained(fused: bool) -> dict[str, torch.Tensor]:
    """Train flash_adamw where Megatron builds torch's AdamW, or one like FusedAdam, first."""
    import megatron.core.optimizer as factory
    import tiny_gpt
    from exact_adamw import ExactAdamW, use_as_megatrons_adam

    class FusedAdam(ExactAdamW):
        """Has the defaults of Transformer Engine's and Apex's, which are the same."""

        def __init__(self, params: Any, *, bias_correction: bool = True, **options: Any) -> None:
            super().__init__(params, **options)
            for group in self.param_groups:
                group["bias_correction"] = bias_correction
            self.defaults["bias_correction"] = bias_correction

    if fused:
        use_as_megatrons_adam()
        factory.Adam = importlib.import_module("megatron.core.optimizer.distrib_optimizer").Adam = (
            FusedAdam
        )
    else:
        assert factory.Adam is torch.optim.AdamW, "this environment has one of them"
    trainer = tiny_gpt.build(tiny_gpt.Setup(layers=1))
    trainer.train(3)
    groups = trainer.optimizer.chained_optimizers[0].optimizer.param_groups
    assert not any("bias_correction" in group or "foreach" in group for group in groups)
    shards = trainer.optimizer.chained_optimizers[0].optimizer.shards
    state = {f"{i}.{key}": t for i, shard in enumerate(shards) for key, t in shard.state()}
    return trainer.weights() | state


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None
    or importlib.util.find_spec("apex") is not None,
    reason="one of the packages is there: the run without them cannot be made",
)
def test_the_adam_that_megatron_builds_first_changes_no_bit() -> None:
    without, fused = (run_ranks(2, _trained, fused) for fused in (False, True))
    for ours, theirs in zip(without, fused, strict=True):
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert torch.equal(tensor, theirs[key]), key


def _fp32_norm(_: Any, tensors: list[list[torch.Tensor]], *__: Any) -> tuple[torch.Tensor, None]:
    """Sum in fp32 whatever the dtype, as the kernels of Transformer Engine and Apex do."""
    squares = [tensor.float().square().sum() for tensor in tensors[0]]
    return torch.stack(squares).sum().sqrt().reshape(1), None


def _apply(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _params_norms(ours: bool, **options: Any) -> dict[str, float]:
    """Return Megatron's figure with torch's norm and with an fp32 one, and the exact one."""
    import tiny_gpt
    from exact_adamw import use_as_megatrons_adam
    from megatron.training import global_vars, training
    from test_hook import _parse

    from megatron_flashoptim.codec import join_master

    global_vars._GLOBAL_ARGS = _parse("--optimizer", "flash_adamw" if ours else "adam")
    if not ours:
        use_as_megatrons_adam()
    setup = tiny_gpt.Setup(**options) if ours else tiny_gpt.Setup(flash=None, **options)
    trainer = tiny_gpt.build(setup)
    trainer.train(4)
    mains = [getattr(p, "main_param", None) for p in trainer.model[0].parameters()]
    found = {"without": float(training.calc_params_l2_norm(trainer.model))}
    module = sys.modules[training.calc_params_l2_norm.__module__]
    module.multi_tensor_applier, module.multi_tensor_l2norm = _apply, _fp32_norm
    found["fused"] = float(training.calc_params_l2_norm(trainer.model))
    if ours:
        after = [getattr(p, "main_param", None) for p in trainer.model[0].parameters()]
        assert all(ours is theirs for ours, theirs in zip(mains, after, strict=True))
        total = torch.zeros((), dtype=torch.float64)
        for member in trainer.optimizer.chained_optimizers:
            for item in member.shard_params:
                shard = member.optimizer.shards[item.shard]
                own = slice(item.start, item.end)
                weight, correction = shard.param[own], shard.correction
                master = weight if correction is None else join_master(weight, correction[own])
                total += master.double().square().sum()
        torch.distributed.all_reduce(total)
        found["exact"] = float(total.sqrt())
    return found


PARAMS_NORMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "fp32 norms": MIXED,
    "experts": {"experts": 4, "ep": 2},
}


@pytest.mark.smoke
@pytest.mark.parametrize("case", PARAMS_NORMS)
def test_params_norm_is_that_of_the_masters_and_of_stock(case: str) -> None:
    options = PARAMS_NORMS[case]
    flash = run_ranks(2, _params_norms, True, **options)
    stock = run_ranks(2, _params_norms, False, **options)
    assert flash[0] == flash[1]
    assert flash[0]["without"] == pytest.approx(flash[0]["fused"], rel=1e-6)
    assert flash[0]["fused"] == pytest.approx(stock[0]["fused"], rel=1e-4)
    if case != "experts":  # whose other parameters both ranks own copies of
        assert flash[0]["fused"] == pytest.approx(flash[0]["exact"], rel=1e-6)


def test_16_bit_masters_have_a_params_norm_too() -> None:
    from megatron_flashoptim import FlashOptimConfig

    flash = FlashOptimConfig(master_bits=16, master_rounding="stochastic")
    (found,) = run_ranks(1, _params_norms, True, layers=1, flash=flash)
    assert found["without"] == pytest.approx(found["exact"], rel=1e-6)


_BARE = """
import importlib.abc, os, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in os.environ["HIDDEN"].split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
import torch
if not torch.cuda.is_available():
    from megatron_flashoptim.megatron import cpu
    cpu.enable()
exec(os.environ["BODY"])
"""
_TRAIN = """
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
torch.distributed.init_process_group(
    "gloo", init_method="file://" + os.environ["STORE"], rank=0, world_size=1)
import tiny_gpt
first, *_, last = tiny_gpt.build(tiny_gpt.Setup(layers=1)).train(5)
assert last < first
assert not set(sys.modules) & set(os.environ["HIDDEN"].split())
"""


def _without(body: str, hidden: list[str], **variables: str) -> subprocess.CompletedProcess:
    folder = Path(__file__).parent
    path = os.pathsep.join([str(folder), str(folder.parent), *sys.path])
    environment = {"HIDDEN": " ".join(hidden), "BODY": body, "PYTHONPATH": path, **variables}
    return subprocess.run(
        [sys.executable, "-c", _BARE], capture_output=True, text=True, env=os.environ | environment
    )


@pytest.mark.smoke
def test_megatron_core_trains_without_any_optional_package(tmp_path: Path) -> None:
    done = _without(_TRAIN, OPTIONAL, STORE=str(tmp_path / "store"))
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_package_that_megatrons_training_lacks_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_flashoptim.megatron import versions

    (tmp_path / "part_of_megatron.py").write_text("import a_package_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="needs the package a_package_that_is_not_there, which"):
        versions.find("part_of_megatron", "name")


def test_megatron_bridge_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "megatron_flashoptim.megatron.bridge"
    monkeypatch.setitem(sys.modules, "megatron.bridge", None)  # cannot be imported
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=r"needs Megatron-Bridge.*flashoptim\[bridge,te\]"):
        importlib.import_module(name)


def test_same_bits_steps_what_is_installed_and_hides_the_rest() -> None:
    """Where all packages are missing there is one way; on a GPU the script compares four."""
    script = Path(__file__).parents[2] / "scripts" / "same_bits.py"
    small = "--layers 1 --hidden 64 --heads 4 --vocab 256 --steps 2 --bucket-size 30000".split()
    device = [] if torch.cuda.is_available() else ["--device", "cpu"]
    done = subprocess.run([sys.executable, script, *device, *small], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    *rows, last = done.stdout.splitlines()
    present = [name for name in ("transformer_engine", "apex") if importlib.util.find_spec(name)]
    assert len(rows) == 2 ** len(present)
    assert last.startswith("the same bits with each of: neither")
    assert all(re.search(r"norms \w{16}  weights \w{16}  state \w{16}", row) for row in rows)


@pytest.mark.smoke
def test_install_without_optional_packages_works_or_names_the_package() -> None:
    """Megatron 0.17 imports yaml when training is imported, 0.19 when it is used."""
    done = _without("import megatron_flashoptim; megatron_flashoptim.install()", OPTIONAL)
    if done.returncode:
        *_, last = done.stderr.strip().splitlines()
        assert re.search(r"needs the package (\w+), which is not installed", last)[1] in OPTIONAL
        assert "pip install 'megatron-flashoptim[train]'" in last
