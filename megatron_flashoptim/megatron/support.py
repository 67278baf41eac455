"""Which Megatron options a flash optimizer supports, in one table.

The same table is checked twice: at argument parsing (names of flags) and when an optimizer is
built from an ``OptimizerConfig`` (names of fields), for code that has no arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from megatron_flashoptim.megatron import versions
from megatron_flashoptim.optim.config import FlashOptimConfig
from megatron_flashoptim.optim.rules import rule_of


@dataclass(frozen=True)
class Refused:
    """One refused option.

    Attributes:
        field: attribute of the arguments, of ``OptimizerConfig`` or of the DDP config.
        refused: whether a value is refused.
        flag: the flag as a user types it.
        reason: why, and what to do.
    """

    field: str
    refused: Callable[[Any], bool]
    flag: str
    reason: str


def _is_set(value: Any) -> bool:
    return bool(value)


_CHECKPOINT_FORMATS = ("torch_dist", "torch")

REFUSED = (
    Refused(
        "use_distributed_optimizer",
        lambda value: not value,
        "no --use-distributed-optimizer",
        "it is a distributed optimizer; add --use-distributed-optimizer",
    ),
    Refused(
        "fp16",
        _is_set,
        "--fp16",
        "fp16 has 5 bits of exponent, with which weight and correction do not hold an fp32 master "
        "(docs/formats.md); use --bf16, which needs no loss scale either",
    ),
    Refused(
        "use_precision_aware_optimizer",
        _is_set,
        "--use-precision-aware-optimizer",
        "it has state formats of its own; drop the flag, flash state is smaller",
    ),
    Refused(
        "optimizer_cpu_offload",
        _is_set,
        "--optimizer-cpu-offload",
        "its state is stepped on the GPU; drop the flag",
    ),
    Refused(
        "use_megatron_fsdp",
        _is_set,
        "--use-megatron-fsdp",
        "it steps the buckets of DistributedDataParallel; drop the flag",
    ),
    Refused(
        "use_torch_fsdp2",
        _is_set,
        "--use-torch-fsdp2",
        "it steps the buckets of DistributedDataParallel; drop the flag",
    ),
    Refused(
        "fp4_param_gather",
        _is_set,
        "--fp4-param-gather",
        "the master's high part is the bf16 weight, stepped in place, and this is FP4; drop the "
        "flag: with --fp4-format alone weights stay bf16 and are cast to FP4 where they are used",
    ),
    Refused(
        "reuse_grad_buf_for_mxfp8_param_ag",
        _is_set,
        "--reuse-grad-buf-for-mxfp8-param-ag",
        "it is for --fp8-param-gather with --fp8-recipe mxfp8, which is refused too; drop the flag",
    ),
    Refused(
        "qk_clip",
        _is_set,
        "--qk-clip",
        "Megatron clips whole main parameters, and those of a distributed optimizer are flat parts "
        "(with Adam the first clipped step fails); drop the flag",
    ),
    *(
        Refused(
            f"{expert}gtp_weight_remat_size",
            lambda value: value > 1,
            f"--{expert.replace('_', '-')}tensor-parallel-num-weight-shards above the tensor "
            "parallel size",
            "checkpoints would have to tell apart the ranks that share a shard of the weights, and "
            "it was never tried; drop the flag",
        )
        for expert in ("", "expert_")
    ),
    Refused(
        "overlap_param_gather_with_optimizer_step",
        lambda value: bool(value) and not versions.gathers_in_step(),
        "--overlap-param-gather-with-optimizer-step",
        "in this release of megatron-core experts would be gathered before they are stepped; use "
        "0.18 or newer, or drop the flag",
    ),
    Refused(
        "ckpt_format",
        lambda value: value not in _CHECKPOINT_FORMATS,
        "--ckpt-format other than torch_dist or torch",
        "flash state is not mapped to the others; use one of these",
    ),
    Refused(
        "non_persistent_ckpt_type",
        lambda value: value == "local",
        "--non-persistent-ckpt-type local",
        "Megatron loads local checkpoints without the description of the state; use global",
    ),
    Refused(
        "yaml_cfg",
        lambda value: value is not None,
        "--yaml-cfg",
        "a YAML configuration replaces the flags; give the options as flags",
    ),
)


# With --optimizer-cuda-graph, which replays the step without any Python.
REFUSED_WITH_CUDA_GRAPH = (
    Refused(
        "log_num_zeros_in_grad",
        _is_set,
        "--log-num-zeros-in-grad",
        "the count is read on the host; drop one of the two",
    ),
    Refused(
        "loss_scale",
        _is_set,
        "--loss-scale",
        "whether to skip a step is decided on the host; drop one of the two",
    ),
    Refused(
        "grad_norm_skip_threshold",
        math.isfinite,
        "OptimizerConfig.grad_norm_skip_threshold",
        "whether to skip a step is decided on the host; drop one of the two",
    ),
    Refused(
        "cuda_graph_warmup_steps",
        lambda value: value < 1,
        "--cuda-graph-warmup-steps 0",
        "the step to capture must have run once before; use 1 or more",
    ),
    Refused(
        "overlap_param_gather_with_optimizer_step",
        _is_set,
        "--overlap-param-gather-with-optimizer-step",
        "a replayed gather cannot be waited for; drop one of the two",
    ),
    Refused(
        "rl_offload_optimizer_during_inference",
        _is_set,
        "--rl-offload-optimizer-during-inference",
        "a replayed step looks for the state where it was; drop one of the two",
    ),
    Refused(
        "timing_log_level",
        lambda value: value > 0,
        "--timing-log-level above 0",
        "timers in the step wait for the device, which cannot be captured; drop one of the two",
    ),
    Refused(
        "weight_decay_incr_style",
        lambda value: value != "constant",
        "--weight-decay-incr-style other than constant",
        "the weight decay of the captured step would be used for all; drop one of the two",
    ),
)


# With --fp8-param-gather.
REFUSED_WITH_QUANTIZED = (
    Refused(
        "fp8_recipe",
        lambda value: value not in (None, "delayed", "tensorwise", "blockwise"),
        "--fp8-recipe other than delayed, tensorwise or blockwise",
        "weights of others were never tried, those of mxfp8 for want of a GPU of the Blackwell "
        "generation; drop --fp8-param-gather: with --fp8-format alone weights stay bf16 and are "
        "cast where used",
    ),
    Refused(
        "optimizer_cuda_graph",
        _is_set,
        "--optimizer-cuda-graph",
        "weights are quantized after the step, which is no part of the graph; drop one of the two",
    ),
    Refused(
        "flash_early_param_gather",
        _is_set,
        "--flash-early-param-gather",
        "weights are quantized after all buckets are stepped; drop one of the two",
    ),
    Refused(
        "flash_gradient_release",
        _is_set,
        "--flash-gradient-release",
        "weights are quantized by Megatron in optimizer.step(); drop one of the two",
    ),
    Refused(
        "ckpt_format",
        lambda value: value != "torch_dist",
        "--ckpt-format other than torch_dist",
        "high parts of quantized weights in other formats were never tried; use torch_dist",
    ),
)


# With --flash-early-param-gather.
REFUSED_WITH_EARLY_GATHER = (
    Refused(
        "overlap_param_gather",
        lambda value: not value,
        "no --overlap-param-gather",
        "without it the step waits for all gathers; add --overlap-param-gather",
    ),
    Refused(
        "overlap_param_gather_with_optimizer_step",
        _is_set,
        "--overlap-param-gather-with-optimizer-step",
        "it gathers all model chunks within the step, not the first alone; drop the latter",
    ),
    Refused(
        "optimizer_cuda_graph",
        _is_set,
        "--optimizer-cuda-graph",
        "a replayed gather cannot be waited for; drop one of the two",
    ),
    Refused(
        "cuda_graph_impl",
        lambda value: value not in (None, "none"),
        "--cuda-graph-impl other than none",
        "a captured forward pass cannot wait for a gather from outside; drop one of the two",
    ),
)


# With --rl-offload-optimizer-during-inference.
REFUSED_WITH_RL_OFFLOAD = (
    Refused(
        "ckpt_assume_constant_structure",
        _is_set,
        "--ckpt-assume-constant-structure",
        "the worker of --async-save would go on reading the state where it was before it was "
        "offloaded; drop one of the two",
    ),
)


def first_refused(options: Any, table: Iterable[Refused]) -> Refused | None:
    """Return the first refused option among those that are set, or None.

    Args:
        options: a namespace or dataclass; options whose field it lacks do not apply.
        table: refused options, in the order in which they are to be told.
    """
    for option in table:
        if hasattr(options, option.field) and option.refused(getattr(options, option.field)):
            return option
    return None


def early_gather_refusal(options: Any) -> str | None:
    """Return why the options cannot be combined with ``--flash-early-param-gather``, or None.

    Args:
        options: a namespace; options whose field it lacks do not apply.
    """
    found = first_refused(options, REFUSED_WITH_EARLY_GATHER)
    if found is None:
        return None
    return f"--flash-early-param-gather cannot be used with {found.flag}: {found.reason}"


def quantized_refusal(options: Any) -> str | None:
    """Return why the options cannot be combined with ``--fp8-param-gather``, or None; likewise."""
    found = first_refused(options, REFUSED_WITH_QUANTIZED)
    if found is None:
        return None
    return f"--fp8-param-gather cannot be used with {found.flag}: {found.reason}"


def rl_offload_refusal(options: Any) -> str | None:
    """Return why the options cannot be combined with offloading for RL's inference; likewise."""
    found = first_refused(options, REFUSED_WITH_RL_OFFLOAD)
    if found is None:
        return None
    return (
        f"--rl-offload-optimizer-during-inference cannot be used with {found.flag}: {found.reason}"
    )


def refusal_of_the_rule(optimizer: str, options: Any) -> str | None:
    """Return what of the options some update rules take, and this one does not, with the reason."""
    if not getattr(options, "decoupled_weight_decay", True) and not rule_of(optimizer).takes_l2:
        return (
            "--no-decoupled-weight-decay (decoupled_weight_decay=False): it decays weights apart "
            "from the gradient; drop the flag, or use flash_adam or flash_sgd"
        )
    if getattr(options, "use_mup", False) and not rule_of(optimizer).scale_free:
        return (
            "--use-mup: Megatron would scale its learning rates by Adam's rules; use flash_adamw, "
            "flash_adam or flash_lion, or drop the flag"
        )
    return None


def first_refusal(optimizer: str, options: Any) -> str | None:
    """Return why the options cannot be combined with a flash optimizer, or None.

    Args:
        optimizer: value of ``--optimizer``, for the message.
        options: a namespace or dataclass; options whose field it lacks do not apply.
    """
    refusal = refusal_of_the_rule(optimizer, options)
    if refusal is not None:
        return f"--optimizer {optimizer} cannot be used with {refusal}"
    option = first_refused(options, REFUSED)
    if option is not None:
        return f"--optimizer {optimizer} cannot be used with {option.flag}: {option.reason}"
    graph = bool(getattr(options, "optimizer_cuda_graph", False))
    option = first_refused(options, REFUSED_WITH_CUDA_GRAPH) if graph else None
    if option is not None:
        return (
            f"--optimizer {optimizer} cannot be used with --optimizer-cuda-graph and "
            f"{option.flag}: {option.reason}"
        )
    return None


def check_configs(
    config: Any, model_chunks: list[Any], flash: FlashOptimConfig | None = None
) -> None:
    """Refuse configurations that flash optimizers do not support.

    Args:
        config: Megatron's ``OptimizerConfig``.
        model_chunks: model chunks wrapped in DistributedDataParallel.
        flash: update rule, formats and rounding; None stands for the defaults.

    Raises:
        ValueError: names the option and says what to do.
    """
    flash = flash or FlashOptimConfig()
    chunk = model_chunks[0]
    if not hasattr(chunk, "ddp_config"):
        raise ValueError(
            f"{flash.optimizer} steps models wrapped in DistributedDataParallel, got "
            f"{type(chunk).__name__}"
        )
    for options in (config, chunk.ddp_config, getattr(chunk, "config", None)):
        refusal = first_refusal(flash.optimizer, options)
        if refusal is not None:
            raise ValueError(refusal)
    if flash.early_param_gather:
        options = SimpleNamespace(
            # Not the optimizer config's field of that name, by which nothing is gathered.
            overlap_param_gather=chunk.ddp_config.overlap_param_gather,
            overlap_param_gather_with_optimizer_step=(
                config.overlap_param_gather_with_optimizer_step
            ),
            optimizer_cuda_graph=config.optimizer_cuda_graph,
            cuda_graph_impl=getattr(chunk.config, "cuda_graph_impl", None),
        )
        refusal = early_gather_refusal(options)
        if refusal is not None:
            raise ValueError(refusal)
    if chunk.ddp_config.fp8_param_gather:
        options = SimpleNamespace(
            fp8_recipe=config.fp8_recipe,
            optimizer_cuda_graph=config.optimizer_cuda_graph,
            flash_early_param_gather=flash.early_param_gather,
            flash_gradient_release=flash.gradient_release,
        )
        refusal = quantized_refusal(options)
        if refusal is not None:
            raise ValueError(refusal)
    if config.optimizer != "adam":
        raise ValueError(
            f"OptimizerConfig.optimizer must be 'adam' for {flash.optimizer}, got "
            f"{config.optimizer!r}"
        )
    flash.rule.options(config, flash)
