"""docs/getting-started.md: its commands work in a fresh folder, and print what it quotes."""

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


@pytest.fixture(scope="module")
def road(megatron: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run the page; returns its folder and what its blocks printed."""
    if torch.cuda.is_available():
        pytest.skip("the page is for CPU ranks, which are refused where a GPU is visible")
    logging.disable(logging.NOTSET)  # the page shows lines of the log
    folder = tmp_path_factory.mktemp("road")
    for name in ("scripts", "configs"):
        (folder / name).symlink_to(REPOSITORY / name)
    return folder / "flash-road", page.run(PAGE, folder)


def test_the_blocks_print_what_the_page_quotes(road: tuple[Path, str]) -> None:
    quoted = page.quoted_lines(PAGE)
    assert len(quoted) > 20
    missing = [line.pattern for line in quoted if not line.search(road[1])]
    assert not missing, f"docs/getting-started.md quotes what is not printed: {missing}\n{road[1]}"


def test_the_resumed_run_repeats_the_losses(road: tuple[Path, str]) -> None:
    """The page says: but for the last digits."""
    losses = [
        {int(number): float(loss) for number, loss in LOSS.findall((road[0] / log).read_text())}
        for log in ("flash.log", "tensor.log")
    ]
    assert sorted(losses[0]) == list(range(21, 41)) and sorted(losses[1]) == list(range(31, 41))
    # The second line of a process is Megatron's mean of two.
    repeated = [number for number in losses[1] if number != 32]
    for number in repeated:
        assert losses[1][number] == pytest.approx(losses[0][number], abs=1e-3)
    assert any(losses[1][number] != losses[0][number] for number in repeated)


def test_tensorboard_has_the_scalars_that_the_page_names(road: tuple[Path, str]) -> None:
    events = EventAccumulator(str(road[0] / "tensorboard"))
    events.Reload()
    names = one_line(PAGE).split("**TensorBoard**")[1].split("with `--log")[0]
    named = re.findall(r"`([\w -]+)`", names)
    assert len(named) == 5 and set(named) <= set(events.Tags()["scalars"])


def test_the_export_holds_every_weight(road: tuple[Path, str]) -> None:
    (file,) = (road[0] / "weights").glob("*.safetensors")
    with safe_open(file, "pt") as weights:
        shapes = {key: weights.get_slice(key).get_shape() for key in weights.keys()}  # noqa: SIM118
    assert len(shapes) == 15 and shapes["embedding.word_embeddings.weight"][1] == 128
