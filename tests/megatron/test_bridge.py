"""The released Megatron-Bridge trains from a recipe that says flash_adamw, saves and loads."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from pretraining import saved_tensors
from ranks import run_ranks

try:
    metadata.version("megatron-bridge")
except metadata.PackageNotFoundError:
    pytest.skip(
        "Megatron-Bridge is not installed; scripts/test_bridge.sh installs it and runs this",
        allow_module_level=True,
    )


@pytest.fixture(scope="module", autouse=True)
def _bridge(megatron: None) -> None:
    from bridge_runs import import_bridge

    import_bridge()


def _train(corpus: Path, folder: Path, steps: int, **optimizer: Any) -> dict[str, Any]:
    import bridge_runs

    cfg = bridge_runs.shrink(bridge_runs.documented_recipe(), corpus, folder, steps)
    for name, value in optimizer.items():
        setattr(cfg.optimizer, name, value)
    if cfg.optimizer.flash_early_param_gather:
        cfg.ddp.overlap_grad_reduce = cfg.ddp.overlap_param_gather = True
        cfg.ddp.bucket_size = 40_000
        cfg.checkpoint.dist_ckpt_optim_fully_reshardable = True
    return bridge_runs.pretrain(cfg)


def _train_adam(corpus: Path, folder: Path) -> dict[str, Any]:
    import bridge_runs

    return bridge_runs.pretrain(
        bridge_runs.shrink(bridge_runs.stock_recipe(), corpus, folder, steps=1)
    )


@pytest.fixture(scope="module")
def straight(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Four iterations on two ranks without an interruption."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, run_ranks(2, _train, corpus, folder, 4)


def test_the_documented_recipe_trains_with_flash_adamw(straight: tuple[Path, list[Any]]) -> None:
    for found in straight[1]:
        assert found["optimizer"] == "FlashChainedOptimizer"
        assert 3.125 <= found["bytes"] < 3.2
        assert list(found["losses"]) == [1, 2, 3, 4]
        assert found["losses"][4] < found["losses"][1]
        assert found["norm"] == pytest.approx(found["exact norm"], rel=1e-6)


def test_a_resumed_run_has_the_same_bits(
    corpus: Path, straight: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    run_ranks(2, _train, corpus, tmp_path, 2)
    resumed = run_ranks(2, _train, corpus, tmp_path, 4)
    assert list(resumed[0]["losses"]) == [3, 4]
    whole = saved_tensors(straight[0] / "iter_0000004")
    again = saved_tensors(tmp_path / "iter_0000004")
    assert any("correction" in key for key in whole)
    assert whole.keys() == again.keys()
    assert [key for key in whole if not torch.equal(whole[key], again[key])] == []


def test_early_gather_works_in_bridges_loop(
    corpus: Path, straight: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    """Other buckets, overlapped gathers and another checkpoint format: the same training."""
    early = run_ranks(2, _train, corpus, tmp_path, 2, flash_early_param_gather=True)
    early_on = run_ranks(2, _train, corpus, tmp_path, 4, flash_early_param_gather=True)
    losses = early[0]["losses"] | early_on[0]["losses"]
    # Norms are summed bucket by bucket, so that clipping may differ in its last bit.
    assert losses == pytest.approx(straight[1][0]["losses"], abs=5e-4)


def test_a_checkpoint_of_bridges_adam_is_taken_over(
    corpus: Path, straight: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    adam = run_ranks(2, _train_adam, corpus, tmp_path)
    assert adam[0]["optimizer"] != "FlashChainedOptimizer"
    taken = run_ranks(2, _train, corpus, tmp_path, 3)
    assert list(taken[0]["losses"]) == [2, 3]
    for step, loss in taken[0]["losses"].items():
        assert loss == pytest.approx(straight[1][0]["losses"][step], abs=5e-3)


def _in_the_configuration(corpus: Path, saved: Path) -> None:
    """Everything about the configuration that needs no model."""
    import bridge_runs
    from megatron.bridge.training.config import OptimizerConfig, runtime_config_update
    from megatron.bridge.training.utils import theoretical_memory_utils as theory
    from megatron.bridge.training.utils.checkpoint_utils import read_run_config
    from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides
    from megatron.bridge.utils.instantiate_utils import instantiate
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from megatron_flashoptim.megatron import hooks
    from megatron_flashoptim.megatron.bridge import FlashOptimizerConfig

    def recipe(**optimizer: Any) -> Any:
        cfg = bridge_runs.shrink(bridge_runs.documented_recipe(), corpus, saved, 4)
        for name, value in optimizer.items():
            setattr(cfg.optimizer, name, value)
        return cfg

    # What a user may get wrong, told before anything is built.
    for wrong, message in (
        ({"flash_master_bits": 20}, "optimizer.flash_master_bits must be one of 16, 24, 32; got"),
        ({"optimizer": "adam"}, "optimizer.optimizer of a FlashOptimizerConfig must be one of"),
        ({"fp16": True}, r"flash_adamw cannot be used with optimizer.fp16=True \(--fp16\): fp16"),
        ({"use_precision_aware_optimizer": True}, "use_precision_aware_optimizer=True"),
        ({"optimizer_cpu_offload": True}, "optimizer.optimizer_cpu_offload=True"),
        ({"use_distributed_optimizer": False}, "optimizer.use_distributed_optimizer=False"),
        ({"flash_early_param_gather": True}, "optimizer.flash_early_param_gather cannot be used"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe(**wrong).validate()
    for part, field, value in (
        ("ddp", "fp4_param_gather", True),
        ("ddp", "use_megatron_fsdp", True),
        ("dist", "use_torch_fsdp2", True),
        ("model", "qk_clip", True),
        ("checkpoint", "non_persistent_ckpt_type", "local"),
        ("checkpoint", "ckpt_format", "fsdp_dtensor"),
    ):
        cfg = recipe()
        setattr(getattr(cfg, part), field, value)
        with pytest.raises(ValueError, match=f"flash_adamw cannot be used with {part}.{field}="):
            cfg.validate()
    cfg = recipe()
    cfg.mixed_precision = "bf16_with_fp8_delayed_scaling_mixed"
    cfg.optimizer.optimizer_cuda_graph = True
    with pytest.raises(ValueError, match="--fp8-param-gather cannot be used with --optim"):
        runtime_config_update(cfg)
    graphed = recipe(optimizer_cuda_graph=True)
    graphed.scheduler.weight_decay_incr_style = "linear"
    with pytest.raises(ValueError, match="optimizer_cuda_graph cannot be used with scheduler"):
        graphed.validate()
    with pytest.raises(ValueError, match="the recipe's optimizer is 'dist_muon'"):
        FlashOptimizerConfig.from_adam(OptimizerConfig(optimizer="dist_muon"))

    # What Adam keeps stays, how it stores its state does not.
    stock = OptimizerConfig(lr=3e-4, adam_beta2=0.9, use_precision_aware_optimizer=True)
    stock.exp_avg_dtype = torch.bfloat16
    made = FlashOptimizerConfig.from_adam(stock, flash_master_bits=32)
    assert (made.lr, made.adam_beta2, made.flash_master_bits) == (3e-4, 0.9, 32)
    made.finalize()

    # Buckets end at whole groups from then on; 8 ranks would cut them. Never plain Adam instead.
    params = [torch.nn.Parameter(torch.zeros(96, dtype=torch.bfloat16))]
    ddp = recipe().ddp
    layout = DistributedOptimizer.compute_full_param_layout(params, None, 8, ddp)
    (buffer,) = layout.layouts.values()
    assert [end % (8 * 32) for _, end in buffer.bucket_indices] == [0]
    with pytest.raises(Exception, match="flash_adamw"):
        get_megatron_optimizer(made, [torch.nn.Linear(2, 2)])

    # Overrides of the command line, and the copy that a checkpoint has of the recipe.
    cfg = process_config_with_overrides(
        recipe(), cli_overrides=["optimizer.flash_master_bits=32", "optimizer.lr=2e-3"]
    )
    assert type(cfg.optimizer) is FlashOptimizerConfig
    assert (cfg.optimizer.flash_master_bits, cfg.optimizer.lr) == (32, 2e-3)
    read = instantiate(
        read_run_config(str(saved / "iter_0000004" / "run_config.yaml"))["optimizer"]
    )
    assert type(read) is FlashOptimizerConfig
    assert (read.flash_master_bits, read.lr, read.bf16) == (24, 1e-3, True)

    # Theoretical memory: flash's bytes, and Adam's for Adam.
    runtime_config_update(cfg)
    assert 2 + 4 + 4.125 / 8 <= theory._bytes_per_parameter(cfg, 8) < 2 + 4 + 4.2 / 8
    cfg.optimizer = stock
    assert theory._bytes_per_parameter(cfg, 8) == 18

    # A later recipe of Adam in the same process is nobody's but Megatron's.
    assert hooks.selected() is not None
    runtime_config_update(bridge_runs.shrink(bridge_runs.stock_recipe(), corpus, saved, 4))
    assert hooks.selected() is None


def test_the_configuration_is_checked_overridden_and_read_back(
    corpus: Path, straight: tuple[Path, list[Any]]
) -> None:
    run_ranks(1, _in_the_configuration, corpus, straight[0])
