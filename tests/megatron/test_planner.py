"""``megatron-flashoptim memory`` with Megatron's arguments, against live runs of the same sizes."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from console import error, run
from ranks import run_ranks

from megatron_flashoptim import FlashOptimConfig

COMMON = """--num-layers 2 --hidden-size 256 --ffn-hidden-size 1024 --num-attention-heads 4 --bf16
--seq-length 64 --max-position-embeddings 64 --micro-batch-size 1 --lr 1e-3 --train-iters 10
--vocab-size 256 --make-vocab-size-divisible-by 1 --tokenizer-type NullTokenizer
--position-embedding-type rope --optimizer flash_adamw --use-distributed-optimizer"""
UNTIED = "--untie-embeddings-and-output-weights"
# Number of ranks, Megatron's flags and the same for the tiny GPT.
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "bf16 gradients": (2, "--grad-reduce-in-bf16", {"grads_in_fp32": False}),
    "flash_lion": (2, "--optimizer flash_lion", {"flash": FlashOptimConfig("flash_lion")}),
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
    "instances and grouped queries": (
        4,
        "--num-distributed-optimizer-instances 2 --group-query-attention --num-query-groups 2",
        {"instances": 2, "query_groups": 2},
    ),
}


def _live(stock: bool, options: dict[str, Any]) -> tuple[int, int, int]:
    """Train a step; return bytes of weights, gradients and optimizer on this rank."""
    import tiny_gpt

    from megatron_flashoptim.megatron.memory.live_memory import optimizer_bytes

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


def _planned(ranks: int, flags: str, common: str = COMMON) -> dict[str, tuple[int, ...]]:
    arguments = ["memory", "--gpus", str(ranks), *common.split(), *flags.split()]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.split("\n\n")[1].splitlines()[1:]
    figures = (
        (row[:32].strip() for row in rows),
        (row[32:].replace(",", "").split() for row in rows),
    )
    # The copy of bf16 gradients is of the optimizer's tensors, as they are counted in a run.
    return {
        name: (int(weights), int(grads), int(state) + int(copied))
        for name, (weights, grads, state, copied, _) in zip(*figures, strict=True)
    }


@pytest.mark.parametrize("case", CASES)
def test_plan_agrees_with_live_runs_within_1_percent(case: str) -> None:
    ranks, flags, options = CASES[case]
    planned = _planned(ranks, flags)
    optimizer = options.get("flash", FlashOptimConfig()).optimizer
    for stock, name in (
        (True, "adam (fp32 master and moments)"),
        (False, f"{optimizer}, 24-bit masters"),
    ):
        live = run_ranks(ranks, _live, stock, options)
        largest = max(live, key=lambda rank: rank[0] + rank[2])
        assert planned[name] == pytest.approx(largest, rel=0.01)


# Stock's bytes per parameter beside bf16 weight and bf16 gradient, allocated after a step: a GPT of
# 1.31B parameters on one H100, Transformer Engine 2.20.2. The same 0.16 in all is not state.
MEASURED = {
    "adam (fp32 master and moments)": 16.16,
    "precision-aware, fp32 moments": 10.16,
    "precision-aware, bf16 moments": 6.15,
    "precision-aware, fp8 moments": 6.16,
}


def test_precision_aware_rows_are_as_far_from_adams_as_was_measured_on_a_gpu() -> None:
    planned = _planned(1, "--grad-reduce-in-bf16")
    adam, *others = MEASURED
    for name in others:
        saved = (planned[adam][2] - planned[name][2]) / planned[adam][2] * 16
        assert saved == pytest.approx(MEASURED[adam] - MEASURED[name], rel=0.01)


def test_plan_of_an_fp32_model_agrees_with_live_runs_within_1_percent() -> None:
    planned = _planned(2, "", COMMON.replace("--bf16", ""))
    assert len(planned) == 2, "no correction and no precision-aware optimizer"
    for stock, name in ((True, "adam (fp32 moments)"), (False, "flash_adamw")):
        live = run_ranks(2, _live, stock, {"bf16": False})
        assert planned[name] == pytest.approx(live[0], rel=0.01)


def _live_pool() -> tuple[int, int]:
    """Train a step with released gradients; return bytes of their pool and of the optimizer."""
    import tiny_gpt

    from megatron_flashoptim import FlashOptimConfig
    from megatron_flashoptim.megatron.memory.live_memory import optimizer_bytes

    setup = tiny_gpt.Setup(
        flash=FlashOptimConfig(gradient_release=True),
        hidden=256,
        bucket_size=100_000,
        ddp={"overlap_grad_reduce": True},
        optimizer={"clip_grad": 0.0},
    )
    trainer = tiny_gpt.build(setup)
    trainer.train(1)
    state, _ = optimizer_bytes(trainer.optimizer, trainer.model)
    return int(trainer.optimizer.release.pool.memory.nbytes), state


def test_plan_of_released_gradients_is_an_upper_bound_of_the_pool() -> None:
    flags = """--overlap-grad-reduce --ddp-bucket-size 100000 --clip-grad 0 --rerun-mode disabled"""
    whole = _planned(1, flags)["flash_adamw, 24-bit masters"]
    planned = _planned(1, f"{flags} --flash-gradient-release")
    assert planned["adam (fp32 master and moments)"][1] == pytest.approx(whole[1], rel=0.01)
    weights, gradients, state = planned["flash_adamw, 24-bit masters"]
    assert (weights, state) == (whole[0], whole[2])
    ((live, live_state),) = run_ranks(1, _live_pool)
    assert live_state == pytest.approx(state, rel=0.01)
    assert 0.7 * gradients < live <= gradients < 0.8 * whole[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "2"), "give --parameters, --checkpoint, or --gpus and Megatron's arguments"),
        (("--gpu", "2"), "and Megatron's arguments; --gpu is none of this command's own"),
        (("--parameters", "8G"), "argument --parameters: 8G: not a number such as 8e9"),
        (
            ("--gpus", "1", *COMMON.replace("--seq-length 64", "").split()),
            "Megatron refuses the arguments: --seq-length is missing",
        ),
        (("--parameters", "1e9", "--num-layers", "2"), "--num-layers cannot be used with"),
        (
            ("--gpus", "1", *COMMON.split(), "--hidden-sizes", "2"),
            "unrecognized arguments: --hidden-sizes 2",
        ),
        (("--gpus", "1", "@FILE"), "--optimizer lion is none of adam, flash_adamw, "),
        (
            ("--gpus", "3", *COMMON.split(), "--tensor-model-parallel-size", "2"),
            "Megatron refuses the arguments: world size (3) is not divisible",
        ),
    ],
)
def test_wrong_arguments_exit_with_2_and_say_what(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "lion.args"
    file.write_text(f"{COMMON}\n--optimizer lion")
    given = (f"@{file}" if argument == "@FILE" else argument for argument in arguments)
    assert message in error("memory", *given, code=2)


H, FFN, EXPERT, PADDED = 256, 1024, 128, 1024
SIZES = f"""--num-layers 4 --hidden-size {H} --ffn-hidden-size {FFN} --num-attention-heads 8 --bf16
--seq-length 64 --max-position-embeddings 64 --vocab-size 1000
--position-embedding-type rope --use-distributed-optimizer"""
MOE = f"""--num-experts 8 --moe-layer-freq ([0]+[1]*3) --moe-ffn-hidden-size {EXPERT}
--moe-router-topk 2 --moe-shared-expert-intermediate-size {EXPERT} --disable-bias-linear
--normalization RMSNorm --swiglu {UNTIED}"""
MLA = """--multi-latent-attention --q-lora-rank 64 --kv-lora-rank 32 --qk-head-dim 32
--qk-pos-emb-head-dim 16 --v-head-dim 32 --qk-layernorm"""
# Down and up projections of queries (8 heads of 32 + 16) and of keys and values, norms, output.
MLA_LAYER = H * 64 + 64 + 64 * 8 * 48 + H * (32 + 16) + 32 + 32 * 8 * 64 + 8 * 32 * H + 2 * H
MOE_MLP = 3 * H * EXPERT * (8 + 1) + 8 * H
# One block of attention, MLP, biases and norms.
BLOCK = 12 * H * H + 13 * H
# Flags, number of ranks, and the parameters of each pipeline stage by hand.
COUNTED: dict[str, tuple[str, int, tuple[int, ...]]] = {
    "latent attention, experts and multi-token prediction": (
        f"{MOE} {MLA} --mtp-num-layers 1",
        8,
        (
            # Layers and the predicted token's, whose two norms feed a projection of both; final
            # norms; embedding and output.
            5 * MLA_LAYER
            + 3 * H * FFN
            + 4 * MOE_MLP
            + (2 * H + 2 * H * H)
            + 2 * H
            + 2 * PADDED * H,
        ),
    ),
    "experts of another tensor parallel size": (
        f"{MOE} --tensor-model-parallel-size 2 --expert-tensor-parallel-size 1 --sequence-parallel "
        "--expert-model-parallel-size 4",
        8,
        (
            4 * (4 * H * H // 2 + 2 * H)
            + 3 * H * FFN // 2
            + 3 * (3 * H * EXPERT * (8 // 4) + 3 * H * EXPERT // 2 + 8 * H)
            + H
            + PADDED * H,
        ),
    ),
    "virtual pipeline stages": (
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
        8,
        # The tied embedding is on the first and on the last stage.
        (2 * BLOCK + PADDED * H, 2 * BLOCK + PADDED * H + 2 * H),
    ),
}


@pytest.mark.parametrize("case", COUNTED)
def test_parameters_are_those_counted_by_hand(case: str) -> None:
    from megatron_flashoptim.megatron.memory import planner

    flags, ranks, expected = COUNTED[case]
    # A fork: the planner changes Megatron's global state.
    with multiprocessing.get_context("fork").Pool(1) as pool:
        size = pool.apply(planner.plan, ([*SIZES.split(), *flags.split()], ranks))
    assert tuple(stage.parameters for stage in size.stages) == expected


WIDE = "--hidden-size 2048 --ffn-hidden-size 8192 --vocab-size 32000"


def _largest_buckets(arguments: list[str], ranks: int) -> tuple[int, int]:
    """Return the largest bucket of stage 0 as planned, and as Megatron's training loop makes it."""
    from megatron.training import global_vars, training

    from megatron_flashoptim.megatron.memory import nominal, planner

    planned = planner.plan(arguments, ranks).stages[0].flash_bucket
    args = nominal.parse(arguments, ranks)
    global_vars._GLOBAL_ARGS = args
    instances = args.num_distributed_optimizer_instances
    with planner.nominal_rank(args, 0, ranks, instances=instances), planner.on_meta_device():
        (chunk,) = training.get_model(nominal._provider(args))
        built = [bucket.grad_data.numel() for buffer in chunk.buffers for bucket in buffer.buckets]
    assert len(built) > 1
    return planned, max(built)


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        ("--ddp-num-buckets 3", 2),
        ("--ddp-bucket-size 100000", 2),
        # Of the ranks of both instances together: 60 million, not 40.
        (f"{WIDE} --num-distributed-optimizer-instances 2", 60),
    ],
)
def test_the_largest_bucket_is_the_one_that_megatron_makes(flags: str, ranks: int) -> None:
    arguments = [*COMMON.split(), "--overlap-grad-reduce", *flags.split()]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        planned, built = pool.apply(_largest_buckets, (arguments, ranks))
    assert planned == built


def test_the_simulation_of_a_rank_refuses_released_gradients() -> None:
    from megatron_flashoptim.megatron.memory import nominal, planned_args

    flags = "--flash-gradient-release --overlap-grad-reduce --clip-grad 0 --rerun-mode disabled"
    with (
        multiprocessing.get_context("fork").Pool(1) as pool,
        pytest.raises(planned_args.ArgumentsError, match=r"--flash-gradient-release .* drop it"),
    ):
        pool.apply(nominal.parse, ([*COMMON.split(), *flags.split()], 1))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--hybrid-layer-pattern M*-M", "a hybrid or Mamba model"),
        ("--spec some.module layer", "a layer specification of its own"),
        ("--encoder-num-layers 2 --decoder-num-layers 2", "an encoder-decoder model"),
    ],
)
def test_models_that_are_not_gpt_are_refused(flags: str, message: str) -> None:
    from megatron_flashoptim.megatron.memory import planned_args, planner

    with (
        multiprocessing.get_context("fork").Pool(1) as pool,
        pytest.raises(planned_args.ArgumentsError, match=message),
    ):
        pool.apply(planner.plan, ([*SIZES.split(), *flags.split()], 1))
