"""Figures that users watch: TensorBoard events, timers and the log of real runs, beside stock's."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from watched_training import ADAM, FLASH, around_steps, train

STEPS = 4
FLAGS = f"""--train-iters {STEPS} --disable-bias-linear --untie-embeddings-and-output-weights
--loss-scale 64 --timing-log-level 2 --log-interval 1 --tensorboard-log-interval 1
--log-timers-to-tensorboard --log-memory-to-tensorboard --log-world-size-to-tensorboard""".split()
TIMERS = {
    "optimizer",
    "optimizer-copy-to-main-grad",
    "optimizer-unscale-and-check-inf",
    "optimizer-clip-main-grad",
    "optimizer-count-zeros",
    "optimizer-inner-step",
    "optimizer-copy-main-to-model-params",
    "params-all-gather",
}
LOG = "megatron.core.timers"
# Megatron's chain of optimizers does not run these.
OURS_ALONE = {"optimizer-clip-main-grad-time", "optimizer-count-zeros-time"}

Events = dict[str, dict[int, float]]


def _events(folder: Path) -> Events:
    """Return the scalars of a run by tag and iteration."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    return {
        tag: {event.step: event.value for event in read.Scalars(tag)}
        for tag in read.Tags()["scalars"]
    }


def _waits() -> dict[str, Any]:
    """Count how often the host waits for the device inside each ``optimizer.step``."""
    waits: list[int] = []
    wait = torch.cuda.synchronize

    def counted(*args: Any) -> None:
        waits[-1] += 1
        wait(*args)

    @contextlib.contextmanager
    def around(optimizer: Any, number: int) -> Iterator[None]:
        step = optimizer.step

        def counting() -> Any:
            waits.append(0)
            torch.cuda.synchronize = counted
            try:
                return step()
            finally:
                torch.cuda.synchronize = wait

        optimizer.step = counting
        yield
        del optimizer.step

    around_steps(around)
    return {"waits": waits}


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Train with stock Adam, with flash_adamw, and with flash_adamw without anything to watch."""
    folder = tmp_path_factory.mktemp("figures")
    found: dict[str, Any] = {"report": folder / "memory.json"}
    for name, optimizer in {"stock": ADAM, "flash": FLASH}.items():
        board = ("--tensorboard-dir", str(folder / name))
        report = ("--memory-report", str(found["report"]))
        ranks = train(corpus, *FLAGS, *optimizer, *board, *report, ranks=2, watch=_waits)
        found[name], found[f"{name} ranks"] = _events(folder / name), ranks
    plain = f"--train-iters {STEPS} --disable-bias-linear".split()
    found["plain ranks"] = train(corpus, *plain, *FLASH, ranks=2, watch=_waits)
    return found


def test_tensorboard_shows_what_it_shows_with_adam(runs: dict[str, Any]) -> None:
    stock, flash = runs["stock"], runs["flash"]
    assert flash.keys() - stock.keys() == OURS_ALONE
    assert stock.keys() <= flash.keys()
    every = set(range(1, STEPS + 1))
    for tag in ("grad-norm", "num-zeros", "params-norm", "learning-rate", "loss-scale"):
        assert flash[tag].keys() == every, tag
        # The same figures once more, by samples: 4 of them an iteration.
        assert list(flash[f"{tag} vs samples"]) == [4 * step for step in sorted(every)]
    for tag in ("mem-allocated-bytes", "mem-max-allocated-bytes", "mem-reserved-bytes"):
        assert flash[tag].keys() == every
        if torch.cuda.is_available():
            assert 0 < flash[tag][STEPS] <= stock[tag][STEPS]


def test_figures_are_those_of_adam(runs: dict[str, Any]) -> None:
    stock, flash = runs["stock"], runs["flash"]
    for tag in ("learning-rate", "loss-scale", "batch-size", "world-size"):
        assert flash[tag] == stock[tag]
    assert set(flash["loss-scale"].values()) == {64.0}
    assert len(set(flash["learning-rate"].values())) == STEPS
    for tag in ("grad-norm", "num-zeros", "lm loss"):
        assert flash[tag][1] == pytest.approx(stock[tag][1], rel=1e-5), "from the same weights"
    for step in range(1, STEPS + 1):
        assert flash["params-norm"][step] > 1
        assert flash["params-norm"][step] == pytest.approx(stock["params-norm"][step], rel=1e-4)
        assert flash["grad-norm"][step] == pytest.approx(stock["grad-norm"][step], rel=5e-3)
        assert flash["lm loss"][step] == pytest.approx(stock["lm loss"][step], rel=1e-3)
        # Embeddings of absent characters, and few others.
        assert flash["num-zeros"][step] == pytest.approx(stock["num-zeros"][step], rel=1e-2)
    assert min(flash["num-zeros"].values()) > 1000


def test_every_part_of_the_step_is_timed(runs: dict[str, Any]) -> None:
    whole = runs["flash"]["optimizer-time"]
    for name in TIMERS:
        timed = runs["flash"][f"{name}-time"]
        assert timed.keys() == whole.keys() == set(range(1, STEPS + 1))
        assert all(0 < timed[step] <= whole[step] for step in timed), name
        assert f"    {name} ..." in "".join(runs["flash ranks"][-1]["log"][LOG]), "of the last rank"
        assert f"    {name} ..." not in "".join(runs["plain ranks"][-1]["log"][LOG])


def test_no_timer_makes_the_host_wait_unless_asked_for(runs: dict[str, Any]) -> None:
    for rank in runs["plain ranks"]:
        assert rank["waits"] == [0] * STEPS
    for rank in runs["flash ranks"]:  # start and stop of each timer
        assert rank["waits"] == [2 * (len(TIMERS) - 1)] * STEPS


def test_one_line_at_start_up_says_what_trains(runs: dict[str, Any]) -> None:
    report = json.loads(runs["report"].read_text())
    for first, second in (runs["flash ranks"], runs["plain ranks"]):
        (line,) = _ours(first)
        assert not _ours(second), "of the first rank alone"
        said = re.fullmatch(
            r"flash_adamw: ([\d.]+) bytes of state per owned parameter, 24-bit masters "
            r"\(nearest rounding\), second moment rounded nearest, 1 launch per step",
            line,
        )
        assert said, line
        assert float(said[1]) == pytest.approx(report["bytes_per_parameter"], abs=2e-3)
    assert not _ours(runs["stock ranks"][0])


def _ours(rank: dict[str, Any]) -> list[str]:
    loggers = [name for name in rank["log"] if name.startswith("megatron_flashoptim")]
    return [line for name in loggers for line in rank["log"][name]]
