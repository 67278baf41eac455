"""What cannot be used with ``--flash-gradient-release`` and ``--flash-bucket-clip-grad``.

All reasons are told at once, since many of Megatron's defaults are among them. The same rules are
checked when arguments are parsed and when an optimizer is built, with the names of either.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

from megatron_flashoptim.megatron.support import Refused
from megatron_flashoptim.optim.config import FlashOptimConfig


def _is_set(value: Any) -> bool:
    return bool(value)


def _above_one(value: Any) -> bool:
    return value is not None and value > 1


_NOT_YET = "a bucket is stepped before the others' gradients are there"
_AFTERWARDS = "gradients are used before the backward pass has ended"

_CLIPPING = Refused(
    "clip_grad",
    lambda value: value > 0.0,
    "--clip-grad above 0",
    f"the norm of all gradients is not known when {_NOT_YET}; use --clip-grad 0, and "
    "--flash-bucket-clip-grad to clip each bucket by its own norm",
)
_LOSS_SCALE = Refused(
    "loss_scale",
    lambda value: value is not None,
    "--loss-scale",
    "whether a gradient overflows is known at the end; drop it, bf16 needs none",
)
_SKIP_THRESHOLD = Refused(
    "grad_norm_skip_threshold",
    math.isfinite,
    "OptimizerConfig.grad_norm_skip_threshold",
    f"a step cannot be skipped by its norm when {_NOT_YET}; drop it",
)
_PIPELINE = Refused(
    "pipeline_model_parallel_size",
    _above_one,
    "--pipeline-model-parallel-size above 1",
    "stages accumulate micro-batches, and sum tied embeddings after the backward pass; use 1",
)
_GRAPHED_STEP = Refused(
    "optimizer_cuda_graph",
    _is_set,
    "--optimizer-cuda-graph",
    "the launches of a step are not in one place to be captured; drop it",
)

REFUSED_WITH_RELEASE = (
    Refused(
        "overlap_grad_reduce",
        lambda value: not value,
        "no --overlap-grad-reduce",
        "all gradients are then one bucket; add --overlap-grad-reduce",
    ),
    _CLIPPING,
    _LOSS_SCALE,
    _SKIP_THRESHOLD,
    _PIPELINE,
    _GRAPHED_STEP,
    Refused(
        "rerun_mode",
        lambda value: value != "disabled",
        "--rerun-mode other than disabled",
        "a rerun would run the backward pass, and step, twice; use --rerun-mode disabled",
    ),
    Refused(
        "rampup_batch_size",
        _is_set,
        "--rampup-batch-size",
        "micro-batches are accumulated; drop it",
    ),
    Refused(
        "step_batch_size_schedule",
        _is_set,
        "--step-batch-size-schedule",
        "micro-batches are accumulated; drop it",
    ),
    Refused(
        "mtp_detach_heads",
        _is_set,
        "--mtp-detach-heads",
        "its heads read the output layer's weight apart from its gradient, maybe after its step; "
        "drop it",
    ),
    Refused(
        "use_transformer_engine_op_fuser",
        _is_set,
        "--use-transformer-engine-op-fuser",
        "its fused layers write gradients before their bucket has memory; drop it",
    ),
    Refused(
        "calculate_per_token_loss",
        _is_set,
        "--calculate-per-token-loss",
        f"it scales gradients by the number of tokens, and {_AFTERWARDS}; drop it",
    ),
    Refused(
        "delay_wgrad_compute",
        _is_set,
        "--delay-wgrad-compute",
        "gradients come after the hooks that step; drop it",
    ),
    Refused(
        "overlap_moe_expert_parallel_comm",
        _is_set,
        "--overlap-moe-expert-parallel-comm",
        "its schedule interleaves micro-batches; drop it",
    ),
    # Fields of the DDP config, and of the arguments.
    *(
        Refused(
            f"{prefix}param_name_patterns_for_fp32_local_accumulation",
            _is_set,
            "--ddp-param-name-patterns-for-fp32-local-accumulation",
            "it keeps gradients of its own, and there is nothing to accumulate; drop it",
        )
        for prefix in ("", "ddp_")
    ),
    *(
        Refused(
            f"{prefix}reduce_scatter_with_fp32_accumulation",
            _is_set,
            "--ddp-reduce-scatter-with-fp32-accumulation",
            "its receive buffer is freed to the stream of the gradients while the step reads it on "
            "another; drop it",
        )
        for prefix in ("", "ddp_")
    ),
    Refused(
        "nccl_ub",
        _is_set,
        "--use-nccl-ub",
        "NCCL allocates and registers the gradients it reduces then; drop it",
    ),
    Refused(
        "cuda_graph_impl",
        lambda value: value not in (None, "none"),
        "--cuda-graph-impl other than none",
        "a replayed backward pass runs no hooks; drop it",
    ),
    Refused(
        "enable_cuda_graph",
        _is_set,
        "--enable-cuda-graph",
        "a replayed backward pass runs no hooks; drop it",
    ),
    Refused(
        "external_cuda_graph",
        _is_set,
        "--external-cuda-graph",
        "a replayed backward pass runs no hooks; drop it",
    ),
    Refused(
        "gtp_weight_remat_size",
        _above_one,
        "--tensor-parallel-num-weight-shards above the tensor parallel size",
        f"it sums gradients of replicated weights, and {_AFTERWARDS}; drop it",
    ),
    Refused(
        "expert_gtp_weight_remat_size",
        _above_one,
        "--expert-tensor-parallel-num-weight-shards above the expert tensor parallel size",
        f"it sums gradients of replicated weights, and {_AFTERWARDS}; drop it",
    ),
    Refused(
        "overlap_param_gather_with_optimizer_step",
        _is_set,
        "--overlap-param-gather-with-optimizer-step",
        "the step is over when optimizer.step() is called; drop it",
    ),
    Refused(
        "save_wgrads_interval",
        lambda value: value is not None,
        "--save-wgrads-interval",
        f"it saves gradients, and {_AFTERWARDS}; drop it",
    ),
    Refused(
        "vision_pretraining_type",
        lambda value: value == "dino",
        "--vision-pretraining-type dino",
        f"it cancels gradients of the last layer, and {_AFTERWARDS}; drop it",
    ),
    Refused(
        "rl_offload_optimizer_during_inference",
        _is_set,
        "--rl-offload-optimizer-during-inference",
        "gradients have no memory to free between iterations; drop it",
    ),
)
# With tensor parallelism: what ranks have copies of, and sum the gradients of afterwards.
_REFUSED_WITH_TENSOR_PARALLEL = (
    Refused(
        "sequence_parallel",
        _is_set,
        "--sequence-parallel",
        f"it sums gradients of norms over tensor-parallel ranks, and {_AFTERWARDS}; drop it",
    ),
    Refused(
        "qk_layernorm",
        _is_set,
        "--qk-layernorm with --tensor-model-parallel-size above 1",
        f"gradients of these norms are summed over tensor-parallel ranks, and {_AFTERWARDS}; drop "
        "one of the two",
    ),
)
REFUSED_WITH_CLIPPING = (_CLIPPING, _LOSS_SCALE, _PIPELINE, _GRAPHED_STEP)


def refusal(flash: FlashOptimConfig, *sources: Any) -> str | None:
    """Return why these options cannot be used with what the configuration asks for, or None.

    Args:
        flash: with ``gradient_release`` and ``bucket_clip_grad``.
        sources: namespaces or dataclasses; options whose field none has do not apply.
    """
    flag = None
    table: tuple[Refused, ...] = ()
    if flash.bucket_clip_grad > 0.0:
        flag, table = "--flash-bucket-clip-grad", REFUSED_WITH_CLIPPING
    if flash.gradient_release:
        flag, table = "--flash-gradient-release", REFUSED_WITH_RELEASE
        if any(_above_one(getattr(o, "tensor_model_parallel_size", 1)) for o in sources):
            table += _REFUSED_WITH_TENSOR_PARALLEL
    found = []
    for option in table:
        values = [getattr(o, option.field) for o in sources if hasattr(o, option.field)]
        if any(map(option.refused, values)):
            found.append(f"{option.flag}: {option.reason}")
    if flash.gradient_release and flash.early_param_gather:
        found.append("--flash-early-param-gather: it gathers within optimizer.step(); drop it")
    found = list(dict.fromkeys(found))
    return f"{flag} cannot be used with {' | '.join(found)}" if found else None


def check_release(config: Any, chunks: Sequence[Any], flash: FlashOptimConfig) -> None:
    """Refuse what cannot be used, when an optimizer is built.

    Args:
        config: Megatron's ``OptimizerConfig``.
        chunks: model chunks wrapped in DistributedDataParallel.
        flash: with ``gradient_release`` and ``bucket_clip_grad``.

    Raises:
        ValueError: names the options and says what to do.
    """
    found = refusal(flash, config, chunks[0].ddp_config, getattr(chunks[0], "config", None))
    if found is not None:
        raise ValueError(found)
    if not flash.gradient_release:
        return
    _check_process()
    for chunk in chunks:
        for name, param in chunk.named_parameters():
            if param.requires_grad and getattr(param, "average_gradients_across_tp_domain", False):
                raise ValueError(
                    f"--flash-gradient-release cannot be used with {name}, whose gradient is "
                    f"averaged over tensor-parallel ranks: {_AFTERWARDS}; drop the flag"
                )


def _check_process() -> None:
    """Refuse what Megatron keeps in its process: reruns and micro-batches.

    Raises:
        ValueError: several micro-batches, or reruns.
    """
    machine = importlib.import_module("megatron.core.rerun_state_machine")
    if machine._GLOBAL_RERUN_STATE_MACHINE is not None:
        mode = machine.get_rerun_state_machine().get_mode()
        if mode != machine.RerunMode.DISABLED:
            raise ValueError(
                f"--flash-gradient-release cannot be used with the rerun mode {mode.value}: a "
                "rerun would run the backward pass, and step, twice; use --rerun-mode disabled"
            )
    calculator = importlib.import_module("megatron.core.num_microbatches_calculator")
    if calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR is not None:
        count = calculator.get_num_microbatches()
        if count > 1:
            raise ValueError(
                f"--flash-gradient-release cannot be used with {count} micro-batches in a global "
                "batch: each would be stepped alone; use a --global-batch-size of "
                "--micro-batch-size times the data-parallel size"
            )
