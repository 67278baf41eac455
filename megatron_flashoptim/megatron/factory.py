"""Build flash optimizers through Megatron's own ``get_megatron_optimizer``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import megatron.core.optimizer
from megatron.core.optimizer import OptimizerConfig
from megatron.core.utils import log_single_rank

from megatron_flashoptim.megatron import install
from megatron_flashoptim.megatron.chained import FlashChainedOptimizer
from megatron_flashoptim.megatron.distrib_optimizer import FlashDistributedOptimizer
from megatron_flashoptim.megatron.first_save import check_first_save
from megatron_flashoptim.megatron.release.support import check_release
from megatron_flashoptim.megatron.run_folders import check_run_folders
from megatron_flashoptim.megatron.support import check_configs
from megatron_flashoptim.optim import FlashOptimConfig

logger = logging.getLogger(__name__)


def get_megatron_optimizer(
    config: OptimizerConfig,
    model_chunks: list[Any],
    *args: Any,
    flash: FlashOptimConfig | None = None,
    **kwargs: Any,
) -> FlashChainedOptimizer:
    """Build the optimizer of a model, as ``megatron.core.optimizer.get_megatron_optimizer`` does.

    Args:
        config: Megatron's optimizer configuration with ``optimizer="adam"`` and
            ``use_distributed_optimizer=True``.
        model_chunks: model chunks wrapped in DistributedDataParallel.
        *args: further arguments of Megatron's function, passed on as ``**kwargs`` are.
        flash: update rule, formats and rounding; the defaults of ``FlashOptimConfig`` if None.

    Raises:
        ValueError: an option that flash optimizers do not support, or, in Megatron's training
            loop, folders or a model that it could not load from or save as its arguments say.
        RuntimeError: Megatron built something else than flash optimizers.
    """
    # A Megatron with one of patches/ has the configuration in its own.
    flash = flash or getattr(config, "flash", None) or FlashOptimConfig()
    check_configs(config, model_chunks, flash)
    check_release(config, model_chunks, flash)
    with _distributed_optimizer_bound_to(flash):
        built = megatron.core.optimizer.get_megatron_optimizer(
            config, model_chunks, *args, **kwargs
        )
    if isinstance(built, FlashChainedOptimizer):
        return built
    return chain(getattr(built, "chained_optimizers", [built]))


def chain(optimizers: list[Any]) -> FlashChainedOptimizer:
    """Return the chain of flash optimizers, told of in the log.

    Raises:
        RuntimeError: a member is something else than a flash optimizer.
        ValueError: Megatron's training loop runs and could not save, or not load what it should.
    """
    chained = FlashChainedOptimizer(optimizers)
    install.SCHEDULE.apply(install.SCHEDULE.owner())
    log_single_rank(logger, logging.INFO, chained.describe())
    unlike = optimizers[0].flash.rule.unlike(optimizers[0].config)
    if unlike:
        log_single_rank(logger, logging.INFO, unlike)
    check_run_folders()
    check_first_save(chained)
    return chained


def bound_to(flash: FlashOptimConfig) -> type[FlashDistributedOptimizer]:
    """Return a class that is built with the arguments of Megatron's ``DistributedOptimizer``."""

    class BoundFlashDistributedOptimizer(FlashDistributedOptimizer):
        """Takes Megatron's arguments only; a class, since Megatron may ask ``isinstance``."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, flash=flash, **kwargs)

    return BoundFlashDistributedOptimizer


@contextmanager
def _distributed_optimizer_bound_to(flash: FlashOptimConfig) -> Iterator[None]:
    """Let Megatron's factory find our class under the name it looks up."""
    module = megatron.core.optimizer
    original = module.DistributedOptimizer
    module.DistributedOptimizer = bound_to(flash)
    try:
        yield
    finally:
        module.DistributedOptimizer = original
