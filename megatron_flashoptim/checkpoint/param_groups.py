"""Param groups of a checkpoint, matched to those of the run.

Megatron identifies groups by their options, not by their order. Whether expert parameters have
groups of their own depends on the expert parallel size, and a run may go on with another schedule,
so that a group which differs in those alone is taken where no group is alike. Groups that differ in
nothing that identifies them (of code that gives some their own betas) keep their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from megatron.core.optimizer.optimizer import param_group_identifier_keys

_EXPERTS = "is_expert_parallel"
# What Megatron's scheduler reads in each group; part of ``param_group_identifier_keys`` since 0.19.
SCHEDULE = ("max_lr", "min_lr", "start_wd", "end_wd")
# What may differ, in this order, where no group of the checkpoint is like one of the run.
_MAY_DIFFER = ((), (_EXPERTS,), SCHEDULE, (_EXPERTS, *SCHEDULE))
# Megatron's name of the optimizer that a group is given to, where several share the model: here one
# steps all groups, whatever it was in the run that saved them.
OPTIMIZER = "optimizer"
# What a group of the run keeps when it takes over one of a checkpoint.
OWN = ("params", _EXPERTS)
# Megatron's name, in the state of the parameters, of the step number that all have.
_STEP_OF_ALL = "common_step"
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
        return _with_step(state["optimizer"])
    chained = sorted(key for key in state if isinstance(key, int))
    return [group for key in chained for group in _with_step(state[key].get("optimizer", {}))]


def _with_step(inner: dict[str, Any]) -> list[Group]:
    """Return the groups of what torch's optimizer keeps, each with the number of steps.

    Megatron's optimizers that are not distributed save it beside the groups, where torch's Adam
    counts it.
    """
    step = (inner.get("state") or {}).get(_STEP_OF_ALL)
    own = {} if step is None else {"step": step}
    return [own | group for group in inner.get("param_groups", ())]


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
        ValueError: a group of the run has no counterpart, or several that differ; names its options
            and those there are.
    """
    found: dict[int, Group] = {}
    for without in _MAY_DIFFER:
        missing = [number for number in range(len(current)) if number not in found]
        taken = [id(group) for group in found.values()]
        # One that was taken is taken again only where there is no other: experts by dense ones'.
        free = [group for group in saved if id(group) not in taken]
        for identifier in {_identifier(current[number], without) for number in missing}:
            numbers = [n for n in missing if _identifier(current[n], without) == identifier]
            like = _like(free, identifier, without) or _like(saved, identifier, without)
            if len(like) == len(numbers):
                found.update(zip(numbers, like, strict=True))
            elif len(like) == 1:
                found.update(dict.fromkeys(numbers, like[0]))
    for number, group in enumerate(current):
        if number not in found:
            theirs = [_named(other) for other in saved]
            raise ValueError(
                f"no param group of the checkpoint, or more than one, is like {_named(group)}; it "
                f"has {theirs}: weight-decay or learning-rate overrides (--decoupled-lr, "
                "--apply-wd-to-qk-layernorm, --use-mup) differ from the run that saved it"
            )
    return [found[number] for number in range(len(current))]


def _like(groups: Iterable[Group], identifier: Any, without: Sequence[str]) -> list[Group]:
    """Return the groups of an identifier, one of those that are equal."""
    like: list[Group] = []
    for group in groups:
        if _identifier(group, without) == identifier and not any(
            _values(group) == _values(other) for other in like
        ):
            like.append(group)
    return like


def _values(group: Group) -> Group:
    return {key: _plain(value) for key, value in group.items() if key != "params"}


def schedules(groups: Iterable[Group]) -> list[Group]:
    """Return what the scheduler reads in each group."""
    return [{key: group[key] for key in SCHEDULE if key in group} for group in groups]


def other_schedules(run: Iterable[Group], groups: Iterable[Group]) -> list[str]:
    """Return a line for each difference of schedules, without repetition.

    Args:
        run: the run's, as of ``schedules``.
        groups: loaded from a checkpoint.
    """
    lines = [
        f"the checkpoint was saved with {key}={loaded.get(key)}, this run has {ours.get(key)}"
        for ours, loaded in zip(run, groups, strict=True)
        for key in SCHEDULE
        if ours.get(key) != loaded.get(key)
    ]
    return list(dict.fromkeys(lines))


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


def _named(group: Group, without: Sequence[str] = ()) -> dict[str, Any]:
    # NeMo calls lr_mult and wd_mult pre_lr_mult and pre_wd_mult.
    return {
        key: group.get(key, group.get(f"pre_{key}"))
        for key in dict.fromkeys((*param_group_identifier_keys, *SCHEDULE))
        if key not in (*without, OPTIMIZER)
    }


def _identifier(group: Group, without: Sequence[str]) -> tuple[Any, ...]:
    return tuple(_named(group, without).values())
