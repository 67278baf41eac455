"""Param groups of a checkpoint, matched to those of the run.

Megatron identifies groups by their options, not by their order. Whether expert parameters have
groups of their own depends on the expert parallel size, so that a group whose only difference is
``is_expert_parallel`` is taken where no group is alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from megatron.core.optimizer.optimizer import param_group_identifier_keys

_EXPERTS = "is_expert_parallel"
# What a group of the run keeps when it takes over one of a checkpoint.
OWN = ("params", _EXPERTS)
# Of Adam: in the param groups of torch's, and in arguments where there is a flag for it.
DECOUPLED = "decoupled_weight_decay"
# Hyper-parameters that make another formula, not another number in it: the flag of each, and the
# value that giving the flag sets.
_SWITCHES: dict[str, tuple[str, bool]] = {
    "nesterov": ("--flash-sgd-nesterov", True),
    DECOUPLED: ("--no-decoupled-weight-decay", False),
}

Group = dict[str, Any]


def of_optimizer(state: dict[Any, Any]) -> list[Group]:
    """Return the param groups of one optimizer's state dict, or of all in a chain's.

    Args:
        state: what Megatron keeps under ``optimizer``; of a chain, by number.
    """
    if "optimizer" in state:
        return list(state["optimizer"]["param_groups"])
    chained = sorted(key for key in state if isinstance(key, int))
    return [
        group
        for key in chained
        for group in state[key].get("optimizer", {}).get("param_groups", ())
    ]


def decoupled_by_adam(groups: Iterable[Group], args: object) -> bool | None:
    """Return whether Megatron's Adam decayed weights apart from the gradient; None if unsaid.

    The groups come first: they are what torch's Adam steps by. Transformer Engine's and Apex's say
    nothing there.

    Args:
        groups: of a checkpoint of Megatron's Adam.
        args: the arguments in it, or None.
    """
    said = (*(group.get(DECOUPLED) for group in groups), getattr(args, DECOUPLED, None))
    return next((bool(value) for value in said if value is not None), None)


def match(current: Sequence[Group], saved: Sequence[Group]) -> list[Group]:
    """Return the checkpoint's group for each group of the run.

    Raises:
        ValueError: a group of the run has no counterpart; names its options and those there are.
    """
    exact = {_identifier(group): group for group in saved}
    apart_from_experts = {_identifier(group, without=_EXPERTS): group for group in reversed(saved)}
    found = []
    for group in current:
        same = exact.get(_identifier(group))
        if same is None:
            same = apart_from_experts.get(_identifier(group, without=_EXPERTS))
        if same is None:
            raise ValueError(
                f"no param group of the checkpoint is like {_named(group)}; it has "
                f"{[_named(other) for other in saved]}: weight decay or learning-rate overrides "
                "differ from the run that saved it"
            )
        found.append(same)
    return found


def taken_over(
    current: Sequence[Group], saved: Sequence[Group], options: Iterable[str]
) -> list[str]:
    """Return a line for each hyper-parameter whose saved value replaces that of the run.

    Megatron's Adam takes betas and epsilon from the checkpoint too, without a word.

    Args:
        current: groups of the run.
        saved: for each, the checkpoint's, as of ``match``.
        options: names of the update rule's hyper-parameters.

    Raises:
        ValueError: a switch is on in one and off in the other; names its flag and both values.
    """
    lines: dict[str, None] = {}  # a set that keeps the order
    for key in options:
        for ours, theirs in zip(current, saved, strict=True):
            # Without the key, the state was converted from another rule's.
            if key not in theirs or _plain(theirs[key]) == _plain(ours[key]):
                continue
            if key in _SWITCHES:
                flag, given = _SWITCHES[key]
                todo = "give" if theirs[key] == given else "drop"
                raise ValueError(
                    f"the checkpoint was saved with {key}={theirs[key]}, this run has {ours[key]}: "
                    f"{todo} {flag}, or start the optimizer anew with --no-load-optim --no-load-rng"
                )
            line = (
                f"the checkpoint was saved with {key}={theirs[key]}, this run has {ours[key]}: as "
                "with Megatron's Adam, the checkpoint's is used"
            )
            lines[line] = None
    return list(lines)


def _plain(value: Any) -> Any:
    """Return a value with tuples for lists, which files may turn them into."""
    return tuple(value) if isinstance(value, list) else value


def _named(group: Group, without: str | None = None) -> dict[str, Any]:
    # NeMo calls lr_mult and wd_mult pre_lr_mult and pre_wd_mult.
    return {
        key: group.get(key, group.get(f"pre_{key}"))
        for key in param_group_identifier_keys
        if key != without
    }


def _identifier(group: Group, without: str | None = None) -> tuple[Any, ...]:
    return tuple(_named(group, without).values())
