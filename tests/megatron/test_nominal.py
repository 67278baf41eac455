"""Layout and checkpoint plan of every rank of a run, by ``scripts/simulate_scale.py``."""

from __future__ import annotations

import importlib.util
import multiprocessing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

GPUS, TENSOR, EXPERT, STAGES = 16, 2, 2, 2
MODEL = f"""--num-layers 4 --hidden-size 256 --ffn-hidden-size 1024 --num-attention-heads 8 --bf16
--seq-length 64 --max-position-embeddings 64 --micro-batch-size 1 --vocab-size 1000 --lr 1e-3
--train-iters 1 --position-embedding-type rope --normalization RMSNorm --swiglu
--disable-bias-linear
--untie-embeddings-and-output-weights --num-experts 8 --moe-layer-freq ([0]+[1]*3)
--moe-ffn-hidden-size 256 --moe-router-topk 2 --use-distributed-optimizer --optimizer flash_adamw
--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 300000
--tensor-model-parallel-size {TENSOR}
--sequence-parallel --expert-model-parallel-size {EXPERT} --expert-tensor-parallel-size 1
--pipeline-model-parallel-size {STAGES} --save nowhere --save-interval 1
--dist-ckpt-optim-fully-reshardable""".split()
# Refused where a run begins; what is planned on any machine looks at no folder.
MODEL += ["--load", __file__]
DP_RESHARDABLE, FULLY_RESHARDABLE = "dp_reshardable", "fully_reshardable"


def _simulation() -> ModuleType:
    file = Path(__file__).parents[2] / "scripts" / "simulate_scale.py"
    spec = importlib.util.spec_from_file_location("simulate_scale", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _simulate() -> dict[str, Any]:
    """Plan all ranks; return them, what rank 0 joins, and the sizes of the stages."""
    from megatron_flashoptim.megatron import cpu

    cpu.enable()  # as the fixture has done where other tests ran before
    simulation = _simulation()
    simulation.start(MODEL, GPUS)
    ranks = [simulation.plan(rank) for rank in range(GPUS)]
    joined = {name: simulation.join([r.writes[name] for r in ranks]) for name in ranks[0].writes}
    incomplete = None
    try:
        simulation.join([rank.writes[FULLY_RESHARDABLE] for rank in ranks[:-1]])
    except ValueError as problem:
        incomplete = str(problem)
    for stage in range(STAGES):
        simulation.check_owned([rank for rank in ranks if rank.stage == stage], simulation._args)
    _, sizes = simulation.sizes(MODEL, GPUS)
    return {"ranks": ranks, "joined": joined, "incomplete": incomplete, "sizes": sizes}


@pytest.fixture(scope="module")
def run(megatron: None) -> dict[str, Any]:
    # A fork: the simulation changes Megatron's global state.
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found: dict[str, Any] = pool.apply(_simulate)
    return found


def test_owned_elements_are_the_models_parameters(run: dict[str, Any]) -> None:
    for stage in range(STAGES):
        ranks = [rank for rank in run["ranks"] if rank.stage == stage]
        (dense,) = {rank.parameters - rank.expert_parameters for rank in ranks}
        (expert,) = {rank.expert_parameters for rank in ranks}
        assert sum(rank.owned for rank in ranks) == TENSOR * dense + EXPERT * expert
        assert run["sizes"][stage]["parameters"] == dense + expert


def test_padding_is_below_a_thousandth(run: dict[str, Any]) -> None:
    for rank in run["ranks"]:
        assert rank.parameters <= rank.buffer < 1.001 * rank.parameters
        assert rank.buffer == run["sizes"][rank.stage]["flash_buffer"]
        assert rank.weight_bytes == 2 * rank.buffer
        assert rank.grad_bytes == 4 * rank.buffer


def test_state_takes_three_and_an_eighth_bytes_per_element(run: dict[str, Any]) -> None:
    shards = {True: GPUS // STAGES // TENSOR, False: GPUS // STAGES // EXPERT}
    assert len(set(shards.values())) == 1  # so that a rank's shards are a part of its buffers
    for rank in run["ranks"]:
        elements = rank.buffer // shards[True]
        rest = rank.state_bytes - 3.125 * elements
        assert rank.table_bytes <= rest <= rank.table_bytes + 200


def test_items_per_rank_are_those_of_the_documentation(run: dict[str, Any]) -> None:
    """5 for each parameter, 10 where cut in halves, and a few more per bucket."""
    for rank in run["ranks"]:
        # Two parameters of a shard can begin or end within a row, each of at most two boxes more;
        # in halves, each has boxes of its own. Five tensors of each box.
        assert 5 * rank.pieces <= rank.boxes[FULLY_RESHARDABLE]
        assert rank.boxes[FULLY_RESHARDABLE] <= 5 * (rank.pieces + 4 * rank.launches)
        assert rank.ranges <= rank.pieces <= 2 * rank.ranges
        assert rank.boxes[DP_RESHARDABLE] == 5 * rank.launches
    first, last = ([r for r in run["ranks"] if r.stage == s] for s in (0, STAGES - 1))
    assert min(rank.launches for rank in first) > max(rank.launches for rank in last) == 2


def test_plans_of_all_ranks_cover_every_tensor_once(run: dict[str, Any]) -> None:
    for name, joined in run["joined"].items():
        assert joined["items"] == sum(len(rank.writes[name].items) for rank in run["ranks"])
    assert run["incomplete"] == "Failed to validate global plan"


def _devices() -> set[str]:
    from megatron_flashoptim.megatron.memory import planned_args, planner

    with planner.prepared():
        args = planned_args.parse(MODEL, GPUS)
        with planner.nominal_rank(args, 0, GPUS), planner.on_meta_device():
            return {p.device.type for c in planner.model_chunks(args) for p in c.parameters()}


def test_planned_models_have_no_storage(megatron: None) -> None:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_devices) == {"meta"}
