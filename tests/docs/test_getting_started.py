"""docs/getting-started.md: its commands work in a fresh folder, and do what it says."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import page
import pytest
import torch
from safetensors import safe_open
from source_messages import REPOSITORY, one_line
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PAGE = (REPOSITORY / "docs" / "getting-started.md").read_text()
LOSS = re.compile(r"iteration +(\d+)/ .*lm loss: ([\d.E+-]+)")


# One test, so that the page is run once however tests are spread over processes.
def test_the_page_works_in_a_fresh_folder_as_it_says(megatron: None, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("the page is for CPU ranks, which are refused where a GPU is visible")
    logging.disable(logging.NOTSET)  # the page shows lines of the log
    for name in ("scripts", "configs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    printed = page.run(PAGE, tmp_path)
    road = tmp_path / "flash-road"
    check_what_is_quoted(printed)
    check_that_the_resumed_run_repeats_the_losses(road)
    check_that_tensorboard_has_the_scalars_of_the_page(road)
    check_that_the_export_holds_every_weight(road)


def check_what_is_quoted(printed: str) -> None:
    quoted = page.quoted_lines(PAGE)
    assert len(quoted) > 20
    missing = [line.pattern for line in quoted if not line.search(printed)]
    assert not missing, f"docs/getting-started.md quotes what is not printed: {missing}\n{printed}"


def check_that_the_resumed_run_repeats_the_losses(road: Path) -> None:
    """The page says: but for the last digits."""
    losses = [
        {int(number): float(loss) for number, loss in LOSS.findall((road / log).read_text())}
        for log in ("flash.log", "tensor.log")
    ]
    assert sorted(losses[0]) == list(range(21, 41)) and sorted(losses[1]) == list(range(31, 41))
    # The second line of a process is Megatron's mean of two.
    repeated = [number for number in losses[1] if number != 32]
    for number in repeated:
        assert losses[1][number] == pytest.approx(losses[0][number], abs=1e-3)
    assert any(losses[1][number] != losses[0][number] for number in repeated)


def check_that_tensorboard_has_the_scalars_of_the_page(road: Path) -> None:
    events = EventAccumulator(str(road / "tensorboard"))
    events.Reload()
    names = one_line(PAGE).split("**TensorBoard**")[1].split("with `--log")[0]
    named = re.findall(r"`([\w -]+)`", names)
    assert len(named) == 5 and set(named) <= set(events.Tags()["scalars"])


def check_that_the_export_holds_every_weight(road: Path) -> None:
    (file,) = (road / "weights").glob("*.safetensors")
    with safe_open(file, "pt") as weights:  # no mapping: it has keys and cannot be iterated
        shapes = {key: weights.get_slice(key).get_shape() for key in weights.keys()}  # noqa: SIM118
    assert len(shapes) == 15 and shapes["embedding.word_embeddings.weight"][1] == 128
