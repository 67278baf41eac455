"""What a checkpoint says about the flash state in it, and the checks on load."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_flashoptim.codec.spec import FORMAT_VERSION, GROUP_SIZE
from megatron_flashoptim.optim.config import FlashOptimConfig

# Key in the checkpoint's content metadata and in the optimizer's state dict.
KEY = "flashoptim"

SHARDING_TYPE = "distrib_optim_sharding_type"
SUPPORTED_SHARDING_TYPES = ("dp_reshardable",)


def describe(flash: FlashOptimConfig) -> dict[str, Any]:
    """Return the plain dict that is stored: formats, optimizer and rounding seed."""
    return {
        "version": FORMAT_VERSION,
        "optimizer": flash.optimizer,
        "group_size": GROUP_SIZE,
        "master_bits": flash.master_bits,
        "seed": flash.seed,
    }


def check(saved: dict[str, Any] | None, flash: FlashOptimConfig) -> None:
    """Refuse optimizer state that this run cannot read as it is.

    Raises:
        ValueError: names what the checkpoint holds and what this run wants.
    """
    if saved is None:
        raise ValueError(
            "the checkpoint holds no flash optimizer state (it was written by another optimizer). "
            "Load the weights alone with --no-load-optim --no-load-rng, or --finetune"
        )
    if saved["version"] > FORMAT_VERSION:
        raise ValueError(
            f"the checkpoint has flash format version {saved['version']}, this release reads up "
            f"to {FORMAT_VERSION}; upgrade megatron-flashoptim"
        )
    wanted = describe(flash)
    for name in ("optimizer", "group_size", "master_bits"):
        if saved[name] != wanted[name]:
            raise ValueError(
                f"the checkpoint was saved with {name} {saved[name]}, this run has "
                f"{wanted[name]}; use the same value, or --no-load-optim"
            )


def check_content(
    content: dict[str, Any] | None, flash: FlashOptimConfig, *, is_loading: bool
) -> None:
    """Check the content metadata Megatron passes to ``sharded_state_dict``.

    Raises:
        ValueError: an unsupported sharding type, or state of another optimizer.
    """
    sharding_type = (content or {}).get(SHARDING_TYPE)
    if sharding_type not in SUPPORTED_SHARDING_TYPES:
        raise ValueError(
            f"flash optimizer state cannot be {'loaded from' if is_loading else 'saved in'} the "
            f"sharding type {sharding_type!r}; supported: {', '.join(SUPPORTED_SHARDING_TYPES)}"
        )
    if is_loading:
        check((content or {}).get(KEY), flash)


def with_saved_seed(flash: FlashOptimConfig, saved: dict[str, Any]) -> FlashOptimConfig:
    """Return the configuration with the checkpoint's rounding seed, which a resumed run keeps."""
    return dataclasses.replace(flash, seed=saved["seed"])
