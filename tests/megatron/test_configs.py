"""``configs/``: Megatron takes every file, and the memory written beside it is the planner's."""

from __future__ import annotations

import multiprocessing
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from console import error
from ranks import run_ranks

from megatron_flashoptim.cli.argument_files import expand, read_arguments

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(CONFIGS.glob("*.args"))
# Files that say with how much memory they run.
PLANNED = [file for file in FILES if "megatron-flashoptim memory" in file.read_text()]
# What scripts/quickstart.py and scripts/simulate_scale.py add to theirs.
ADDED = ("--micro-batch-size", "1", "--train-iters", "1", "--optimizer", "flash_adamw")
GPUS = {
    "gpt_85m_bytes": 2,
    "moe_1t_4096_ranks": 4096,
    "quality_gpt": 1,
    "quality_moe": 1,
    "quickstart_gpt": 2,
}

COMMAND = re.compile(r"megatron-flashoptim memory --gpus (\d+) @configs/(\S+)\):")
ACTIVATIONS = re.compile(
    r"^# Activations come on top: ([\d.]+) by Megatron's formula, not measured\. "
    r"For GPUs of (\d+) GB\.$",
    re.MULTILINE,
)
# What flash_adamw and activations may take of a GPU. The rest is for what the formula leaves out,
# temporary tensors, CUDA and NCCL.
SHARE = 0.8
WITHOUT_DATA = re.compile(
    r"^    grep (-vE '\S+ ') (configs/gpt2_124m.args) > my.args$", re.MULTILINE
)
FIGURE = re.compile(r"^#   (\S.*?) +([\d.]+)$", re.MULTILINE)


def _in_fork(body: Any, *args: Any) -> Any:
    # The planner changes Megatron's global state.
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(body, args)


def _plan(file: Path, gpus: int) -> tuple[str, int]:
    from megatron_flashoptim.cli.memory import render_run
    from megatron_flashoptim.megatron.memory import planner

    size = planner.plan(expand([f"@{file}"]), gpus)
    return render_run(size), max(stage.parameters for stage in size.stages)


@pytest.mark.parametrize("file", PLANNED, ids=lambda file: file.stem)
def test_megatron_takes_the_file_and_the_figures_are_the_planners(file: Path) -> None:
    text = file.read_text()
    ((gpus, name),) = COMMAND.findall(text)
    assert name == file.name and f" {int(gpus):,} GPUs" in text.split("\n\n")[0]
    table, parameters = _in_fork(_plan, file, int(gpus))
    planned = {
        line[:32].strip(): line.split()[-1] for line in table.split("\n\n")[1].splitlines()[1:]
    }
    written = dict(FIGURE.findall(text))
    assert len(written) == 3
    assert written == {name: planned[name] for name in written}, table
    (row,) = [
        line
        for line in (CONFIGS / "README.md").read_text().splitlines()
        if line.startswith(f"| [{file.name}]")
    ]
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3] == f"{int(gpus):,}"
    assert cells[5] == f"{parameters / 1e9:.2f}"
    assert cells[6:9] == [f"{float(figure):.1f}" for figure in written.values()]
    ((activations, memory),) = ACTIVATIONS.findall(text)
    assert f"activations come on top: {activations} GiB" in table
    assert cells[9:11] == [f"{float(activations):.1f}", f"{memory} GB"]
    taken = float(written["flash_adamw, 24-bit masters"]) + float(activations)
    assert taken * 2**30 < SHARE * int(memory) * 1e9


def _parse(file: Path) -> tuple[str, int]:
    from megatron_flashoptim.megatron.memory import planned_args, planner

    with planner.prepared():
        args = planned_args.parse([*read_arguments(file), *ADDED], GPUS[file.stem])
    return args.flash_optimizer, args.num_layers


@pytest.mark.parametrize(
    "file", [file for file in FILES if file not in PLANNED], ids=lambda file: file.stem
)
def test_megatron_takes_the_files_of_scripts(file: Path) -> None:
    layers = int(read_arguments(file)[read_arguments(file).index("--num-layers") + 1])
    assert _in_fork(_parse, file) == ("flash_adamw", layers)


def test_recipes_name_data_so_that_none_trains_on_mock_data() -> None:
    assert len(PLANNED) >= 5
    for file in PLANNED:
        arguments = read_arguments(file)
        assert arguments[arguments.index("--data-path") + 1] == "DATA_PATH"
        assert "--dist-ckpt-optim-fully-reshardable" in arguments
        assert arguments[arguments.index("--optimizer") + 1] == "flash_adamw"


def _blends(arguments: list[str]) -> Any:
    from megatron.training.utils import get_blend_and_blend_per_split

    from megatron_flashoptim.megatron.memory import planned_args, planner

    with planner.prepared():
        args = planned_args.parse(arguments, 8)
    blend, per_split = get_blend_and_blend_per_split(args)
    return blend, per_split, args.split


def test_data_that_are_split_already_take_the_place_of_a_file_s_as_the_page_says(
    tmp_path: Path,
) -> None:
    ((options, file),) = WITHOUT_DATA.findall((CONFIGS / "README.md").read_text())
    kept = subprocess.run(
        ["grep", *shlex.split(options), file],
        cwd=CONFIGS.parent,
        check=True,
        capture_output=True,
        text=True,
    )
    (tmp_path / "my.args").write_text(kept.stdout)
    split = ["--train-data-path", "a", "--valid-data-path", "b"]
    found = _in_fork(_blends, expand([f"@{tmp_path}/my.args", *split]))
    assert found == (None, [(["a"], None), (["b"], None), None], None)
    with pytest.raises(ValueError, match="A single data source must be provided"):
        _in_fork(_blends, expand([f"@{CONFIGS.parent / file}", *split]))


def _launch(*arguments: str) -> None:
    from megatron_flashoptim import run

    run.main(arguments)


def test_the_launcher_gives_a_script_the_words_of_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, sys\npathlib.Path(__file__ + '.argv').write_text(repr(sys.argv))"
    )
    (tmp_path / "a.args").write_text("--a 1  # one\n")
    run_ranks(1, _launch, str(script), f"@{tmp_path}/a.args", "--b", "2")
    given = (tmp_path / "script.py.argv").read_text()
    assert given == repr([str(script), "--a", "1", "--b", "2"])
    with pytest.raises(SystemExit):
        _launch(str(script), "@none.args")
    assert "error: cannot read the file of arguments none.args" in capsys.readouterr().err


def test_words_are_those_of_a_shell_and_files_and_lines_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.args"
    file.write_text("# of a model\n--a 1 # one\n--b '2 3'\n\n--c ([0]*1+[1]*2)\n")
    words = ["--a", "1", "--b", "2 3", "--c", "([0]*1+[1]*2)"]
    assert expand(["x", f"@{file}", "--a", "2"]) == ["x", *words, "--a", "2"]
    assert "cannot read the file of arguments none.args" in error(
        *("memory", "--gpus", "8", "@none.args"), code=2
    )
    file.write_text("--a 1\n--b '2\n")
    with pytest.raises(ValueError, match=r"a\.args, line 2: No closing quotation: --b '2"):
        expand([f"@{file}"])
