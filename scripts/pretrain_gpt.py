#!/usr/bin/env python3
"""Pretrain a GPT with ``megatron.training`` from the megatron-core wheel.

Takes Megatron's own arguments. Run it with the launcher, so that ``--optimizer flash_adamw`` is
known:

    torchrun --nproc-per-node 2 -m megatron_flashoptim.run scripts/pretrain_gpt.py ...

``--memory-report FILE`` writes what the optimizer holds at the end of training: bytes of its live
tensors and the parameters it owns, summed over ranks.

``--resumable-adam`` is for ``--optimizer adam`` without Transformer Engine and Apex: Megatron then
takes torch's optimizer, whose checkpoints it cannot load. With the flag it takes an exact fp32
AdamW instead, as Transformer Engine's, whose checkpoints it can load. Where either is installed,
the flag changes nothing.

``--plain-lion`` is for ``--optimizer lion``, for which Megatron takes Adam's decay rates, and Adam
itself for all but matrices. With the flag it takes Lion, with Lion's, for every parameter.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from exact_adamw import use_as_megatrons_adam
from megatron.core import optimizer as optimizer_factory
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args, training
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.utils import get_blend_and_blend_per_split
from plain_lion import use_as_megatrons_lion

from megatron_flashoptim.megatron import versions
from megatron_flashoptim.megatron.memory.live_memory import optimizer_bytes

# What training built, for the memory report.
_built: list[tuple[Any, Any]] = []


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this script's own arguments to Megatron's."""
    parser.add_argument("--memory-report", help="write the optimizer's live bytes to this file")
    parser.add_argument(
        "--resumable-adam",
        action="store_true",
        help="where Megatron would fall back to torch's Adam, take one whose checkpoints load",
    )
    parser.add_argument(
        "--plain-lion",
        action="store_true",
        help="with --optimizer lion: Lion, with --lion-beta1 and --lion-beta2, for every parameter",
    )
    return parser


def get_batch(data_iterator: Iterator[dict[str, Any]] | None) -> dict[str, Any]:
    """Return the next batch on the device; empty on pipeline stages that need none."""
    if data_iterator is None:
        return dict.fromkeys(("tokens", "labels", "loss_mask", "attention_mask", "position_ids"))
    batch = next(data_iterator)
    return {
        key: value.cuda(non_blocking=True) if torch.is_tensor(value) else value
        for key, value in batch.items()
    }


def check_loss(loss: torch.Tensor) -> None:
    """Have Megatron look at this rank's loss, as its own scripts do."""
    args = get_args()
    machine = get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for rejected, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            message = f"found {name} in local forward loss calculation"
            machine.validate_result(loss, rejection_func=rejected, message=message, fatal=True)
    if args.check_for_spiky_loss:
        spiky = partial(machine.is_unexpectedly_large, threshold=10, context="loss")
        machine.validate_result(loss, rejection_func=spiky, message="Spiky loss", fatal=False)


def loss_func(
    loss_mask: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return the summed loss, the number of tokens, and both for the log."""
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    check_loss(loss)
    num_tokens = mask.sum().detach().to(torch.int)
    report = torch.cat([loss.detach().view(1), num_tokens.view(1)])
    return loss, num_tokens, {"lm loss": report}


def forward_step(data_iterator: Iterator[dict[str, Any]] | None, model: Any) -> tuple[Any, Any]:
    """Run one micro-batch forward."""
    batch = get_batch(data_iterator)
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch.get("attention_mask"),
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(loss_func, batch["loss_mask"])


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    **_: Any,
) -> Any:
    """Build the GPT; for releases of Megatron that do not build it from the arguments."""
    args = get_args()
    config = config or core_transformer_config_from_args(args)
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=args.transformer_impl == "transformer_engine",
            normalization=args.normalization,
            vp_stage=vp_stage,
        ),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        vp_stage=vp_stage,
    )


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> Any:
    """Build the train, validation and test datasets on every rank."""
    args = get_args()
    if args.context_parallel_size > 1:
        raise SystemExit(
            "scripts/pretrain_gpt.py takes --context-parallel-size 1; use Megatron-LM's "
            "pretrain_gpt.py under the same launcher for context parallelism"
        )
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, num_samples, lambda: True, config).build()


# Megatron reads this attribute of the function.
datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def watch_what_is_built() -> None:
    """Take the resumable Adam or the plain Lion if asked to; keep what is built."""
    build = training.get_megatron_optimizer

    def build_and_remember(config: Any, model_chunks: Any, *args: Any, **kwargs: Any) -> Any:
        if get_args().resumable_adam and optimizer_factory.USING_PYTORCH_OPTIMIZER:
            use_as_megatrons_adam()
        if get_args().plain_lion:
            if config.optimizer != "lion":
                raise SystemExit("--plain-lion is for --optimizer lion; drop it")
            use_as_megatrons_lion()
        optimizer = build(config, model_chunks, *args, **kwargs)
        _built.append((optimizer, model_chunks))
        return optimizer

    training.get_megatron_optimizer = build_and_remember


def write_memory_report(path: str) -> None:
    """Sum live optimizer bytes and owned parameters over ranks and write them as JSON."""
    optimizer, model_chunks = _built[-1]
    counts = torch.tensor(optimizer_bytes(optimizer, model_chunks), dtype=torch.int64).cuda()
    torch.distributed.all_reduce(counts)
    state_bytes, owned = counts.tolist()
    if torch.distributed.get_rank() == 0:
        report = {
            "optimizer_state_bytes": state_bytes,
            "owned_parameters": owned,
            "bytes_per_parameter": state_bytes / owned,
            "ranks": torch.distributed.get_world_size(),
            "peak_device_bytes": torch.cuda.max_memory_allocated(),
        }
        with open(path, "w") as file:
            json.dump(report, file, indent=2)


def main() -> None:
    """Parse Megatron's arguments and train."""
    watch_what_is_built()
    versions.pretrain(datasets_provider, model_provider, forward_step, add_arguments)
    args = get_args()
    if args.memory_report:
        write_memory_report(args.memory_report)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
