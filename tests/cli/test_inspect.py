"""``megatron-flashoptim inspect`` on checkpoints of real training."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from console import error, run, run_installed
from ranks import run_ranks

from megatron_flashoptim import FlashOptimConfig
from megatron_flashoptim.cli.inspect import default_report
from megatron_flashoptim.codec import (
    decode_exp_avg,
    decode_exp_avg_sq,
    encode_exp_avg,
    encode_exp_avg_sq,
    join_master,
    split_master,
)

# Rows of 48 are no multiple of 32: scales are saved per element. Layers are stacked.
ROWS_OF_48 = {"hidden": 48, "layers": 3}
FULLY, BUCKETS = "fully_reshardable", "dp_reshardable"
FC1 = "decoder.layers.mlp.linear_fc1.weight"
SHOWN = {"master": "masters", "exp_avg": "first moments", "exp_avg_sq": "second moments"}

State = dict[str, torch.Tensor]


def _save(folder: Path, optimizer: str) -> Any:
    """Train on this rank and save in every layout; returns the state in model space."""
    import checkpoints
    import tiny_gpt
    from exact_adamw import use_as_megatrons_adam
    from megatron.core import dist_checkpointing

    options: dict[str, Any] = dict(ROWS_OF_48)
    if optimizer == "adam":
        use_as_megatrons_adam()
        options["flash"] = None
    elif optimizer == "lion":
        options["flash"] = FlashOptimConfig(optimizer="flash_lion")
    trainer = tiny_gpt.build(tiny_gpt.Setup(**options))
    trainer.train(3)
    for layout in (FULLY, BUCKETS):
        checkpoints.save(trainer, folder / f"{optimizer}_{layout}", layout)
    if optimizer == "adam":
        state = {"model": trainer.model[0].module.sharded_state_dict()}
        strategy = checkpoints.TorchDistSaveShardedStrategy()
        dist_checkpointing.save(state, str(folder / "weights"), strategy)
    return checkpoints.in_model_space(trainer)


def _save_older(folder: Path) -> Any:
    from adam_checkpoints import save_flattened

    return save_flattened(folder, **ROWS_OF_48)[0]


def _save_shifted(folder: Path) -> None:
    """Save with Megatron's defect: several buckets, and padding between them."""
    import checkpoints
    import tiny_gpt
    from exact_adamw import use_as_megatrons_adam

    use_as_megatrons_adam()
    options: dict[str, Any] = {"flash": None, "overlap": True, "bucket_size": 15_000}
    trainer = tiny_gpt.build(tiny_gpt.Setup(**options, hidden=72, layers=3))
    trainer.train(1)
    checkpoints.save(trainer, folder / "shifted", FULLY)
    checkpoints.save(trainer, folder / "several", BUCKETS)


class Saved:
    """The checkpoints, and the state that the runs had in memory."""

    def __init__(self, folder: Path) -> None:
        import checkpoints

        self.folder = folder
        self.state: dict[str, State] = {}
        self._printed: dict[tuple[str, ...], Path] = {}
        for name in (
            "older",
            "shifted",
            "several",
            "weights",
            *(f"{a}_{b}" for a in ("adam", "flash", "lion") for b in (FULLY, BUCKETS)),
        ):
            (folder / name).mkdir()
        for optimizer in ("adam", "flash", "lion"):
            self.state[optimizer] = checkpoints.joined(run_ranks(2, _save, folder, optimizer))
        run_ranks(2, _save_older, folder / "older")
        run_ranks(2, _save_shifted, folder)

    def inspected(self, name: str, *arguments: str) -> dict[str, Any]:
        """Return the JSON of a checkpoint, once."""
        file = self._printed.get((name, *arguments))
        if file is None:
            file = self.folder / f"{len(self._printed)}.json"
            done = run(
                "inspect", str(self.folder / name), "--no-report", "--json", str(file), *arguments
            )
            assert done.returncode == 0, done.stderr
            assert done.stderr == ""
            self._printed[name, *arguments] = file
        found: dict[str, Any] = json.loads(file.read_text())
        return found


@pytest.fixture(scope="module")
def saved(megatron: None, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("inspected"))


def _layers(found: dict[str, Any]) -> dict[tuple[str, int | None], dict[str, Any]]:
    return {(part["name"], part["index"]): part for part in found["parts"]}


def _expected(state: State, kind: str) -> dict[tuple[str, int | None], torch.Tensor]:
    """Return flat tensors of a kind by name and layer."""
    found: dict[tuple[str, int | None], torch.Tensor] = {}
    for key, tensor in state.items():
        if not key.startswith(f"{kind}."):
            continue
        name = key.removeprefix(f"{kind}.")
        if ".layers." not in name:
            found[name, None] = tensor.flatten()
            continue
        for layer, part in enumerate(tensor):
            found[name.replace(".layers.", ".layers.*."), layer] = part.flatten()
    return found


def _relative(error: torch.Tensor, values: torch.Tensor) -> float:
    return float(error.double().norm() / values.double().norm())


RECODED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "master": lambda w: join_master(*split_master(w)),
    "exp_avg": lambda m: decode_exp_avg(*encode_exp_avg(m)),
    "exp_avg_sq": lambda v: decode_exp_avg_sq(*encode_exp_avg_sq(v)),
}


@pytest.mark.parametrize("kind", RECODED)
def test_adam_shows_each_layers_norm_and_what_encoding_would_cost(saved: Saved, kind: str) -> None:
    parts = _layers(saved.inspected(f"adam_{FULLY}"))
    expected = _expected(saved.state["adam"], kind)
    assert set(parts) == set(expected)
    for where, exact in expected.items():
        found = parts[where][kind]
        assert found["elements"] == exact.numel()
        assert found["norm"] == pytest.approx(float(exact.double().norm()), rel=1e-6)
        assert found["largest"] == float(exact.abs().max())
        stored = RECODED[kind](exact)
        if kind == "exp_avg_sq":
            exact, stored = exact.double().sqrt(), stored.double().sqrt()
        error = _relative(stored.double() - exact.double(), exact)
        assert found["relative_error"] == pytest.approx(error, rel=1e-4, abs=1e-12), where


MOMENTS = {"flash": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",)}


@pytest.mark.parametrize("optimizer", MOMENTS)
def test_flash_shows_each_layers_decoded_norm_codes_and_scales(
    saved: Saved, optimizer: str
) -> None:
    parts = _layers(saved.inspected(f"{optimizer}_{FULLY}"))
    state = saved.state[optimizer]
    for part in parts.values():
        assert part.keys() - {"name", "index", "weight"} == {"master", *MOMENTS[optimizer]}
    for (name, layer), exact in _expected(state, "master").items():
        found = parts[name, layer]["master"]
        assert found["norm"] == pytest.approx(float(exact.double().norm()), rel=1e-6)
    for kind in MOMENTS[optimizer]:
        top, minimum = {"exp_avg": 127, "exp_avg_sq": 255}[kind], 1
        scales = _expected(state, f"{kind}_scale")
        for where, codes in _expected(state, kind).items():
            found, magnitude = parts[where][kind], codes.to(torch.int32).abs()
            for name, code in (("saturated", top), ("zero", 0), ("minimum", minimum)):
                assert found[name] == pytest.approx(float((magnitude == code).double().mean()))
            scale = (
                scales[where].view(torch.bfloat16)
                if scales[where].dtype == torch.int16
                else scales[where]
            )
            used = scale[scale > 0].float()
            assert found["smallest_scale"] == float(used.min())
            assert found["largest_scale"] == float(used.max())
            decode = decode_exp_avg if kind == "exp_avg" else decode_exp_avg_sq
            values = decode(codes, scale[::32].to(torch.bfloat16))
            assert found["norm"] == pytest.approx(float(values.double().norm()), rel=1e-6)


@pytest.mark.parametrize(("name", "kinds"), [("adam", SHOWN), *MOMENTS.items()])
def test_buckets_have_the_elements_of_all_layers(saved: Saved, name: str, kinds: Any) -> None:
    parts = saved.inspected(f"{name}_{BUCKETS}")["parts"]
    for kind in kinds:
        exact = [found for where, found in _expected(saved.state[name], kind).items()]
        (found,) = [part[kind] for part in parts if kind in part]
        assert "bucket_idx_" in next(part["name"] for part in parts if kind in part)
        if name == "adam":
            total = sum(float(each.double().square().sum()) for each in exact)
            assert found["elements"] == sum(each.numel() for each in exact)
            assert found["norm"] == pytest.approx(total**0.5, rel=1e-6)
        else:
            used = sum(int((each != 0).sum()) for each in exact)
            assert (
                found["elements"] - sum(found["codes"][128 if kind == "exp_avg" else 0 :][:1])
                == used
            )


def test_layout_of_older_releases_shows_the_same(saved: Saved) -> None:
    older, newer = (_layers(saved.inspected(name)) for name in ("older", f"adam_{FULLY}"))
    assert older == newer


def test_masters_are_checked_against_the_weights(saved: Saved) -> None:
    found = saved.inspected(f"adam_{FULLY}")
    assert found["masters_checked"] == len(found["parts"])
    assert found["masters_not_of_weights"] == []
    shifted = saved.inspected("shifted")["masters_not_of_weights"]
    assert 0 < len(shifted) < len(found["parts"])
    done = run("inspect", str(saved.folder / "shifted"), "--no-report")
    assert f"masters rounded to bf16 are NOT the weights in {len(shifted)} of" in done.stdout
    assert shifted[0] in done.stdout


def test_weights_alone_are_shown(saved: Saved) -> None:
    found = saved.inspected("weights")
    assert found["optimizer"] == "weights"
    of_adam = _layers(saved.inspected(f"adam_{FULLY}"))
    for where, part in _layers(found).items():
        assert part["weight"] == of_adam[where]["weight"]
        assert set(part) == {"name", "index", "weight"}


def test_table_names_the_worst_layer_and_has_a_line_per_tensor(saved: Saved) -> None:
    adam, flash = (str(saved.folder / f"{name}_{FULLY}") for name in ("adam", "flash"))
    done = run_installed("inspect", adam, "--against", flash, "--no-report")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"\nagainst {flash}\n" in done.stdout
    lines = done.stdout.splitlines()
    parts = _layers(saved.inspected(f"adam_{FULLY}"))
    name = FC1.replace("layers.", "layers.*.")
    for kind, title in SHOWN.items():
        start = next(n for n, line in enumerate(lines) if line.startswith(f"{title} "))
        table = lines[start : next(n for n in range(start, len(lines)) if not lines[n])]
        assert len(table) == 2 + len({part for part, _ in parts})
        (row,) = [line.split() for line in table if line.startswith(f"{name} ")]
        errors = [parts[name, layer][kind]["relative_error"] for layer in range(3)]
        norms = [parts[name, layer][kind]["norm"] for layer in range(3)]
        shown = [f"{min(norms):.3g}", f"{sorted(norms)[1]:.3g}", f"{max(norms):.3g}"]
        shown.append(str(norms.index(max(norms))))
        shown += [f"{sorted(errors)[1]:.3g}", f"{max(errors):.3g}", str(errors.index(max(errors)))]
        assert row[1:9] == ["3", *shown]


def test_layers_are_listed_on_demand(saved: Saved) -> None:
    folder = str(saved.folder / f"flash_{FULLY}")
    lines = run("inspect", folder, "--no-report", "--layers").stdout.splitlines()
    assert sum(line.startswith("  2  ") for line in lines) == 3 * 12


def test_against_itself_nothing_differs_and_adam_differs_from_flash(saved: Saved) -> None:
    flash = str(saved.folder / f"flash_{FULLY}")
    same = saved.inspected(f"flash_{FULLY}", "--against", flash)["against"]
    for part in same["parts"]:
        for kind in SHOWN:
            assert part[kind]["differing"] == 0 and part[kind]["largest"] == 0
    parts = _layers(saved.inspected(f"adam_{FULLY}", "--against", flash)["against"])
    ours, theirs = (_expected(saved.state[name], "master") for name in ("adam", "flash"))
    for where, exact in ours.items():
        found, difference = parts[where]["master"], (theirs[where] - exact).abs()
        assert found["differing"] == int(difference.count_nonzero())
        mean = float(difference.double().sum() / exact.abs().double().sum())
        assert found["mean"] == pytest.approx(mean, rel=1e-5)
        reference = torch.maximum(exact.abs(), theirs[where].abs())
        largest = float((difference / reference.clamp(min=1e-38)).max())
        assert found["largest"] == pytest.approx(largest, rel=1e-6)


def test_moments_that_one_lacks_are_said_and_the_others_compared(
    saved: Saved, tmp_path: Path
) -> None:
    lion, adam = (str(saved.folder / f"{name}_{FULLY}") for name in ("lion", "adam"))
    report = tmp_path / "report.html"
    done = run("inspect", lion, "--against", adam, "--report", str(report))
    assert (done.returncode, done.stderr) == (0, "")
    of_lion, _, against = done.stdout.partition(f"\nagainst {adam}\n")
    assert "second moments" not in done.stdout and "sqrt code" not in of_lion
    assert "flash_lion, 24-bit masters, groups of 32" in of_lion
    for table in (of_lion, against):
        assert "\nmasters " in table and "\nfirst moments " in table
    assert against.count("only the ") == 1 and "only the second has: exp_avg_sq\n" in against
    titles = [f"{title}: distributions" for title in ("masters", "first moments", "second moments")]
    assert [title in report.read_text() for title in titles] == [True, True, False]
    buckets = [str(saved.folder / f"{name}_{BUCKETS}") for name in ("flash", "lion")]
    done = run("inspect", buckets[0], "--against", buckets[1], "--no-report")
    assert "only the first has: exp_avg_sq\n" in done.stdout, done.stderr


def test_processes_side_by_side_find_the_same(saved: Saved) -> None:
    name, other = f"adam_{FULLY}", str(saved.folder / f"flash_{FULLY}")
    alone = saved.inspected(name, "--against", other)
    assert saved.inspected(name, "--against", other, "--processes", "2") == alone


def test_layouts_compare_and_buckets_compare_with_buckets(saved: Saved) -> None:
    older = str(saved.folder / "older")
    found = saved.inspected(f"adam_{FULLY}", "--against", older)["against"]
    assert found["only_first"] == found["only_second"] == []
    assert all(part[kind]["differing"] == 0 for part in found["parts"] for kind in SHOWN)
    buckets = str(saved.folder / f"flash_{BUCKETS}")
    found = saved.inspected(f"adam_{BUCKETS}", "--against", buckets)["against"]
    (moments,) = [part["exp_avg"] for part in found["parts"] if "exp_avg" in part]
    elements = sum(each.numel() for each in _expected(saved.state["adam"], "exp_avg").values())
    assert moments["elements"] == elements and 0 < moments["mean"] < 0.1


def test_what_cannot_be_compared_is_one_line(saved: Saved) -> None:
    names = [str(saved.folder / f"adam_{layout}") for layout in (FULLY, BUCKETS)]
    said = error("inspect", names[0], "--against", names[1], "--no-report", code=1)
    assert "buckets do not say which parameter is where" in said and "Save both with" in said


def test_report_is_one_file_by_default_named_after_run_and_iteration(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for run_name, name in (("adam", f"adam_{BUCKETS}"), ("flash", f"flash_{FULLY}")):
        iteration = tmp_path / "runs" / run_name / "checkpoints" / "iter_0000003"
        iteration.parent.mkdir(parents=True)
        iteration.symlink_to(saved.folder / name)
        done = run("inspect", f"runs/{run_name}/checkpoints", "--iteration", "3")
        assert done.returncode == 0, done.stderr
        file = f"{run_name}-checkpoints-iter_0000003-inspect.html"
        assert f"written: {file}\n" in done.stdout
        page = Path(file).read_text()
        assert page.count("<svg") == page.count("</svg>") > 1
        assert FC1.replace("layers.", "layers.*.") in page
        assert "<script" not in page and "<link" not in page and 'src="http' not in page
    assert len(list(tmp_path.glob("*"))) == 3, "no report is another run's"


def _pictures(page: str) -> dict[str, tuple[float, list[list[str]]]]:
    """Return where each picture's first panel begins, and the labels of x axes along depth."""
    found = {}
    for picture in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        (title,) = re.findall(r">([^<>]+(?: over depth| over buckets|: distributions))<", picture)
        left = re.search(r'"axes_\d+">\s*<g id="patch_\d+">\s*<path d="M ([\d.]+)', picture)
        assert left is not None
        axes = [
            re.findall(r">([^<>\n]+)</text>", axis) for axis in picture.split("matplotlib.axis")
        ]
        along = [labels for labels in axes if labels[-1:] in (["layer"], ["bucket"])]
        found[title] = (float(left[1]), along)
    return found


@pytest.mark.parametrize(
    ("name", "layers", "expected"),
    [
        (
            f"adam_{FULLY}",
            1,
            {"masters over depth": 1, "masters: distributions": 0, "first moments over depth": 2},
        ),
        (
            f"flash_{BUCKETS}",
            3,
            {
                "weights over depth": 1,
                "weights: distributions": 1,
                "corrections: distributions": 0,
                "first moments: distributions": 0,
                "second moments: distributions": 0,
            },
        ),
        (
            "several",
            3,
            {"masters over buckets": 2, "masters: distributions": 2, "weights over depth": 1},
        ),
    ],
)
def test_layers_and_buckets_are_mapped_where_there_are_several_and_counted_along_axes(
    saved: Saved, tmp_path: Path, name: str, layers: int, expected: dict[str, int]
) -> None:
    from megatron_flashoptim.checkpoint.folder import open_folder
    from megatron_flashoptim.checkpoint.statistics import inspect
    from megatron_flashoptim.cli import report

    inspection = inspect(open_folder(saved.folder / name))
    buckets = sum("bucket_idx" in part.name for part, _ in inspection.parts)
    assert buckets > 1 or name != "several"
    if not buckets:
        kept = [each for each in inspection.parts if (each[0].index or 0) < layers]
        inspection = replace(inspection, parts=kept)
    file = tmp_path / "report.html"
    report.write(file, inspection, None, report.Text("", {}, [], [], []))
    found = _pictures(file.read_text())
    assert {title: len(found.get(title, (0, []))[1]) for title in expected} == expected
    if buckets == 1:
        assert set(found) == set(expected), "one bucket has no depth"
    for left, axes in found.values():
        assert left < 300, "no gap left of the first panel"
        for labels in axes:
            count = layers if labels[-1] == "layer" else buckets
            numbers = [int(label) for label in labels[:-1] if label != "none"]
            assert numbers == sorted({*numbers} & {*range(count)}), labels
            assert len(numbers) >= min(count, 2), labels


def test_default_name_of_a_comparison_names_both_and_fits_a_file_system() -> None:
    folders = [Path(f"/runs/{name}/checkpoints/iter_0000400") for name in ("adam", "flash")]
    adam, flash = (f"{name}-checkpoints-iter_0000400" for name in ("adam", "flash"))
    assert default_report(*folders) == f"{adam}-against-{flash}-inspect.html"
    assert default_report(Path("/iter_0000400")) == "iter_0000400-inspect.html"
    long = Path("/", "r" * 255, "c" * 255, "iter_0000400")
    name = default_report(long, long)
    assert len(name) <= 255 and name.count("iter_0000400") == 2


def test_damaged_files_are_found_before_anything_is_printed(saved: Saved, tmp_path: Path) -> None:
    whole, cut = saved.folder / f"flash_{FULLY}", tmp_path / "cut"
    shutil.copytree(whole, cut)
    half = (cut / "__1_0.distcp").stat().st_size // 2
    os.truncate(cut / "__1_0.distcp", half)
    for arguments in ([cut], [whole, "--against", cut]):
        done = run("inspect", *map(str, arguments), "--no-report")
        assert (done.returncode, done.stdout) == (1, "")
        assert f"{cut} is damaged: __1_0.distcp has {half} of " in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_report_as_png_has_the_comparison_too(saved: Saved, tmp_path: Path) -> None:
    from matplotlib.image import imread

    heights = []
    for more in ((), ("--against", str(saved.folder / f"flash_{FULLY}"))):
        file = tmp_path / f"report{len(more)}.png"
        done = run("inspect", str(saved.folder / "weights"), "--report", str(file), *more)
        assert done.returncode == 0, done.stderr
        heights.append(imread(file).shape[0])
    assert heights[1] > heights[0] > 500


def test_without_matplotlib_tables_remain_and_the_package_is_named(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.chdir(tmp_path)
    folder = str(saved.folder / "weights")
    done = run("inspect", folder)
    assert done.returncode == 0 and "word_embeddings" in done.stdout
    assert "pip install 'megatron-flashoptim[inspect]'" in done.stderr
    assert not any(tmp_path.iterdir())
    said = error("inspect", folder, "--report", "x.png", code=1)
    assert "pip install 'megatron-flashoptim[inspect]'" in said


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nowhere",), 1, "nowhere is no folder"),
        ((".", "--report", "report.pdf"), 2, "must end in .html or .png"),
        ((".", "--report", "a.png", "--no-report"), 2, "exclude each other"),
        ((".", "--report", "missing/a.png"), 2, "is no folder"),
        ((".", "--against-iteration", "3"), 2, "needs --against"),
        ((), 2, "CKPT"),
    ],
)
def test_errors_are_one_line(
    arguments: tuple[str, ...],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in error("inspect", *arguments, code=code)
