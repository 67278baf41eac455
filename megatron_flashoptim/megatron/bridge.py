"""Megatron-Bridge: an optimizer configuration that makes a recipe train with flash_adamw.

Bridge's ``setup_optimizer`` calls ``provide`` of a configuration that has it instead of Megatron's
factory. What lies before and beside that call is bound by name, as ``install()`` does it for
Megatron's training loop: ``ConfigContainer.validate`` (refuses what the recipe's other parts ask
for), and, once a configuration is finalized, what decides where buckets end, which is asked before
the optimizer is built; ``dist_checkpointing.load``; and Bridge's parameter norm and theoretical
memory figures. All do what they do without the plugin where the recipe has another optimizer.

Imports ``megatron.bridge``, which is an optional package.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

from megatron_flashoptim.codec import spec
from megatron_flashoptim.megatron import hooks, install, support, versions
from megatron_flashoptim.megatron.chained import FlashChainedOptimizer
from megatron_flashoptim.megatron.factory import get_megatron_optimizer
from megatron_flashoptim.optim.config import FlashOptimConfig, RoundingPolicy
from megatron_flashoptim.optim.footprint import TABLE_BYTES, buffer_bytes, flash_state_bytes
from megatron_flashoptim.optim.rules import RULES

try:
    from megatron.bridge.training.config import ConfigContainer, OptimizerConfig
    from megatron.bridge.utils.instantiate_utils import register_allowed_target_prefix
except ImportError as problem:
    raise ImportError(
        "megatron_flashoptim.megatron.bridge needs Megatron-Bridge, which cannot be imported "
        f"({problem}); pip install 'megatron-flashoptim[bridge,te]' installs it and what it needs"
    ) from problem

# A checkpoint's run_config.yaml names the class of the recipe's optimizer configuration.
register_allowed_target_prefix(__name__)

# How precision-aware Adam stores its state, which means nothing to a flash optimizer.
_ADAM_FORMATS = (
    "use_precision_aware_optimizer",
    "store_param_remainders",
    "main_grads_dtype",
    "main_params_dtype",
    "exp_avg_dtype",
    "exp_avg_sq_dtype",
)


@dataclass
class FlashOptimizerConfig(OptimizerConfig):
    """Bridge's ``OptimizerConfig`` for flash optimizers: ``cfg.optimizer`` of a recipe.

    Attributes:
        optimizer: the flash optimizer's name, not Megatron's.
        use_distributed_optimizer: must stay True; Bridge makes the DDP configuration agree.
        flash_master_bits, flash_exp_avg_sq_code, flash_rounding, flash_master_rounding,
            flash_early_param_gather, flash_sgd_nesterov, flash_seed: as the fields of
            ``FlashOptimConfig``. Gradient release, which is built with DDP, is not offered.
    """

    optimizer: str = "flash_adamw"
    use_distributed_optimizer: bool = True
    flash_master_bits: spec.MasterBits = 24
    flash_exp_avg_sq_code: spec.ExpAvgSqCode = "sqrt"
    flash_rounding: RoundingPolicy = "auto"
    flash_master_rounding: spec.Rounding = "nearest"
    flash_early_param_gather: bool = False
    flash_sgd_nesterov: bool = False
    flash_seed: int = 1234

    def __post_init__(self) -> None:
        """Have the recipe's ``validate`` ask ``refuse``; all else waits for ``finalize``."""
        super().__post_init__()
        _bind(_VALIDATE)

    @classmethod
    def from_adam(cls, config: OptimizerConfig, **changes: Any) -> FlashOptimizerConfig:
        """Return a recipe's Adam configuration as one of flash_adamw.

        Learning rate, betas, decay, clipping and the like are taken over; the number formats of
        precision-aware Adam are not.

        Args:
            config: the recipe's own ``cfg.optimizer``.
            **changes: fields to set otherwise.

        Raises:
            ValueError: the recipe trains with another optimizer, whose settings mean other things.
        """
        if config.optimizer != "adam":
            raise ValueError(
                f"the recipe's optimizer is {config.optimizer!r}, and only those of 'adam' mean "
                "the same to flash_adamw; make a FlashOptimizerConfig(lr=..., ...) instead"
            )
        own = {"optimizer", "use_distributed_optimizer", *_ADAM_FORMATS}
        taken = {
            field.name: getattr(config, field.name)
            for field in fields(config)
            if field.init and field.name not in own
        }
        return cls(**(taken | changes))

    def flash(self) -> FlashOptimConfig:
        """Return the rule, formats and rounding.

        Raises:
            ValueError: a value is not allowed; the message names the field and the choices.
        """
        if self.optimizer not in RULES:
            raise ValueError(
                f"optimizer.optimizer of a FlashOptimizerConfig must be one of "
                f"{', '.join(RULES)}; got {self.optimizer!r}. For Megatron's own "
                "optimizers use Bridge's OptimizerConfig"
            )
        given = {
            field.name: getattr(self, f"flash_{field.name}")
            for field in fields(FlashOptimConfig)
            if hasattr(self, f"flash_{field.name}")
        }
        try:
            return FlashOptimConfig(optimizer=self.optimizer, **given)
        except ValueError as problem:
            raise ValueError(_in_fields(str(problem))) from problem

    def finalize(self) -> None:
        """Check all, derive Megatron's fields, and have DDP's shards be whole groups from now on.

        Raises:
            ValueError: an option that flash optimizers do not support.
            ImportError: Megatron or Bridge lacks a name that is needed.
        """
        flash = self.flash()
        self._refuse([("optimizer", self)])
        super().finalize()
        # Before anything is bound, and the model is built between here and ``provide``. For good,
        # since an in-process restart builds a second model without finalizing again.
        versions.check((binding.module, binding.path) for binding in _AROUND)
        hooks.select(flash)
        module, path = versions.layout_name()
        _bind(install.Binding(module, path, install.wrap_layout, static="." in path), *_AROUND)

    def refuse(self, container: ConfigContainer) -> None:
        """Refuse what the other parts of a recipe ask for.

        Args:
            container: the recipe that this is the optimizer configuration of.

        Raises:
            ValueError: names the part's field, its value, and says what to do.
        """
        flash = self.flash()
        self._refuse(_parts(container))
        transformer = getattr(container.model, "transformer", container.model)
        options = SimpleNamespace(
            # Bridge lets either stand for both.
            overlap_param_gather=container.ddp.overlap_param_gather or self.overlap_param_gather,
            overlap_param_gather_with_optimizer_step=self.overlap_param_gather_with_optimizer_step,
            optimizer_cuda_graph=self.optimizer_cuda_graph,
            cuda_graph_impl=getattr(transformer, "cuda_graph_impl", None),
        )
        refusal = None
        if flash.early_param_gather:
            refusal = support.early_gather_refusal(options)
        if refusal is None and container.ddp.fp8_param_gather:
            refusal = support.quantized_refusal(
                SimpleNamespace(
                    fp8_recipe=getattr(transformer, "fp8_recipe", None),
                    optimizer_cuda_graph=self.optimizer_cuda_graph,
                    flash_early_param_gather=flash.early_param_gather,
                    flash_gradient_release=flash.gradient_release,
                ),
            )
        if refusal is not None:
            raise ValueError(_in_fields(refusal))

    def _refuse(self, parts: list[tuple[str, Any]]) -> None:
        refusal = support.refusal_of_the_rule(self.optimizer, self)
        if refusal is not None:
            raise ValueError(f"{self.optimizer} cannot be used with {refusal}")
        with_graph = support.REFUSED_WITH_CUDA_GRAPH if self.optimizer_cuda_graph else ()
        table = (*support.REFUSED, *with_graph)
        for name, part in parts:
            # The optimizer's decides, and Bridge gives it to DDP.
            mine = [o for o in table if part is self or o.field != "use_distributed_optimizer"]
            option = support.first_refused(part, mine)
            if option is not None:
                beside = " and optimizer_cuda_graph" if option in with_graph else ""
                raise ValueError(
                    f"{self.optimizer}{beside} cannot be used with "
                    f"{name}.{option.field}={getattr(part, option.field)!r} ({option.flag}): "
                    f"{option.reason}"
                )

    def provide(
        self,
        model_chunks: Any,
        config_overrides: Any = None,
        use_gloo_process_groups: bool = True,
        pg_collection: Any = None,
    ) -> FlashChainedOptimizer:
        """Build the optimizer; called by Bridge's ``setup_optimizer``, with its arguments.

        Raises:
            ValueError: an option that flash optimizers do not support, or a model that was wrapped
                in DDP before ``finalize``.
        """
        chunks = model_chunks if isinstance(model_chunks, list) else [model_chunks]
        config = copy.copy(self)
        config.optimizer = "adam"
        return get_megatron_optimizer(
            config,
            chunks,
            flash=self.flash(),
            config_overrides=config_overrides,
            use_gloo_process_groups=use_gloo_process_groups,
            pg_collection=pg_collection,
        )


def _in_fields(message: str) -> str:
    """Return a message with the recipe's fields in place of this plugin's flags."""
    return re.sub(
        r"--flash-([a-z-]+)", lambda flag: f"optimizer.flash_{flag[1].replace('-', '_')}", message
    )


def _parts(container: ConfigContainer) -> list[tuple[str, Any]]:
    """Return the parts of a recipe that a flash optimizer depends on, by name."""
    names = ("optimizer", "ddp", "dist", "model", "checkpoint", "scheduler", "logger")
    parts = [(name, getattr(container, name)) for name in names]
    if hasattr(container.model, "transformer"):
        parts.append(("model.transformer", container.model.transformer))
    return parts


def _wrap_validate(original: Callable[..., Any]) -> Callable[..., Any]:
    def validate(self: ConfigContainer, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.optimizer, FlashOptimizerConfig):
            self.optimizer.refuse(self)
        else:  # or its model would be laid out for an earlier recipe's flash optimizer
            hooks.select(None)
        return original(self, *args, **kwargs)

    return validate


def _wrap_bytes_per_parameter(original: Callable[..., Any]) -> Callable[..., Any]:
    def bytes_per_parameter(config: ConfigContainer, optimizer_shard_size: int) -> float:
        optimizer = config.optimizer
        if not isinstance(optimizer, FlashOptimizerConfig):
            return float(original(config, optimizer_shard_size))
        weight, grad = buffer_bytes(optimizer.bf16, config.ddp.grad_reduce_in_fp32)
        state = flash_state_bytes(optimizer.flash().rule, optimizer.flash_master_bits, weight)
        return weight + grad + (state + TABLE_BYTES) / max(1, optimizer_shard_size)

    return bytes_per_parameter


_VALIDATE = install.Binding(
    "megatron.bridge.training.config", "ConfigContainer.validate", _wrap_validate
)
_AROUND = (
    install.Binding("megatron.core.dist_checkpointing", "load", install.wrap_load),
    install.Binding(
        "megatron.core.dist_checkpointing", "load_common_state_dict", install.wrap_load_common
    ),
    install.Binding(
        "megatron.bridge.training.train", "calc_params_l2_norm", install.wrap_params_norm
    ),
    install.Binding(
        "megatron.bridge.training.utils.theoretical_memory_utils",
        "_bytes_per_parameter",
        _wrap_bytes_per_parameter,
    ),
)


def _bind(*bindings: install.Binding) -> None:
    for binding in bindings:
        binding.apply(binding.owner())
