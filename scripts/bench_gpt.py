"""The GPT that benchmarks of whole models build, of Megatron's own parts and its local layers."""

from __future__ import annotations

import argparse
from typing import Any

import torch


def build(
    options: argparse.Namespace, device: torch.device | str, *, tied: bool, **more: Any
) -> tuple[Any, Any]:
    """Return the model's configuration and the model, bf16, on a device.

    Args:
        options: with ``layers``, ``hidden``, ``heads``, ``vocab`` and ``sequence``.
        device: of the weights.
        tied: whether input and output embeddings are one.
        more: further fields of Megatron's ``TransformerConfig``.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=options.layers,
        hidden_size=options.hidden,
        num_attention_heads=options.heads,
        use_cpu_initialization=torch.device(device).type == "cpu",
        bf16=True,
        params_dtype=torch.bfloat16,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        bias_dropout_fusion=False,
        **more,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=options.vocab,
        max_sequence_length=options.sequence,
        share_embeddings_and_output_weights=tied,
        position_embedding_type="rope",
    )
    return config, model.to(device=device, dtype=torch.bfloat16)
