"""Checkpoints in every format: small, resumed bitwise, refused when foreign."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_state import assert_same_state
from mixed_precision import MIXED
from ranks import run_ranks

from megatron_flashoptim import FlashOptimConfig
from megatron_flashoptim.optim.rules import RULES


def _train(
    steps: int,
    load: Path | None = None,
    save: Path | None = None,
    save_as: str = "dp_reshardable",
    parallel: bool = False,
    **options: Any,
) -> dict[str, Any]:
    import checkpoints
    import tiny_gpt

    trainer = tiny_gpt.build(tiny_gpt.Setup(**options))
    if load is not None:
        for group in trainer.optimizer.param_groups:
            group["lr"] = 0.5  # must come from the checkpoint
        checkpoints.load(trainer, load, parallel=parallel)
    losses = trainer.train(steps)
    if save is not None:
        checkpoints.save(trainer, save, save_as, parallel=parallel)
    return {**checkpoints.everything(trainer), "losses": losses}


def _train_on(folder: Path, formats: list[str], parallel: bool, **options: Any) -> dict[str, Any]:
    """Train, save in several formats, and train on; returns the state of both moments."""
    import checkpoints
    import tiny_gpt

    trainer = tiny_gpt.build(tiny_gpt.Setup(**options))
    losses = trainer.train(3)
    saved = checkpoints.everything(trainer)
    for save_as in formats:
        checkpoints.save(trainer, folder / save_as, save_as, parallel=parallel)
    losses += trainer.train(3)
    return {**checkpoints.everything(trainer), "losses": losses, "saved": saved}


STOCHASTIC = FlashOptimConfig(rounding="stochastic", master_rounding="stochastic", seed=7)
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "data parallel, bf16 gradients": (2, {"grads_in_fp32": False}),
    "data parallel, 4 ranks, odd sizes": (4, {"hidden": 72, "layers": 1}),
    "overlap, several buckets with padding": (2, {"overlap": True, "bucket_size": 15_000}),
    "tensor parallel": (2, {"tp": 2}),
    "pipeline parallel": (2, {"pp": 2}),
    "experts": (2, {"ep": 2, "experts": 4}),
    "stochastic rounding": (2, {"flash": STOCHASTIC}),
    "stochastic rounding, tensor parallel": (2, {"tp": 2, "flash": STOCHASTIC}),
    "stochastic rounding, tied embeddings": (2, {"pp": 2, "flash": STOCHASTIC}),
    "beta2 0.999": (2, {"tp": 2, "optimizer": {"adam_beta2": 0.999}}),
    "32-bit masters": (2, {"flash": FlashOptimConfig(master_bits=32)}),
    "16-bit masters": (
        2,
        {"flash": FlashOptimConfig(master_bits=16, master_rounding="stochastic")},
    ),
    "fp32 model": (2, {"bf16": False}),
    "fp32 norms": (2, {**MIXED, "flash": STOCHASTIC, "grads_in_fp32": False}),
    **{name: (2, {"flash": FlashOptimConfig(optimizer=name)}) for name in RULES},
}
LEGACY = (
    *("tensor parallel", "pipeline parallel", "experts", "overlap, several buckets with padding"),
    *("32-bit masters", "fp32 model", "fp32 norms", *RULES),
)


def _formats(case: str) -> Iterator[str]:
    yield from ("dp_reshardable", "fully_reshardable")
    if case in LEGACY:
        yield "torch"
    if "overlap" in case:
        yield "fully_reshardable, memory efficient"


class Saved:
    """Runs that went on after they saved, by case: each is made when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ranks: dict[str, list[Any]] = {}

    def folder(self, case: str, save_as: str) -> Path:
        """Return the folder of a checkpoint."""
        self.ranks(case)
        return self._folder / case / save_as

    def ranks(self, case: str) -> list[Any]:
        """Return what ``_train_on`` returned on each rank."""
        if case not in self._ranks:
            world_size, options = CASES[case]
            formats = list(_formats(case))
            for save_as in formats:
                (self._folder / case / save_as).mkdir(parents=True)
            self._ranks[case] = run_ranks(
                world_size, _train_on, self._folder / case, formats, _in_parallel(case), **options
            )
        return self._ranks[case]


def _in_parallel(case: str) -> bool:
    """Return whether Megatron saves and loads fully in parallel: in every other case."""
    return len(case) % 2 == 0


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize(
    ("case", "save_as"), [(case, save_as) for case in CASES for save_as in _formats(case)]
)
def test_resume_in_fresh_processes_is_bitwise(saved: Saved, case: str, save_as: str) -> None:
    world_size, options = CASES[case]
    whole, folder = saved.ranks(case), saved.folder(case, save_as)
    resumed = run_ranks(world_size, _train, 3, load=folder, parallel=_in_parallel(case), **options)
    for ours, theirs in zip(resumed, whole, strict=True):
        assert ours["losses"] == theirs["losses"][3:]
        assert_same_state(ours, theirs)


def test_saving_changes_nothing(saved: Saved) -> None:
    case = "overlap, several buckets with padding"
    world_size, options = CASES[case]
    for ours, theirs in zip(
        saved.ranks(case), run_ranks(world_size, _train, 6, **options), strict=True
    ):
        assert ours["losses"] == theirs["losses"]
        assert_same_state(ours, theirs)


def _load_each(folders: list[Path], **options: Any) -> list[str | dict[str, Any]]:
    """Load one checkpoint after the other; returns the state, or the error, and what was logged.

    Weights and state are zero before each: what is found was read.
    """
    import checkpoints
    import tiny_gpt

    trainer = tiny_gpt.build(tiny_gpt.Setup(**options))
    found: list[str | dict[str, Any]] = []
    logged = checkpoints.collect_log()
    for folder in folders:
        logged.clear()
        for param in trainer.model[0].parameters():
            param.data.zero_()
        for member in trainer.optimizer.chained_optimizers:
            for shard in member.optimizer.shards:
                for _, tensor in shard.state():
                    tensor.zero_()
        try:
            checkpoints.load(trainer, folder)
            found.append({**checkpoints.everything(trainer), "logged": list(logged)})
        except ValueError as problem:
            found.append(str(problem))
    return found


@pytest.mark.parametrize("name", RULES)
def test_legacy_files_hold_the_moments_of_the_rule(saved: Saved, name: str) -> None:
    state = torch.load(saved.folder(name, "torch") / "optimizer_0_0_0.pt")
    (tensors,) = state[0].values()
    moments = CASES[name][1]["flash"].rule.moments
    assert tensors.keys() == {"param", *moments, "numel_unpadded"}
    assert all(tensors[moment].any() for moment in moments)


@pytest.mark.parametrize("name", RULES)
def test_state_of_another_rule_is_taken_over_or_refused(saved: Saved, name: str) -> None:
    """Taken over bit for bit where both have Adam's moments; else refused naming both."""
    others = [other for other in RULES if other != name]
    cases = [(other, save_as) for other in others for save_as in _formats(other)]
    folders = [saved.folder(*case) for case in cases]
    ranks = run_ranks(2, _load_each, folders, **CASES[name][1])
    adams = ("flash_adam", "flash_adamw")
    for number, rank in enumerate(ranks):
        for (other, _), found in zip(cases, rank, strict=True):
            if name in adams and other in adams:
                before = saved.ranks(other)[number]["saved"]
                assert_same_state(found, before)
                said = f"took over the state of {other}, which is that of {name}"
                assert found["logged"] == [said] * (number == 0)
                continue
            assert f"saved with optimizer {other}, this run has {name}" in found
            assert f"convert --to flash --optimizer {name}" in found
            assert "--no-load-optim --no-load-rng, or --finetune" in found


# Case and format of the checkpoint, the run's options, whether it is refused, and what is said.
OTHER_HYPER_PARAMETERS: list[tuple[str, str, dict[str, Any], bool, str]] = [
    *(
        (
            "flash_sgd",
            save_as,
            {"flash": FlashOptimConfig("flash_sgd", sgd_nesterov=True)},
            True,
            "nesterov=False, this run has True: drop --flash-sgd-nesterov, or ",
        )
        for save_as in ("dp_reshardable", "torch")
    ),
    (
        "flash_sgd",
        "fully_reshardable",
        {**CASES["flash_sgd"][1], "optimizer": {"decoupled_weight_decay": False}},
        True,
        "decoupled_weight_decay=True, this run has False: drop --no-decoupled-weight-decay, or ",
    ),
    (
        "flash_sgd",
        "torch",
        {**CASES["flash_sgd"][1], "optimizer": {"sgd_momentum": 0.75}},
        False,
        "momentum=0.9, this run has 0.75: ",
    ),
    (
        "experts",
        "dp_reshardable",
        {**CASES["experts"][1], "optimizer": {"adam_beta2": 0.875}},
        False,
        "betas=(0.9, 0.95), this run has (0.9, 0.875): ",
    ),
]


def _load_in_runs_of_their_own(folders: list[Path]) -> list[str | dict[str, Any]]:
    from megatron.core import parallel_state

    found = []
    for folder, (_, _, options, _, _) in zip(folders, OTHER_HYPER_PARAMETERS, strict=True):
        found += _load_each([folder], **options)
        parallel_state.destroy_model_parallel()
    return found


def test_other_hyper_parameters_than_the_saved_ones_are_refused_or_told(saved: Saved) -> None:
    """Another formula is refused; of numbers the checkpoint's are used, as Megatron does."""
    folders = [saved.folder(case[0], case[1]) for case in OTHER_HYPER_PARAMETERS]
    for rank, found in enumerate(run_ranks(2, _load_in_runs_of_their_own, folders)):
        for (name, _, _, refused, said), loaded in zip(OTHER_HYPER_PARAMETERS, found, strict=True):
            if refused:
                assert said in loaded
                continue
            told = [line for line in loaded["logged"] if said in line]
            assert len(told) == len(loaded["logged"]) == (rank == 0), loaded["logged"]
            assert loaded["groups"] == saved.ranks(name)[rank]["saved"]["groups"]


def test_rounding_seed_comes_from_the_checkpoint(tmp_path: Path) -> None:
    saved = FlashOptimConfig(rounding="stochastic", seed=1)
    whole = run_ranks(1, _train, 4, flash=saved)
    run_ranks(1, _train, 2, save=tmp_path, flash=saved)
    other = FlashOptimConfig(rounding="stochastic", seed=2)
    resumed = run_ranks(1, _train, 2, load=tmp_path, flash=other)
    assert_same_state(resumed[0], whole[0])
    fresh = run_ranks(1, _train, 4, flash=other)
    assert not torch.equal(
        fresh[0]["state"]["0.0.exp_avg_sq"], whole[0]["state"]["0.0.exp_avg_sq"]
    ), "the seed must matter for this test to mean anything"


def test_data_parallel_size_may_change_in_dp_reshardable(tmp_path: Path) -> None:
    """Bucket state without end padding is the same tensor at any data-parallel size."""
    options = {"hidden": 72, "layers": 1}
    saved = run_ranks(4, _train, 3, save=tmp_path, **options)
    loaded = run_ranks(2, _train, 0, load=tmp_path, **options)
    for name in saved[0]["state"]:
        joined = [
            torch.cat([rank["state"][name] for rank in ranks]).view(torch.uint8)
            for ranks in (saved, loaded)
        ]
        length = min(map(len, joined))
        assert torch.equal(joined[0][:length], joined[1][:length]), name
        assert not any(tensor[length:].any() for tensor in joined), "padding holds no state"


def _bytes_saved(folder: Path, save_as: str, optimizer: str) -> int:
    import checkpoints
    import tiny_gpt

    flash = FlashOptimConfig(optimizer=optimizer)
    trainer = tiny_gpt.build(tiny_gpt.Setup(hidden=512, layers=2, flash=flash))
    trainer.train(1)
    checkpoints.save(trainer, folder, save_as)
    return sum(param.numel() for param in trainer.model[0].parameters())


@pytest.mark.parametrize(
    ("save_as", "optimizer", "expected"),
    [
        ("dp_reshardable", "flash_adamw", 5.125),
        ("fully_reshardable", "flash_adamw", 5.125),
        ("fully_reshardable", "flash_lion", 4.0625),
    ],
)
def test_weights_and_state_take_the_bytes_of_the_formats_on_disk(
    save_as: str, optimizer: str, expected: float, tmp_path: Path
) -> None:
    (numel, _) = run_ranks(2, _bytes_saved, tmp_path, save_as, optimizer)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert expected * numel < size < 1.015 * expected * numel


def _load_error(folder: Path, **options: Any) -> str:
    import checkpoints
    import tiny_gpt

    trainer = tiny_gpt.build(tiny_gpt.Setup(**options))
    try:
        checkpoints.load(trainer, folder)
    except ValueError as problem:
        return str(problem)
    return ""


def _save_stock(folder: Path, save_as: str) -> None:
    import checkpoints
    import tiny_gpt
    from exact_adamw import use_as_megatrons_adam

    use_as_megatrons_adam()
    trainer = tiny_gpt.build(tiny_gpt.Setup(flash=None))
    trainer.train(1)
    checkpoints.save(trainer, folder, save_as)


def test_stock_checkpoint_in_the_legacy_format_is_refused(tmp_path: Path) -> None:
    run_ranks(1, _save_stock, tmp_path, "torch")
    (message,) = run_ranks(1, _load_error, tmp_path)
    assert "holds no flash optimizer state" in message and "--no-load-optim" in message
    assert "torch_dist only" in message


def test_other_buckets_are_refused_naming_both_sides(tmp_path: Path) -> None:
    run_ranks(1, _train, 1, save=tmp_path, overlap=True, bucket_size=30_000)
    (message,) = run_ranks(1, _load_error, tmp_path, overlap=True, bucket_size=60_000)
    assert "saved with buckets of" in message and "--ddp-bucket-size" in message


def _freeze_last_norm(model: Any) -> None:
    norm = getattr(model.decoder, "final_layernorm", None)  # on the last stage only
    if norm is not None:
        norm.requires_grad_(False)


def test_buckets_that_are_others_on_some_ranks_are_refused_on_all(tmp_path: Path) -> None:
    """Rank 0 alone can say which the checkpoint has, and only the last stage that its differ."""
    run_ranks(2, _train, 1, save=tmp_path, pp=2)
    for message in run_ranks(2, _load_error, tmp_path, tp=2):
        assert "saved with buckets of" in message and "pipeline" in message
    for message in run_ranks(2, _load_error, tmp_path, pp=2, prepare_model=_freeze_last_norm):
        assert "other buckets or weights on model-parallel rank 1" in message
        assert message.endswith("(on rank 1; 1 of 2 ranks have a problem)")


def _newer(folder: Path) -> str:
    from megatron_flashoptim.checkpoint import metadata

    metadata.FORMAT_VERSION = 0
    return _load_error(folder)


def test_newer_format_version_is_refused(tmp_path: Path) -> None:
    run_ranks(1, _train, 1, save=tmp_path)
    (message,) = run_ranks(1, _newer, tmp_path)
    assert "format version 1" in message and "upgrade megatron-flashoptim" in message


def _unsupported_type() -> str:
    import tiny_gpt

    trainer = tiny_gpt.build(tiny_gpt.Setup())
    try:
        trainer.optimizer.sharded_state_dict(
            {}, metadata={"distrib_optim_sharding_type": "fully_sharded_model_space"}
        )
    except ValueError as problem:
        return str(problem)
    return ""


def test_unsupported_sharding_type_is_refused_by_name() -> None:
    (message,) = run_ranks(1, _unsupported_type)
    assert "'fully_sharded_model_space'" in message
    assert "dp_reshardable, fully_reshardable" in message


def _model_only() -> tuple[bool, Any, Any]:
    import tiny_gpt

    trainer = tiny_gpt.build(tiny_gpt.Setup())
    trainer.train(2)
    (shard,) = trainer.optimizer.chained_optimizers[0].optimizer.shards
    had_corrections = bool(shard.correction.any())
    before = shard.param.clone()
    trainer.optimizer.reload_model_params()
    return had_corrections, shard.correction, torch.equal(before, shard.param)


def test_model_only_load_starts_from_exactly_the_weights() -> None:
    for had_corrections, correction, unchanged in run_ranks(2, _model_only):
        assert had_corrections and not correction.any() and unchanged


def _from_state_dict() -> tuple[Any, Any]:
    import tiny_gpt

    from megatron_flashoptim.codec import join_master

    trainer = tiny_gpt.build(tiny_gpt.Setup())
    precise = {
        name.removeprefix("module."): param.detach().float() * (1 + 2.0**-11)
        for name, param in trainer.model[0].named_parameters()
    }
    trainer.optimizer.reload_model_params(state_dict={"model": precise})
    (member,) = trainer.optimizer.chained_optimizers
    (shard,) = member.optimizer.shards
    masters = join_master(shard.param, shard.correction)
    names = {p: n.removeprefix("module.") for n, p in trainer.model[0].named_parameters()}
    pairs = [
        (
            masters[i.start : i.end].clone(),
            precise[names[i.param]].view(-1)[i.param_start :][: i.end - i.start].clone(),
        )
        for i in member.shard_params
    ]
    return tuple(torch.cat(side) for side in zip(*pairs, strict=True))


def test_masters_are_split_from_a_higher_precision_state_dict() -> None:
    for masters, precise in run_ranks(2, _from_state_dict):
        assert ((masters - precise).abs() <= 2.0**-16 * precise.abs()).all()
        assert not torch.equal(precise, precise.bfloat16().float())


def _freeze(model: Any) -> None:
    for param in model.parameters():
        param.requires_grad = False


def _with_a_frozen_stage(
    folder: Path, frozen_stage: int, save_as: str, load: bool = False
) -> tuple[dict[str, Any], str]:
    import checkpoints
    import tiny_gpt
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(1, 2)
    frozen = parallel_state.get_pipeline_model_parallel_rank() == frozen_stage
    trainer = tiny_gpt.build(
        tiny_gpt.Setup(prepare_model=_freeze if frozen else None, pp=2, tied=False)
    )
    if load:
        checkpoints.load(trainer, folder)
        return checkpoints.everything(trainer), ""
    if frozen_stage == 1:  # without a loss that has a gradient; any state will do
        for member in trainer.optimizer.chained_optimizers:
            for item in member.shard_params:  # not the padding, which no checkpoint holds
                for name, tensor in member.optimizer.shards[item.shard].state():
                    step = 32 if name.endswith("scale") else 1
                    tensor[item.start // step : item.end // step].fill_(len(name))
    else:
        trainer.train(2)
    try:
        checkpoints.save(trainer, folder, save_as)
    except ValueError as problem:
        return checkpoints.everything(trainer), str(problem)
    return checkpoints.everything(trainer), ""


@pytest.mark.parametrize("frozen_stage", [0, 1])
def test_frozen_stage_saves_and_loads_with_the_others(frozen_stage: int, tmp_path: Path) -> None:
    saved = run_ranks(2, _with_a_frozen_stage, tmp_path, frozen_stage, "dp_reshardable")
    assert [bool(rank["state"]) for rank, _ in saved] == [frozen_stage == 1, frozen_stage == 0]
    loaded = run_ranks(2, _with_a_frozen_stage, tmp_path, frozen_stage, "dp_reshardable", load=True)
    for (ours, _), (theirs, _) in zip(loaded, saved, strict=True):
        assert_same_state(ours, theirs)


@pytest.mark.parametrize("frozen_stage", [0, 1])
def test_layers_of_one_tensor_that_are_partly_frozen_are_refused_by_key(
    frozen_stage: int, tmp_path: Path
) -> None:
    for _, error in run_ranks(2, _with_a_frozen_stage, tmp_path, frozen_stage, "fully_reshardable"):
        assert "elements of decoder.layers." in error and "Save with dp_reshardable" in error
