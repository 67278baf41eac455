"""Megatron-Bridge's own ``setup_optimizer`` with our configuration; needs the released package."""

from __future__ import annotations

from typing import Any

import pytest
from ranks import run_ranks


@pytest.fixture(scope="module")
def bridge(megatron: None) -> Any:
    return pytest.importorskip(
        "megatron.bridge.training.optim", reason="megatron-bridge is not installed"
    )


def _set_up(bits: int, finalized: bool = True) -> tuple[str, int, int]:
    import tiny_gpt
    from megatron.bridge.training.config import SchedulerConfig
    from megatron.bridge.training.optim import setup_optimizer
    from megatron.core.distributed import DistributedDataParallel

    from megatron_flashoptim.megatron.bridge import FlashOptimizerConfig

    config = FlashOptimizerConfig(
        optimizer="adam",
        lr=1e-3,
        bf16=True,
        use_distributed_optimizer=True,
        flash_master_bits=bits,
    )
    scheduler = SchedulerConfig(lr_decay_style="constant", lr_decay_iters=10)
    scheduler.lr_warmup_steps, scheduler.lr_decay_steps, scheduler.wd_incr_steps = 0, 10, 10
    if finalized:
        config.finalize()
    # A DDP that is given no layout, as Bridge's is not given ours. 96 x 8 ranks cut groups apart.
    trainer = tiny_gpt.build(tiny_gpt.Setup())
    bare = trainer.model[0].module
    chunk = DistributedDataParallel(bare.config, trainer.model[0].ddp_config, bare)
    optimizer, _ = setup_optimizer(config, scheduler, [chunk])
    return type(optimizer).__name__, optimizer.state_bytes(), optimizer.owned_parameters()


@pytest.mark.parametrize("bits", [24, 32])
def test_bridge_builds_a_flash_optimizer(bridge: Any, bits: int) -> None:
    for name, state, owned in run_ranks(2, _set_up, bits):
        assert name == "FlashChainedOptimizer"
        assert bits / 8 + 0.125 <= state / owned < bits / 8 + 0.4


def test_wrong_values_are_refused_when_finalized(bridge: Any) -> None:
    from megatron_flashoptim.megatron.bridge import FlashOptimizerConfig

    config = FlashOptimizerConfig(lr=1e-3, bf16=True, flash_master_bits=20)
    with pytest.raises(ValueError, match="--flash-master-bits must be one of 16, 24, 32; got 20"):
        config.finalize()
