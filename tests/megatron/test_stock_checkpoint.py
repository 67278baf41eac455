"""Checkpoints of Megatron's own Adam, loaded by flash_adamw."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from adam_checkpoints import (
    BUCKETS,
    FLATTENED,
    FULLY,
    encoded,
    load,
    save,
    save_flattened,
    save_remainders,
)
from mixed_precision import GROUPS_OF_ONE_DTYPE, is_kept_in_fp32
from ranks import run_ranks

from megatron_flashoptim import FlashOptimConfig

FULL = "--dist-ckpt-optim-fully-reshardable"
L2 = "--no-decoupled-weight-decay"


PLAIN = {"layers": 2, "query_groups": 2}
DENSE = {"swiglu": True, "query_groups": 2, "layers": 2}
EXPERTS = {"experts": 4, "swiglu": True}
CASES: dict[str, tuple[str, tuple[int, dict[str, Any]], tuple[int, dict[str, Any]]]] = {
    "same": (FULLY, (2, DENSE), (2, DENSE)),
    "tensor and pipeline": (FULLY, (2, {**DENSE, "tp": 2}), (4, {**DENSE, "pp": 2})),
    "to overlap": (FULLY, (1, DENSE), (2, {**DENSE, "overlap": True, "bucket_size": 30_000})),
    "experts": (FULLY, (2, {**EXPERTS, "ep": 2}), (2, EXPERTS)),
    "padded vocabulary": (
        FULLY,
        (1, {"vocab": 288, "tied": False, "layers": 1}),
        (2, {"vocab": 320, "tied": False, "layers": 1, "tp": 2}),
    ),
    "fp32 weights": (
        FULLY,
        (1, {"layers": 1, "bf16": False}),
        (1, {"layers": 1, "bf16": False}),
    ),
    "fp32 norms": (FULLY, (2, GROUPS_OF_ONE_DTYPE), (2, {**GROUPS_OF_ONE_DTYPE, "pp": 2})),
    "buckets, fp32 norms": (BUCKETS, (2, GROUPS_OF_ONE_DTYPE), (2, GROUPS_OF_ONE_DTYPE)),
    "32-bit masters": (
        FULLY,
        (1, {"layers": 1}),
        (2, {"layers": 1, "flash": FlashOptimConfig("flash_adam", master_bits=32)}),
    ),
    "flattened, data parallel": (FLATTENED, (2, PLAIN), (2, PLAIN)),
    "flattened, tensor parallel": (FLATTENED, (2, {**PLAIN, "tp": 2}), (2, {**PLAIN, "pp": 2})),
    "flattened, to tensor parallel": (FLATTENED, (2, PLAIN), (4, {**PLAIN, "tp": 2})),
    "buckets, data parallel size": (BUCKETS, (2, DENSE), (4, {**DENSE, "grads_in_fp32": False})),
    "buckets, tensor parallel": (BUCKETS, (2, {**DENSE, "tp": 2}), (2, {**DENSE, "tp": 2})),
    "buckets, overlap": (
        BUCKETS,
        (2, {**DENSE, "overlap": True, "bucket_size": 15_000}),
        (2, {**DENSE, "overlap": True, "bucket_size": 15_000}),
    ),
    "buckets, experts": (BUCKETS, (2, {**EXPERTS, "ep": 2}), (2, {**EXPERTS, "ep": 2})),
}


@pytest.mark.parametrize("case", CASES)
def test_state_is_that_of_stock_encoded(case: str, tmp_path: Path) -> None:
    from checkpoints import assert_same, joined

    save_as, (saved_by, saved_options), (loaded_by, options) = CASES[case]
    if save_as == FLATTENED:
        stock = run_ranks(saved_by, save_flattened, tmp_path, **saved_options)
    else:
        stock = run_ranks(saved_by, save, tmp_path, save_as, **saved_options)
    flash = run_ranks(loaded_by, load, tmp_path, **options)
    assert not any("error" in rank for rank in flash), flash[0]
    bits = options.get("flash", FlashOptimConfig()).master_bits
    vocab = 256 if "vocab" in options else None
    exact_state = joined([state for state, _ in stock], vocab)
    is_fp32 = is_kept_in_fp32 if "fp32 norms" in case else lambda key: False
    wanted = encoded(exact_state, bits if options.get("bf16", True) else None, is_fp32)
    assert all(tensor.any() for key, tensor in wanted.items() if key.startswith("exp_avg_sq."))
    assert_same(joined([rank["state"] for rank in flash], vocab), wanted)
    for rank in flash:
        assert {group["step"] for group in rank["groups"]} == {3}
        assert {group["lr"] for group in rank["groups"]} == {1e-3}
        assert all(0 < loss < 7 for loss in rank["losses"])
    # Weights are whole on every rank, also where a master carried into the next bf16 number.
    by_model_rank = flash if options.get("tp", 1) == options.get("pp", 1) == 1 else []
    for rank in by_model_rank:
        for name, weight in rank["weights"].items():
            if ".experts." not in name:
                assert torch.equal(weight, by_model_rank[0]["weights"][name]), name
    assert not any(rank["told"] for rank in flash), "this Adam says nowhere how it decayed"
    (message,) = flash[0]["logged"]
    assert (
        " without a problem: " in message
        and "parameters (one that ranks share is counted by each)" in message
        and "(moments: largest is relative" in message
        and not any(rank["logged"] for rank in flash[1:])
    )
    pairs = [(wanted[key], exact) for key, exact in exact_state.items() if "master." in key]
    kept, exact = (torch.cat([t.flatten() for t in side]) for side in zip(*pairs, strict=True))
    relative = ((kept - exact) / exact)[exact != 0].abs()
    largest = float(message.split("masters largest ")[1].split(",")[0])
    assert largest == pytest.approx(float(relative.max()), rel=0.01)
    mean = float(message.split(" mean ")[1].split(",")[0])
    wanted_mean = float((kept - exact).abs().double().sum() / exact.abs().double().sum())
    assert mean == pytest.approx(wanted_mean, rel=0.1)  # ranks may own copies of some


def test_stocks_shifted_masters_are_found_and_named(tmp_path: Path) -> None:
    """Stock's own defect, made by stock: buckets with padding, saved as fully_reshardable."""
    options = {"layers": 2, "overlap": True, "bucket_size": 15_000, "hidden": 72}
    run_ranks(2, save, tmp_path, FULLY, **options)
    for rank in run_ranks(2, load, tmp_path, **options):
        assert "does not belong to its weights" in rank["error"]
        assert "decoder.layers." in rank["error"] and "--no-load-optim" in rank["error"]


@pytest.mark.parametrize("save_as", (FULLY, BUCKETS))
def test_masters_of_the_precision_aware_optimizer_are_refused(save_as: str, tmp_path: Path) -> None:
    """docs/migration.md says so: 16-bit remainders must never pass for masters."""
    run_ranks(1, save_remainders, tmp_path, save_as, layers=1)
    (rank,) = run_ranks(1, load, tmp_path, layers=1)
    refused = re.search(r"not belong to its weights: .* weight in (\d+) param", rank["error"])
    assert refused and int(refused[1]) > 8, rank["error"]


def test_other_sharding_types_are_refused_by_name() -> None:
    from megatron_flashoptim.checkpoint.metadata import check_stock

    with pytest.raises(ValueError, match="'dp_zero_gather_scatter'; supported: dp_reshardable, "):
        check_stock({"distrib_optim_sharding_type": "dp_zero_gather_scatter"}, FlashOptimConfig())


def test_without_install_the_error_says_so(tmp_path: Path) -> None:
    run_ranks(1, save, tmp_path, FULLY, layers=1)
    (rank,) = run_ranks(1, load, tmp_path, install=False, layers=1)
    assert "megatron_flashoptim.install()" in rank["error"]
    # Rules with other moments than Adam's refuse it before that.
    lion = FlashOptimConfig(optimizer="flash_lion")
    (rank,) = run_ranks(1, load, tmp_path, layers=1, flash=lion)
    assert "of Megatron's own, such as Adam, this run has flash_lion" in rank["error"]
    assert "convert --to flash --optimizer flash_lion" in rank["error"]


def test_other_buckets_are_refused_with_both_sizes(tmp_path: Path) -> None:
    options = {"layers": 1, "overlap": True}
    run_ranks(1, save, tmp_path, BUCKETS, bucket_size=30_000, **options)
    (rank,) = run_ranks(1, load, tmp_path, bucket_size=60_000, **options)
    assert "in the checkpoint and" in rank["error"] and "--ddp-bucket-size" in rank["error"]


def _peak_of_load(folder: Path, **options: Any) -> tuple[int, int]:
    import checkpoints
    import tiny_gpt
    from test_no_gather import _peak_bytes, _reset_peak

    import megatron_flashoptim

    megatron_flashoptim.install()
    trainer = tiny_gpt.build(tiny_gpt.Setup(**options))
    for member in trainer.optimizer.chained_optimizers:
        for shard in member.optimizer.shards:
            for _, tensor in shard.state():
                tensor.fill_(1)  # pages of zeros are given to a process when it writes them
    before = _reset_peak()
    checkpoints.load(trainer, folder)
    return _peak_bytes() - before, sum(p.numel() for p in trainer.model[0].parameters())


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)
def test_peak_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Four times the layers: what grows is the description of tensors, not what is read."""
    peaks, sizes = [], []
    for layers in (4, 16):
        folder = tmp_path / str(layers)
        folder.mkdir()
        options = {"hidden": 256, "layers": layers}
        run_ranks(1, save, folder, FULLY, 1, **options)
        ((peak, numel),) = run_ranks(1, _peak_of_load, folder, **options)
        peaks.append(peak)
        sizes.append(12 * numel)
    assert sizes[1] - sizes[0] > 100 << 20
    # All of it would be 1; allocator and page cache have been seen to add 0.18 by chance.
    assert peaks[1] - peaks[0] < 0.3 * (sizes[1] - sizes[0]), (peaks, sizes)
    assert peaks[1] < sizes[1] / 3, (peaks, sizes)


def _train(
    folder: Path, optimizer: str, flags: str, steps: int, *, load: bool, save_at: int = 0
) -> tuple[int, torch.Tensor, list[dict[str, Any]], list[float], list[str]]:
    import checkpoints
    import training_checkpoints
    from exact_adamw import use_as_megatrons_adam

    if optimizer == "adam":
        use_as_megatrons_adam()
    flash = None if optimizer == "adam" else FlashOptimConfig(optimizer=optimizer)
    options = {"decoupled_weight_decay": L2 not in flags}
    flags = f"--optimizer {optimizer} {flags}"
    run = training_checkpoints.Run(folder, *flags.split(), flash=flash, optimizer=options)
    logged = checkpoints.collect_log()
    start = run.load() if load else 0
    told = [line for line in logged if line.startswith("took over")]
    rng, groups = torch.get_rng_state(), checkpoints.plain_groups(run.trainer)
    losses = []
    for iteration in range(start + 1, start + steps + 1):
        losses += run.train(1)
        if iteration == save_at:
            torch.manual_seed(99)  # a state that no run starts with
            run.save(iteration)
    return start, rng, groups, losses, told


@pytest.mark.parametrize(
    ("format_flags", "decay", "alike", "other"),
    [(FULL, L2, "flash_adam", "flash_adamw"), ("", "", "flash_adamw", "flash_adam")],
)
def test_training_goes_on_where_stock_was(
    format_flags: str, decay: str, alike: str, other: str, tmp_path: Path
) -> None:
    """Megatron's own load_checkpoint: iteration, step, schedule and RNG are stock's.

    And whether Adam decayed by L2 is the saved arguments', as with Transformer Engine's Adam.
    """
    stock_flags = f"{format_flags} {decay}"
    whole = run_ranks(2, _train, tmp_path, "adam", stock_flags, 6, load=False, save_at=3)
    stock = run_ranks(2, _train, tmp_path, "adam", stock_flags, 0, load=True)
    flash = run_ranks(2, _train, tmp_path, alike, format_flags, 3, load=True)
    for ours, theirs, all_along in zip(flash, stock, whole, strict=True):
        assert ours[0] == theirs[0] == 3
        assert torch.equal(ours[1], theirs[1])
        for name in ("lr", "step", "weight_decay", "betas", "eps"):
            assert [group[name] for group in ours[2]] == [group[name] for group in theirs[2]]
        assert {group["step"] for group in ours[2]} == {3}
        assert ours[3] == pytest.approx(all_along[3][3:], rel=2e-3)
        assert not ours[4]
    otherwise = run_ranks(2, _train, tmp_path, other, format_flags, 0, load=True)
    (said,) = otherwise[0][4]
    assert f"which is that of {other}; it was saved with" in said
    assert f"decoupled_weight_decay={not decay}, and {alike} is what goes on" in said
    if format_flags == FULL:
        from megatron_flashoptim.checkpoint.offline import Conversion, Request

        conversion = Conversion(Request(tmp_path, tmp_path / "flash", "flash"))
        assert conversion.recoding.flash.optimizer == alike
