"""What a checkpoint says about the flash state in it, and the checks on load."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from megatron_flashoptim.checkpoint.bucket_space import BucketSpace
from megatron_flashoptim.codec.spec import FORMAT_VERSION, GROUP_SIZE
from megatron_flashoptim.optim.config import FlashOptimConfig

# Key in the checkpoint's content metadata and in the optimizer's state dict.
KEY = "flashoptim"

SHARDING_TYPE = "distrib_optim_sharding_type"
SUPPORTED_SHARDING_TYPES = ("dp_reshardable",)
ONLY_BUCKET_SPACE = (
    "flash optimizer state is saved and loaded through torch_dist checkpoints in dp_reshardable "
    "only; use --ckpt-format torch_dist, Megatron's default"
)


def describe(flash: FlashOptimConfig, spaces: Sequence[BucketSpace] = ()) -> dict[str, Any]:
    """Return the plain dict that is stored: formats, optimizer, rounding seed and buckets.

    Args:
        flash: the configuration in force.
        spaces: bucket spaces of the chained optimizers on this rank; their layout is what
            ``dp_reshardable`` depends on. Global rank 0's are stored.
    """
    description: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "optimizer": flash.optimizer,
        "group_size": GROUP_SIZE,
        "master_bits": flash.master_bits,
        "exp_avg_sq_code": flash.exp_avg_sq_code,
        "seed": flash.seed,
    }
    if spaces:
        description["buckets"] = [space.layout() for space in spaces]
    return description


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
    for name in ("optimizer", "group_size", "master_bits", "exp_avg_sq_code"):
        if saved[name] != wanted[name]:
            raise ValueError(
                f"the checkpoint was saved with {name} {saved[name]}, this run has "
                f"{wanted[name]}; use the same value, or --no-load-optim"
            )


def check_sharding_type(content: dict[str, Any] | None) -> None:
    """Refuse a sharding type that flash state is not mapped to.

    Raises:
        ValueError: names the type and the supported ones.
    """
    sharding_type = (content or {}).get(SHARDING_TYPE)
    if sharding_type not in SUPPORTED_SHARDING_TYPES:
        raise ValueError(
            f"flash optimizer state cannot be saved in or loaded from the sharding type "
            f"{sharding_type!r}; supported: {', '.join(SUPPORTED_SHARDING_TYPES)}"
        )


def check_buckets(saved: dict[str, Any], spaces: Sequence[BucketSpace]) -> None:
    """Refuse a checkpoint whose buckets are cut otherwise than this run's.

    Raises:
        ValueError: names both layouts and the options they depend on.
    """
    if any(space.dp_group_index != 0 for space in spaces):
        return  # the checkpoint describes the buckets of the first model-parallel rank
    layout = [space.layout() for space in spaces]
    if saved["buckets"] != layout:
        raise ValueError(
            f"the checkpoint was saved with buckets of {saved['buckets']} elements, this run has "
            f"{layout}: dp_reshardable needs the tensor, pipeline and expert parallel sizes, "
            "--overlap-grad-reduce and --ddp-bucket-size of the run that saved it (by default the "
            "bucket size grows with data-parallel sizes above 40; give the saved run's)"
        )


def with_saved_seed(flash: FlashOptimConfig, saved: dict[str, Any]) -> FlashOptimConfig:
    """Return the configuration with the checkpoint's rounding seed, which a resumed run keeps."""
    return dataclasses.replace(flash, seed=saved["seed"])
