"""Megatron's arguments for the planner, from a command line or from a checkpoint.

A checkpoint's arguments become the defaults of Megatron's own parser, and Megatron validates the
result as it does in a training run. What validation derived from other arguments is left out, to
be derived again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import torch

from megatron_flashoptim.checkpoint.saved_args import SavedArgs
from megatron_flashoptim.megatron.arguments import FIELD
from megatron_flashoptim.optim.footprint import OPTIMIZERS

# Arguments of a checkpoint that are not taken over, because Megatron's validation derives or turns
# them off by others, or refuses them a second time. None has a part in a model's shape.
_DERIVED = {
    *("align_param_gather", "encoder_num_layers", "encoder_seq_length", "eval_global_batch_size"),
    *("eval_micro_batch_size", "global_batch_size", "overlap_p2p_comm", "padded_vocab_size"),
    *("phase_transition_iterations", "rampup_batch_size", "step_batch_size_schedule"),
    *("start_weight_decay", "end_weight_decay", "train_iters", "train_samples"),
    "virtual_pipeline_model_parallel_size",
}
# Megatron's default for these is the tensor parallel size, which its validation writes down.
_AS_TENSOR_PARALLEL = (
    "expert_tensor_parallel_size",
    "expert_tensor_parallel_num_weight_shards",
    "tensor_parallel_num_weight_shards",
)
# Groups of arguments that the size of a model and its optimizer does not depend on. What belongs to
# one flash optimizer would be refused beside another; the plan has a line for all master bits.
_WITHOUT_EFFECT = ("cuda_graph", "flash_", "grpo_", "inference_", "lr_", "non_persistent_", "rl_")

# Of these, what gradients take depends on.
_OF_GRADIENTS = ("flash_gradient_release", "flash_release_slots")
# How layers are divided over pipeline stages; void with another number of stages.
_PIPELINE_LAYOUT = {
    *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
    *("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"),
    "pipeline_model_parallel_layout",
}

# Arguments of models and of wrappers that the planner does not build.
_NOT_PLANNED = {
    "hybrid_layer_pattern": "a hybrid or Mamba model",
    "decoder_num_layers": "an encoder-decoder model",
    "spec": "a model with a layer specification of its own",
    "experimental_attention_variant": "a model with an experimental attention variant",
    "yaml_cfg": "a model configured by a YAML file",
    "use_megatron_fsdp": "Megatron-FSDP instead of the distributed optimizer",
    "use_torch_fsdp2": "torch's FSDP2 instead of the distributed optimizer",
}
# First parts of the names of tensors that no GPT has.
_NOT_GPT = {
    *("binary_head", "encoder", "language_model", "lm_head", "vision_model", "vision_projection"),
}

# What Megatron asserts, without a message, of a flag that it needs.
_ASSERTED = re.compile(r"assert args\.(\w+) is not None$")


class ArgumentsError(ValueError):
    """Megatron does not take the arguments, or the planner does not build what they say."""


def parse(arguments: Sequence[str], world_size: int, saved: SavedArgs | None = None) -> Any:
    """Return validated arguments, changed so that a GPT of these sizes is built on any machine.

    Args:
        arguments: of ``pretrain_gpt.py``; with a checkpoint, those that differ from it.
        world_size: number of GPUs.
        saved: of a checkpoint.

    Raises:
        ArgumentsError: Megatron refuses the arguments, with its message, or the model is not a GPT.
    """
    from megatron.training import arguments as megatron_arguments

    if not torch.cuda.is_available():
        megatron_arguments.get_device_arch_version = lambda: 10
        # Asked for --moe-grouped-gemm.
        torch.cuda.get_device_capability = lambda *_: (10, 0)

    def with_saved_defaults(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        # Megatron asks for it; what is planned does not depend on it.
        parser.set_defaults(micro_batch_size=1)
        if saved is not None:
            known = {action.dest for action in parser._actions}
            taken = _taken_over(saved.args, arguments)
            parser.set_defaults(**{key: taken[key] for key in taken.keys() & known})
        return parser

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world_size))
    before = sys.argv
    sys.argv = ["pretrain_gpt.py", *arguments]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):  # Megatron's usage is hundreds of lines
            args = megatron_arguments.parse_args(extra_args_provider=with_saved_defaults)
        _refuse_other_models(args)
        _refuse_other_optimizers(args)
        args = megatron_arguments.validate_args(args)
    except SystemExit as problem:
        lines = said.getvalue().splitlines() or [str(problem)]
        raise ArgumentsError(lines[-1].removeprefix("pretrain_gpt.py: error: ")) from problem
    except ArgumentsError:
        raise
    except (AssertionError, RuntimeError, ValueError) as problem:
        # Some of its assertions say nothing but what they assert.
        asserted = traceback.extract_tb(problem.__traceback__)[-1].line or ""
        said_by_megatron = str(problem) or _ASSERTED.sub(_flag_is_missing, asserted)
        raise ArgumentsError(f"Megatron refuses the arguments: {said_by_megatron}") from problem
    finally:
        sys.argv = before
    if args.gtp_weight_remat_size > 1 or args.expert_gtp_weight_remat_size > 1:
        raise ArgumentsError(
            "--tensor-parallel-num-weight-shards beyond the tensor parallel size is not planned; "
            "drop it for an upper bound"
        )
    if not args.vocab_size and not args.padded_vocab_size:
        raise ArgumentsError("the vocabulary's size is unknown; add --vocab-size")
    _build_anywhere(args)
    return args


def _flag_is_missing(asserted: re.Match[str]) -> str:
    field = asserted[1].removeprefix("encoder_")  # Megatron's name for --seq-length
    return f"--{field.replace('_', '-')} is missing"


def refuse_other_checkpoints(saved: SavedArgs) -> None:
    """Refuse a checkpoint whose tensors are not those of a GPT.

    Raises:
        ValueError: names what the checkpoint holds.
    """
    parts = {name.split(".")[0] for name in saved.names}
    foreign = sorted(parts & _NOT_GPT)
    if foreign or "decoder" not in parts:
        found = f"tensors of {', '.join(foreign)}" if foreign else "no decoder"
        raise ValueError(
            f"the checkpoint in {saved.folder} holds {found}: it is not of a GPT, and only GPT "
            "models are planned. Give --parameters for others"
        )


def _taken_over(args: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the saved arguments that stand until others are given."""
    given = {argument.split("=")[0] for argument in arguments}
    taken = {
        key: value
        for key, value in vars(args).items()
        if key not in _DERIVED and not key.startswith(_WITHOUT_EFFECT)
    }
    if "--bf16" in given:
        taken.pop("fp16", None)  # Megatron refuses both
    if "--pipeline-model-parallel-size" in given:
        taken = {key: value for key, value in taken.items() if key not in _PIPELINE_LAYOUT}
    for key in _AS_TENSOR_PARALLEL:
        if taken.get(key) == taken.get("tensor_model_parallel_size"):
            taken.pop(key, None)
    # The vocabulary as it was padded, which is the only size that all tokenizers leave here.
    if getattr(args, "padded_vocab_size", None):
        taken["vocab_size"] = args.padded_vocab_size
    if getattr(args, FIELD, None):
        taken["optimizer"] = getattr(args, FIELD)
        # An optimizer that is given comes with its own flags; and so can be had without release.
        if "--optimizer" not in given and getattr(args, "flash_gradient_release", None):
            taken.update({key: getattr(args, key) for key in _OF_GRADIENTS})
    return taken


def _refuse_other_models(args: Any) -> None:
    for field, what in _NOT_PLANNED.items():
        if getattr(args, field, None):
            raise ArgumentsError(
                f"--{field.replace('_', '-')} means {what}; only GPT models on Megatron's "
                "distributed optimizer are planned. Give --parameters for others"
            )


def _refuse_other_optimizers(args: Any) -> None:
    """Refuse those of Megatron that neither Adam's figures nor a flash optimizer's are about."""
    if getattr(args, FIELD) is None and args.optimizer not in OPTIMIZERS:
        raise ArgumentsError(
            f"--optimizer {args.optimizer} is none of {', '.join(OPTIMIZERS)}, which are planned"
        )
    if getattr(args, FIELD) is None and args.fp16:  # where it is not, the optimizer's own refusal
        raise ArgumentsError(
            "--fp16 is not planned: flash optimizers take bf16 or fp32 weights; give --bf16"
        )
    if getattr(args, "fp8_param_gather", False):
        raise ArgumentsError(
            "--fp8-param-gather is not planned: Transformer Engine decides what it quantizes. Drop "
            "it for the figures of bf16 weights; FP8 ones take 1 byte less, with most recipes 1 "
            "more for a transpose, and 2 more of state, divided by the data-parallel size"
        )


def _build_anywhere(args: Any) -> None:
    """Turn off what changes no parameter's shape and may need a GPU or another package."""
    args.transformer_impl = "local"
    args.fp8 = None
    args.apply_rope_fusion = args.gradient_accumulation_fusion = args.tp_comm_overlap = False
    args.use_cpu_initialization = True
    args.perform_initialization = False
