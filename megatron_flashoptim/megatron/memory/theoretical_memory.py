"""Megatron's theoretical memory figures, for flash optimizers.

Megatron counts the parameters of the most loaded rank and multiplies them by what Adam keeps of
each. Both its count and its division over ranks are linear in those bytes, so that they can be had
from its own function, without a copy of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from megatron_flashoptim.optim.config import FlashOptimConfig
from megatron_flashoptim.optim.footprint import TABLE_BYTES, buffer_bytes, flash_state_bytes

# num_bytes_per_parameter in Megatron's theoretical_memory_usage.py: all of Adam without the
# distributed optimizer; with it, what each rank keeps of every parameter and what is divided.
_ADAM = 18
_ADAM_REPLICATED = 6
_ADAM_DIVIDED = 12


def weight_and_optimizer_bytes(
    adam_bytes: Callable[..., float], args: Any, flash: FlashOptimConfig, verbose: bool = False
) -> float:
    """Return bytes of weights, gradients and optimizer on the most loaded rank.

    Args:
        adam_bytes: Megatron's ``compute_weight_and_optimizer_memory``.
        args: Megatron's arguments, validated.
        flash: what the optimizer keeps.
        verbose: let Megatron print the numbers of parameters.
    """
    whole = copy.copy(args)
    whole.use_distributed_optimizer = False
    parameters = adam_bytes(whole, verbose=verbose) / _ADAM
    divided = copy.copy(args)
    divided.use_distributed_optimizer = True
    # Context-parallel ranks share the state too; several instances of the optimizer do not.
    instances = args.num_distributed_optimizer_instances
    divided.data_parallel_size = args.data_parallel_size * args.context_parallel_size / instances
    divided.world_size = args.world_size // instances
    owned = (adam_bytes(divided, verbose=False) - _ADAM_REPLICATED * parameters) / _ADAM_DIVIDED
    weight, grad = buffer_bytes(args.bf16, args.accumulate_allreduce_grads_in_fp32)
    state = flash_state_bytes(flash.rule, flash.master_bits, weight)
    gradients = parameters * grad
    if flash.gradient_release:
        in_slots = flash.release_slots * bucket_size(args, parameters) * grad
        gradients = min(gradients, in_slots)
    return parameters * weight + gradients + owned * (state + TABLE_BYTES)


def bucket_size(args: Any, parameters: float) -> float:
    """Return the elements at which Megatron ends a bucket, with the parameter that reaches them.

    As its training loop has it, with ``--overlap-grad-reduce``: without, there is one bucket.

    Args:
        args: Megatron's arguments, validated.
        parameters: elements of all model chunks on the rank, those without gradients too.
    """
    if args.ddp_num_buckets is not None:
        return float(parameters // args.ddp_num_buckets)
    if args.ddp_bucket_size is not None:
        return float(args.ddp_bucket_size)
    # All of them, also where several instances of the optimizer share the state among fewer.
    ranks = args.data_parallel_size * args.context_parallel_size
    return float(max(40_000_000, 1_000_000 * ranks))


def report_before_training(args: Any) -> None:
    """Print Megatron's theoretical figures on rank 0, for ``--report-theoretical-memory``."""
    import torch
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.training import training

    if torch.distributed.get_rank() == 0:
        training.report_theoretical_memory(args, get_num_microbatches(), verbose=True)
