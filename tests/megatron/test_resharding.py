"""``fully_reshardable``: saved at one model layout, loaded at another, the same bits."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from mixed_precision import EXPERTS
from ranks import run_ranks

from megatron_flashoptim import FlashOptimConfig


def _round(load: Path | None, save: Path | None, steps: int = 1, **options: Any) -> tuple[Any, Any]:
    """Load, train on, save; return the state in model space as loaded and as saved."""
    import checkpoints
    import tiny_gpt

    trainer = tiny_gpt.build(tiny_gpt.Setup(**options))
    loaded = None
    if load is not None:
        checkpoints.load(trainer, load, parallel=options.get("tp", 1) == 2)
        loaded = checkpoints.in_model_space(trainer)
    trainer.train(steps)
    if save is not None:
        checkpoints.save(
            trainer, save, checkpoints.FULLY_RESHARDABLE, parallel=options.get("pp", 1) == 2
        )
    return loaded, checkpoints.in_model_space(trainer)


# Number of ranks and options of each run, which loads what the one before saved.
DENSE = {"swiglu": True, "query_groups": 2, "layers": 4, "tied": True}
VIRTUAL = {"pp": 2, "vp": 2, "microbatches": 2}
# Experts are split over tensor-parallel ranks; gloo gathers equal numbers of tokens only.
TENSOR_OF_EXPERTS = {
    "tp": 2,
    "sequence_parallel": True,
    "transformer": {
        "moe_expert_capacity_factor": 2.0,
        "moe_pad_expert_input_to_capacity": True,
    },
}
LION, SGD = (FlashOptimConfig(optimizer=name) for name in ("flash_lion", "flash_sgd"))
CHAINS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "dense": [
        (1, DENSE),
        (2, {**DENSE, "tp": 2}),
        (4, {**DENSE, "tp": 2, "overlap": True, "bucket_size": 30_000}),
        (4, {**DENSE, "pp": 4}),
        (4, {**DENSE, "tp": 2, "pp": 2}),
        (2, {**DENSE}),
    ],
    "interleaved pipeline": [
        (2, {**DENSE, **VIRTUAL}),
        (2, {**DENSE, "tp": 2}),
        (4, {**DENSE, **VIRTUAL}),
    ],
    "context parallel": [
        (2, {"cp": 2, "layers": 1}),
        (1, {"layers": 1}),
        (4, {"cp": 2, "layers": 1}),
    ],
    "tensor parallel 4": [
        (1, {"hidden": 128, "layers": 1}),
        (4, {"tp": 4, "hidden": 128, "layers": 1}),
        (2, {"tp": 2, "hidden": 128, "layers": 1}),
        (4, {"tp": 4, "hidden": 128, "layers": 1}),
    ],
    "experts": [
        (1, {"experts": 4, "swiglu": True}),
        (2, {"experts": 4, "swiglu": True, "ep": 2}),
        (4, {"experts": 4, "swiglu": True, "ep": 4}),
        (4, {"experts": 4, "swiglu": True, "ep": 2, "overlap": True, "bucket_size": 20_000}),
        (4, {"experts": 4, "swiglu": True, "ep": 2, **TENSOR_OF_EXPERTS}),
        (2, {"experts": 4, "swiglu": True, "ep": 2, "grouped": True}),
        (4, {"experts": 4, "swiglu": True, "ep": 2, "grouped": True, **TENSOR_OF_EXPERTS}),
        (1, {"experts": 4, "swiglu": True}),
    ],
    "padded vocabulary": [
        (1, {"vocab": 288, "tied": False, "layers": 1}),
        (2, {"vocab": 320, "tied": False, "layers": 1, "tp": 2}),
        (2, {"vocab": 264, "tied": False, "layers": 1}),
    ],
    "optimizer instances": [
        (4, {"layers": 1, "instances": 2}),
        (2, {"layers": 1}),
        (4, {"layers": 1, "instances": 2}),
    ],
    "rows that are no multiple of 32": [
        (2, {"hidden": 72, "layers": 1, "swiglu": True}),
        (4, {"hidden": 72, "layers": 1, "swiglu": True}),
        (1, {"hidden": 72, "layers": 1, "swiglu": True}),
    ],
    "rows that are no multiple of 32, tensor parallel": [
        (2, {"hidden": 96, "layers": 1, "tp": 2}),
        (4, {"hidden": 96, "layers": 1, "tp": 2}),
        (2, {"hidden": 96, "layers": 1, "tp": 2}),
    ],
    "flash_lion": [
        (1, {"layers": 1, "flash": LION}),
        (2, {"layers": 1, "flash": LION, "tp": 2}),
        (4, {"layers": 1, "flash": LION}),
    ],
    "flash_sgd, rows that are no multiple of 32": [
        (2, {"hidden": 96, "layers": 1, "flash": SGD, "tp": 2}),
        (2, {"hidden": 96, "layers": 1, "flash": SGD, "tp": 2, "overlap": True}),
    ],
    "fp32 weights": [
        (1, {"layers": 1, "bf16": False}),
        (2, {"layers": 1, "bf16": False, "tp": 2}),
    ],
    "fp32 norms and routers in a bf16 model": [
        (2, {**EXPERTS, "ep": 2}),
        (2, {**EXPERTS, "pp": 2}),
        (1, EXPERTS),
        (2, {**EXPERTS, "overlap": True, "bucket_size": 20_000}),
    ],
}


@pytest.mark.parametrize("chain", CHAINS)
def test_state_is_the_same_bits_at_every_layout(chain: str, tmp_path: Path) -> None:
    from checkpoints import assert_same, joined

    previous = None
    for number, (world_size, options) in enumerate(CHAINS[chain]):
        folder = tmp_path / str(number)
        folder.mkdir()
        load = tmp_path / str(number - 1) if number else None
        ranks = run_ranks(world_size, _round, load, folder, **options)
        vocab = 256 if "vocab" in options else None
        if previous is not None:
            assert_same(joined([loaded for loaded, _ in ranks], vocab), previous)
        previous = joined([saved for _, saved in ranks], vocab)
        assert any("master" in key for key in previous)
        (last,) = options.get("flash", FlashOptimConfig()).rule.moments[-1:]
        moments = [tensor for key, tensor in previous.items() if key.startswith(f"{last}.")]
        assert moments and all(tensor.any() for tensor in moments), "every parameter is trained"


def _decoded(state: dict[str, torch.Tensor], moment: str, key: str) -> torch.Tensor:
    """Decode a moment whose elements each carry a scale, 32 times over for the public codec."""
    from megatron_flashoptim.checkpoint.conversion import decode_moment

    codes = state[f"{moment}.{key}"].reshape(-1).repeat_interleave(32)
    scales = state[f"{moment}_scale.{key}"].reshape(-1).view(torch.bfloat16)
    return decode_moment(moment, codes, scales)[::32]


def test_columns_that_tensor_parallelism_cuts_within_groups(tmp_path: Path) -> None:
    """96 columns over two ranks: 48 are no multiple of 32, and groups are cut anew both ways."""
    from checkpoints import joined

    one, two = {"hidden": 96, "layers": 1}, {"hidden": 96, "layers": 1, "tp": 2}
    folders = [tmp_path / str(number) for number in range(3)]
    for folder in folders:
        folder.mkdir()
    attention = "decoder.layers.self_attention"
    cut = (f"{attention}.linear_proj.weight", f"{attention}.linear_qkv.bias")  # 288 over two ranks
    runs = [(1, None, folders[0], one), (2, folders[0], folders[1], two)]
    runs += [(2, folders[1], folders[2], one)]
    previous = None
    for world_size, load, save, options in runs:
        ranks = run_ranks(world_size, _round, load, save, **options)
        if previous is not None:
            loaded = joined([loaded for loaded, _ in ranks])
            differing = {key for key in loaded if not torch.equal(loaded[key], previous[key])}
            moments = ("exp_avg", "exp_avg_sq")
            assert differing <= {
                f"{moment}{scale}.{key}"
                for moment in moments
                for scale in ("", "_scale")
                for key in cut
            }
            for moment, key in itertools.product(moments, cut):
                scale = loaded[f"{moment}_scale.{key}"].view(torch.bfloat16).float().flatten()
                got, want = (_decoded(state, moment, key) for state in (loaded, previous))
                if moment == "exp_avg_sq":
                    got, want = got.sqrt(), want.sqrt()
                bound = {"exp_avg": 1 / 127, "exp_avg_sq": 1 / 255}[moment]
                assert ((got - want).abs() <= scale * bound * (1 + 2**-20)).all()
                assert not torch.equal(got, want), "groups must have been encoded again"
        previous = joined([saved for _, saved in ranks])


BITS = {
    bits: FlashOptimConfig(
        master_bits=bits, master_rounding="stochastic" if bits == 16 else "nearest"
    )
    for bits in (16, 24, 32)
}


@pytest.mark.parametrize("save_as", ["dp_reshardable", "fully_reshardable"])
@pytest.mark.parametrize(("saved", "bits"), [(24, 32), (32, 24), (16, 24), (16, 32)])
def test_master_bits_convert_on_load(saved: int, bits: int, save_as: str, tmp_path: Path) -> None:
    from checkpoints import assert_same, joined

    before = run_ranks(1, _save_state, tmp_path, save_as, flash=BITS[saved], layers=1)
    after = run_ranks(2, _load_state, tmp_path, flash=BITS[bits], layers=1)
    ours, theirs = joined(after), joined(before)
    if (saved, bits) != (32, 24):
        assert_same(ours, theirs)
        return
    masters = [key for key in theirs if key.startswith("master")]
    ours_flat, theirs_flat = (
        torch.cat([side[key].flatten() for key in masters]).view(torch.int32).to(torch.int64)
        for side in (ours, theirs)
    )
    error = (ours_flat - theirs_flat).abs()
    assert 0 < error.max() <= 255, "less than a 24-bit quantum of 256 fp32 ulps"
    assert (error <= 128).float().mean() > 0.99
    assert_same(*({k: v for k, v in s.items() if k not in masters} for s in (ours, theirs)))


def _save_state(folder: Path, save_as: str, **options: Any) -> Any:
    import checkpoints
    import tiny_gpt

    trainer = tiny_gpt.build(tiny_gpt.Setup(**options))
    trainer.train(2)
    checkpoints.save(trainer, folder, save_as)
    return checkpoints.in_model_space(trainer)


def _load_state(folder: Path, **options: Any) -> Any:
    import checkpoints
    import tiny_gpt

    trainer = tiny_gpt.build(tiny_gpt.Setup(**options))
    checkpoints.load(trainer, folder)
    return checkpoints.in_model_space(trainer)


def _load_error(folder: Path, **options: Any) -> str:
    try:
        _load_state(folder, **options)
    except ValueError as problem:
        return str(problem)
    return ""


@pytest.mark.parametrize("save_as", ["dp_reshardable", "fully_reshardable"])
def test_masters_that_cannot_convert_are_refused_naming_both_sides(
    save_as: str, tmp_path: Path
) -> None:
    run_ranks(1, _save_state, tmp_path, save_as, layers=1)
    (bits,) = run_ranks(1, _load_error, tmp_path, flash=BITS[16], layers=1)
    assert "master_bits 24, this run has 16" in bits
    (weights,) = run_ranks(1, _load_error, tmp_path, bf16=False, layers=1)
    assert "weights bfloat16, this run has float32" in weights


def _keep_last_norm_in_fp32(model: Any) -> None:
    model.decoder.final_layernorm.float()


MISMATCH = {
    "dp_reshardable": "buffers",
    "fully_reshardable": "norm",
    "torch": "--ckpt-format torch",
}


@pytest.mark.parametrize("save_as", MISMATCH)
def test_weights_of_another_dtype_are_refused_naming_both_sides(
    save_as: str, tmp_path: Path
) -> None:
    """On all ranks, also those that own no state of the weights, or, with torch, read none."""
    one = {"prepare_model": _keep_last_norm_in_fp32}  # in bf16, one rank has all its state
    folders = [tmp_path / "mixed", tmp_path / "bf16"]
    for folder, options in zip(folders, (one, {}), strict=True):
        folder.mkdir()
        run_ranks(2, _save_state, folder, save_as, layers=1, **options)
    for folder, options in zip(folders, ({}, one), strict=True):
        for error in run_ranks(2, _load_error, folder, layers=1, **options):
            assert "bfloat16" in error and "float32" in error and MISMATCH[save_as] in error
            assert save_as == "torch" or "--no-load-optim" in error


def _keep_one_layer_in_fp32(model: Any) -> None:
    for name, param in model.named_parameters():
        if "layers.1." in name and "norm" in name:
            param.data = param.data.float()


def _save_error(folder: Path, save_as: str) -> str:
    try:
        _save_state(folder, save_as, pp=2, prepare_model=_keep_one_layer_in_fp32, layers=4)
    except ValueError as problem:
        return str(problem)
    return ""


def test_layers_of_one_tensor_with_several_dtypes_are_refused_by_key(tmp_path: Path) -> None:
    for error in run_ranks(2, _save_error, tmp_path, "fully_reshardable"):
        assert "weights of decoder.layers." in error and "--ckpt-format torch" in error
    assert not any(run_ranks(2, _save_error, tmp_path, "torch"))


def _expert_groups(folder: Path, ep: int, *, load: bool) -> list[tuple[bool, int]]:
    import checkpoints
    import tiny_gpt

    trainer = tiny_gpt.build(tiny_gpt.Setup(ep=ep, experts=4))
    if load:
        checkpoints.load(trainer, folder)
    else:
        trainer.step()
        checkpoints.save(trainer, folder, checkpoints.FULLY_RESHARDABLE)
    return [(g["is_expert_parallel"], g["step"]) for g in trainer.optimizer.param_groups]


def test_groups_of_experts_stay_what_they_are_in_this_run(tmp_path: Path) -> None:
    """Saved without expert parallelism, they take step and rates of the dense groups, no more."""
    saved = run_ranks(2, _expert_groups, tmp_path, 1, load=False)
    assert all(not experts and step == 1 for rank in saved for experts, step in rank)
    for rank in run_ranks(2, _expert_groups, tmp_path, 2, load=True):
        assert {experts for experts, _ in rank} == {False, True}
        assert {step for _, step in rank} == {1}
