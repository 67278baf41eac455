"""A tiny GPT of Megatron's own parts, trained on real text by Megatron's own schedules."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer as get_stock_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

from megatron_flashoptim import (
    FlashDistributedOptimizer,
    FlashOptimConfig,
    get_megatron_optimizer,
)
from megatron_flashoptim.megatron import versions

VOCAB = 256
SEQUENCE = 64


@dataclass
class Setup:
    """What to build; the defaults are one dense GPT with plain data parallelism."""

    flash: FlashOptimConfig | None = field(default_factory=FlashOptimConfig)
    tp: int = 1
    pp: int = 1
    ep: int = 1
    instances: int = 1
    layers: int = 2
    hidden: int = 64
    vocab: int = VOCAB
    swiglu: bool = False
    query_groups: int | None = None
    tied: bool = True
    experts: int | None = None
    bf16: bool = True
    grads_in_fp32: bool = True
    overlap: bool = False
    bucket_size: int | None = None
    foreign_layout: bool = False
    prepare_model: Callable[[Any], None] | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)


@dataclass
class Trainer:
    """A model and its optimizer on this rank."""

    setup: Setup
    model: list[Any]
    optimizer: Any
    config: Any
    step_number: int = 0

    def step(self, *, update: bool = True) -> tuple[float | None, float | None, float | None]:
        """Train one global batch of real text; returns loss, grad norm and zero gradients."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, self.step_number),
            data_iterator=None,
            model=self.model,
            num_microbatches=1,
            seq_length=SEQUENCE,
            micro_batch_size=2,
            forward_only=False,
        )
        self.step_number += 1
        loss = torch.tensor([losses[0]["loss"]]) if losses else torch.zeros(1)
        group = parallel_state.get_data_parallel_group()
        torch.distributed.all_reduce(loss, group=group)
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(
            loss, last, group=parallel_state.get_pipeline_model_parallel_group()
        )
        if not update:
            return loss.item() / group.size(), None, None
        ok, norm, zeros = self.optimizer.step()
        assert ok
        return loss.item() / group.size(), float(norm), zeros

    def train(self, steps: int) -> list[float]:
        """Train some steps and return the losses."""
        return [self.step()[0] for _ in range(steps)]

    def sync_params(self) -> None:
        """Gather parameters whose all-gather overlaps with the next forward pass."""
        if self.setup.overlap:
            for chunk in self.model:
                chunk.disable_forward_pre_hook(param_sync=True)
                chunk.enable_forward_pre_hook()

    def weights(self) -> dict[str, torch.Tensor]:
        """Return copies of this rank's model weights."""
        self.sync_params()
        return {
            f"{index}.{name}": param.detach().clone()
            for index, chunk in enumerate(self.model)
            for name, param in chunk.named_parameters()
        }


def build(setup: Setup) -> Trainer:
    """Build model and optimizer on this rank; the process group must be up."""
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=setup.tp,
            pipeline_model_parallel_size=setup.pp,
            expert_model_parallel_size=setup.ep,
            num_distributed_optimizer_instances=setup.instances,
        )
    torch.manual_seed(1234)
    model_parallel_cuda_manual_seed(1234)
    config = TransformerConfig(
        num_layers=setup.layers,
        hidden_size=setup.hidden,
        num_attention_heads=4,
        ffn_hidden_size=4 * setup.hidden,
        use_cpu_initialization=not torch.cuda.is_available(),
        bf16=setup.bf16,
        params_dtype=torch.bfloat16 if setup.bf16 else torch.float32,
        pipeline_dtype=torch.bfloat16 if setup.bf16 else torch.float32,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=setup.tp,
        pipeline_model_parallel_size=setup.pp,
        expert_model_parallel_size=setup.ep,
        num_moe_experts=setup.experts,
        moe_router_topk=1 if setup.experts else 2,
        moe_token_dispatcher_type="alltoall" if setup.experts else "allgather",
        moe_router_pre_softmax=bool(setup.experts),
        add_bias_linear=not setup.experts,
        num_query_groups=setup.query_groups,
        gated_linear_unit=setup.swiglu,
        activation_func=torch.nn.functional.silu if setup.swiglu else torch.nn.functional.gelu,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(num_experts=setup.experts),
        vocab_size=setup.vocab,
        max_sequence_length=SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=setup.tied,
        position_embedding_type="rope",
    )
    if setup.bf16:
        model = model.to(torch.bfloat16)
    if setup.prepare_model is not None:
        setup.prepare_model(model)
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=setup.grads_in_fp32,
        overlap_grad_reduce=setup.overlap,
        overlap_param_gather=setup.overlap,
        bucket_size=setup.bucket_size,
        num_distributed_optimizer_instances=setup.instances,
        check_for_nan_in_grad=False,
    )
    chunks = [_wrap(setup, config, ddp_config, model)]
    config.finalize_model_grads_func = finalize_model_grads
    config.timers = None
    if setup.overlap:
        config.no_sync_func = chunks[0].no_sync
    options = dict(
        optimizer="adam",
        lr=1e-3,
        min_lr=1e-3,
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.95,
        clip_grad=1.0,
        bf16=setup.bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=setup.overlap,
        log_num_zeros_in_grad=True,
    )
    optimizer_config = OptimizerConfig(**{**options, **setup.optimizer})
    if setup.flash:
        optimizer = get_megatron_optimizer(optimizer_config, chunks, flash=setup.flash)
    else:
        optimizer = get_stock_optimizer(optimizer_config, chunks)
    for group in optimizer.param_groups:  # what the lr scheduler does at its first step
        group["lr"] = group.get("max_lr") or optimizer_config.lr
        group["weight_decay"] = optimizer_config.weight_decay * group.get("wd_mult", 1.0)
    return Trainer(setup, chunks, optimizer, optimizer_config)


def _wrap(setup: Setup, config: Any, ddp_config: Any, model: Any) -> Any:
    """Wrap the model in DDP with the layout that its optimizer needs."""
    if setup.foreign_layout or not versions.computes_layouts():
        align = setup.flash is not None and not setup.foreign_layout
        with FlashDistributedOptimizer.group_aligned_buffers() if align else nullcontext():
            return DistributedDataParallel(config, ddp_config, model)
    layout_class = FlashDistributedOptimizer if setup.flash else DistributedOptimizer
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    layout = layout_class.compute_full_param_layout(
        [p for p in model.parameters() if p.requires_grad],
        setup.bucket_size if setup.overlap and pp_rank == 0 else None,
        parallel_state.get_data_parallel_world_size(
            with_context_parallel=True, partial_data_parallel=setup.instances > 1
        ),
        ddp_config,
        expert_data_parallel_world_size=parallel_state.get_expert_data_parallel_world_size(),
    )
    return DistributedDataParallel(config, ddp_config, model, full_param_layout=layout)


@cache
def corpus() -> torch.Tensor:
    """Return real text as bytes: modules of the standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    names = ("argparse", "ast", "dataclasses", "inspect", "tarfile", "typing", "zipfile/__init__")
    text = b"".join((library / f"{name}.py").read_bytes() for name in names)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def _batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and labels of this data-parallel rank at a step."""
    generator = torch.Generator().manual_seed(step)
    rank = parallel_state.get_data_parallel_rank()
    world_size = parallel_state.get_data_parallel_world_size()
    starts = torch.randint(len(corpus()) - SEQUENCE - 1, (world_size, 2), generator=generator)
    rows = torch.stack([corpus()[s : s + SEQUENCE + 1] for s in starts[rank].tolist()])
    device = torch.cuda.current_device()
    return rows[:, :-1].to(device), rows[:, 1:].to(device)


def _forward_step(step: int, _: Any, model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    tokens, labels = _batch(step)
    positions = torch.arange(SEQUENCE, device=tokens.device).expand_as(tokens)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool, device=tokens.device).triu(1)
    output = model(tokens, positions, mask, labels=labels)

    def loss_func(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        loss = losses.float().mean()
        return loss, {"loss": loss.item()}

    return output, loss_func
