"""Update rules beside AdamW in Megatron's hands: flags, param groups, sharding, training."""

from __future__ import annotations

import argparse
import logging
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from docs_rule import NAME as DOCS_RULE
from docs_rule import register
from ranks import run_ranks
from test_hook import _in_fork, _parse

from megatron_flashoptim import FlashOptimConfig

# Beside lr and weight_decay, by the optimizer config below.
OPTIONS: dict[str, dict[str, Any]] = {
    "flash_adam": {"betas": (0.9, 0.95), "eps": 1e-8},
    "flash_lion": {"betas": (0.9, 0.99)},
    "flash_sgd": {"momentum": 0.8, "nesterov": True, "decoupled_weight_decay": True},
    DOCS_RULE: {"beta": 0.8},
}
CONFIG: dict[str, Any] = {"lion_beta1": 0.9, "lion_beta2": 0.99, "sgd_momentum": 0.8}
LR = {"flash_adam": 1e-3, "flash_lion": 3e-4, "flash_sgd": 0.1, DOCS_RULE: 3e-4}


def _state_of_parameters(trainer: Any) -> dict[tuple[str, int, str], torch.Tensor]:
    names = {param: name for name, param in trainer.model[0].named_parameters()}
    found = {}
    for member in trainer.optimizer.chained_optimizers:
        for item in member.shard_params:
            shard = member.optimizer.shards[item.shard]
            for name, tensor in [("param", shard.param), *shard.state()]:
                unit = 32 if name.endswith("scale") else 1
                part = slice(item.start // unit, -(-item.end // unit))
                key = (names[item.param], item.param_start, name)
                found[key] = tensor[part].view(torch.uint8).clone()
    return found


def _build(name: str) -> Any:
    import tiny_gpt

    flash = FlashOptimConfig(
        optimizer=name, master_rounding="stochastic", sgd_nesterov=name == "flash_sgd"
    )
    options = {**CONFIG, "lr": LR[name], "clip_grad": 0.0}
    return tiny_gpt.build(tiny_gpt.Setup(layers=1, flash=flash, optimizer=options))


def _step_on_given_gradients(trainer: Any, steps: range) -> dict[Any, torch.Tensor]:
    """Step on gradients that no number of ranks changes; return the state."""
    for step in steps:
        for key, param in trainer.model[0].named_parameters():
            seed = zlib.crc32(f"{step}{key}".encode())
            generator = torch.Generator().manual_seed(seed)
            param.main_grad.copy_(1e-3 * torch.randn(param.shape, generator=generator))
        trainer.optimizer.step()
    return _state_of_parameters(trainer)


def _run(name: str, folder: Path | None = None) -> dict[str, Any]:
    """Step on given gradients; save, if there is a folder for it; train on real text."""
    import checkpoints

    trainer = _build(name)
    state = _step_on_given_gradients(trainer, range(3))
    if folder is not None:
        checkpoints.save(trainer, folder, "fully_reshardable")
    (member,) = trainer.optimizer.chained_optimizers
    several = torch.distributed.get_world_size() == 2
    return {
        "state": state,
        "next": {} if several else _step_on_given_gradients(trainer, range(3, 4)),
        "losses": trainer.train(12) if several else [],
        "groups": [
            {key: value for key, value in group.items() if key != "params"}
            for group in member.optimizer.param_groups
        ],
        "says": trainer.optimizer.describe(),
    }


def _loaded(name: str, folder: Path) -> tuple[dict[Any, torch.Tensor], dict[Any, torch.Tensor]]:
    """Load a checkpoint; return the state before and after another step."""
    import checkpoints

    trainer = _build(name)
    checkpoints.load(trainer, folder)
    return _state_of_parameters(trainer), _step_on_given_gradients(trainer, range(3, 4))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_rule_trains_and_its_state_does_not_depend_on_the_number_of_ranks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = None  # test_checkpoint.py saves the other rules
    if name == DOCS_RULE:
        register(tmp_path, monkeypatch)
        folder = tmp_path / "saved"
        folder.mkdir()
    (alone,) = run_ranks(1, _run, name)
    ranks = run_ranks(2, _run, name, folder)

    def joined(key: str, kind: str) -> torch.Tensor:
        pieces = [
            (start, part)
            for rank in ranks
            for (param, start, what), part in rank["state"].items()
            if (param, what) == (key, kind)
        ]
        return torch.cat([part for _, part in sorted(pieces, key=lambda piece: piece[0])])

    assert len({kind for _, _, kind in alone["state"]}) == (6 if name == "flash_adam" else 4)
    for (key, _, kind), expected in alone["state"].items():
        assert torch.equal(joined(key, kind), expected), (key, kind)
        assert kind == "correction" or expected.any(), (key, kind)

    if folder is not None:  # saved by 2 ranks, loaded by 1
        ((loaded, stepped),) = run_ranks(1, _loaded, name, folder)
        assert loaded.keys() == stepped.keys() == alone["state"].keys()
        for key, expected in alone["state"].items():
            assert torch.equal(loaded[key], expected), key
            assert torch.equal(stepped[key], alone["next"][key]), key

    for rank in ranks:
        losses = rank["losses"]
        assert sum(losses[-3:]) < 0.98 * sum(losses[:3]), losses
        for group in rank["groups"]:
            mine = {key: group[key] for key in OPTIONS[name]}
            assert mine == OPTIONS[name]
            foreign = {"betas", "eps", "momentum", "nesterov"} - OPTIONS[name].keys()
            assert not foreign & group.keys()
            assert group["step"] == 15
        assert rank["says"].startswith(f"{name}: ")
        assert ("second moment" in rank["says"]) == (name == "flash_adam")


REFUSED: dict[str, tuple[str, ...]] = {
    "--optimizer flash_lion --flash-rounding auto": ("--flash-rounding", "flash_lion keeps none"),
    "--optimizer flash_sgd --flash-exp-avg-sq-code sqrt": (
        "--flash-exp-avg-sq-code",
        "flash_sgd keeps none",
    ),
    "--optimizer flash_adam --flash-sgd-nesterov": (
        "--flash-sgd-nesterov cannot be used with --optimizer flash_adam",
        "use --optimizer flash_sgd",
    ),
    "--optimizer flash_sgd --sgd-momentum 0": ("--sgd-momentum must be above 0", "got 0.0"),
    "--optimizer flash_lion --lion-beta1 1.2": ("--lion-beta1 must be 0 or above", "got 1.2"),
    "--optimizer flash_lion --lion-beta2 1": ("--lion-beta2 must be 0 or above", "got 1.0"),
    "--optimizer flash_adam --adam-beta1 nan": ("--adam-beta1 must be 0 or above", "got nan"),
    "--optimizer flash_adamw --adam-beta2 1.0": ("--adam-beta2 must be 0 or above", "got 1.0"),
    "--optimizer flash_adamw --adam-eps=-1e-8": ("--adam-eps must be 0 or above", "got -1e-08"),
    "--optimizer flash_lion --no-decoupled-weight-decay": (
        "--optimizer flash_lion cannot be used with --no-decoupled-weight-decay",
        "flash_adam or flash_sgd",
    ),
    "--optimizer flash_sgd --use-mup": ("--use-mup", "flash_lion"),
    "--optimizer flash_lion --fp4-param-gather": ("--optimizer flash_lion cannot", "drop the flag"),
    "--optimizer sgd --flash-sgd-nesterov": ("--flash-sgd-nesterov given with --optimizer sgd",),
}
ACCEPTED = {
    "flash_adam": "--flash-rounding nearest --flash-exp-avg-sq-code fourth_root",
    "flash_lion": "--lion-beta1 0.9 --lion-beta2 0.99 --flash-master-bits 32 --use-mup",
    "flash_sgd": "--sgd-momentum 0.7 --flash-sgd-nesterov --no-decoupled-weight-decay",
}


def _parse_all() -> dict[str, Any]:
    from megatron.training import arguments, training

    from megatron_flashoptim.megatron.arguments import add_flash_arguments, config_from_args

    found: dict[str, Any] = {flags: _parse(*flags.split()) for flags in REFUSED}
    for name, flags in ACCEPTED.items():
        args = _parse("--optimizer", name, *flags.split())
        if isinstance(args, str):
            found[name] = args
            continue
        flash = config_from_args(args)
        config, _ = training.get_megatron_optimizer_config(arguments.validate_args(args))
        found[name] = (args.optimizer, flash, flash.rule.options(config, flash))
    # A parser of our own: Megatron 0.19's cannot print its help.
    parser = argparse.ArgumentParser()
    parser.add_argument("--optimizer", choices=["adam", "sgd"])
    found["help"] = " ".join(add_flash_arguments(parser).format_help().split())
    return found


@pytest.mark.smoke
def test_flags_of_every_rule_reach_it_or_are_refused_by_name() -> None:
    (found,) = _in_fork(_parse_all)
    for flags, parts in REFUSED.items():
        assert isinstance(found[flags], str), f"accepted: {flags}"
        assert "\n" not in found[flags]
        for part in parts:
            assert part in found[flags], flags
    optimizer, flash, options = found["flash_adam"]
    assert optimizer == "adam" and options == {"betas": (0.9, 0.999), "eps": 1e-8}
    assert (flash.rounding, flash.exp_avg_sq_code) == ("nearest", "fourth_root")
    _, flash, options = found["flash_lion"]
    assert options == {"betas": (0.9, 0.99)} and flash.master_bits == 32
    _, flash, options = found["flash_sgd"]
    assert options == {"momentum": 0.7, "nesterov": True, "decoupled_weight_decay": False}
    for text in ("flash_lion", "--flash-sgd-nesterov", "--no-decoupled-weight-decay", "--lion-*"):
        assert text in found["help"], text


def _with_overrides() -> list[dict[str, Any]]:
    """Build with one param group whose betas Megatron was told to override."""
    import tiny_gpt
    from megatron.core.optimizer import ParamKey

    flash = FlashOptimConfig(optimizer="flash_lion")
    setup = tiny_gpt.Setup(layers=1, flash=flash, optimizer=CONFIG)
    build = tiny_gpt.get_megatron_optimizer
    options = {"betas": (0.5, 0.6), "eps": 1.0, "weight_decay": 0.5}
    own = {ParamKey(attr="is_embedding_or_output_parameter"): options}
    found: list[dict[str, Any]] = []

    def built(*args: Any, **kwargs: Any) -> Any:
        optimizer = build(*args, **kwargs, config_overrides=own)
        # As built: the scheduler, and ``tiny_gpt`` in its place, set learning rate and decay.
        for group in optimizer.param_groups:
            found.append({key: group[key] for key in group if key != "params"})
        return optimizer

    tiny_gpt.get_megatron_optimizer = built
    tiny_gpt.build(setup)
    return found


def test_options_that_megatron_overrides_for_a_param_group_reach_the_rule() -> None:
    """Adam's eps, which muP scales, does not."""
    (groups,) = run_ranks(1, _with_overrides)
    found = {(group["betas"], group["weight_decay"]) for group in groups}
    assert found == {((0.9, 0.99), 0.1), ((0.5, 0.6), 0.5)}
    assert not any("eps" in group for group in groups)


def _stops_at_stock_optimizer() -> str:
    import tiny_gpt
    from megatron.training import global_vars

    global_vars._GLOBAL_ARGS = _parse("--optimizer", "flash_lion")
    try:
        tiny_gpt.build(tiny_gpt.Setup(flash=None, layers=1))
    except RuntimeError as problem:
        return str(problem)
    return ""


def test_a_message_names_the_optimizer_in_force() -> None:
    (message,) = run_ranks(1, _stops_at_stock_optimizer)
    assert message.startswith("--optimizer flash_lion was given")


def _log_of(optimizer: str, **options: Any) -> list[str]:
    import checkpoints
    import tiny_gpt

    logged = checkpoints.collect_log()
    logging.getLogger("megatron_flashoptim").setLevel(logging.INFO)
    flash = FlashOptimConfig(optimizer=optimizer)
    tiny_gpt.build(tiny_gpt.Setup(flash=flash, layers=1, optimizer=options))
    return [line for line in logged if "Megatron's --optimizer" in line]


def test_the_log_says_what_megatrons_optimizer_of_the_name_does_instead() -> None:
    def said(optimizer: str, **options: Any) -> list[str]:
        return run_ranks(1, _log_of, optimizer, **options)[0]

    (line,) = said("flash_lion", adam_beta2=0.99)
    assert "with betas (0.95, 0.98) of" in line and "lion takes (0.9, 0.99), of" in line
    (line,) = said("flash_sgd")
    assert "apart from the gradient; Megatron's --optimizer sgd does within it" in line
    (line,) = said("flash_adam")
    assert "within the gradient (L2); Megatron's --optimizer adam does apart from it" in line
    for optimizer in ("flash_sgd", "flash_adam"):
        assert not said(optimizer, decoupled_weight_decay=False)
        assert not said(optimizer, weight_decay=0.0)
    assert not said("flash_adamw")
