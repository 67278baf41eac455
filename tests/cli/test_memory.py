"""``megatron-flashoptim memory`` without a model."""

from __future__ import annotations

import pytest
from console import error, run


def test_table_shows_the_bytes_of_the_formats() -> None:
    done = run("memory", "--parameters", "1e9", "--grad-dtype", "bf16")
    assert done.returncode == 0, done.stderr
    per_parameter = {
        line[:32].strip(): float(line[32:44]) for line in done.stdout.splitlines()[3:7]
    }
    assert per_parameter == {
        "adam (fp32 master and moments)": 16.0,
        "flash_adamw, 32-bit masters": 8.125,
        "flash_adamw, 24-bit masters": 7.125,
        "flash_adamw, 16-bit masters": 6.125,
    }


def test_state_is_shared_by_the_data_parallel_ranks() -> None:
    done = run("memory", "--parameters", "1e9", "--data-parallel-size", "16")
    (line,) = [line for line in done.stdout.splitlines() if "24-bit" in line]
    assert float(line[32:44]) == pytest.approx(6 + 3.125 / 16, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--parameters"),
        (("--parameters", "0"), "must be positive"),
        (("--parameters", "many"), "invalid number value: 'many'"),
        (("--parameters", "1e9", "--grad-dtype", "fp8"), "fp8"),
    ],
)
def test_wrong_command_line_exits_with_2_and_says_what(
    arguments: tuple[str, ...], message: str
) -> None:
    assert message in error("memory", *arguments, code=2)
