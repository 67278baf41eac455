"""Train flash_adamw and stock Megatron with exact AdamW on the same data, and compare.

Both run in the same forked ranks. Weight decay, ``eps`` and clipping are chosen so that each shows:
decay moves weights as much as the gradient does, and every step is clipped by so much that ``eps``
matters, which makes updates depend on the scale of each gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from ranks import run_ranks

STEPS = 5
OPTIMIZER = {"weight_decay": 1.0, "adam_eps": 1e-5, "clip_grad": 0.1}

Trace = dict[str, Any]


def follow(
    world_size: int, break_flash: Callable[[], None] | None = None, **options: Any
) -> list[tuple[Trace, Trace]]:
    """Return what flash and stock did on each rank.

    Args:
        world_size: number of ranks.
        break_flash: called on each rank before flash is built, to see a fault being noticed.
        **options: of ``tiny_gpt.Setup``.
    """
    return run_ranks(world_size, _both, break_flash, **options)


def _both(break_flash: Callable[[], None] | None, **options: Any) -> tuple[Trace, Trace]:
    import tiny_gpt
    from exact_adamw import use_as_megatrons_adam

    setup = tiny_gpt.Setup(**{**options, "optimizer": OPTIMIZER | options.get("optimizer", {})})
    if break_flash is not None:
        break_flash()
    flash = _trace(setup)
    use_as_megatrons_adam()
    return flash, _trace(dataclasses.replace(setup, flash=None))


def _trace(setup: Any) -> Trace:
    """Train; return losses, norms and zeros of each step, and this rank's part of the state."""
    import tiny_gpt
    from decoded import flash_state, stock_state

    trainer = tiny_gpt.build(setup)
    names = {
        param: f"{number}.{name}"
        for number, chunk in enumerate(trainer.model)
        for name, param in chunk.named_parameters()
    }
    start = {param: param.detach().float().view(-1).clone() for param in names}
    steps = [trainer.step() for _ in range(STEPS)]
    parts = {}
    for number, member in enumerate(trainer.optimizer.chained_optimizers):
        if member.is_stub_optimizer:
            continue
        for bucket in (b for maps in member.gbuf_ranges for m in maps.values() for b in m):
            for param, where in bucket["param_map"].items():
                state = flash_state(member, param) if setup.flash else stock_state(member, param)
                owned = where["param"]
                parts[names[param], number] = {
                    "update": state["param"] - start[param][owned.start : owned.end],
                    "exp_avg": state["exp_avg"],
                    "root of exp_avg_sq": state["exp_avg_sq"].sqrt(),
                }
    trainer.sync_params()
    frozen = {
        names[param]: not torch.equal(param.detach().float().view(-1), start[param])
        for param in names
        if not param.requires_grad
    }
    losses, norms, zeros = ([step[kind] for step in steps] for kind in range(3))
    return {"losses": losses, "norms": norms, "zeros": zeros, "parts": parts, "moved": frozen}


def deviations(ranks: list[tuple[Trace, Trace]]) -> dict[str, Any]:
    """Return relative differences: of losses and norms by step, and the worst L2 of each state."""
    ours, theirs = ranks[0]
    found: dict[str, Any] = {
        kind: [abs(a - b) / b for a, b in zip(ours[kind], theirs[kind], strict=True)]
        for kind in ("losses", "norms")
    }
    found["zeros"] = [abs(a - b) for a, b in zip(ours["zeros"], theirs["zeros"], strict=True)]
    sums: dict[tuple[str, str], list[float]] = {}
    for flash, stock in ranks:
        assert flash["parts"].keys() == stock["parts"].keys()
        for (name, _), state in stock["parts"].items():
            for kind, want in state.items():
                got = flash["parts"][name, _][kind]
                entry = sums.setdefault((kind, name), [0.0, 0.0])
                entry[0] += float((got - want).square().sum())
                entry[1] += float(want.square().sum())
    for (kind, name), (error, size) in sums.items():
        relative = (error / size) ** 0.5 if size else float(error > 0)
        if relative >= found.get(kind, (0.0, ""))[0]:
            found[kind] = (relative, name)
    return found
