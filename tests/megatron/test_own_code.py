"""docs/checkpoints.md: saving and loading in code that calls ``megatron.core`` directly."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md"
SHARDING_TYPES = ("fully_reshardable", "dp_reshardable")


def _functions(sharding_type: str = SHARDING_TYPES[0]) -> dict[str, Any]:
    """Return the page's functions, with the other value that its comment has."""
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    first, second = (f'"{each}"' for each in SHARDING_TYPES)
    assert f"{first}}}  # or {second}" in code
    functions: dict[str, Any] = {}
    exec(code.replace(first, f'"{sharding_type}"'), functions)
    return functions


def _save(folder: Path, sharding_type: str) -> list[float]:
    import checkpoints
    import tiny_gpt

    trainer = tiny_gpt.build(tiny_gpt.Setup(overlap=True))
    trainer.train(3)
    checkpoints.fork_queue_of_results()
    _functions(sharding_type)["save"](str(folder), trainer.model[0], trainer.optimizer, step=3)
    return trainer.train(3)


def _load(folder: Path, **layout: Any) -> tuple[list[float], dict[str, Any]]:
    import tiny_gpt

    trainer = tiny_gpt.build(tiny_gpt.Setup(overlap=True, **layout))
    beside = _functions()["load"](str(folder), trainer.model[0], trainer.optimizer, step=0)
    trainer.step_number = beside["step"]
    return trainer.train(3), beside


@pytest.mark.parametrize("sharding_type", SHARDING_TYPES)
def test_code_of_ones_own_goes_on_where_it_saved(sharding_type: str, tmp_path: Path) -> None:
    saved = run_ranks(2, _save, tmp_path, sharding_type)
    loaded = run_ranks(2, _load, tmp_path)
    assert loaded == [(losses, {"step": 3}) for losses in saved], "bit for bit"
    if sharding_type == "fully_reshardable":
        ((losses, _), _) = run_ranks(2, _load, tmp_path, tp=2)
        assert losses[0] == pytest.approx(sum(losses_of[0] for losses_of in saved) / 2, abs=0.05)
