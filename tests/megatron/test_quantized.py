"""``--fp8-param-gather``: quantized weights, of which the optimizer keeps bf16 high parts.

On CPU ranks with ``float8`` in place of Transformer Engine's tensors, which need a GPU; with those
``scripts/check_transformer_engine.py`` trains.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks

from megatron_flashoptim import FlashOptimConfig

STOCK: dict[str, Any] = {"flash": None}
OVERLAP = {"overlap": True, "bucket_size": 20_000}


def _build(*, quantized: bool = True, prepare: Any = None, **options: Any) -> Any:
    import float8
    import tiny_gpt

    import megatron_flashoptim

    megatron_flashoptim.install()
    if options.get("flash", FlashOptimConfig()) is None:
        from exact_adamw import use_as_megatrons_adam

        use_as_megatrons_adam()
    if not quantized:
        return tiny_gpt.build(tiny_gpt.Setup(**options))
    float8.enable()
    options["ddp"] = {**options.get("ddp", {}), "fp8_param_gather": True}
    prepare = prepare or float8.quantize_linear_layers
    return tiny_gpt.build(tiny_gpt.Setup(prepare_model=prepare, **options))


def _quantize_layer(number: int, model: Any) -> None:
    import float8

    float8.quantize_linear_layers(model.decoder.layers[number])


def _freeze_others(model: Any) -> None:
    import float8

    float8.quantize_linear_layers(model)
    for param in model.parameters():
        param.requires_grad_(isinstance(param, float8.Float8))


def _quantized_weights(trainer: Any) -> list[Any]:
    import float8

    trainer.sync_params()
    return [
        p for chunk in trainer.model for p in chunk.parameters() if isinstance(p, float8.Float8)
    ]


def _trained(**options: Any) -> dict[str, Any]:
    trainer = _build(**options)
    found: dict[str, Any] = {"losses": trainer.train(4), "weights": trainer.weights()}
    if options.get("flash", FlashOptimConfig()) is None:
        return found
    found["line"] = trainer.optimizer.describe()
    found["quantized"] = len(_quantized_weights(trainer))
    _check_codes(trainer)
    return found


def _check_codes(trainer: Any) -> None:
    """Fail unless the owned codes are of the high parts, and what is not needed is freed."""
    import float8

    weights = _quantized_weights(trainer)
    assert not any(hasattr(weight, "initial") for weight in weights)
    owned = [(i, m) for m in trainer.optimizer.chained_optimizers for i in m.quantized()]
    assert owned
    for item, member in owned:
        high = member.optimizer.shards[item.shard].param[item.start : item.end]
        assert item.param.main_param.data_ptr() == high.data_ptr()
        own = item.param.codes.view(-1)[item.param_start :][: high.numel()]
        assert torch.equal(own, float8._codes(high, item.param.scale))


LAYOUTS: dict[str, dict[str, Any]] = {
    "data parallel": {},
    "overlap": OVERLAP,
    "tensor parallel": {"tp": 2},
    "instances": {"instances": 2},
    "bf16 gradients": {"grads_in_fp32": False},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_follows_adam_on_the_same_quantized_weights(layout: str) -> None:
    ours = run_ranks(2, _trained, **LAYOUTS[layout])
    theirs = run_ranks(2, _trained, **STOCK, **LAYOUTS[layout])
    assert ours[0]["quantized"] == 8
    assert ours[0]["losses"] == pytest.approx(theirs[0]["losses"], rel=2e-4)
    assert ours[0]["losses"][0] == theirs[0]["losses"][0]
    assert "with a bf16 high part beside the quantized weight" in ours[0]["line"]
    if layout != "tensor parallel":
        for name, weight in ours[0]["weights"].items():
            assert torch.equal(weight, ours[1]["weights"][name]), name


def test_masters_start_at_the_values_that_weights_were_initialized_with() -> None:
    """Not at what their codes stand for."""
    (masters,) = run_ranks(1, _masters)
    (exact,) = run_ranks(1, _masters, quantized=False)
    assert masters.keys() == exact.keys()
    for key, master in masters.items():
        assert torch.equal(master, exact[key]), key


def _masters(load: Path | None = None, **options: Any) -> dict[str, torch.Tensor]:
    """Return the masters this rank has, of whole parameters, perhaps after loading."""
    import checkpoints

    trainer = _build(**options)
    if load is not None:
        checkpoints.load(trainer, load)
    return checkpoints.joined([_pieces(trainer)])


def _pieces(trainer: Any) -> Any:
    import checkpoints

    return [
        (key, *place)
        for key, *place in checkpoints.in_model_space(trainer)
        if not key.startswith("high.")
    ]


def _round(
    load: Path | None = None,
    save: Path | None = None,
    save_as: str = "fully_reshardable",
    steps: int = 2,
    parallel: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Load, train, save and train on; returns the state as loaded and as saved, and losses."""
    import checkpoints

    trainer = _build(**options)
    found: dict[str, Any] = {}
    try:
        if load is not None:
            checkpoints.load(trainer, load, parallel=parallel)
            found |= {"loaded": _pieces(trainer), "weights": trainer.weights()}
            found["equal"] = _equal_to_masters(trainer)
    except ValueError as problem:
        return {"error": str(problem)}
    trainer.train(steps)
    if save is not None:
        args = Namespace(fp8_param_gather=options.get("quantized", True))
        checkpoints.save(trainer, save, save_as, parallel=parallel, args=args)
        found["saved"] = _pieces(trainer)
    found["losses"] = trainer.train(2)
    if trainer.setup.flash:
        found["all"] = checkpoints.everything(trainer)
    return found


def _equal_to_masters(trainer: Any) -> bool:
    """Return whether weights that are not quantized are the high parts of the masters."""
    members = trainer.optimizer.chained_optimizers
    shards = [(i, m.optimizer.shards[i.shard]) for m in members for i in m.shard_params]
    return all(
        torch.equal(
            item.param.detach().view(-1)[item.param_start :][: item.end - item.start],
            shard.param[item.start : item.end],
        )
        for item, shard in shards
        if not shard.owns_param
    )


@pytest.mark.parametrize("save_as", ["fully_reshardable", "dp_reshardable"])
def test_a_resumed_run_goes_on_with_the_same_bits(save_as: str, tmp_path: Path) -> None:
    from checkpoint_state import assert_same_state

    whole = run_ranks(2, _round, save=tmp_path, save_as=save_as, **OVERLAP)
    resumed = run_ranks(2, _round, load=tmp_path, steps=0, **OVERLAP)
    for before, after in zip(whole, resumed, strict=True):
        assert after["losses"] == before["losses"]
        assert_same_state(before["all"], after["all"])


def test_buckets_of_quantized_weights_alone_are_loaded_as_such(tmp_path: Path) -> None:
    options = {"prepare": _freeze_others, "layers": 1}
    (whole,) = run_ranks(1, _round, save=tmp_path, save_as="dp_reshardable", **options)
    (resumed,) = run_ranks(1, _round, load=tmp_path, steps=0, **options)
    assert resumed["losses"] == whole["losses"]


EXPERTS = {"experts": 4, "layers": 1}
WAYS = {
    "more ranks": ((1, {}), (2, OVERLAP)),
    "to bf16": ((2, OVERLAP), (2, {"quantized": False})),
    "to bf16, tensor parallel": ((1, {}), (2, {"quantized": False, "tp": 2, "parallel": True})),
    "layers of both kinds": (
        (1, {"prepare": partial(_quantize_layer, 0)}),
        (2, {"prepare": partial(_quantize_layer, 1), **OVERLAP}),
    ),
    "experts": ((2, {"ep": 2, **EXPERTS}), (1, EXPERTS)),
    "from bf16": ((2, {"quantized": False}), (2, {"parallel": True, **OVERLAP})),
}


@pytest.mark.parametrize("way", WAYS)
def test_masters_stay_the_same_with_other_weights_and_ranks(way: str, tmp_path: Path) -> None:
    from checkpoints import assert_same, joined

    (saved_by, saving), (loaded_by, loading) = WAYS[way]
    saved = run_ranks(saved_by, _round, save=tmp_path, **saving)
    loaded = run_ranks(loaded_by, _round, load=tmp_path, steps=0, **loading)
    assert_same(
        joined([rank["saved"] for rank in saved]), joined([rank["loaded"] for rank in loaded])
    )
    assert all(rank["equal"] for rank in loaded)
    if saved_by == loaded_by and "tp" not in saving:  # the same data: what FP8 is off, no more
        assert loaded[0]["losses"] == pytest.approx(saved[0]["losses"], rel=1e-3)
    if "tp" not in loading:
        for rank in loaded:
            for name, weight in rank["weights"].items():
                assert torch.equal(weight, loaded[0]["weights"][name]), name


def test_buckets_of_quantized_weights_are_not_loaded_as_others(tmp_path: Path) -> None:
    from megatron_flashoptim.checkpoint.folder import open_folder
    from megatron_flashoptim.checkpoint.statistics import inspect

    run_ranks(1, _round, save=tmp_path, save_as="dp_reshardable")
    inspection = inspect(open_folder(tmp_path))
    assert not inspection.has_masters_of_weights(), "most weights are known by tensor alone"
    assert len(inspection.families("master")) == 1
    (found,) = run_ranks(1, _round, load=tmp_path, quantized=False)
    assert "'quantized'" in found["error"] and "--fp8-param-gather as in the run" in found["error"]


def test_state_of_adam_is_taken_over_where_weights_are_quantized(tmp_path: Path) -> None:
    from checkpoints import joined

    from megatron_flashoptim.checkpoint.folder import open_folder
    from megatron_flashoptim.checkpoint.statistics import inspect
    from megatron_flashoptim.cli.inspect_tables import findings

    adam = run_ranks(2, _round, save=tmp_path, **STOCK)
    taken = run_ranks(2, _round, load=tmp_path, steps=0, **OVERLAP)
    ours, theirs = (
        joined([rank[kind] for rank in ranks])
        for ranks, kind in ((taken, "loaded"), (adam, "saved"))
    )
    for key, master in theirs.items():
        if key.startswith("master."):
            torch.testing.assert_close(ours[key], master, rtol=2**-16, atol=0)
    assert taken[0]["losses"] == pytest.approx(adam[0]["losses"], rel=1e-3)
    for others in ({"quantized": False}, {"prepare": partial(_quantize_layer, 1)}):
        (refused,) = run_ranks(1, _round, load=tmp_path, **others)
        assert "was saved by Adam with --fp8-param-gather" in refused["error"]
    inspection = inspect(open_folder(tmp_path))
    assert inspection.checked and not inspection.not_of_weights
    assert "to about FP8's precision" in findings(inspection)[0]


def test_buckets_of_adam_are_taken_over_where_weights_are_quantized(tmp_path: Path) -> None:
    (adam,) = run_ranks(1, _round, save=tmp_path, save_as="dp_reshardable", **STOCK)
    (taken,) = run_ranks(1, _round, load=tmp_path, steps=0)
    assert taken["losses"] == pytest.approx(adam["losses"], rel=1e-3)
    (refused,) = run_ranks(1, _round, load=tmp_path, quantized=False)
    assert "in the checkpoint and" in refused["error"]
    assert "--fp8-param-gather of the run that saved it" in refused["error"]


def test_state_of_adam_that_is_not_of_the_weights_is_refused(tmp_path: Path) -> None:
    run_ranks(1, _round, save=tmp_path, **STOCK)
    (found,) = run_ranks(1, _shuffled, tmp_path)
    assert "does not belong to its weights" in found


def _shuffled(folder: Path) -> str:
    import checkpoints

    from megatron_flashoptim.checkpoint import stock

    trainer = _build()
    read = stock._read
    stock._read = lambda *args: read(*args).roll(64)  # as stock's packing defect shifts them
    try:
        checkpoints.load(trainer, folder)
    except ValueError as problem:
        return str(problem)
    return ""


def test_conversion_and_export_take_the_high_parts(tmp_path: Path) -> None:
    """--to adam, --to weights and --to flash of another format; inspect reads them, too."""
    from checkpoints import joined
    from safetensors.torch import load_file
    from test_convert import _contents, _convert

    from megatron_flashoptim.checkpoint.folder import open_folder
    from megatron_flashoptim.checkpoint.state_parts import MASTER, parts
    from megatron_flashoptim.checkpoint.weights_file import WeightsExport
    from megatron_flashoptim.codec import join_master

    (tmp_path / "flash").mkdir()
    (saved,) = run_ranks(1, _round, save=tmp_path / "flash")
    masters = {
        key.removeprefix("master."): tensor
        for key, tensor in joined([saved["saved"]]).items()
        if key.startswith("master.")
    }
    before, _ = _contents(tmp_path / "flash")
    quantized = open_folder(tmp_path / "flash").flash["quantized_weights"]
    assert {key.removeprefix("optimizer.state.high.") for key in before if ".high." in key} == set(
        quantized
    )
    adam, _ = _contents(_convert(tmp_path / "flash", tmp_path / "adam", "adam")[1])
    wide, _ = _contents(_convert(tmp_path / "flash", tmp_path / "wide", "flash", master_bits=32)[1])
    assert open_folder(tmp_path / "wide").flash["quantized_weights"] == quantized
    for key, master in masters.items():
        assert torch.equal(adam[f"optimizer.state.param.{key}"], master), key
        high = wide[f"optimizer.state.high.{key}" if key in quantized else key]
        assert torch.equal(join_master(high, wide[f"optimizer.state.correction.{key}"]), master)
        assert torch.equal(wide[key], before[key]), key
    WeightsExport(tmp_path / "flash", tmp_path / "bf16", torch.bfloat16).run(lambda *_: None)
    (file,) = (tmp_path / "bf16").glob("*.safetensors")
    for key, weight in load_file(file).items():
        assert torch.equal(weight, before.get(f"optimizer.state.high.{key}", before[key])), key
    for part in parts(open_folder(tmp_path / "flash")):
        if "linear_fc1.weight" in part.name:
            numel = part.elements
            whole = masters["decoder.layers.mlp.linear_fc1.weight"][part.index]
            assert torch.equal(part.values(MASTER, 0, numel), whole.reshape(-1))


def test_state_moves_to_the_cpu_and_back_with_the_high_parts() -> None:
    run_ranks(1, _offloaded)


def _offloaded() -> None:
    import checkpoints
    from checkpoint_state import assert_same_state

    from megatron_flashoptim.optim import BucketShard

    def moved(shard: BucketShard, _: Any) -> None:
        for _, tensor in shard.state():
            tensor.data = tensor.data.clone()  # elsewhere, as between a GPU and the host

    BucketShard.move_state = moved  # type: ignore[method-assign]  # in this fork only
    trainer = _build()
    trainer.train(1)
    before = checkpoints.everything(trainer)
    trainer.optimizer.offload_to_cpu()
    _check_codes(trainer)
    with pytest.raises(RuntimeError, match="restore_from_cpu"):
        trainer.step()
    trainer.optimizer.restore_from_cpu()
    assert_same_state(before, checkpoints.everything(trainer))
    trainer.train(1)
    _check_codes(trainer)


def test_what_one_rank_cannot_read_is_told_by_all(tmp_path: Path) -> None:
    """Or the others would wait for it, to gather the weights."""
    run_ranks(2, _round, save=tmp_path, quantized=False)
    told = "OSError: not here (on rank 1; 1 of 2 ranks have a problem)"
    assert run_ranks(2, _unreadable, tmp_path) == [told, told]


def _unreadable(folder: Path) -> str:
    import checkpoints

    from megatron_flashoptim.checkpoint.loading import Loading

    def unreadable(_: Any) -> None:
        raise OSError("not here")

    trainer = _build()
    if torch.distributed.get_rank() == 1:
        Loading.read_weights = unreadable  # type: ignore[method-assign]  # in this fork
    with pytest.raises(RuntimeError) as raised:
        checkpoints.load(trainer, folder)
    return str(raised.value)


REFUSED = {
    "fp8_recipe": ("mxfp8", "--fp8-recipe other than"),
    "optimizer_cuda_graph": (True, "--optimizer-cuda-graph"),
    "flash_early_param_gather": (True, "--flash-early-param-gather"),
    "flash_gradient_release": (True, "--flash-gradient-release"),
    "ckpt_format": ("torch", "--ckpt-format other than torch_dist"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_does_not_go_with_quantized_weights_is_refused(field: str) -> None:
    from megatron_flashoptim.megatron.support import quantized_refusal

    value, named = REFUSED[field]
    refusal = quantized_refusal(SimpleNamespace(**{field: value}))
    assert refusal is not None
    assert refusal.startswith(f"--fp8-param-gather cannot be used with {named}")


def _refused(recipe: str) -> str:
    try:
        _build(optimizer={"fp8_recipe": recipe})
    except ValueError as problem:
        return str(problem)
    return ""


def test_an_optimizer_refuses_recipes_that_were_never_tried() -> None:
    (message,) = run_ranks(1, _refused, "mxfp8")
    assert "--fp8-recipe other than delayed, tensorwise or blockwise" in message
