"""Command-line arguments: the optimizer choice, the ``--flash-*`` flags and their checks.

``--optimizer flash_adamw``, as the other rules, is stored as ``optimizer="adam"`` plus
``flash_optimizer``: Megatron's own validation knows Adam, and would turn the distributed optimizer
off for other names.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from megatron_flashoptim.codec import spec
from megatron_flashoptim.megatron.release.support import refusal as release_refusal
from megatron_flashoptim.megatron.support import (
    early_gather_refusal,
    first_refusal,
    quantized_refusal,
    rl_offload_refusal,
)
from megatron_flashoptim.optim.config import (
    ROUNDING_POLICIES,
    FlashOptimConfig,
    config_of,
    fields_refusal,
)
from megatron_flashoptim.optim.rules import RULES

# Namespace attribute that holds the flash optimizer's name, or None.
FIELD = "flash_optimizer"

# Megatron's name for every rule, for its own config and its arguments.
_MEGATRON_OPTIMIZER = "adam"

_FLAGS: dict[str, dict[str, Any]] = {
    "--flash-master-bits": {
        "type": int,
        "choices": spec.MASTER_BITS,
        "help": "Bits of the master weight: bf16 weight plus an int8 (24) or int16 (32) "
        "correction, or none (16, with --flash-master-rounding stochastic). Default 24.",
    },
    "--flash-exp-avg-sq-code": {
        "choices": spec.EXP_AVG_SQ_CODES,
        "help": "Code of the second moment (flash_adamw, flash_adam): sqrt is the paper's, "
        "fourth_root keeps small elements more exactly. Default sqrt.",
    },
    "--flash-rounding": {
        "choices": ROUNDING_POLICIES,
        "help": "Rounding of the second moment (flash_adamw, flash_adam); auto takes stochastic "
        "where nearest would stall at --adam-beta2. Default auto.",
    },
    "--flash-master-rounding": {
        "choices": spec.ROUNDINGS,
        "help": "Rounding of the master weight. Default nearest.",
    },
    "--flash-early-param-gather": {
        "action": "store_true",
        "help": "With --overlap-param-gather, start the all-gather of a bucket as soon as it is "
        "stepped, in the order of the next forward pass, not in that pass.",
    },
    "--flash-sgd-nesterov": {
        "action": "store_true",
        "help": "With --optimizer flash_sgd, take Nesterov's steps.",
    },
    "--flash-gradient-release": {
        "action": "store_true",
        "help": "With --overlap-grad-reduce, step a bucket in the backward pass once its "
        "gradients are reduced, and use their memory for the next. One micro-batch, --clip-grad 0.",
    },
    "--flash-release-slots": {
        "type": int,
        "help": "With --flash-gradient-release, how many buckets the memory for gradients is for; "
        "it grows where more are open at the same time. Default 3.",
    },
    "--flash-accept-partial-step": {
        "action": "store_true",
        "help": "With --flash-gradient-release, go on after a backward pass that failed when some "
        "buckets were stepped; the others miss one update.",
    },
    "--flash-bucket-clip-grad": {
        "type": float,
        "help": "Clip the gradients of each bucket to this norm, with or without gradient release; "
        "needs --clip-grad 0. Default: no clipping by bucket.",
    },
}

# Of any optimizer; Megatron 0.19 has the field in OptimizerConfig, and no flag.
L2 = "--no-decoupled-weight-decay"
# Of any optimizer; Megatron has the report, and no flag to have it before memory runs out.
REPORT = "--report-theoretical-memory"


def add_flash_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the optimizer choices and flags to Megatron's parser, and check them after parsing.

    What is wrong with them is one line without Megatron's usage, and exit code 2.

    Raises:
        RuntimeError: the parser has no ``--optimizer`` with choices.
    """
    action = parser._option_string_actions.get("--optimizer")
    if action is None or action.choices is None:
        raise RuntimeError("Megatron's parser has no --optimizer with choices to extend")
    action.choices = [*action.choices, *RULES]
    group = parser.add_argument_group(
        title="flashoptim",
        description=f"Flags of --optimizer {', '.join(RULES)}, beside Megatron's own "
        "--weight-decay, --adam-*, --lion-* and --sgd-momentum.",
    )
    for flag, options in _FLAGS.items():
        group.add_argument(flag, default=None, **options)
    if L2 not in parser._option_string_actions:
        group.add_argument(
            L2,
            action="store_false",
            dest="decoupled_weight_decay",
            help="Make weight decay a part of the gradient (L2), with flash_sgd or Megatron's "
            "Adam; flash_adam does it by itself.",
        )
    if REPORT not in parser._option_string_actions:
        group.add_argument(
            REPORT,
            action="store_true",
            help="Print Megatron's theoretical memory figures once the optimizer is built, before "
            "the first iteration, whatever the optimizer. After it Megatron prints them by itself.",
        )
    parse_known_args, with_usage = parser.parse_known_args, parser.error

    def refuse(message: str) -> NoReturn:
        # Megatron's usage is hundreds of lines, printed by every rank.
        parser.exit(2, f"{parser.prog}: error: {message}\n")

    def parse_and_check(*args: Any, **kwargs: Any) -> Any:
        namespace, rest = parse_known_args(*args, **kwargs)
        _select(refuse, namespace)
        return namespace, rest

    def error(message: str) -> NoReturn:
        # argparse's own messages name the flag and what was given: --flash-..., flash_....
        (refuse if "flash" in message else with_usage)(message)

    # Of this parser alone; parse_args calls them.
    parser.parse_known_args = parse_and_check  # type: ignore[method-assign]  # replaced on purpose
    parser.error = error  # type: ignore[method-assign]  # likewise
    return parser


def _select(error: Callable[[str], Any], namespace: argparse.Namespace) -> None:
    """Replace a flash optimizer's name by Megatron's and check the options beside it."""
    given = {flag: getattr(namespace, _dest(flag)) for flag in _FLAGS}
    name = namespace.optimizer
    setattr(namespace, FIELD, None)
    if name not in RULES:
        flags = [flag for flag, value in given.items() if value is not None]
        if flags:
            error(
                f"{', '.join(flags)} given with --optimizer {name}; these flags belong to "
                f"--optimizer {', '.join(RULES)}"
            )
        return
    refusal = first_refusal(name, namespace)
    if refusal is not None:
        error(refusal)
    fields = {
        _dest(flag).removeprefix("flash_"): value
        for flag, value in given.items()
        if value is not None
    }
    refusal = fields_refusal(name, fields)
    if refusal is not None:
        error(refusal)
    try:
        config = FlashOptimConfig(optimizer=name, seed=namespace.seed, **fields)
        config.rule.options(namespace, config)
    except ValueError as problem:
        error(str(problem))
    for given_too, refusal_beside in (
        (config.early_param_gather, early_gather_refusal),
        (getattr(namespace, "fp8_param_gather", False), quantized_refusal),
        (
            getattr(namespace, "rl_offload_optimizer_during_inference", False),
            rl_offload_refusal,
        ),
    ):
        refusal = refusal_beside(namespace) if given_too else None
        if refusal is not None:
            error(refusal)
    refusal = release_refusal(config, namespace)
    if refusal is not None:
        error(refusal)
    for flag in _FLAGS:
        setattr(namespace, _dest(flag), getattr(config, _dest(flag).removeprefix("flash_")))
    setattr(namespace, FIELD, name)
    namespace.optimizer = _MEGATRON_OPTIMIZER


def config_from_args(args: argparse.Namespace) -> FlashOptimConfig | None:
    """Return the flash configuration of parsed arguments, or None for other optimizers."""
    return None if getattr(args, FIELD, None) is None else config_of(vars(args))


def _dest(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")
