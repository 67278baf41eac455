"""Megatron's theoretical memory figures, by its own function on its own arguments."""

from __future__ import annotations

from typing import Any

import pytest
from ranks import run_ranks

LAYERS, HIDDEN, FFN, VOCAB, EXPERTS = 4, 256, 1024, 512, 8
MODEL = f"""--num-layers {LAYERS} --hidden-size {HIDDEN} --ffn-hidden-size {FFN} --bf16
--num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 --micro-batch-size 1
--vocab-size {VOCAB} --disable-bias-linear --normalization RMSNorm --use-distributed-optimizer"""
ATTENTION, MLP = 4 * HIDDEN**2, 2 * HIDDEN * FFN
NORMS = (2 * LAYERS + 1) * HIDDEN
DENSE = LAYERS * (ATTENTION + MLP) + NORMS + VOCAB * HIDDEN
SHARED_OF_MOE = LAYERS * (ATTENTION + EXPERTS * HIDDEN) + NORMS + VOCAB * HIDDEN
MOE = f"--num-experts {EXPERTS} --expert-model-parallel-size 4"
RELEASE = """--flash-gradient-release --overlap-grad-reduce --clip-grad 0
--rerun-mode disabled"""
TABLE = 4 / 2048  # one int32 per tile of 64 groups of 32
# Flags, number of ranks, bytes.
FLASH: dict[str, tuple[str, int, float]] = {
    "fp32 gradients": ("", 4, DENSE * (6 + (3.125 + TABLE) / 4)),
    "bf16 gradients": ("--grad-reduce-in-bf16", 4, DENSE * (4 + (3.125 + TABLE) / 4)),
    "32-bit masters": ("--flash-master-bits 32", 2, DENSE * (6 + (4.125 + TABLE) / 2)),
    "L2-Adam": ("--optimizer flash_adam", 4, DENSE * (6 + (3.125 + TABLE) / 4)),
    "Lion": ("--optimizer flash_lion", 4, DENSE * (6 + (2.0625 + TABLE) / 4)),
    "SGD, fp32 model": (
        "--optimizer flash_sgd --fp32-model",
        2,
        DENSE * (8 + (1.0625 + TABLE) / 2),
    ),
    "fp32 model": ("--fp32-model", 4, DENSE * (8 + (2.125 + TABLE) / 4)),
    "context parallel": ("--context-parallel-size 2", 4, DENSE * (6 + (3.125 + TABLE) / 4)),
    "instances": (
        "--num-distributed-optimizer-instances 2",
        4,
        DENSE * (6 + (3.125 + TABLE) / 2),
    ),
    # Slots of the bucket size, 3 by default.
    "gradient release": (
        f"{RELEASE} --ddp-bucket-size 10000",
        4,
        DENSE * (2 + (3.125 + TABLE) / 4) + 3 * 10000 * 4,
    ),
    "gradient release, 2 slots of 8": (
        f"{RELEASE} --ddp-num-buckets 8 --flash-release-slots 2",
        4,
        DENSE * (2 + 2 / 8 * 4 + (3.125 + TABLE) / 4),
    ),
    "gradient release, one bucket": (RELEASE, 4, DENSE * (6 + (3.125 + TABLE) / 4)),
    "experts": (
        MOE,
        8,
        SHARED_OF_MOE * (6 + (3.125 + TABLE) / 8)
        + LAYERS * EXPERTS * MLP / 4 * (6 + (3.125 + TABLE) / 2),
    ),
    "experts and instances": (
        f"{MOE} --num-distributed-optimizer-instances 2",
        16,
        SHARED_OF_MOE * (6 + (3.125 + TABLE) / 8)
        + LAYERS * EXPERTS * MLP / 4 * (6 + (3.125 + TABLE) / 2),
    ),
}


def _figures(cases: dict[str, tuple[str, int]]) -> dict[str, tuple[float, float]]:
    """Return the figure of each command line, and that of Megatron's function unbound."""
    from megatron.training import theoretical_memory_usage

    import megatron_flashoptim
    from megatron_flashoptim.megatron.memory import planned_args

    megatron_flashoptim.install()
    bound: Any = theoretical_memory_usage.compute_weight_and_optimizer_memory
    found = {}
    for name, (flags, ranks) in cases.items():
        given = f"{MODEL} {flags}"
        if "--fp32-model" in flags:  # which Megatron's flags say by leaving --bf16 out
            given = given.replace("--bf16", "").replace("--fp32-model", "")
        args = planned_args.parse(given.split(), ranks)
        args.padded_vocab_size = VOCAB
        reported, _, _ = theoretical_memory_usage.report_theoretical_memory(args)
        assert reported * 2**20 == bound(args)
        found[name] = (bound(args), bound.__wrapped__(args))
    return found


def test_figures_are_those_of_the_formats() -> None:
    cases = {
        name: (f"--optimizer flash_adamw {flags}", ranks)
        for name, (flags, ranks, _) in FLASH.items()
    }
    (found,) = run_ranks(1, _figures, cases)
    for name, (_, _, expected) in FLASH.items():
        assert found[name][0] == pytest.approx(expected, rel=1e-9), name


def test_figures_of_other_optimizers_are_megatrons() -> None:
    (found,) = run_ranks(1, _figures, {"dense": ("--optimizer adam", 4), "moe": (MOE, 8)})
    assert all(ours == theirs for ours, theirs in found.values())
    assert found["dense"][0] == DENSE * (6 + 12 / 4)


def _activations(cases: list[str]) -> list[float]:
    import megatron_flashoptim
    from megatron_flashoptim.megatron.memory import planned_args
    from megatron_flashoptim.megatron.memory.activations import activation_bytes

    megatron_flashoptim.install()
    flags = "--optimizer flash_adamw --make-vocab-size-divisible-by 1"
    return [activation_bytes(planned_args.parse(f"{MODEL} {flags} {c}".split(), 4)) for c in cases]


def test_activations_are_megatrons_estimate_of_the_ranks_part_of_the_sequence() -> None:
    tensor = "--tensor-model-parallel-size 2"
    cases = ["", "--context-parallel-size 2", tensor, f"{tensor} --sequence-parallel"]
    (found,) = run_ranks(1, _activations, cases)
    # Bytes per token and hidden element of a layer: 10, and 24 that tensor parallelism divides.
    around = HIDDEN + 8
    whole, context, tensor_only, sequence = found
    assert whole == 1.05 * 64 * (LAYERS * HIDDEN * 34 + around + 2 * (VOCAB + HIDDEN))
    assert context == whole / 2
    assert tensor_only == 1.05 * 64 * (LAYERS * HIDDEN * 22 + around + 2 * (VOCAB / 2 + HIDDEN))
    assert sequence == 64 * (LAYERS * HIDDEN * 34 + around + 4 * (VOCAB + HIDDEN)) / 2
