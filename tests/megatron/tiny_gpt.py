"""A tiny GPT of Megatron's own parts, trained on real text by Megatron's own schedules."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from context_parallel import GatheredKeyAttention, hides
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer as get_stock_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank

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
    vp: int | None = None
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    sequence_parallel: bool = False
    microbatches: int = 1
    instances: int = 1
    layers: int = 2
    hidden: int = 64
    vocab: int = VOCAB
    swiglu: bool = False
    query_groups: int | None = None
    tied: bool = True
    positions: str = "rope"
    experts: int | None = None
    grouped: bool = False
    moe_layers: list[int] | None = None
    mtp: int | None = None
    bf16: bool = True
    grads_in_fp32: bool = True
    overlap: bool = False
    bucket_size: int | None = None
    foreign_layout: bool = False
    prepare_model: Callable[[Any], None] | None = None
    transformer: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
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
        iterators = [_batches(self.setup, self.step_number) for _ in self.model]
        losses = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iterators if self.setup.vp else iterators[0],
            model=self.model,
            num_microbatches=self.setup.microbatches,
            seq_length=SEQUENCE,
            micro_batch_size=2,
            forward_only=False,
        )
        self.step_number += 1
        loss = torch.tensor([sum(entry["loss"] for entry in losses) / self.setup.microbatches])
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(loss, group=group)
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(
            loss, last, group=parallel_state.get_pipeline_model_parallel_group()
        )
        replicas = parallel_state.get_data_parallel_world_size()
        if not update:
            return loss.item() / replicas, None, None
        ok, norm, zeros = self.optimizer.step()
        assert ok
        return loss.item() / replicas, float(norm), zeros

    def train(self, steps: int) -> list[float]:
        """Train some steps and return the losses."""
        return [self.step()[0] for _ in range(steps)]

    def sync_params(self) -> None:
        """Gather parameters whose all-gather overlaps with the next forward pass."""
        if self.model[0].ddp_config.overlap_param_gather:
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
            virtual_pipeline_model_parallel_size=setup.vp,
            context_parallel_size=setup.cp,
            expert_model_parallel_size=setup.ep,
            expert_tensor_parallel_size=setup.etp,
            num_distributed_optimizer_instances=setup.instances,
        )
    torch.manual_seed(1234)
    model_parallel_cuda_manual_seed(1234)
    config = _config(setup)
    ddp_config = _ddp_config(setup)
    chunks = [
        _wrapped(setup, config, ddp_config, _model(setup, config, stage), stage)
        for stage in range(setup.vp or 1)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    config.timers = None
    # As Megatron's training loop does; without virtual stages these are no lists.
    if ddp_config.overlap_grad_reduce:
        config.no_sync_func = _one_or_list(setup, [chunk.no_sync for chunk in chunks])
        config.grad_sync_func = _one_or_list(setup, [chunk.start_grad_sync for chunk in chunks])
    if ddp_config.overlap_param_gather and ddp_config.align_param_gather:
        config.param_sync_func = _one_or_list(setup, [chunk.start_param_sync for chunk in chunks])
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
        overlap_param_gather=ddp_config.overlap_param_gather,
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


def _config(setup: Setup) -> TransformerConfig:
    options: dict[str, Any] = dict(
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
        virtual_pipeline_model_parallel_size=setup.vp,
        context_parallel_size=setup.cp,
        expert_tensor_parallel_size=setup.etp,
        sequence_parallel=setup.sequence_parallel,
        mtp_num_layers=setup.mtp,
        expert_model_parallel_size=setup.ep,
        num_moe_experts=setup.experts,
        moe_layer_freq=setup.moe_layers or 1,
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
    return TransformerConfig(**{**options, **setup.transformer})


def _model(setup: Setup, config: TransformerConfig, stage: int) -> GPTModel:
    """Return the GPT of one virtual pipeline stage, or of the only one."""
    vp_stage = stage if setup.vp else None
    if setup.moe_layers:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=vp_stage)
    else:
        spec = get_gpt_layer_local_spec(num_experts=setup.experts)
        if setup.grouped:
            from grouped_experts import group_experts  # older releases of Megatron lack its parts

            group_experts(spec)
        if setup.cp > 1:
            spec.submodules.self_attention.submodules.core_attention = GatheredKeyAttention
    mtp_spec = None
    if setup.mtp:
        mtp_spec = get_gpt_mtp_block_spec(config, spec, False, vp_stage=vp_stage)
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=setup.vocab,
        max_sequence_length=SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=setup.tied,
        position_embedding_type=setup.positions,
        mtp_block_spec=mtp_spec,
        vp_stage=vp_stage,
    )
    if setup.bf16:
        model = model.to(torch.bfloat16)
    if setup.prepare_model is not None:
        setup.prepare_model(model)
    return model


def _ddp_config(setup: Setup) -> DistributedDataParallelConfig:
    options: dict[str, Any] = dict(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=setup.grads_in_fp32,
        overlap_grad_reduce=setup.overlap,
        overlap_param_gather=setup.overlap,
        bucket_size=setup.bucket_size,
        num_distributed_optimizer_instances=setup.instances,
        check_for_nan_in_grad=False,
    )
    return DistributedDataParallelConfig(**{**options, **setup.ddp})


def _wrapped(
    setup: Setup,
    config: TransformerConfig,
    ddp_config: DistributedDataParallelConfig,
    model: GPTModel,
    stage: int,
) -> DistributedDataParallel:
    """Return the model in DDP, with buckets where Megatron's training loop makes several."""
    releases = setup.flash is not None and setup.flash.gradient_release
    with FlashDistributedOptimizer.released_buffers() if releases else nullcontext():
        return _bucketed(setup, config, ddp_config, model, stage)


def _bucketed(
    setup: Setup,
    config: TransformerConfig,
    ddp_config: DistributedDataParallelConfig,
    model: GPTModel,
    stage: int,
) -> DistributedDataParallel:
    one_bucket = stage > 0 or bool(setup.optimizer.get("overlap_param_gather_with_optimizer_step"))
    if setup.foreign_layout or not versions.computes_layouts():
        align = setup.flash is not None and not setup.foreign_layout
        with FlashDistributedOptimizer.group_aligned_buffers() if align else nullcontext():
            return DistributedDataParallel(config, ddp_config, model, disable_bucketing=one_bucket)
    layout_class = FlashDistributedOptimizer if setup.flash else DistributedOptimizer
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    bucketed = ddp_config.overlap_grad_reduce and pp_rank == 0 and not one_bucket
    layout = layout_class.compute_full_param_layout(
        [p for p in model.parameters() if p.requires_grad],
        setup.bucket_size if bucketed else None,
        parallel_state.get_data_parallel_world_size(
            with_context_parallel=True, partial_data_parallel=setup.instances > 1
        ),
        ddp_config,
        expert_data_parallel_world_size=parallel_state.get_expert_data_parallel_world_size(
            partial_expert_data_parallel=setup.instances > 1
        ),
    )
    return DistributedDataParallel(
        config,
        ddp_config,
        model,
        disable_bucketing=one_bucket,
        full_param_layout=layout,
    )


def _one_or_list(setup: Setup, functions: list[Any]) -> Any:
    return functions if setup.vp else functions[0]


@cache
def corpus() -> torch.Tensor:
    """Return real text as bytes: modules of the standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    names = ("argparse", "ast", "dataclasses", "inspect", "tarfile", "typing", "zipfile/__init__")
    text = b"".join((library / f"{name}.py").read_bytes() for name in names)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def _batches(setup: Setup, step: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the microbatches of this rank at a step."""
    generator = torch.Generator().manual_seed(step)
    rank = parallel_state.get_data_parallel_rank()
    world_size = parallel_state.get_data_parallel_world_size()
    device = torch.cuda.current_device()
    for _ in range(setup.microbatches):
        starts = torch.randint(len(corpus()) - SEQUENCE - 1, (world_size, 2), generator=generator)
        rows = torch.stack([corpus()[s : s + SEQUENCE + 1] for s in starts[rank].tolist()])
        batch = {"tokens": rows[:, :-1], "labels": rows[:, 1:]}
        batch["positions"] = torch.arange(SEQUENCE).expand_as(batch["tokens"])
        batch["loss_mask"] = torch.ones(batch["tokens"].shape)
        if setup.cp > 1:
            group = parallel_state.get_context_parallel_group()
            batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def _forward_step(
    batches: Iterator[dict[str, torch.Tensor]], model: Any
) -> tuple[torch.Tensor, Callable[..., Any]]:
    batch = next(batches)
    positions = batch["positions"]
    mask = hides(positions[0], model.config.context_parallel_size)
    output = model(
        batch["tokens"], positions, mask, labels=batch["labels"], loss_mask=batch["loss_mask"]
    )

    def loss_func(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        # Megatron multiplies by the context-parallel size what is a mean over its ranks.
        loss = losses.float().mean() / model.config.context_parallel_size
        return loss, {"loss": loss.item()}

    return output, loss_func
