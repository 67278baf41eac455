"""Update rules, one file each. A new rule is a file like these and a line in ``RULES``."""

from __future__ import annotations

import importlib

from megatron_flashoptim.optim.rules.rule import EXP_AVG, EXP_AVG_SQ, Rule

__all__ = ["EXP_AVG", "EXP_AVG_SQ", "RULES", "Rule", "rule_of"]

# Value of --optimizer, and the module whose RULE it is. Modules are imported when a rule is used:
# they need Triton, which decides how its functions run when it is imported.
RULES: dict[str, str] = {
    "flash_adamw": "megatron_flashoptim.optim.rules.adamw",
    "flash_adam": "megatron_flashoptim.optim.rules.adam",
    "flash_lion": "megatron_flashoptim.optim.rules.lion",
    "flash_sgd": "megatron_flashoptim.optim.rules.sgd",
}


def rule_of(name: str) -> Rule:
    """Return the rule of a value of ``--optimizer``.

    Raises:
        ValueError: there is none of that name, or it has another name where it is defined.
    """
    if name not in RULES:
        raise ValueError(f"--optimizer must be one of {', '.join(RULES)}; got {name!r}")
    rule: Rule = importlib.import_module(RULES[name]).RULE
    if rule.name != name:
        raise ValueError(
            f"{RULES[name]} is registered as {name}, and its rule's name is {rule.name}"
        )
    return rule
