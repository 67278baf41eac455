"""What a Megatron-LM with one of ``patches/`` applied calls; it knows nothing else of this package.

Where Megatron is as released, ``install()`` makes the same calls from outside. Megatron is imported
when a function here is called, since its modules import this one.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_flashoptim.codec.spec import GROUP_SIZE
from megatron_flashoptim.megatron import arguments, versions
from megatron_flashoptim.megatron.arguments import config_from_args
from megatron_flashoptim.megatron.params_norm import norms_for_main_params
from megatron_flashoptim.megatron.training_args import training_args
from megatron_flashoptim.optim.config import FlashOptimConfig

__all__ = [
    "SHARD_ALIGNMENT",
    "add_flash_arguments",
    "before_load",
    "chained_optimizer",
    "config_from_args",
    "distributed_optimizer_class",
    "norms_for_main_params",
    "selected",
    "weight_and_optimizer_bytes",
    "wrap_load_common",
]

# For ``DistributedDataParallelConfig.shard_alignment``: no group is shared by two shards.
SHARD_ALIGNMENT = GROUP_SIZE


# The configuration of a Megatron-Bridge recipe, which has no arguments.
_of_recipe: FlashOptimConfig | None = None


def select(flash: FlashOptimConfig | None) -> None:
    """Have ``selected`` return a configuration that is not in Megatron's arguments."""
    global _of_recipe
    _of_recipe = flash


def plain_adam(flash: FlashOptimConfig) -> str:
    """Return what is wrong where plain Adam would be built in place of a flash optimizer."""
    return (
        f"--optimizer {flash.optimizer} was given, but plain Adam in Megatron's own "
        "DistributedOptimizer is being built. Build the optimizer with "
        "megatron_flashoptim.get_megatron_optimizer(config, model_chunks, ...)"
    )


def add_flash_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the optimizer choices and flags to Megatron's parser, and check them after parsing.

    Args:
        parser: may have choices ``flash_*`` already, for where this package is not installed; they
            are replaced by those that it has.
    """
    action = parser._option_string_actions["--optimizer"]
    action.choices = [name for name in action.choices or () if not name.startswith("flash_")]
    return arguments.add_flash_arguments(parser)


def selected() -> FlashOptimConfig | None:
    """Return the flash configuration of this process's recipe or arguments, or None."""
    if _of_recipe is not None:
        return _of_recipe
    args = training_args()
    return None if args is None else config_from_args(args)


def distributed_optimizer_class(config: Any, stock: type[Any]) -> type[Any]:
    """Return the class of the distributed optimizer to build.

    Args:
        config: Megatron's ``OptimizerConfig``; its ``flash`` decides.
        stock: Megatron's ``DistributedOptimizer``, or one that stands in for it.

    Raises:
        RuntimeError: plain Adam would be built where a flash optimizer was asked for.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    # Otherwise megatron_flashoptim.get_megatron_optimizer is building.
    is_megatrons = stock is DistributedOptimizer
    if not is_megatrons:
        return stock
    if config.flash is not None:
        bound: type[Any] = _factory().bound_to(config.flash)
        return bound
    flash = selected()
    if flash is not None:
        raise RuntimeError(plain_adam(flash))
    return stock


def chained_optimizer(optimizers: list[Any]) -> Any:
    """Return the chain of flash optimizers, told of in the log.

    Raises:
        RuntimeError: a member is something else than a flash optimizer.
    """
    return _factory().chain(optimizers)


def _factory() -> Any:
    """Return the module that builds optimizers; what it imports is looked for first."""
    versions.check()
    from megatron_flashoptim.megatron import factory

    return factory


def before_load(sharded_state_dict: Any, checkpoint_dir: str) -> None:
    """Check a ``torch_dist`` checkpoint's files, and tell the state dict where they are.

    Warns where it has other rows of the vocabulary.

    Args:
        sharded_state_dict: as given to ``dist_checkpointing.load`` next.
        checkpoint_dir: folder of one iteration.

    Raises:
        ValueError: names the files that are missing or too short.
    """
    from megatron_flashoptim.checkpoint.damage import check_files_together
    from megatron_flashoptim.checkpoint.loading import tell_folder, warn_of_other_rows

    check_files_together(checkpoint_dir, partial(warn_of_other_rows, sharded_state_dict))
    tell_folder(sharded_state_dict, checkpoint_dir)


def wrap_load_common(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``dist_checkpointing.load_common_state_dict`` that names damaged files.

    From 0.19 on the common state is in the first rank's file, and read before anything else.
    """
    from megatron_flashoptim.checkpoint.folder import told_of_damage

    def load_common_state_dict(checkpoint_dir: Any) -> Any:
        with told_of_damage(str(checkpoint_dir)):
            return original(checkpoint_dir)

    return load_common_state_dict


def weight_and_optimizer_bytes(
    adam_bytes: Callable[..., float], args: Any, verbose: bool = False
) -> float:
    """Return bytes of weights, gradients and optimizer on the most loaded rank.

    Args:
        adam_bytes: Megatron's ``compute_weight_and_optimizer_memory``.
        args: Megatron's arguments, validated, with a flash optimizer.
        verbose: let Megatron print the numbers of parameters.
    """
    from megatron_flashoptim.megatron.memory import theoretical_memory

    flash = config_from_args(args)
    assert flash is not None
    # Or Megatron's function would come back here.
    adam = copy.copy(args)
    setattr(adam, arguments.FIELD, None)
    return theoretical_memory.weight_and_optimizer_bytes(adam_bytes, adam, flash, verbose)
