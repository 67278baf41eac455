"""All that is known of Megatron-Core's releases: which are tested, and where they differ.

What a release can do is asked of the release itself (has it this name, does this function take
that argument), not concluded from its number. The number decides only whether it is refused as too
old or warned about as untested. Megatron is imported when a function here is called.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any

logger = logging.getLogger(__name__)

# The releases that every change is tested with, oldest first: the newest patch of each series.
TESTED = ("0.17.1", "0.18.2", "0.19.2")
# The release of Megatron-Bridge that scripts/requirements-bridge.txt installs.
TESTED_BRIDGE = "0.6.2"

_DISTRIBUTED_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer"
_OPTIMIZER = "megatron.core.optimizer.optimizer"
_BUFFERS = "megatron.core.distributed.distributed_data_parallel"

# What optimizers are built from, in training and without megatron.training: whatever is imported
# from Megatron or overridden. A method that Megatron no longer calls by this name would be ignored
# silently. tests/test_needed_names.py compares with the sources.
NEEDED: dict[str, tuple[str, ...]] = {
    "megatron.core.optimizer": (
        "DistributedOptimizer",
        "OptimizerConfig",
        "get_megatron_optimizer",
    ),
    "megatron.core.optimizer.optimizer_config": ("OptimizerConfig",),
    _DISTRIBUTED_OPTIMIZER: tuple(
        f"DistributedOptimizer.{name}"
        for name in (
            "__init__",
            "_build_model_and_main_param_groups",
            "_build_model_param_to_state_dict_param_map",
            "_copy_main_params_to_model_params",
            "_copy_model_grads_to_main_grads",
            "_copy_model_params_to_main_params",
            "_get_fp8_params_and_shard_fp32_from_fp8",
            "_get_main_param_and_optimizer_states",
            "_param_name",
            "_set_main_param_and_optimizer_states",
            "_unscale_main_grads_and_check_for_nan",
            "count_zeros",
            "get_grad_stats_parallel_group",
            "get_parameter_state_dp_zero",
            "get_parameters",
            "load_parameter_state_from_dp_zero",
            "load_state_dict",
            "offload_to_cpu",
            "restore_from_cpu",
            "sharded_param_state_dp_reshardable",
            "sharded_param_state_fully_reshardable",
            "sharded_state_dict",
            "state_dict",
        )
    ),
    _OPTIMIZER: (
        *(
            f"ChainedOptimizer.{name}"
            for name in (
                "_synchronize_steps",
                "count_zeros",
                "get_grad_norm",
                "load_state_dict",
                "prepare_grads",
                "reload_model_params",
                "sharded_state_dict",
                "state_dict",
                "step",
                "step_with_ready_grads",
            )
        ),
        "param_group_identifier_keys",
    ),
    "megatron.core.dist_checkpointing": ("ShardedTensor", "load", "load_content_metadata"),
    "megatron.core.dist_checkpointing.core": ("maybe_load_config",),
    "megatron.core.dist_checkpointing.dict_utils": ("nested_values",),
    "megatron.core.dist_checkpointing.mapping": (
        "LocalNonpersistentObject",
        "ShardedObject",
        "ShardedTensorFactory",
    ),
    "megatron.core.dist_checkpointing.serialization": ("load_common_state_dict",),
    "megatron.core.dist_checkpointing.strategies.common": ("COMMON_STATE_FNAME",),
    "megatron.core.dist_checkpointing.utils": ("extract_sharded_tensors_and_factories",),
    "megatron.core.fp8_utils": ("dequantize_fp8_tensor",),
    "megatron.core.num_microbatches_calculator": (
        "_GLOBAL_NUM_MICROBATCHES_CALCULATOR",
        "get_num_microbatches",
    ),
    "megatron.core.optimizer_param_scheduler": ("OptimizerParamScheduler.load_state_dict",),
    "megatron.core.parallel_state": (
        "get_expert_tensor_parallel_group",
        "get_tensor_model_parallel_group",
    ),
    "megatron.core.rerun_state_machine": (
        "RerunMode",
        "_GLOBAL_RERUN_STATE_MACHINE",
        "get_rerun_state_machine",
    ),
    "megatron.core.tensor_parallel": (
        "copy_tensor_model_parallel_attributes",
        "param_is_not_tensor_parallel_duplicate",
    ),
    "megatron.core.transformer.module": ("param_is_not_shared",),
    "megatron.core.utils": ("log_single_rank", "unwrap_model"),
}
# What install() and the launcher take beside that and beside what they bind.
NEEDED_BY_INSTALL: dict[str, tuple[str, ...]] = {
    "megatron.core.datasets.utils": ("compile_helpers",),
    "megatron.training.checkpointing": (
        "_build_sharded_state_dict_metadata",
        "generate_state_dict",
    ),
    "megatron.training.global_vars": ("_GLOBAL_ARGS",),
    "megatron.training.log_handler": ("CustomHandler",),
    "megatron.training.training": ("report_theoretical_memory",),
}


def installed_version() -> str:
    """Return the version of megatron-core that is imported, or "(not installed)".

    A checkout of Megatron-LM on the path hides an installed wheel, so the package is asked before
    the metadata of what is installed.
    """
    try:
        return str(importlib.import_module("megatron.core.package_info").__version__)
    except (ImportError, AttributeError):
        pass
    try:
        return metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        return "(not installed)"


class BrokenPackageError(ImportError):
    """A package that Megatron imports is installed and does not work."""


def find(module: str, path: str) -> Any:
    """Return the object that holds the last name of a path in a module of Megatron.

    Raises:
        BrokenPackageError: names a package that the module imports and that does not work.
        ImportError: names the version of megatron-core and what it lacks.
    """
    in_bridge = module.startswith("megatron.bridge.")
    try:
        owner: Any = _import(module)
        *parents, attribute = path.split(".")
        for part in parents:
            owner = getattr(owner, part)
        getattr(owner, attribute)
    except BrokenPackageError:
        raise
    except (ImportError, AttributeError) as problem:
        missing = problem.name if isinstance(problem, ModuleNotFoundError) else None
        package = "megatron-bridge" if in_bridge else f"megatron-core {installed_version()}"
        extra, tested = ("bridge", (TESTED_BRIDGE,)) if in_bridge else ("train", TESTED)
        if missing and missing.partition(".")[0] != "megatron":
            raise ImportError(
                f"{module} of {package} needs the package {missing}, which is not installed; "
                f"pip install 'megatron-flashoptim[{extra}]' installs what training needs"
            ) from problem
        raise ImportError(
            f"megatron-flashoptim needs {module}.{path}, which {package} does not have "
            f"({problem}). Tested releases: {', '.join(tested)}"
        ) from problem
    return owner


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    # Whatever is raised where a package is imported: OSError of a library that cannot be loaded.
    except Exception as problem:
        broken = _broken_package(problem)
        if broken is None:
            raise
        torch = importlib.import_module("torch")
        said = " ".join(str(problem).split())
        raise BrokenPackageError(
            f"{module} imports the package {broken}, which is installed and does not work "
            f"({type(problem).__name__}: {said}). Reinstall or rebuild it for torch "
            f"{torch.__version__}, CUDA {torch.version.cuda}, or uninstall it"
        ) from problem


def _broken_package(problem: Exception) -> str | None:
    """Return the package that failed while Megatron imported it, None if Megatron did itself."""
    if isinstance(problem, ModuleNotFoundError):
        return None
    # Without torch nothing came this far: what it lacks is for a newer or an older Megatron.
    apart = {"", "megatron", "megatron_flashoptim", "torch", *sys.stdlib_module_names}
    raised_in = None
    trace = problem.__traceback__
    while trace is not None:
        package = str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0]
        if package == "megatron":
            raised_in = None
        elif raised_in is None and package not in apart:
            raised_in = package
        trace = trace.tb_next
    if raised_in is None and isinstance(problem, ImportError):
        # An extension module has no frame, and a name that a package lacks is missed in Megatron's.
        raised_in = _package_of(problem.path or "") or str(problem.name or "").partition(".")[0]
    return None if raised_in in apart else raised_in


def _package_of(file: str) -> str:
    """Return the package that a file on the path belongs to, "" if there is none."""
    folders = [folder for folder in sys.path if folder and file.startswith(f"{folder}/")]
    inside = file.removeprefix(max(folders, key=len, default=file)).lstrip("/")
    return inside.partition("/")[0].partition(".")[0]


def has(module: str, path: str) -> bool:
    """Return whether Megatron has a name.

    Raises:
        BrokenPackageError: as ``find``: then it cannot be told.
    """
    try:
        find(module, path)
    except BrokenPackageError:
        raise
    except ImportError:
        return False
    return True


# Names that are there only with one of patches/ applied, one of each file that others depend on.
_PATCHED = (
    ("megatron.core.optimizer.optimizer_config", "OptimizerConfig.flash"),
    (
        "megatron.core.distributed.distributed_data_parallel_config",
        "DistributedDataParallelConfig.shard_alignment",
    ),
    ("megatron.core.optimizer", "HAVE_FLASHOPTIM"),
)


def is_patched() -> bool:
    """Return whether Megatron calls this package by itself, one of ``patches/`` being applied."""
    return all(has(module, path) for module, path in _PATCHED)


def check(needed: Iterable[tuple[str, str]] = (), *, install: bool = False) -> None:
    """Refuse a release that lacks a name or is too old; warn, once, of one that is not tested.

    Args:
        needed: modules and paths to look for beside those every optimizer needs.
        install: look for what ``install()`` needs of ``megatron.training`` too.

    Raises:
        ImportError: names the version of megatron-core and what is wrong with it.
    """
    installed = installed_version()
    number = _number(installed)
    if number and number < _series(TESTED[0]):
        raise ImportError(
            f"megatron-core {installed} is older than megatron-flashoptim supports; install "
            f"{'.'.join(map(str, _series(TESTED[0])))} or newer (tested: {', '.join(TESTED)})"
        )
    for module, paths in (*NEEDED.items(), *(NEEDED_BY_INSTALL.items() if install else ())):
        for path in paths:
            find(module, path)
    find(*layout_name())
    for module, path in needed:
        find(module, path)
    _warn_if_newer(installed)


@functools.cache
def _warn_if_newer(installed: str) -> None:
    number = _number(installed)
    tested = {_series(release): _number(release) for release in TESTED}
    if number <= tested.get(_series(installed), ()):
        return
    # Before there are process groups; torchrun sets it.
    if os.environ.get("RANK", "0") != "0":
        return
    logger.warning(
        "megatron-core %s is newer than the releases megatron-flashoptim is tested with (%s). "
        "Every name it needs is there; compare the first losses with those of a tested release",
        installed,
        ", ".join(TESTED),
    )


def _number(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, without pre-release and build; maybe empty."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found.group().split("."))) if found else ()


def _series(version: str) -> tuple[int, ...]:
    return _number(version)[:2]


# Buffer layout: computed apart from the buffers and handed to DDP since 0.18; before, in the
# constructor of the buffer.

LAYOUT = (_DISTRIBUTED_OPTIMIZER, "DistributedOptimizer.compute_full_param_layout")
BUFFER = (_BUFFERS, "_ParamAndGradBuffer")


def computes_layouts() -> bool:
    """Return whether DDP takes a parameter layout that was computed before."""
    return has(*LAYOUT)


def layout_name() -> tuple[str, str]:
    """Return module and path of what decides where buckets end."""
    return LAYOUT if computes_layouts() else BUFFER


def check_layout_can_be_computed(instead: str) -> None:
    """Refuse a release without parameter layouts.

    Args:
        instead: what to do.

    Raises:
        ImportError: names the version of megatron-core.
    """
    if not computes_layouts():
        raise ImportError(
            f"megatron-core {installed_version()} computes no parameter layouts, 0.18 and newer "
            f"do; {instead}"
        )


def with_optimizer_shards(layout: Any, count: int) -> Any:
    """Return a ``PerBufferParamLayout`` that says for how many shards it is (since 0.19)."""
    if not hasattr(layout, "num_optimizer_shards"):
        return layout
    return dataclasses.replace(layout, num_optimizer_shards=count)


def buffer_laid_out_for(factor: int, buffer_class: type) -> type:
    """Return a buffer class that pads bucket ends for ``factor`` shards per rank.

    Args:
        factor: shards per data-parallel rank.
        buffer_class: ``_ParamAndGradBuffer`` of a release whose buffers lay themselves out; it
            pads by its ``data_parallel_world_size`` while it is constructed.
    """

    class LaidOutBuffer(buffer_class):
        """Has more ranks while it is laid out."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._factor = factor
            super().__init__(*args, **kwargs)
            self._factor = 1

        @property
        def data_parallel_world_size(self) -> int:
            """Ranks that share the optimizer state of the buffer."""
            return self._ranks * self._factor

        @data_parallel_world_size.setter
        def data_parallel_world_size(self, ranks: int) -> None:
            self._ranks = ranks

    return LaidOutBuffer


# Gradient norm and clipping.


@functools.cache
def separate_grad_norm_groups() -> tuple[str, ...]:
    """Return the norm groups that are clipped apart from the rest (since 0.19)."""
    return tuple(getattr(_optimizer_module(), "SEPARATE_GRAD_NORM_GROUPS", ()))


@functools.cache
def grad_norm_group_attribute() -> str:
    """Return the attribute of a parameter that names its norm group (since 0.19)."""
    return str(getattr(_optimizer_module(), "GRAD_NORM_GROUP_ATTR", "grad_norm_group"))


def grad_norm_group(param: Any) -> str | None:
    """Return the norm group a parameter is marked with, or None."""
    group = getattr(param, grad_norm_group_attribute(), None)
    return None if group is None else str(group)


# Names of methods that Megatron's own code calls on a member of a chain, until 0.18.
_OLDER_NAMES = {"get_grads_for_grad_norm": "get_main_grads_for_grad_norm"}


def also_under_older_names[Class: type](cls: Class) -> Class:
    """Give a subclass of Megatron's optimizer its methods under the names of older releases too."""
    for name, older in _OLDER_NAMES.items():
        setattr(cls, older, getattr(cls, name))
    return cls


def grad_norm_skip_threshold(config: Any) -> float:
    """Return the gradient norm above which a step is skipped (since 0.18), by default infinity."""
    return float(getattr(config, "grad_norm_skip_threshold", math.inf))


def counts_on_this_rank(param: Any, tp_group: Any, expert_tp_group: Any) -> bool:
    """Return whether a parameter is in this rank's norms, being on no other rank too.

    Args:
        param: a model parameter.
        tp_group: tensor parallel group of the optimizer, or None for the global one.
        expert_tp_group: the same for expert parameters.
    """
    tensor_parallel = importlib.import_module("megatron.core.tensor_parallel")
    modules = importlib.import_module("megatron.core.transformer.module")
    not_duplicate = tensor_parallel.param_is_not_tensor_parallel_duplicate
    groups = {"tp_group": tp_group, "expert_tp_group": expert_tp_group}
    known = _parameters(not_duplicate)
    if not modules.param_is_not_shared(param) or not not_duplicate(
        param, **{name: group for name, group in groups.items() if name in known}
    ):
        return False
    # Weights cut over a further group, since 0.19.
    not_gtp_duplicate = getattr(tensor_parallel, "param_is_not_gtp_duplicate", None)
    return not_gtp_duplicate is None or bool(not_gtp_duplicate(param))


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _optimizer_module() -> Any:
    return importlib.import_module(_OPTIMIZER)


# The training loop, for the scripts of this project.


def pretrain(
    datasets_provider: Callable[..., Any],
    model_provider: Callable[..., Any],
    forward_step: Callable[..., Any],
    extra_args_provider: Callable[[Any], Any],
) -> None:
    """Parse the arguments and train a GPT with ``megatron.training``.

    Args:
        datasets_provider: builds the datasets.
        model_provider: builds the model, where Megatron does not from the arguments (until 0.18).
        forward_step: runs one micro-batch.
        extra_args_provider: adds arguments to Megatron's parser.
    """
    training = importlib.import_module("megatron.training")
    arguments = importlib.import_module("megatron.training.arguments")
    argument_utils = importlib.import_module("megatron.training.argument_utils")
    model_type = importlib.import_module("megatron.core.enums").ModelType.encoder_or_decoder
    if not hasattr(argument_utils, "pretrain_cfg_container_from_args"):  # 0.17
        training.pretrain(
            datasets_provider,
            model_provider,
            model_type,
            forward_step,
            extra_args_provider=extra_args_provider,
        )
        return
    args = arguments.parse_and_validate_args(extra_args_provider=extra_args_provider)
    configured = argument_utils.pretrain_cfg_container_from_args
    if not hasattr(argument_utils, "gpt_config_from_args"):  # 0.18
        config = configured(args)
        training.pretrain(config, datasets_provider, model_provider, model_type, forward_step)
        return
    config = configured(args, argument_utils.gpt_config_from_args(args))
    training.pretrain(config, datasets_provider, model_type, forward_step)


def gathers_in_step() -> bool:
    """Return whether the step that a chain overlaps with a gather is a method (since 0.18)."""
    return has(_OPTIMIZER, "ChainedOptimizer._step")
