"""Offline conversion of checkpoints that Megatron saved: what it writes, and what loads it."""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from adam_checkpoints import FLATTENED, FULLY, encoded, load, save, save_flattened
from mixed_precision import EXPERTS as MIXED_EXPERTS
from mixed_precision import GROUPS_OF_ONE_DTYPE, is_kept_in_fp32
from ranks import run_ranks

from megatron_flashoptim import FlashOptimConfig


def _convert(source: Path, destination: Path, target: str, **options: Any) -> Any:
    """Convert a folder that is an iteration by itself; returns result and new folder."""
    from megatron_flashoptim.checkpoint.offline import Conversion, Request

    result = Conversion(Request(source, destination, target, **options)).run()
    return result, result.folder


def _contents(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return all tensors by key, and the optimizer's part of the common state."""
    from megatron_flashoptim.checkpoint.boxes import Box
    from megatron_flashoptim.checkpoint.folder import open_folder

    opened = open_folder(folder)
    tensors = {
        key: opened.reader.read(key, Box((0,) * len(found.size), tuple(found.size)))
        for key, found in opened.reader.tensors().items()
    }
    return tensors, opened.common["optimizer"]


def _described(folder: Path) -> dict[str, Any]:
    from megatron_flashoptim.checkpoint.folder import open_folder

    return open_folder(folder).flash


def _saved_args(folder: Path) -> dict[str, Any]:
    from megatron_flashoptim.checkpoint.folder import open_folder

    return vars(open_folder(folder).common["args"])


def _format(flash: FlashOptimConfig) -> dict[str, Any]:
    """Return what asks for a format."""
    return {"master_bits": flash.master_bits, "exp_avg_sq_code": flash.exp_avg_sq_code}


def _save_flash(folder: Path, steps: int = 3, save_as: str = FULLY, **options: Any) -> Any:
    import checkpoints
    import tiny_gpt

    trainer = tiny_gpt.build(tiny_gpt.Setup(**options))
    trainer.train(steps)
    args = Namespace(decoupled_weight_decay=True)  # flash_adam needs no flag to decay by L2
    checkpoints.save(trainer, folder, save_as, args=args)
    return checkpoints.plain_groups(trainer)


def _load_adam(folder: Path, **options: Any) -> dict[str, Any]:
    """Load into Megatron's own Adam."""
    import checkpoints
    import tiny_gpt
    from exact_adamw import use_as_megatrons_adam

    use_as_megatrons_adam()
    trainer = tiny_gpt.build(tiny_gpt.Setup(flash=None, **options))
    checkpoints.load(trainer, folder)
    return {
        "state": checkpoints.in_model_space(trainer),
        "groups": checkpoints.plain_groups(trainer),
        "losses": trainer.train(2),
    }


DENSE = {"swiglu": True, "query_groups": 2, "layers": 2}
EXPERTS = {"experts": 4, "swiglu": True}
# Rows of 72 and 36 columns: groups run over the ends of rows.
ODD = {"hidden": 72, "layers": 1}
TO_FLASH: dict[str, tuple[str, tuple[int, dict[str, Any]], tuple[int, dict[str, Any]]]] = {
    "dense": (FULLY, (2, {**DENSE, "tp": 2}), (2, {**DENSE, "pp": 2})),
    "experts": (FULLY, (2, {**EXPERTS, "ep": 2}), (2, EXPERTS)),
    "odd rows": (FULLY, (1, ODD), (2, ODD)),
    "fp32 weights": (FULLY, (1, {"layers": 1, "bf16": False}), (1, {"layers": 1, "bf16": False})),
    "fp32 norms": (FULLY, (2, GROUPS_OF_ONE_DTYPE), (2, {**GROUPS_OF_ONE_DTYPE, "pp": 2})),
    "32 bits, fourth_root": (
        FULLY,
        (1, {"layers": 1}),
        (1, {"layers": 1, "flash": FlashOptimConfig(master_bits=32)}),
    ),
    "flattened": (FLATTENED, (2, {"layers": 2, "tp": 2}), (1, {"layers": 2})),
}


@pytest.mark.parametrize("case", TO_FLASH)
def test_flash_of_adam_is_what_loading_converts_to(case: str, tmp_path: Path) -> None:
    """The same bits as the public codec gives, in the layout of another run."""
    from checkpoints import assert_same, joined

    saves_as, (saved_by, saved_options), (loaded_by, options) = TO_FLASH[case]
    saves = (save_flattened,) if saves_as == FLATTENED else (save, saves_as)
    source = tmp_path / "adam"
    source.mkdir()
    stock = run_ranks(saved_by, saves[0], source, *saves[1:], **saved_options)
    flash = options.get("flash", FlashOptimConfig())
    result, folder = _convert(source, tmp_path / "flash", "flash", **_format(flash))
    loaded = run_ranks(loaded_by, load, folder, **options)
    assert not any("error" in rank for rank in loaded), loaded[0]
    assert not any(rank["logged"] for rank in loaded), "it is a flash checkpoint, not converted"
    wanted = encoded(
        joined([state for state, _ in stock]),
        flash.master_bits if options.get("bf16", True) else None,
        is_kept_in_fp32 if case == "fp32 norms" else lambda key: False,
    )
    if case == "odd rows":  # groups are those of the ranks, not of the whole tensor
        wanted = {key: wanted[key] for key in wanted if key.startswith("master.")}
    found = joined([rank["state"] for rank in loaded])
    assert_same({key: found[key] for key in wanted}, wanted)
    for rank in loaded:
        assert {group["step"] for group in rank["groups"]} == {3}
        assert {group["lr"] for group in rank["groups"]} == {1e-3}
        assert all(0 < loss < 7 for loss in rank["losses"])
    assert result.bytes_after < 0.7 * result.bytes_before


BACK: dict[str, tuple[int, dict[str, Any]]] = {
    "dense": (2, {**DENSE, "tp": 2}),
    "experts": (2, {**EXPERTS, "ep": 2}),
    "odd rows": (2, ODD),
    "odd rows, tensor parallel": (2, {**ODD, "tp": 2}),
    "32 bits, fourth_root": (
        1,
        {"layers": 1, "flash": FlashOptimConfig(master_bits=32, exp_avg_sq_code="fourth_root")},
    ),
    "fp32 weights": (1, {"layers": 1, "bf16": False}),
    "fp32 norms": (2, GROUPS_OF_ONE_DTYPE),
    "flash_adam": (1, {"layers": 1, "flash": FlashOptimConfig(optimizer="flash_adam")}),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.smoke] if case == "dense" else []) for case in BACK],
)
def test_flash_to_adam_loads_in_stock_and_back_is_the_identity(case: str, tmp_path: Path) -> None:
    ranks, options = BACK[case]
    flash = options.get("flash", FlashOptimConfig())
    source = tmp_path / "flash"
    source.mkdir()
    groups = run_ranks(ranks, _save_flash, source, **options)[0]
    _, adam = _convert(source, tmp_path / "adam", "adam")
    _, again = _convert(adam, tmp_path / "again", "flash", **_format(flash))
    (before, own), (after, same) = _contents(source), _contents(again)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor.view(torch.uint8), after[key].view(torch.uint8)), key
    assert {k: v for k, v in own.items() if k != "grad_scaler"} == same
    assert _described(again) == _described(source)
    if case == "flash_adam":
        _assert_decays_by_l2(adam, tmp_path)
    stock_options = {key: value for key, value in options.items() if key != "flash"}
    loaded = run_ranks(ranks, _load_adam, adam, **stock_options)
    for group, of_stock in zip(groups, loaded[0]["groups"], strict=True):
        assert all(of_stock[key] == value for key, value in group.items() if key != "params")
    masters = _contents(adam)[0]
    from checkpoints import joined

    found = joined([rank["state"] for rank in loaded])
    for key, tensor in found.items():
        kind, _, name = key.partition(".")
        kind = "param" if kind == "master" else kind
        assert torch.equal(tensor, masters[f"optimizer.state.{kind}.{name}"]), key
    assert all(0 < loss < 7 for loss in loaded[0]["losses"])


def _assert_decays_by_l2(adam: Path, tmp_path: Path) -> None:
    """Adam made of flash_adam says so in the arguments too; what decays otherwise says that."""
    assert _saved_args(adam)["decoupled_weight_decay"] is False
    _, other = _convert(adam, tmp_path / "adamw", "flash", optimizer="flash_adamw")
    args = _saved_args(other)
    # Or no run, and no `memory --checkpoint`, would take these arguments.
    assert args["flash_optimizer"] == "flash_adamw" and args["decoupled_weight_decay"] is True
    for optimizer, told in (("flash_adamw", True), ("flash_adam", False)):
        (loaded,) = run_ranks(1, load, adam, layers=1, flash=FlashOptimConfig(optimizer=optimizer))
        said = "saved with decoupled_weight_decay=False, and flash_adam is what goes on"
        assert [said in line for line in loaded["told"]] == [True] * told


def test_masters_of_fp32_weights_keep_their_bits_at_other_master_bits(tmp_path: Path) -> None:
    """A bf16 model's fp32 norms and routers: no correction in any checkpoint, weights as they are.

    In one param group with bf16 weights, as Megatron's own Adam cannot be saved.
    """
    source = tmp_path / "flash"
    source.mkdir()
    run_ranks(2, _save_flash, source, **{**MIXED_EXPERTS, "ep": 2})
    folders = [
        source,
        _convert(source, tmp_path / "to-flash", "flash", master_bits=32)[1],
        _convert(source, tmp_path / "to-adam", "adam")[1],
    ]
    before, widened, adam = (_contents(folder)[0] for folder in folders)
    keys = {key.removeprefix("optimizer.state.exp_avg.") for key in before if ".exp_avg." in key}
    fp32 = {key for key in keys if is_kept_in_fp32(key)}
    assert _described(folders[1])["fp32_weights"] == _described(source)["fp32_weights"]
    assert set(_described(source)["fp32_weights"]) == fp32 and 1 < len(fp32) < len(keys)
    for key in keys:
        assert (f"optimizer.state.correction.{key}" in before) == (key not in fp32)
        assert (f"optimizer.state.correction.{key}" in widened) == (key not in fp32)
        assert before[key].dtype == (torch.float32 if key in fp32 else torch.bfloat16)
        assert torch.equal(before[key], widened[key]) and torch.equal(before[key], adam[key])
        same = torch.equal(adam[f"optimizer.state.param.{key}"], before[key].float())
        assert same == (key in fp32), key


@pytest.mark.smoke
def test_adam_to_flash_to_adam_stays_within_the_formats(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    run_ranks(2, save, source, FULLY, 5, **DENSE)
    result, flash = _convert(source, tmp_path / "flash", "flash")
    _, adam = _convert(flash, tmp_path / "adam", "adam")
    (before, _), (after, _) = _contents(source), _contents(adam)
    assert before.keys() == after.keys()
    for key, exact in before.items():
        found = after[key]
        if key.startswith("optimizer.state.param."):
            ulp = 2.0 ** (torch.frexp(exact).exponent - 24)  # of fp32; a quantum is 256 of them
            assert ((found - exact).abs() <= 128 * ulp).all(), key
        elif key.startswith("optimizer.state."):
            squared = "exp_avg_sq" in key
            roots = [(t.sqrt() if squared else t).reshape(-1, 32) for t in (found, exact)]
            largest = roots[1].abs().amax(dim=1, keepdim=True)
            # Half a code, and half a bf16 ulp of the scale.
            bound = largest * (1 / (510 if squared else 127) + 2.0**-8)
            assert ((roots[0] - roots[1]).abs() <= bound).all(), key
        else:  # the weight follows its master over half a bf16 ulp
            moved = (found.view(torch.int16).int() - exact.view(torch.int16).int()).abs()
            assert moved.max() <= 1 and (moved != 0).float().mean() < 0.01, key
    assert 0 < result.report.deviations["param"].largest < 2**-15


def test_shifted_masters_are_refused_or_repaired(tmp_path: Path) -> None:
    """Stock's own defect, made by stock: buckets with padding, saved as fully_reshardable."""
    from checkpoints import joined

    options = {"layers": 2, "overlap": True, "bucket_size": 15_000, "hidden": 72}
    source = tmp_path / "source"
    source.mkdir()
    stock = run_ranks(2, save, source, FULLY, **options)
    with pytest.raises(ValueError, match=r"does not belong to its weights.*--repair"):
        _convert(source, tmp_path / "flash", "flash")
    assert not (tmp_path / "flash").exists(), "nothing is left of a refused conversion"
    result, mended = _convert(source, tmp_path / "flash", "flash", repair=True)
    _, adam = _convert(source, tmp_path / "adam", "adam", repair=True)
    true_state = joined([state for state, _ in stock])
    saved, _ = _contents(source)
    repaired, _ = _contents(adam)
    shifted, found = set(), {"damaged": 0, "kept": 0}
    for key, weights in saved.items():
        if key.startswith("optimizer.state.") or not weights.is_floating_point():
            continue
        layers = range(len(weights)) if "layers" in key else (slice(None),)
        for layer in layers:
            name = key if isinstance(layer, slice) else f"{key}[{layer}]"
            weight = weights[layer]
            master, *moments = (
                repaired[f"optimizer.state.{kind}.{key}"][layer]
                for kind in ("param", "exp_avg", "exp_avg_sq")
            )
            right, *exact = (
                true_state[f"{kind}.{key}"][layer] for kind in ("master", "exp_avg", "exp_avg_sq")
            )
            assert all(tensor.any() for tensor in exact), "zeros must be those of the repair"
            if torch.equal(saved[f"optimizer.state.param.{key}"][layer], right):
                assert torch.equal(master, right), name
                assert all(map(torch.equal, moments, exact)), name
                found["kept"] += 1
                continue
            shifted.add(name)
            assert torch.equal(master, weight.float()), name
            assert not any(moment.any() for moment in moments), name
            found["damaged"] += 1
    assert set(result.report.damaged) == shifted
    assert min(found.values()) > 3, found
    loaded = run_ranks(1, load, mended, **{**options, "overlap": False})
    assert all(0 < loss < 7 for loss in loaded[0]["losses"])
    _assert_no_weights_of_shifted_masters(source, adam, shifted, tmp_path / "weights")


def _assert_no_weights_of_shifted_masters(
    source: Path, adam: Path, shifted: set[str], weights: Path
) -> None:
    """They are refused by name; the repaired checkpoint's masters and any bf16 are exported."""
    from safetensors.torch import load_file

    from megatron_flashoptim.checkpoint.weights_file import WeightsExport

    with pytest.raises(ValueError, match=r"--dtype bf16 takes them; .*--repair") as refused:
        WeightsExport(source, weights, torch.float32).run(lambda *_: None)
    assert f"not the weights in {len(shifted)} parameters (" in str(refused.value)
    assert not list(weights.parent.glob("*weights*")), "nothing is left of a refused export"
    for folder, dtype in ((adam, torch.float32), (source, torch.bfloat16)):
        WeightsExport(folder, weights, dtype).run(lambda *_: None)
        (file,) = weights.glob("*.safetensors")
        tensors, written = _contents(folder)[0], load_file(file)
        assert len(written) > 8
        for key, found in written.items():
            wanted = tensors[key if dtype == torch.bfloat16 else f"optimizer.state.param.{key}"]
            assert found.dtype == dtype and torch.equal(found, wanted), key
        shutil.rmtree(weights)


def test_what_is_saved_otherwise_is_refused_by_name(tmp_path: Path) -> None:
    from megatron_flashoptim.checkpoint.offline import Conversion, Request

    def refused(source: Path, target: str, match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            Conversion(Request(source, tmp_path / "new", target, **options))
        assert not (tmp_path / "new").exists()

    buckets, adam, flash, flash_buckets = (tmp_path / name for name in "1234")
    for folder in (buckets, adam, flash, flash_buckets):
        folder.mkdir()
    run_ranks(1, save, buckets, "dp_reshardable", 1, layers=1)
    run_ranks(1, save, adam, FULLY, 1, layers=1)
    run_ranks(1, _save_flash, flash, 1, layers=1)
    refused(buckets, "flash", "dp_reshardable.*: --load it with --optimizer flash_adamw.*; or load")
    refused(buckets, "flash", "is whose: load it in a run.*, save once", optimizer="flash_lion")
    refused(buckets, "adam", "Adam already; what --repair mends is not in dp_reshardable")
    refused(adam, "adam", "already.*--repair")
    run_ranks(1, _save_flash, flash_buckets, 1, "dp_reshardable", layers=1)
    for folder in (flash, flash_buckets):
        refused(folder, "flash", "flash_adamw with 24-bit masters and the code sqrt already")
    with pytest.raises(ValueError, match=r"/proc/new cannot be written .*; make room, or mend"):
        Conversion(Request(flash, Path("/proc/new"), "adam")).run()
    refused(flash, "adam", "--repair mends", repair=True)
    refused(flash, "flash", "^--master-bits 16 would drop .*; give 24 or 32", master_bits=16)
    legacy = tmp_path / "legacy"
    legacy.mkdir()
    refused(legacy, "flash", "no latest_checkpointed_iteration.txt")
    (legacy / "latest_checkpointed_iteration.txt").write_text("7")
    refused(legacy, "flash", "no iter_0000007")
    (legacy / "iter_0000007" / "mp_rank_00").mkdir(parents=True)
    refused(legacy, "flash", "legacy format.*--ckpt-convert-format torch_dist")
    (tmp_path / "state.pt").write_bytes(b"")
    refused(tmp_path / "state.pt", "flash", "single file.*flashoptim")
    refused(tmp_path / "nothing", "flash", "is no folder")
    file = next(adam.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1000])
    refused(adam, "flash", "damaged: .* of .* bytes")


def test_an_interrupted_conversion_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_flashoptim.checkpoint import offline, writer

    source = tmp_path / "source"
    source.mkdir()
    run_ranks(1, save, source, FULLY, 1, layers=2)
    kept = {file.name: file.read_bytes() for file in source.iterdir()}
    _, whole = _convert(source, tmp_path / "whole", "flash")
    monkeypatch.setattr(offline, "_PART", 1 << 14)
    written: list[int] = []
    original = writer.write_part

    def stops(*arguments: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(arguments[2])
        original(*arguments)

    monkeypatch.setattr(writer, "write_part", stops)
    with pytest.raises(KeyboardInterrupt):
        _convert(source, tmp_path / "flash", "flash")
    left = [path.name for path in (tmp_path / "flash").iterdir()]
    assert left == [".converting-release"], "no folder that --load would take"
    monkeypatch.setattr(writer, "write_part", lambda *a: (written.append(a[2]), original(*a)))
    with pytest.raises(ValueError, match="unfinished conversion of another"):
        _convert(source, tmp_path / "flash", "flash", master_bits=32)
    result, folder = _convert(source, tmp_path / "flash", "flash")
    assert result.resumed == 3 and result.parts > 6
    assert sorted(written) == list(range(result.parts)), "each part was written once"
    assert not (tmp_path / "flash" / ".converting-release").exists()
    (once, _), (resumed, _) = _contents(whole), _contents(folder)
    assert once.keys() == resumed.keys()
    assert all(torch.equal(once[key], resumed[key]) for key in once)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == kept


def test_what_the_disk_changes_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_flashoptim.checkpoint import offline, writer

    source = tmp_path / "source"
    source.mkdir()
    run_ranks(1, save, source, FULLY, 1, layers=1)
    original = writer.write_part
    whole: list[bytes] = []
    monkeypatch.setattr(offline, "_PART", 1 << 14)

    def flips(folder: Path, records: Path, number: int, *more: Any) -> None:
        original(folder, records, number, *more)
        if number != 1:
            return
        (file,) = folder.glob("__1_*.distcp")
        whole.append(file.read_bytes())
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_part", flips)
        with pytest.raises(ValueError, match=r"was not written as it should be.* goes on with it"):
            _convert(source, tmp_path / "flash", "flash")
    assert not (tmp_path / "flash" / "release").exists()
    result, folder = _convert(source, tmp_path / "flash", "flash")
    assert result.resumed == result.parts - 1 > 1, "the same command writes that part again"
    (file,) = folder.glob("__1_*.distcp")
    assert [file.read_bytes()] == whole


def test_processes_write_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_flashoptim.checkpoint import offline

    source = tmp_path / "source"
    source.mkdir()
    run_ranks(1, save, source, FULLY, 1, layers=1)
    monkeypatch.setattr(offline, "_PART", 1 << 14)
    _, alone = _convert(source, tmp_path / "alone", "flash")
    result, together = _convert(source, tmp_path / "together", "flash", processes=2)
    assert result.parts > 3
    (ours, _), (theirs, _) = _contents(alone), _contents(together)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_joined_masters_or_the_models_own(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    from safetensors.torch import load_file

    from megatron_flashoptim.checkpoint import weights_file

    source = tmp_path / "source"
    source.mkdir()
    run_ranks(2, _save_flash, source, tp=2, **DENSE)
    _, adam = _convert(source, tmp_path / "adam", "adam")
    monkeypatch.setattr(weights_file, "_FILE_BYTES", 100_000)
    original = weights_file._write_box

    def reserved(path: Path, *more: Any) -> None:
        size = path.stat()
        assert 512 * size.st_blocks >= size.st_size, "a full disk would be SIGBUS"
        original(path, *more)

    monkeypatch.setattr(weights_file, "_write_box", reserved)
    shown: list[tuple[str, int, int]] = []
    export = weights_file.WeightsExport(source, tmp_path / "weights", dtype)
    export.run(lambda *state: shown.append(state))
    index = json.loads((tmp_path / "weights" / weights_file.INDEX).read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    tensors, _ = _contents(adam)
    for name in files:
        for key, found in load_file(tmp_path / "weights" / name).items():
            assert index["weight_map"].pop(key) == name
            wanted = tensors[key if dtype == torch.bfloat16 else f"optimizer.state.param.{key}"]
            assert found.dtype == dtype and torch.equal(found, wanted), key
    assert not index["weight_map"]
    assert shown[-1][1] == shown[-1][2] == export.numel()
    size = sum(file.stat().st_size for file in (tmp_path / "weights").glob("*.safetensors"))
    assert size == export.bytes_of_result()


def test_weights_of_buckets_are_the_models_own_only(tmp_path: Path) -> None:
    from megatron_flashoptim.checkpoint.weights_file import WeightsExport

    source = tmp_path / "source"
    source.mkdir()
    run_ranks(1, save, source, "dp_reshardable", 1, layers=1)
    with pytest.raises(ValueError, match=r"--dtype bf16 .*; for the fp32 masters load it in"):
        WeightsExport(source, tmp_path / "weights", torch.float32)
    WeightsExport(source, tmp_path / "weights", torch.bfloat16).run(lambda *_: None)
    with pytest.raises(ValueError, match="is there already"):
        WeightsExport(source, tmp_path / "weights", torch.bfloat16)
    shutil.rmtree(tmp_path / "weights")
