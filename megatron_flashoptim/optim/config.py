"""User-facing configuration: one field per ``--flash-*`` flag."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal, get_args

from megatron_flashoptim.codec import spec
from megatron_flashoptim.optim.rules import RULES, Rule, rule_of

RoundingPolicy = Literal["auto", "nearest", "stochastic"]

# The most that rounding to the nearest bf16 moves a scale, relative to it.
_HALF_ULP_OF_SCALE = 2.0**-8

_OF_EXP_AVG_SQ = ("exp_avg_sq_code", "rounding")
_OF_GRADIENT_RELEASE = ("release_slots", "accept_partial_step")
# Fields of a rule's own, and what to do.
_OF_ONE_RULE = {"sgd_nesterov": "use --optimizer flash_sgd, or drop the flag"}

ROUNDING_POLICIES: tuple[str, ...] = get_args(RoundingPolicy)


@dataclass(frozen=True)
class FlashOptimConfig:
    """How a flash optimizer stores and rounds its state.

    Attributes:
        optimizer: update rule; value of ``--optimizer``, one of ``optim.rules.RULES``.
        master_bits: bits of the master weight, 16, 24 or 32 (``--flash-master-bits``).
        exp_avg_sq_code: code of the second moment (``--flash-exp-avg-sq-code``): "sqrt" is the
            paper's; "fourth_root" spends more codes on small elements, see docs/formats.md.
        rounding: rounding of the second moment (``--flash-rounding``); "auto" takes stochastic
            rounding where nearest would stall at the given beta2, see ``resolve_rounding``.
        master_rounding: rounding of the master weight (``--flash-master-rounding``); 16-bit
            masters need "stochastic".
        early_param_gather: gather the weights of a bucket as soon as it is stepped, not in the next
            forward pass (``--flash-early-param-gather``); changes no bit.
        sgd_nesterov: take Nesterov's steps (``--flash-sgd-nesterov``); of flash_sgd alone.
        gradient_release: step a bucket in the backward pass, once its gradients are reduced,
            and use their memory again (``--flash-gradient-release``); changes no bit.
        release_slots: with it, how many buckets the memory for gradients is for
            (``--flash-release-slots``); 2 or more.
        accept_partial_step: with it, go on where a backward pass has failed after some buckets were
            stepped (``--flash-accept-partial-step``).
        bucket_clip_grad: clip the gradients of each bucket to this norm
            (``--flash-bucket-clip-grad``); 0 clips nothing.
        seed: seed of all stochastic rounding; the command line uses Megatron's ``--seed``.

    Raises:
        ValueError: a value is not allowed, or is of what the rule has not; the message names the
            flag and what to do.
    """

    optimizer: str = "flash_adamw"
    master_bits: spec.MasterBits = 24
    exp_avg_sq_code: spec.ExpAvgSqCode = "sqrt"
    rounding: RoundingPolicy = "auto"
    master_rounding: spec.Rounding = "nearest"
    early_param_gather: bool = False
    sgd_nesterov: bool = False
    gradient_release: bool = False
    release_slots: int = 3
    accept_partial_step: bool = False
    bucket_clip_grad: float = 0.0
    seed: int = 1234

    def __post_init__(self) -> None:
        _check_choice("--optimizer", self.optimizer, tuple(RULES))
        _check_choice("--flash-master-bits", self.master_bits, spec.MASTER_BITS)
        _check_choice("--flash-exp-avg-sq-code", self.exp_avg_sq_code, spec.EXP_AVG_SQ_CODES)
        _check_choice("--flash-rounding", self.rounding, ROUNDING_POLICIES)
        _check_choice("--flash-master-rounding", self.master_rounding, spec.ROUNDINGS)
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name), field.default)
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        refusal = fields_refusal(self.optimizer, changed)
        if refusal is not None:
            raise ValueError(refusal)
        if self.release_slots < 2:
            raise ValueError(
                f"--flash-release-slots must be 2 or more, got {self.release_slots}: one bucket is "
                "filled while another is reduced and stepped"
            )
        if not 0.0 <= self.bucket_clip_grad < math.inf:
            raise ValueError(
                f"--flash-bucket-clip-grad must be a norm above 0, or 0 for none; got "
                f"{self.bucket_clip_grad}"
            )
        for name in _OF_GRADIENT_RELEASE:
            if name in changed and not self.gradient_release:
                raise ValueError(
                    f"--flash-{name.replace('_', '-')} is for --flash-gradient-release, which is "
                    "not given; add it, or drop the flag"
                )
        if self.master_bits == 16 and self.master_rounding != "stochastic":
            raise ValueError(
                "--flash-master-bits 16 keeps no correction, so that updates below half a bf16 "
                "ulp would be lost; add --flash-master-rounding stochastic, or use 24 or 32 bits"
            )

    @property
    def rule(self) -> Rule:
        """The update rule."""
        return rule_of(self.optimizer)

    def resolve_rounding(self, beta2: float) -> spec.Rounding:
        """Return the rounding of the second moment for a given beta2.

        A step without gradient takes the root of v down by a share (1 - beta2) / 2. The largest
        element of a group has the top code always, so that its loss must show in the group's
        bf16 scale, of which half an ulp is 2^-9 to 2^-8 of it. "auto" keeps nearest, which has the
        smaller error, where the loss is more than two of these, that is for
        ``beta2 < 1 - 2^-6 = 0.984``; from there on v lags behind its decay, and above 0.992 it
        would only ever grow. Codes below the top stall later. See docs/stress-grid.md.
        """
        if self.rounding != "auto":
            return self.rounding
        return "nearest" if (1.0 - beta2) / 2.0 > 2 * _HALF_ULP_OF_SCALE else "stochastic"


def fields_refusal(optimizer: str, given: Iterable[str]) -> str | None:
    """Return why fields have no place beside a rule, or None.

    Args:
        optimizer: name of the rule.
        given: names of the fields that were given a value.
    """
    for name in given:
        flag = f"--flash-{name.replace('_', '-')}"
        if name in _OF_EXP_AVG_SQ and not rule_of(optimizer).keeps_exp_avg_sq:
            return (
                f"{flag} is of the second moment, and --optimizer {optimizer} keeps none; drop the "
                "flag"
            )
        if name in _OF_ONE_RULE and name not in rule_of(optimizer).own_fields:
            return f"{flag} cannot be used with --optimizer {optimizer}; {_OF_ONE_RULE[name]}"
    return None


def arguments(flash: FlashOptimConfig | None) -> dict[str, Any]:
    """Return what parsed arguments hold of a configuration, or for other optimizers.

    Returns:
        ``flash_optimizer`` and one name for each ``--flash-*`` flag; the seed is Megatron's own.
    """
    names = [field.name for field in fields(FlashOptimConfig) if field.name != "seed"]
    return {f"flash_{name}": None if flash is None else getattr(flash, name) for name in names}


def config_of(args: Mapping[str, Any]) -> FlashOptimConfig:
    """Return the configuration that parsed arguments hold, the inverse of ``arguments``."""
    given = {name.removeprefix("flash_"): args[name] for name in arguments(None)}
    return FlashOptimConfig(**given, seed=args["seed"])


def _check_type(name: str, value: Any, default: object) -> None:
    """Refuse what no flag could give; names have choices, which say what they are."""
    kinds: dict[type, tuple[type, str]] = {
        bool: (bool, "True or False"),
        int: (Integral, "a whole number"),
        float: (Real, "a number"),
    }
    kind, words = kinds.get(type(default), (object, ""))
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool and words):
        raise ValueError(f"FlashOptimConfig.{name} must be {words}; got {value!r}")


def _check_choice(flag: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        allowed = ", ".join(str(choice) for choice in choices)
        raise ValueError(f"{flag} must be one of {allowed}; got {value!r}")
