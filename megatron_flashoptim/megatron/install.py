"""install() and uninstall(): every name of Megatron that the plugin binds, in one place.

Bound are ``add_megatron_arguments`` (choices and flags), the training loop's
``get_megatron_optimizer``, what decides where buckets end (shards of whole quantization groups),
``DistributedOptimizer.__init__`` (refuses to be plain Adam where a flash optimizer was asked for),
``_ParamAndGradBuffer.__init__`` (allocates no gradients with ``--flash-gradient-release``),
``dist_checkpointing.load`` and ``load_common_state_dict`` (name damaged files), the training loop's
``calc_params_l2_norm`` (sums in fp32) and the bytes in Megatron's theoretical memory figures. All
do what Megatron does unless ``--optimizer`` names a flash optimizer;
``--report-theoretical-memory`` prints those figures for any optimizer. ``DistributedOptimizer`` in
``megatron.core.optimizer`` is bound too, but only while a flash optimizer is being built
(``megatron.factory``).

A Megatron with one of ``patches/`` applied makes the same calls itself; there only gradient buffers
are bound, for ``--flash-gradient-release``.

Where a chain of flash optimizers is built, with or without ``install()``, the scheduler's
``load_state_dict`` is bound too (learning rates of a checkpoint or of the run, in every param
group), and stays so.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_flashoptim.megatron import hooks, versions
from megatron_flashoptim.megatron.hooks import before_load, plain_adam, selected

logger = logging.getLogger(__name__)

# What we have bound, by module and path. By identity: functools.wraps gives the attributes of our
# wrapper to whoever wraps it.
_bound: dict[tuple[str, str], Callable[..., Any]] = {}


@dataclass(frozen=True)
class Binding:
    """One name of Megatron and what wraps it.

    Attributes:
        module: module that holds the name.
        path: attribute path in the module.
        wrap: makes the replacement from the original.
        static: the name is a static method of a class.
    """

    module: str
    path: str
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    static: bool = False

    def owner(self) -> Any:
        """Return the object that holds the name.

        Raises:
            ImportError: names the installed megatron-core and what it lacks.
        """
        return versions.find(self.module, self.path)

    @property
    def attribute(self) -> str:
        """Last part of the path."""
        return self.path.split(".")[-1]

    def apply(self, owner: Any) -> None:
        """Bind the wrapper, once, also where somebody has wrapped it since."""
        original = getattr(owner, self.attribute)
        ours = _bound.get((self.module, self.path))
        if ours is not None and original is not _original(ours):
            return
        # The attributes of a class are no attributes of the function that stands in for it.
        updated = () if isinstance(original, type) else functools.WRAPPER_UPDATES
        wrapper = functools.wraps(original, updated=updated)(self.wrap(original))
        setattr(owner, self.attribute, staticmethod(wrapper) if self.static else wrapper)
        _bound[self.module, self.path] = wrapper

    def undo(self, owner: Any) -> None:
        """Bind the original again, if ours is bound; leave what somebody bound on top of it."""
        ours = _bound.get((self.module, self.path))
        if ours is None:
            return
        bound = getattr(owner, self.attribute)
        original = _original(ours)
        if bound is not ours and bound is not original:
            logger.warning(
                "uninstall() leaves %s.%s as it is, since %s was bound on top of "
                "megatron-flashoptim's; undo that, and call uninstall() again",
                self.module,
                self.path,
                _described(bound),
            )
            return
        setattr(owner, self.attribute, staticmethod(original) if self.static else original)
        del _bound[self.module, self.path]


def _original(wrapper: Any) -> Any:
    return wrapper.__wrapped__


def _described(bound: Any) -> str:
    """Return which code an object runs; functools.wraps gives a wrapper the name of another."""
    code = getattr(bound, "__code__", None)
    if code is None:
        return repr(bound)
    return f"{code.co_qualname} ({code.co_filename}:{code.co_firstlineno})"


def _wrap_arguments(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_megatron_arguments(parser: Any) -> Any:
        from megatron_flashoptim.megatron.arguments import add_flash_arguments

        return add_flash_arguments(original(parser))

    return add_megatron_arguments


def _wrap_optimizer(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_megatron_optimizer(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import global_vars

        flash = selected()
        if flash is None:
            built = original(*args, **kwargs)
        else:
            from megatron_flashoptim.megatron import factory

            built = factory.get_megatron_optimizer(*args, flash=flash, **kwargs)
        if getattr(global_vars._GLOBAL_ARGS, "report_theoretical_memory", False):
            from megatron_flashoptim.megatron.memory.theoretical_memory import (
                report_before_training,
            )

            report_before_training(global_vars._GLOBAL_ARGS)
        return built

    return get_megatron_optimizer


def _wrap_init(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        from megatron_flashoptim.megatron.distrib_optimizer import FlashDistributedOptimizer

        flash = None if isinstance(self, FlashDistributedOptimizer) else selected()
        if flash is not None:
            raise RuntimeError(plain_adam(flash))
        original(self, *args, **kwargs)

    return __init__


def wrap_layout(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return what lays buffers out, for a flash optimizer in whole quantization groups."""
    from megatron_flashoptim.megatron import layout

    return layout.wrap_layout(original, lambda: selected() is not None)


def _wrap_buffer(original: Callable[..., Any]) -> Callable[..., Any]:
    from megatron_flashoptim.megatron.release.buffers import wrap_buffer_init

    def applies() -> bool:
        flash = selected()
        return flash is not None and flash.gradient_release

    return wrap_buffer_init(original, applies)


def wrap_params_norm(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return what takes the norm of a flash optimizer's masters where they are."""

    def calc_params_l2_norm(model: Any, *args: Any, **kwargs: Any) -> Any:
        if selected() is None:
            return original(model, *args, **kwargs)
        from megatron_flashoptim.megatron.params_norm import norms_for_main_params

        with norms_for_main_params(model):
            return original(model, *args, **kwargs)

    return calc_params_l2_norm


def wrap_load(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return what loads a checkpoint, and for a flash optimizer looks at its files before.

    For others it says what a checkpoint of flash state is, once it could not be loaded.
    """

    def load(sharded_state_dict: Any, checkpoint_dir: str, *args: Any, **kwargs: Any) -> Any:
        from megatron_flashoptim.checkpoint.loading import tell_folder
        from megatron_flashoptim.checkpoint.other_optimizer import told_of_flash_state

        if selected() is not None:
            before_load(sharded_state_dict, checkpoint_dir)
        else:
            tell_folder(sharded_state_dict, checkpoint_dir)
        with told_of_flash_state(sharded_state_dict, checkpoint_dir):
            return original(sharded_state_dict, checkpoint_dir, *args, **kwargs)

    return load


def wrap_load_common(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``dist_checkpointing.load_common_state_dict`` that names damaged files."""
    named = hooks.wrap_load_common(original)

    def load_common_state_dict(checkpoint_dir: Any) -> Any:
        return (original if selected() is None else named)(checkpoint_dir)

    return load_common_state_dict


def _wrap_schedule(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_state_dict(self: Any, state_dict: Any) -> None:
        if settle := getattr(self.optimizer, "settle_schedule", None):
            settle(
                override=self.override_opt_param_scheduler,
                use_checkpoint=self.use_checkpoint_opt_param_scheduler,
            )
        original(self, state_dict)

    return load_state_dict


def _wrap_theoretical_memory(original: Callable[..., Any]) -> Callable[..., Any]:
    def compute_weight_and_optimizer_memory(args: Any, verbose: bool = False) -> Any:
        from megatron_flashoptim.megatron.arguments import config_from_args

        flash = config_from_args(args)
        if flash is None:
            return original(args, verbose=verbose)
        from megatron_flashoptim.megatron.memory.theoretical_memory import (
            weight_and_optimizer_bytes,
        )

        return weight_and_optimizer_bytes(original, args, flash, verbose)

    return compute_weight_and_optimizer_memory


# Wherever gradients may be released; no part of patches/.
_BUFFER = Binding(
    "megatron.core.distributed.param_and_grad_buffer", "_ParamAndGradBuffer.__init__", _wrap_buffer
)
# Bound where a chain of flash optimizers is built, for as long as the process lives: it does
# nothing for others. What the scheduler reads in param groups is loaded with the optimizer.
SCHEDULE = Binding(
    "megatron.core.optimizer_param_scheduler",
    "OptimizerParamScheduler.load_state_dict",
    _wrap_schedule,
)
BINDINGS = (
    Binding("megatron.training.arguments", "add_megatron_arguments", _wrap_arguments),
    Binding("megatron.training.training", "get_megatron_optimizer", _wrap_optimizer),
    Binding(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer.__init__",
        _wrap_init,
    ),
    _BUFFER,
    Binding("megatron.core.dist_checkpointing", "load", wrap_load),
    Binding("megatron.core.dist_checkpointing", "load_common_state_dict", wrap_load_common),
    Binding("megatron.training.training", "calc_params_l2_norm", wrap_params_norm),
    Binding(
        "megatron.training.theoretical_memory_usage",
        "compute_weight_and_optimizer_memory",
        _wrap_theoretical_memory,
    ),
)


def bindings() -> tuple[Binding, ...]:
    """Return what is bound in the installed Megatron, little where it calls us by itself."""
    if versions.is_patched():
        return (_BUFFER,)
    module, path = versions.layout_name()
    return (*BINDINGS, Binding(module, path, wrap_layout, static="." in path))


def install() -> None:
    """Make our values of ``--optimizer`` known to Megatron in this process; idempotent.

    Raises:
        ImportError: Megatron lacks a name the plugin needs, or is too old; nothing is bound then.
    """
    versions.check(((binding.module, binding.path) for binding in BINDINGS), install=True)
    for binding in bindings():
        binding.apply(binding.owner())


def uninstall() -> None:
    """Undo ``install()``; does nothing where it was not called.

    What somebody has bound on top of ours stays, and ours in it, with a warning.
    """
    for binding in bindings():
        binding.undo(binding.owner())
