"""``megatron-flashoptim memory`` without a model, and once of one as it is installed."""

from __future__ import annotations

import pytest
from console import error, run, run_installed

from megatron_flashoptim.optim.rules import RULES, rule_of

GPT = """--num-layers 2 --hidden-size 64 --ffn-hidden-size 256 --num-attention-heads 4 --bf16
--seq-length 64 --max-position-embeddings 64 --micro-batch-size 1 --lr 1e-3 --train-iters 10
--vocab-size 256 --make-vocab-size-divisible-by 1 --tokenizer-type NullTokenizer
--position-embedding-type rope --optimizer flash_adamw --use-distributed-optimizer""".split()


def test_table_shows_the_bytes_of_the_formats() -> None:
    done = run("memory", "--parameters", "1e9", "--grad-dtype", "bf16")
    assert done.returncode == 0, done.stderr
    one, two = (
        ", ".join(name for name in RULES if rule_of(name).keeps_exp_avg_sq == both)
        for both in (False, True)
    )
    assert _per_parameter(done.stdout) == {
        "adam (fp32 master and moments)": 20.0,  # 4 for the fp32 main gradient
        "precision-aware, fp32 moments": 14.0,
        "precision-aware, bf16 moments": 10.0,
        "precision-aware, fp8 moments": 10.0,
        f"{two}, 32-bit masters": 8.125,
        f"{two}, 24-bit masters": 7.125,
        f"{two}, 16-bit masters": 6.125,
        f"{one}, 32-bit masters": 7.062,
        f"{one}, 24-bit masters": 6.062,
        f"{one}, 16-bit masters": 5.062,
    }


def _per_parameter(table: str) -> dict[str, float]:
    """Return bytes per parameter of each line by the optimizer's name."""
    return {name: float(figures[5]) for name, figures in _figures(table).items()}


def _figures(table: str) -> dict[str, list[str]]:
    """Return the columns of each line between heading and notes."""
    _, body, _ = table.split("\n\n")
    header, *lines = body.splitlines()
    split = (line.rsplit(maxsplit=7 if "bytes/param" in header else 5) for line in lines)
    return {name: figures for name, *figures in split}


def test_copied_gradients_are_a_column_of_their_own_and_the_rest_is_readmes_16() -> None:
    done = run("memory", "--parameters", "1B", "--grad-dtype", "bf16")
    weights, grads, state, copied, *_ = _figures(done.stdout)["adam (fp32 master and moments)"]
    found = [int(cell.replace(",", "")) for cell in (weights, grads, state, copied)]
    assert found == [2e9, 2e9, 12e9, 4e9]
    assert "fp32 grads: Megatron's copy" in done.stdout
    others = [cells[3] for name, cells in _figures(done.stdout).items() if "adam (" not in name]
    assert set(others) == {"0"}
    assert "fp32 grads: " not in run("memory", "--parameters", "1B").stdout


def test_padding_and_released_gradients_are_explained(megatron: None) -> None:
    from megatron_flashoptim.cli.memory import render_run
    from megatron_flashoptim.megatron.memory.planner import RunSize, StageSize

    sizes = {"parameters": 1000, "stock_buffer": 1024, "owned": 500, "flash_shard": 1024}
    stage = StageSize(stage=0, flash_buffer=2048, flash_bucket=700, **sizes)
    flash = "flash_lion, 24-bit masters"
    table = render_run(RunSize((stage,), 2, 2, 2, "flash_lion", release_slots=2))
    assert _figures(table)[flash][:2] == ["4,096", "2,800"]
    assert "flash_lion: buffers are padded by 1,024 elements more than Adam's" in table
    assert "flash_lion: grads are at most this, the pool of 2 buckets" in table
    unpadded = StageSize(stage=0, flash_buffer=1024, flash_bucket=700, **sizes)
    table = render_run(RunSize((unpadded,), 2, 2, 2, "flash_lion"))
    assert _figures(table)[flash][:2] == ["2,048", "2,048"] and "flash_lion: " not in table


def test_the_stage_is_the_one_that_takes_most_not_the_one_with_most_parameters(
    megatron: None,
) -> None:
    """Experts are shared by fewer ranks than the rest: theirs is the most state."""
    from megatron_flashoptim.cli.memory import render_run
    from megatron_flashoptim.megatron.memory.planner import RunSize, StageSize

    def planned(buffer: int, owned: int) -> str:
        dense = StageSize(0, 1000, 1000, 1000, 100, 100, 1000)
        experts = StageSize(1, buffer, buffer, buffer, owned, owned, buffer)
        return render_run(RunSize((dense, experts), 2, 4, 8, "flash_adamw"))

    adam, flash = "adam (fp32 master and moments)", "flash_adamw, 24-bit masters"
    table = planned(950, 950)
    assert table.startswith("950 parameters on a rank of pipeline stage 1 of 2, ")
    assert _figures(table)[adam][:3] == ["1,900", "3,800", "11,400"]
    assert "where it takes more" not in table
    # Of Adam's state there is more, so that it takes most on another stage.
    table = planned(800, 400)
    assert table.startswith("1,000 parameters on a rank of pipeline stage 0 of 2, ")
    assert _figures(table)[adam][:3] == ["1,600", "3,200", "4,800"]
    assert _figures(table)[flash][:2] == ["2,000", "4,000"]
    assert f"\non a rank of stage 1, where it takes more: {adam}; precision-aware, fp32" in table


def test_adam_without_the_distributed_optimizer_keeps_all_state_on_each_rank(
    megatron: None,
) -> None:
    from megatron_flashoptim.cli.memory import render_run
    from megatron_flashoptim.megatron.memory.planner import RunSize, StageSize

    stage = StageSize(0, 1000, 1024, 1024, 125, 128, 1024)
    for distributed, of_adam in ((True, "1,500"), (False, "12,000")):
        run_size = RunSize((stage,), 2, 4, 8, "flash_adamw", distributed=distributed)
        table = render_run(run_size)
        assert _figures(table)["adam (fp32 master and moments)"][2] == of_adam
        assert _figures(table)["precision-aware, fp32 moments"][2] == "1,250"
        assert ("adam: all state on each rank, as the arguments" in table) != distributed
    masters = _figures(render_run(RunSize((stage,), 4, 4, 8, "flash_adamw", distributed=False)))
    assert masters["adam (fp32 moments)"][:3] == ["4,000", "4,000", "8,000"]


@pytest.mark.parametrize(
    ("given", "shown"),
    [("8B", "8,000,000,000"), ("1.3b", "1,300,000,000"), ("124M", "124,000,000"), ("8e9", "8,000")],
)
def test_numbers_are_taken_as_people_write_them(given: str, shown: str) -> None:
    assert run("memory", "--parameters", given).stdout.startswith(shown)


def test_state_is_shared_by_the_data_parallel_ranks() -> None:
    chosen = ("--data-parallel-size", "16", "--optimizer", "flash_lion")
    done = run("memory", "--parameters", "1e9", *chosen)
    found = _per_parameter(done.stdout)
    assert len(found) == 7, "of Adam, the precision-aware and the chosen optimizer"
    adam = "adam (fp32 master and moments)"
    assert found[adam] == 6 + 12 / 16, "fp32 gradients need no main gradient"
    assert found["flash_lion, 24-bit masters"] == pytest.approx(6 + 2.0625 / 16, abs=1e-3)
    checkpoint = _figures(done.stdout)["flash_lion, 24-bit masters"][-1]
    assert checkpoint == f"{4.0625e9 / 2**30:.3f}"


def test_adam_is_shown_beside_flash_adamw() -> None:
    tables = [
        run("memory", "--parameters", "1e9", "--optimizer", name).stdout
        for name in ("adam", "flash_adamw")
    ]
    assert tables[0] == tables[1] and len(_per_parameter(tables[0])) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--parameters"),
        (("--parameters", "0"), "must be positive"),
        (("--parameters", "many"), "many: not a number such as 8e9, 8B or 124M"),
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
    title, body, notes = done.stdout.split("\n\n")
    header, *rows = body.splitlines()
    assert title.startswith(f"{parameters:,} parameters on a rank") and "size 2, " in title
    assert header.split() == "bytes on the rank weights grads state fp32 grads GiB in all".split()
    table = {name: figures for name, *figures in (row.rsplit(maxsplit=5) for row in rows)}
    of_fp8, of_activations = notes.splitlines()
    assert of_fp8.startswith("fp8 moments take what bf16 ones do")
    # Of two layers without tensor parallelism; of embedding, last norm and logits.
    tokens = 64
    estimate = tokens * (2 * 64 * (10 + 24) + 8 + 64 + 2 * (256 + 64)) * 1.05
    assert of_activations.startswith(f"activations come on top: {estimate / 2**30:.3f} GiB")
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


def test_console_script_plans_adam_as_its_arguments_have_it() -> None:
    without = [word for word in GPT if word != "--use-distributed-optimizer"]
    done = run_installed("memory", "--gpus", "2", *without, "--optimizer", "adam")
    parameters = int(done.stdout.split()[0].replace(",", ""))
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("adam ("))
    sizes = [int(cell.replace(",", "")) for cell in row.rsplit(maxsplit=5)[1:4]]
    assert sizes == [2 * parameters, 4 * parameters, 12 * parameters]


def test_console_script_says_an_error_of_megatron_in_one_line() -> None:
    arguments = ("memory", "--gpus", "3", "--tensor-model-parallel-size", "2", *GPT)
    said = error(*arguments, code=2, run=run_installed)
    assert "Megatron refuses the arguments: world size (3) is not divisible" in said
