"""Megatron's own training loop under the launcher: real processes, real data, real checkpoints."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from console import run
from pretraining import (
    FLASH,
    MODEL,
    data_flags,
    device_flags,
    losses,
    pretrain,
    printed,
    saved_tensors,
)

ROOT = Path(__file__).resolve().parents[2]
# A checkout of Megatron-LM core_v0.19.0; its scripts are not in the megatron-core wheel.
MEGATRON_LM = os.environ.get("MEGATRON_LM_PATH")

THEORETICAL = re.compile(r"Theoretical memory footprints: weight and optimizer=([\d.]+) MB")


def _launch(script: Path, corpus: Path, *flags: str, ranks: int = 2) -> subprocess.CompletedProcess:
    device = [] if torch.cuda.is_available() else ["--device", "cpu"]
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(ranks)),
            *("-m", "megatron_flashoptim.run", *device, str(script), *MODEL),
            *(*device_flags(), *data_flags(corpus), *flags),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
    )


def _output(script: Path, corpus: Path, *flags: str) -> str:
    """Train and return what was printed."""
    done = _launch(script, corpus, *flags)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def _train(script: Path, corpus: Path, *flags: str) -> dict[int, tuple[str, str]]:
    """Return loss and parameter norm of each iteration."""
    return losses(_output(script, corpus, *flags))


def test_training_loop_resumes_bitwise_from_its_own_checkpoint(
    corpus: Path, tmp_path: Path
) -> None:
    script = ROOT / "scripts" / "pretrain_gpt.py"
    flags = ("--optimizer", "flash_adamw", "--train-iters", "8", "--save-interval", "4")
    text = _output(script, corpus, *flags, "--save", str(tmp_path / "whole"))
    assert text.count("bytes of state per owned parameter") == 1
    whole = losses(text)
    resumed = _train(
        script,
        corpus,
        *(*flags, "--save", str(tmp_path / "resumed")),
        *("--load", str(tmp_path / "whole"), "--ckpt-step", "4"),
    )
    # Megatron also prints the first iteration after a start, on its own.
    assert {i: whole[i] for i in (6, 8)} == {i: resumed[i] for i in (6, 8)}
    assert min(resumed) == 5, "the checkpoint must have been loaded"
    ours, theirs = (saved_tensors(tmp_path / run / "iter_0000008") for run in ("whole", "resumed"))
    assert ours.keys() == theirs.keys()
    assert {t.dtype for t in ours.values()} >= {torch.int8, torch.uint8, torch.bfloat16}
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key
    # Its arguments are those of a whole training run, with data, schedule and tokenizer.
    planned = run("memory", "--checkpoint", str(tmp_path / "whole"))
    weights = [tensor for key, tensor in ours.items() if not key.startswith("optimizer.")]
    parameters = sum(tensor.numel() for tensor in weights)
    assert planned.stdout.startswith(f"{parameters:,} parameters on a rank"), planned.stderr


@pytest.fixture(scope="module")
def adam_and_flash(corpus: Path) -> tuple[str, str, dict[str, Any]]:
    """Train alike with both; return what each printed, and what flash_adamw holds."""
    report = corpus / "memory.json"
    # Megatron's theoretical figures know no biases, which in this model are 1 % of it.
    shown = ("--logging-level", str(logging.INFO))
    flags = ("--train-iters", "8", "--disable-bias-linear", *shown, "--optimizer")
    adam = printed(corpus, *flags, "adam")
    asked = ("--report-theoretical-memory", "--memory-report", str(report))
    flash = printed(corpus, *flags, "flash_adamw", *asked)
    return adam, flash, json.loads(report.read_text())


def test_flash_adamw_follows_adam_in_the_training_loop(
    adam_and_flash: tuple[str, str, dict[str, Any]],
) -> None:
    told = "bytes of state per owned parameter"
    assert adam_and_flash[1].count(told) == 1 and told not in adam_and_flash[0]
    adam, flash = map(losses, adam_and_flash[:2])
    assert adam.keys() == flash.keys()
    for iteration in adam:
        loss, norm = flash[iteration]
        assert float(loss) == pytest.approx(float(adam[iteration][0]), rel=5e-3)
        assert float(norm) == pytest.approx(float(adam[iteration][1]), rel=1e-4)
        assert float(flash[iteration][1]) > 1.0, "the params norm is never 0"


@pytest.mark.smoke
def test_initial_weights_do_not_depend_on_the_micro_batch_size(
    megatron: None, corpus: Path
) -> None:
    """On a CPU Megatron's warm-up would draw from the generator that makes them."""
    first = [
        float(pretrain(corpus, *FLASH, "--train-iters", "1", "--micro-batch-size", size)[1][0])
        for size in ("2", "1")
    ]
    # Sums in another order; other weights made 0.0077.
    assert first[0] == pytest.approx(first[1], abs=1e-4)


def test_theoretical_memory_report_is_that_of_the_optimizer(
    adam_and_flash: tuple[str, str, dict[str, Any]],
) -> None:
    adam, flash, held = adam_and_flash
    theirs, ours = ([float(mb) for mb in THEORETICAL.findall(text)] for text in (adam, flash))
    assert theirs and len(ours) == len(theirs) + 1, "once more, before the first iteration"
    parameters, ranks = held["owned_parameters"], held["ranks"]
    live = parameters * (2 + 4) + held["optimizer_state_bytes"] / ranks
    rounding = 0.006  # printed with two decimals
    assert ours == pytest.approx([live / 2**20] * len(ours), abs=rounding)
    # Megatron's own, untouched.
    adams = parameters * (6 + 12 / ranks)
    assert theirs == pytest.approx([adams / 2**20] * len(theirs), abs=rounding)


def test_weights_of_a_stock_checkpoint_load_without_its_optimizer(
    corpus: Path, tmp_path: Path
) -> None:
    """Also by a rule that refuses the optimizer's state."""
    save = ("--save", str(tmp_path), "--save-interval", "4")
    adam = pretrain(corpus, "--optimizer", "adam", "--train-iters", "4", *save)
    fresh_loss = float(adam[min(adam)][0])
    for optimizer, flags, first in (
        ("flash_adamw", "--finetune", 1),
        ("flash_adamw", "--no-load-optim --no-load-rng", 5),
        ("flash_lion", "--no-load-optim --no-load-rng", 5),
    ):
        load = ("--load", str(tmp_path), *flags.split(), "--train-iters", "6")
        flash = pretrain(corpus, "--optimizer", optimizer, *load)
        assert min(flash) == first
        assert float(flash[first][0]) < fresh_loss - 0.2, "it must start from the trained weights"


def test_wrong_flags_end_the_launch_with_one_line(corpus: Path) -> None:
    script = ROOT / "scripts" / "pretrain_gpt.py"
    flags = ("--optimizer", "flash_adamw", "--train-iters", "1", "--fp4-param-gather")
    done = _launch(script, corpus, *flags, ranks=1)
    assert done.returncode != 0
    assert "--optimizer flash_adamw cannot be used with --fp4-param-gather" in done.stderr
    assert "usage:" not in done.stderr


def test_launcher_names_a_script_that_is_not_there() -> None:
    command = [sys.executable, "-m", "megatron_flashoptim.run", "no_such_script.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "SCRIPT 'no_such_script.py' is not a file" in done.stderr


def test_lines_of_megatron_are_seen_whatever_an_import_logs(tmp_path: Path) -> None:
    package = tmp_path / "transformer_engine"
    package.mkdir()
    absent = "import logging\nlogging.info('-')\nraise ModuleNotFoundError\n"
    (package / "__init__.py").write_text(absent)
    script = tmp_path / "script.py"
    script.write_text("import logging\nlogging.getLogger('megatron.core.timers').info('a timer')\n")
    command = [sys.executable, "-m", "megatron_flashoptim.run", "--device", "cpu", str(script)]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("a timer")


@pytest.mark.skipif(
    MEGATRON_LM is None,
    reason="needs MEGATRON_LM_PATH, a checkout of Megatron-LM core_v0.19.0 (not in the wheel)",
)
def test_unmodified_pretrain_gpt_of_megatron_lm_runs(corpus: Path, tmp_path: Path) -> None:
    assert MEGATRON_LM is not None
    flags = ("--optimizer", "flash_adamw", "--train-iters", "4", "--save-interval", "4")
    script = Path(MEGATRON_LM) / "pretrain_gpt.py"
    losses = _train(script, corpus, *flags, "--save", str(tmp_path))
    assert losses.keys() >= {2, 4}
    assert (tmp_path / "iter_0000004" / ".metadata").is_file()
