"""Megatron-Bridge: an optimizer configuration whose ``provide`` builds a flash optimizer.

Bridge's ``setup_optimizer`` calls ``provide`` of a configuration that has it instead of Megatron's
factory. By then DDP has laid out its buffers, so that whole quantization groups per shard must be
asked for before: ``finalize``, which Bridge calls before it builds the model, does that, and
``provide`` ends it. Imports ``megatron.bridge``, which is an optional package.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron.bridge.training.config import OptimizerConfig

from megatron_flashoptim.codec import spec
from megatron_flashoptim.megatron.chained import FlashChainedOptimizer
from megatron_flashoptim.megatron.factory import get_megatron_optimizer
from megatron_flashoptim.megatron.layout import group_aligned_buffers
from megatron_flashoptim.megatron.support import first_refusal
from megatron_flashoptim.optim.config import FlashOptimConfig, RoundingPolicy

# Open between ``finalize`` and ``provide``; of the process, as the name it binds.
_layout = contextlib.ExitStack()
_open = False


@dataclass
class FlashOptimizerConfig(OptimizerConfig):  # type: ignore[misc]
    """Bridge's ``OptimizerConfig`` for flash_adamw; ``optimizer`` stays "adam".

    Attributes:
        flash_master_bits, flash_exp_avg_sq_code, flash_rounding, flash_master_rounding, flash_seed:
            as the fields of ``FlashOptimConfig``.
    """

    flash_master_bits: spec.MasterBits = 24
    flash_exp_avg_sq_code: spec.ExpAvgSqCode = "sqrt"
    flash_rounding: RoundingPolicy = "auto"
    flash_master_rounding: spec.Rounding = "nearest"
    flash_seed: int = 1234

    def flash(self) -> FlashOptimConfig:
        """Return formats and rounding.

        Raises:
            ValueError: a value is not allowed; the message names the choices.
        """
        return FlashOptimConfig(
            master_bits=self.flash_master_bits,
            exp_avg_sq_code=self.flash_exp_avg_sq_code,
            rounding=self.flash_rounding,
            master_rounding=self.flash_master_rounding,
            seed=self.flash_seed,
        )

    def finalize(self) -> None:
        """Derive Megatron's fields, check all, and have DDP's shards be whole groups from now on.

        Raises:
            ValueError: an option that flash optimizers do not support.
        """
        super().finalize()
        self.flash()
        refusal = first_refusal("flash_adamw", self)
        if refusal is not None:
            raise ValueError(refusal)
        _align()

    def provide(
        self,
        model_chunks: Any,
        config_overrides: Any = None,
        use_gloo_process_groups: bool = True,
        pg_collection: Any = None,
    ) -> FlashChainedOptimizer:
        """Build the optimizer; arguments are those of Bridge's ``setup_optimizer``.

        Raises:
            ValueError: an option that flash optimizers do not support, or a model that was wrapped
                in DDP before ``finalize``.
        """
        chunks = model_chunks if isinstance(model_chunks, list) else [model_chunks]
        with _until_built():
            return get_megatron_optimizer(
                self,
                chunks,
                flash=self.flash(),
                config_overrides=config_overrides,
                use_gloo_process_groups=use_gloo_process_groups,
                pg_collection=pg_collection,
            )


def _align() -> None:
    global _open
    if not _open:
        _layout.enter_context(group_aligned_buffers())
        _open = True


@contextlib.contextmanager
def _until_built() -> Iterator[None]:
    global _open
    try:
        yield
    finally:
        _layout.close()
        _open = False
