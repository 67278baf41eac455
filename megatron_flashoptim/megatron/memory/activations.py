"""Megatron's estimate of what activations take, from its arguments."""

from __future__ import annotations

import copy
from typing import Any


def activation_bytes(args: Any) -> float:
    """Return Megatron's theoretical bytes of activations on a rank of the first pipeline stage.

    With sequence parallelism by the formula for it, which Megatron's own report takes only with
    selective recomputation too: it counts no attention scores, which fused attention never keeps.
    A context-parallel rank has its part of the sequence, which Megatron's report does not divide.

    Args:
        args: Megatron's arguments, validated.
    """
    from megatron.training import theoretical_memory_usage, vocab_utils

    on_rank = copy.copy(args)
    on_rank.padded_vocab_size = args.padded_vocab_size or vocab_utils.calculate_padded_vocab_size(
        args.vocab_size,
        args.make_vocab_size_divisible_by,
        args.tensor_model_parallel_size,
        logging_enabled=False,
    )
    on_rank.seq_length = args.seq_length / args.context_parallel_size
    micro_batches = None
    if args.global_batch_size:
        micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    if args.sequence_parallel:
        estimate = theoretical_memory_usage.compute_activation_memory
    else:
        estimate = theoretical_memory_usage.compute_activation_memory_without_sp
    return float(estimate(on_rank, num_microbatches=micro_batches))
