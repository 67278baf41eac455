"""``megatron-flashoptim memory`` with Megatron's arguments, against live runs of the same sizes."""

from __future__ import annotations

from typing import Any

import pytest
from console import error, run
from ranks import run_ranks

COMMON = """--num-layers 2 --hidden-size 256 --ffn-hidden-size 1024 --num-attention-heads 4 --bf16
--seq-length 64 --max-position-embeddings 64 --micro-batch-size 1 --lr 1e-3 --train-iters 10
--vocab-size 256 --make-vocab-size-divisible-by 1 --tokenizer-type NullTokenizer
--position-embedding-type rope --optimizer flash_adamw --use-distributed-optimizer"""
UNTIED = "--untie-embeddings-and-output-weights"
# Number of ranks, Megatron's flags and the same for the tiny GPT.
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "bf16 gradients": (2, "--grad-reduce-in-bf16", {"grads_in_fp32": False}),
    "tensor and pipeline parallel": (
        4,
        f"--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --swiglu {UNTIED}",
        {"tp": 2, "pp": 2, "swiglu": True, "tied": False},
    ),
    "experts": (
        2,
        f"--num-experts 4 --expert-model-parallel-size 2 --disable-bias-linear {UNTIED}",
        {"ep": 2, "experts": 4, "tied": False},
    ),
}


def _live(stock: bool, options: dict[str, Any]) -> tuple[int, int, int]:
    """Train a step; return bytes of weights, gradients and optimizer on this rank."""
    import tiny_gpt

    from megatron_flashoptim.megatron.live_memory import optimizer_bytes

    if stock:
        from exact_adamw import use_as_megatrons_adam

        use_as_megatrons_adam()
        options = {**options, "flash": None}
    trainer = tiny_gpt.build(tiny_gpt.Setup(hidden=256, layers=2, vocab=256, **options))
    trainer.train(1)
    (chunk,) = trainer.model
    buffers = [*chunk.buffers, *chunk.expert_parallel_buffers]
    state, _ = optimizer_bytes(trainer.optimizer, trainer.model)
    weights = sum(buffer.param_data.nbytes for buffer in buffers)
    return weights, sum(buffer.grad_data.nbytes for buffer in buffers), state


def _planned(ranks: int, flags: str) -> dict[str, tuple[int, ...]]:
    arguments = ["memory", "--gpus", str(ranks), *COMMON.split(), *flags.split()]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()[3:]
    return {row[:32].strip(): tuple(map(int, row[32:].split()[:3])) for row in rows}


@pytest.mark.parametrize("case", CASES)
def test_plan_agrees_with_live_runs_within_1_percent(case: str) -> None:
    ranks, flags, options = CASES[case]
    planned = _planned(ranks, flags)
    for stock, name in (
        (True, "adam (fp32 master and moments)"),
        (False, "flash_adamw, 24-bit masters"),
    ):
        live = run_ranks(ranks, _live, stock, options)
        largest = max(live, key=lambda rank: rank[0] + rank[2])
        assert planned[name] == pytest.approx(largest, rel=0.01)
    # The precision-aware rows cannot run here: by the formats, with 2 bytes for the remainder.
    adam = planned["adam (fp32 master and moments)"][2] / (16 if "bf16 gr" in case else 12)
    for moments, size in (("fp32", 10), ("bf16", 6), ("fp8", 4)):
        assert planned[f"precision-aware, {moments} moments"][2] == pytest.approx(size * adam)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "2"), "give --parameters, or --gpus and Megatron's arguments"),
        (("--parameters", "1e9", "--num-layers", "2"), "--num-layers cannot be used with"),
        (
            ("--gpus", "1", *COMMON.split(), "--hidden-sizes", "2"),
            "unrecognized arguments: --hidden-sizes 2",
        ),
        (
            ("--gpus", "3", *COMMON.split(), "--tensor-model-parallel-size", "2"),
            "Megatron refuses the arguments: world size (3) is not divisible",
        ),
    ],
)
def test_wrong_arguments_exit_with_2_and_say_what(arguments: tuple[str, ...], message: str) -> None:
    assert message in error("memory", *arguments, code=2)
