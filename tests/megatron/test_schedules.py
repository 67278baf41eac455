"""Learning rate and weight decay of every schedule and override arrive in the weights.

With both betas 0 the update of AdamW is ``-lr * sign(g) - lr * weight_decay * w``. So the learning
rate and the weight decay that a step really took are two unknowns of a linear fit to what the
masters did, one fit for each param group and step of a real run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from watched_training import ADAM, FLASH, around_steps, train

from megatron_flashoptim.codec import join_master

BASE = """--train-iters 8 --lr 1e-3 --min-lr 1e-4 --lr-warmup-iters 2 --lr-warmup-init 5e-5
--lr-decay-iters 7 --weight-decay 0.5 --adam-beta1 0 --adam-beta2 0 --clip-grad 0
--untie-embeddings-and-output-weights""".split()
WSD = "--lr-decay-style WSD --lr-wsd-decay-iters 4 --lr-wsd-decay-style"
RAMP = "--start-weight-decay 0.2 --end-weight-decay 2 --weight-decay-incr-style"
SCHEDULES = {
    "constant": "--lr-decay-style constant",
    "linear": f"--lr-decay-style linear {RAMP} linear",
    "cosine": f"--lr-decay-style cosine {RAMP} cosine",
    "inverse square root": "--lr-decay-style inverse-square-root",
    "WSD, exponential": f"{WSD} exponential",
    "WSD, linear": f"{WSD} linear",
    "WSD, cosine": f"{WSD} cosine",
    "WSD, minus_sqrt": f"{WSD} minus_sqrt",
}
OVERRIDES = {
    "decoupled lr": "--decoupled-lr 3e-3 --decoupled-min-lr 2e-4",
    "decay of qk layernorms": "--qk-layernorm --apply-wd-to-qk-layernorm",
    "muP": "--use-mup --mup-base-hidden-size 16",
}


def _masters(member: Any) -> list[torch.Tensor]:
    return [join_master(shard.param, shard.correction) for shard in member.optimizer.shards]


def _fit(update: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor) -> tuple[float, float]:
    """Return learning rate and weight decay of a group's update, where it had a gradient."""
    moved = grad.abs() > 1e-4  # eps is 1e-8
    sides = torch.stack([grad.sign(), weight], dim=1)[moved].double()
    lr, decay = torch.linalg.lstsq(sides, -update[moved].double()[:, None]).solution.flatten()
    return float(lr), float(decay / lr)


def _updates() -> dict[str, Any]:
    """Record, for each step and param group, what the scheduler said and the weights did."""
    steps: list[list[tuple[float, ...]]] = []

    @contextlib.contextmanager
    def around(optimizer: Any, number: int) -> Iterator[None]:
        (member,) = optimizer.chained_optimizers
        groups = member.optimizer.param_groups
        said = [(group["lr"], group["weight_decay"], group["eps"]) for group in groups]
        before = _masters(member)
        yield
        after = _masters(member)
        grads = [shard.grad for shard in member.optimizer.shards]
        seen = []
        for index, values in enumerate(said):
            items = [item for item in member.shard_params if item.group_index == index]

            def whole(flat: list[torch.Tensor], items: list[Any] = items) -> torch.Tensor:
                return torch.cat([flat[i.shard][i.start : i.end].float() for i in items])

            update = whole(after) - whole(before)
            seen.append((len(update), *values, *_fit(update, whole(grads), whole(before))))
        steps.append(seen)

    around_steps(around)
    return {"steps": steps}


def _groups() -> dict[str, Any]:
    """Record what the scheduler said for each param group, of any optimizer."""
    steps: list[list[tuple[float, ...]]] = []

    @contextlib.contextmanager
    def around(optimizer: Any, number: int) -> Iterator[None]:
        groups = optimizer.chained_optimizers[0].optimizer.param_groups
        steps.append(
            [
                (sum(map(torch.numel, g["params"])), g["lr"], g["weight_decay"], g["eps"])
                for g in groups
            ]
        )
        yield

    around_steps(around)
    return {"steps": steps}


def _flash(corpus: Path, flags: str) -> list[list[tuple[float, ...]]]:
    bits = ("--flash-master-bits", "32")  # the fit is then as exact as the update
    (rank,) = train(corpus, *BASE, *FLASH, *bits, *flags.split(), watch=_updates)
    for step in rank["steps"]:
        for _, lr, decay, _, seen_lr, seen_decay in step:
            assert seen_lr == pytest.approx(lr, rel=2e-3)
            assert seen_decay == pytest.approx(decay, rel=2e-2, abs=5e-3)
    assert len(rank["steps"]) == 8
    return rank["steps"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_step_takes_the_scheduled_rate_and_decay(name: str, corpus: Path) -> None:
    steps = _flash(corpus, SCHEDULES[name])
    rates = [step[0][1] for step in steps]
    assert rates[:3] == pytest.approx([5e-5, 5.25e-4, 1e-3]), "warm-up"
    assert len(set(rates)) == (3 if name == "constant" else {"WSD": 7}.get(name[:3], 8)), rates
    decays = {max(group[2] for group in step) for step in steps}
    assert len(decays) == (8 if "incr" in SCHEDULES[name] else 1)


@pytest.mark.parametrize("name", OVERRIDES)
def test_overrides_make_the_groups_of_stock_and_reach_the_weights(name: str, corpus: Path) -> None:
    flash = _flash(corpus, OVERRIDES[name])
    (stock,) = train(corpus, *BASE, *ADAM, *OVERRIDES[name].split(), watch=_groups)
    assert [[group[:4] for group in step] for step in flash] == stock["steps"]
    rates = {group[1] for group in flash[3]}
    decayed = {numel for numel, _, decay, *_ in flash[3] if decay}
    if name == "decoupled lr":
        assert max(rates) / min(rates) > 2.5
    elif name == "muP":
        assert max(rates) == pytest.approx(4 * min(rates))
        assert len({group[3] for group in flash[3]}) > 1, "eps differs too"
    else:
        assert len(rates) == 1
        (numel,) = decayed
        matrices, embeddings = 2 * 12 * 64 * 64, 2 * 384 * 64
        assert numel == matrices + embeddings + 2 * 2 * (16 + 16), "layernorms of 2 layers too"
