"""``megatron-flashoptim memory`` without a model, and once of one as it is installed."""

from __future__ import annotations

import pytest
from console import error, run, run_installed

GPT = """--num-layers 2 --hidden-size 64 --ffn-hidden-size 256 --num-attention-heads 4 --bf16
--seq-length 64 --max-position-embeddings 64 --micro-batch-size 1 --lr 1e-3 --train-iters 10
--vocab-size 256 --make-vocab-size-divisible-by 1 --tokenizer-type NullTokenizer
--position-embedding-type rope --optimizer flash_adamw --use-distributed-optimizer""".split()


def test_table_shows_the_bytes_of_the_formats() -> None:
    done = run("memory", "--parameters", "1e9", "--grad-dtype", "bf16")
    assert done.returncode == 0, done.stderr
    assert _per_parameter(done.stdout) == {
        "adam (fp32 master and moments)": 20.0,  # 4 for the fp32 main gradient
        "flash_adamw, flash_adam, 32-bit masters": 8.125,
        "flash_adamw, flash_adam, 24-bit masters": 7.125,
        "flash_adamw, flash_adam, 16-bit masters": 6.125,
        "flash_lion, flash_sgd, 32-bit masters": 7.062,
        "flash_lion, flash_sgd, 24-bit masters": 6.062,
        "flash_lion, flash_sgd, 16-bit masters": 5.062,
    }


def _per_parameter(table: str) -> dict[str, float]:
    """Return the first figure of each line, bytes per parameter, by the optimizer's name."""
    lines = table.splitlines()[3:-2]
    fields = (line.rsplit(maxsplit=6) for line in lines)
    return {name: float(figure) for name, figure, *_ in fields}


def test_state_is_shared_by_the_data_parallel_ranks() -> None:
    chosen = ("--data-parallel-size", "16", "--optimizer", "flash_lion")
    done = run("memory", "--parameters", "1e9", *chosen)
    found = _per_parameter(done.stdout)
    assert len(found) == 4, "Adam's line, and those of the chosen optimizer"
    adam = "adam (fp32 master and moments)"
    assert found[adam] == 6 + 12 / 16, "fp32 gradients need no main gradient"
    assert found["flash_lion, 24-bit masters"] == pytest.approx(6 + 2.0625 / 16, abs=1e-3)
    assert done.stdout.splitlines()[5].endswith(f"{4.0625e9 / 2**30:11.2f}"), "the checkpoint"


def test_adam_is_shown_beside_flash_adamw() -> None:
    tables = [
        run("memory", "--parameters", "1e9", "--optimizer", name).stdout
        for name in ("adam", "flash_adamw")
    ]
    assert tables[0] == tables[1] and len(_per_parameter(tables[0])) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--parameters"),
        (("--parameters", "0"), "must be positive"),
        (("--parameters", "many"), "many: not a number such as 8e9"),
        (("--parameters", "nan"), "must be positive, got nan"),
        (("--parameters", "1e9", "--grad-dtype", "fp8"), "fp8"),
        (
            ("--gpus", "2", "--num-layers", "2", "--grad-dtype", "bf16"),
            "--grad-dtype bf16 belongs to --parameters; Megatron's is --grad-reduce-in-bf16",
        ),
        (("--checkpoint", "a", "--data-parallel-size", "1"), "--data-parallel-size 1 belongs to "),
        (("--parameters", "1e9", "--optimizer", "muon"), "muon is none of adam, flash_adamw, "),
        (
            ("--gpus", "2", "--num-layers", "2", "--optimizer", "lion"),
            "lion is none of adam, flash_adamw, ",
        ),
    ],
)
def test_wrong_command_line_exits_with_2_and_says_what(
    arguments: tuple[str, ...], message: str
) -> None:
    assert message in error("memory", *arguments, code=2)


def test_console_script_plans_a_run_and_says_nothing_of_its_imports() -> None:
    done = run_installed("memory", "--gpus", "2", *GPT)
    assert (done.returncode, done.stderr) == (0, "")
    layer = 64 * (3 * 64 + 64 + 2 * 256) + (3 * 64 + 64 + 256 + 64) + 4 * 64
    parameters = 256 * 64 + 2 * layer + 2 * 64
    title, _, header, *rows = done.stdout.splitlines()
    assert title.startswith(f"{parameters:,} parameters on a rank") and "size 2, " in title
    assert header.split() == "bytes on the rank weights grads state GiB in all".split()
    table = {name: figures for name, *figures in (row.rsplit(maxsplit=4) for row in rows)}
    for name, state in (
        ("adam (fp32 master and moments)", 12),
        ("flash_adamw, 32-bit masters", 4.125),
        ("flash_adamw, 24-bit masters", 3.125),
        ("flash_adamw, 16-bit masters", 2.125),
    ):
        weights, grads, found = (int(cell.replace(",", "")) for cell in table[name][:3])
        assert (weights, grads) == (2 * parameters, 4 * parameters)
        # Beside it flash keeps a table of a fraction of a byte per group.
        assert 0 <= found - state * parameters / 2 < 0.002 * parameters, name


def test_console_script_says_an_error_of_megatron_in_one_line() -> None:
    arguments = ("memory", "--gpus", "3", "--tensor-model-parallel-size", "2", *GPT)
    said = error(*arguments, code=2, run=run_installed)
    assert "Megatron refuses the arguments: world size (3) is not divisible" in said
