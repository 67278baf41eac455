"""FlashDistributedOptimizer: Megatron's DistributedOptimizer with FlashOptim state.

What the base class does stays: ranges, param groups, process groups, parameter all-gather,
checkpoint entry points. What changes: there are no main parameters beside the model weights and
no main gradients beside the gradient buffer. Each bucket shard holds flat int8 state next to
views of the two buffers, and is stepped by one launch.
"""

from __future__ import annotations

import copy
import inspect
import zlib
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig

from megatron_flashoptim.codec.spec import GROUP_SIZE
from megatron_flashoptim.megatron import versions
from megatron_flashoptim.megatron.checkpointing import FlashCheckpointing
from megatron_flashoptim.megatron.grad_stats import GradRuns, ReleasedStats, ShardParam
from megatron_flashoptim.megatron.layout import (
    check_group_alignment,
    check_weights,
    compute_group_aligned_layout,
    group_aligned_buffers,
)
from megatron_flashoptim.megatron.params_norm import Master, remember
from megatron_flashoptim.megatron.quantized import QuantizedWeights, is_quantized, main_param_of
from megatron_flashoptim.megatron.release.buffers import check_buffer, released_buffers
from megatron_flashoptim.megatron.support import check_configs
from megatron_flashoptim.optim import BucketShard, FlashOptimConfig, FlashOptimizer
from megatron_flashoptim.optim.segments import Segment, SegmentTable


@versions.also_under_older_names
class FlashDistributedOptimizer(FlashCheckpointing, QuantizedWeights, DistributedOptimizer):
    """Data-parallel sharded AdamW, or another rule, of 3.125 bytes of state per owned parameter.

    Takes the arguments of Megatron's ``DistributedOptimizer``; ``optimizer`` is used for its
    param groups only and replaced.

    Args:
        flash: update rule, formats and rounding; the defaults of ``FlashOptimConfig`` if None.

    Attributes:
        flash: the configuration in force.
        optimizer: the ``FlashOptimizer`` with the bucket shards.
        shard_params: where each owned parameter lies in the shards.
        shard_buckets: DDP's bucket of each shard.

    Raises:
        ValueError: an option that flash optimizers do not support, or a model wrapped in DDP
            with a layout whose shards would split quantization groups.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | None,
        config: OptimizerConfig,
        grad_scaler: Any,
        init_state_fn: Callable[..., None] | None,
        model_chunks: list[Any],
        per_model_buffers: dict[int, list[Any]],
        data_parallel_group: torch.distributed.ProcessGroup,
        *args: Any,
        flash: FlashOptimConfig | None = None,
        **kwargs: Any,
    ) -> None:
        versions.check()
        self.flash = flash or FlashOptimConfig()
        check_configs(config, model_chunks, self.flash)
        inner = None if optimizer is None else self._make_inner(optimizer, config)
        super().__init__(
            optimizer,
            config,
            grad_scaler,
            _no_state_to_init,
            model_chunks,
            per_model_buffers,
            data_parallel_group,
            *args,
            **kwargs,
        )
        # A stub lacks it, and is asked for it when a chain saves in the legacy format.
        self.data_parallel_group = data_parallel_group
        self.shard_params: list[ShardParam] = []
        self.shard_buckets: list[Any] = []
        self._clip_handles: list[torch.nn.Parameter] = []
        self._runs: dict[str | None, GradRuns] = {}
        self._every_run: GradRuns | None = None
        self._released: ReleasedStats | None = None
        if not self.is_stub_optimizer:
            assert inner is not None
            # Only now, since the base class may take no optimizers but those it knows.
            for own, group in zip(inner.param_groups, self.optimizer.param_groups, strict=True):
                own["params"] = group["params"]  # cut to this rank
            self.optimizer = inner
            self._build_shards()

    def _make_inner(
        self, optimizer: torch.optim.Optimizer, config: OptimizerConfig
    ) -> FlashOptimizer:
        """Make our optimizer from the param groups of the one Megatron built."""
        rule = self.flash.rule
        options = rule.options(config, self.flash)

        def is_kept(key: str, value: Any) -> bool:
            if key in ("params", "lr", "weight_decay") or key not in optimizer.defaults:
                return True
            # Adam's option: the rule's if it has one of that name and the group one of its own.
            return key in options and value != optimizer.defaults[key]

        return FlashOptimizer(
            [
                {key: value for key, value in group.items() if is_kept(key, value)}
                for group in optimizer.param_groups
            ],
            self.flash,
            lr=config.lr if config.lr is not None else 0.0,
            weight_decay=config.weight_decay,
            capturable=config.optimizer_cuda_graph,
            **options,
        )

    @staticmethod
    def compute_full_param_layout(
        params: list[torch.nn.Parameter],
        bucket_size: int | None,
        data_parallel_world_size: int,
        ddp_config: Any,
        expert_data_parallel_world_size: int | None = None,
    ) -> Any:
        """Return Megatron's ``FullParamLayout`` with every shard a whole number of groups.

        Raises:
            ImportError: this release of Megatron lays buffers out as it makes them; build DDP
                within ``group_aligned_buffers()``.
        """
        versions.check_layout_can_be_computed(
            "build DistributedDataParallel within FlashDistributedOptimizer.group_aligned_buffers()"
        )
        return compute_group_aligned_layout(
            inspect.unwrap(DistributedOptimizer.compute_full_param_layout),  # under install()
            params,
            bucket_size,
            data_parallel_world_size,
            ddp_config,
            expert_data_parallel_world_size,
        )

    # For DDP that is made without a layout: ``with ...group_aligned_buffers(): model = DDP(...)``.
    group_aligned_buffers = staticmethod(group_aligned_buffers)
    # Beside it with ``gradient_release=True``, whether DDP is made with a layout or not.
    released_buffers = staticmethod(released_buffers)

    @classmethod
    def _build_model_and_main_param_groups(
        cls,
        gbuf_ranges: list[Any],
        param_gbuf_map: dict[torch.nn.Parameter, Any],
        opt_group_ranges: list[Any],
        config: OptimizerConfig,
    ) -> tuple[list[Any], ...]:
        """Let the base class build param groups of views, without any main parameter."""
        views_only = copy.copy(config)
        views_only.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
        views_only.fp8_recipe = None  # no views of quantized weights with any recipe
        groups = super()._build_model_and_main_param_groups(
            gbuf_ranges, param_gbuf_map, opt_group_ranges, views_only
        )
        model_float16, model_fp32, shard_float16, shard_fp32, main = groups
        for number, model_group in enumerate(model_float16):
            for index, model_param in enumerate(model_group):
                if shard_float16[number][index] is None:
                    shard_float16[number][index] = main_param_of(model_param)
                # The bf16 view is the high part of the master.
                model_param.main_param = shard_float16[number][index]
            owned = [*shard_fp32[number], *shard_float16[number]]
            opt_group_ranges[number]["orig_group"]["params"] = owned
        return model_float16, model_fp32, shard_float16, shard_fp32, [[] for _ in main]

    def _build_shards(self) -> None:
        """Make one shard per bucket, on views of Megatron's buffers."""
        rows: dict[tuple[int, str | None], int] = {}
        shards: list[BucketShard] = []
        names = self._param_ids()
        for gbuf_index, buffer in enumerate(self.buffers):
            world_size = buffer.data_parallel_group.size()
            check_buffer(buffer, released=self.flash.gradient_release)
            check_group_alignment(buffer, world_size)
            (bucket_ranges,) = self.gbuf_ranges[gbuf_index].values()
            for bucket, ranges in zip(buffer.buckets, bucket_ranges, strict=True):
                segments = []
                located = sorted(
                    ((r["gbuf_local"], r["param"], p) for p, r in ranges["param_map"].items()),
                    key=lambda item: item[0].start,
                )
                for local, param_range, param in located:
                    group_index = self.model_param_group_index_map[param][0]
                    norm_group = versions.grad_norm_group(param)
                    row = rows.setdefault((group_index, norm_group), len(rows))
                    segments.append(
                        Segment(
                            start=local.start // GROUP_SIZE,
                            row=row,
                            tensor_id=names[param],
                            first_group=param_range.start // GROUP_SIZE,
                        )
                    )
                    self.shard_params.append(
                        ShardParam(
                            param=param,
                            shard=len(shards),
                            start=local.start,
                            end=local.end,
                            param_start=param_range.start,
                            group_index=group_index,
                        )
                    )
                self.shard_buckets.append(bucket)
                shards.append(_shard_of_bucket(bucket, buffer, segments, self.flash))
        self.make_high_parts(shards)
        for item in self.shard_params:
            remember(item.param, Master(shards[item.shard], item.start, item.end))
        # Not a buffer's device: a rank whose parameters are all frozen has no buffer.
        device = torch.device(torch.cuda.current_device())
        self.optimizer.attach(shards, [group_index for group_index, _ in rows], device)
        self._clip_handles = [
            self._clip_handle(row, norm_group) for (_, norm_group), row in rows.items()
        ]

    def _param_ids(self) -> dict[torch.nn.Parameter, int]:
        """Return 32-bit ids that key stochastic rounding, equal wherever a parameter has a replica.

        Replicas over tensor parallel ranks, data-parallel instances and, for tied embeddings,
        pipeline stages get the same gradients and must round alike to stay equal. So no rank goes
        into an id; that different layers or shards draw equal bits leaves each of them unbiased.
        """

        def key(chunk_index: int, name: str, param: torch.nn.Parameter) -> str:
            if getattr(param, "shared_embedding", False):
                return "shared_embedding"  # copies on several stages, under several names
            return f"{chunk_index}/{name}"

        return {
            param: zlib.crc32(key(chunk_index, name, param).encode())
            for chunk_index, chunk in enumerate(self.model_chunks)
            for name, param in chunk.named_parameters()
        }

    def _clip_handle(self, row: int, norm_group: str | None) -> torch.nn.Parameter:
        """Return a one-element parameter whose gradient is the gradient scale of a row.

        Megatron clips by multiplying the gradients of ``get_parameters()``. Given these handles
        it multiplies the device scalar that the step kernel applies, so that clipping reads no
        gradient and never waits for the host.
        """
        scale = self.optimizer.table.grad_scale
        handle = torch.nn.Parameter(torch.zeros_like(scale[row : row + 1]))
        handle.grad = scale[row : row + 1]
        if norm_group is not None:
            setattr(handle, versions.grad_norm_group_attribute(), norm_group)
        return handle

    def get_parameters(self) -> list[torch.nn.Parameter]:
        """Return the clip handles, see ``_clip_handle``."""
        return self._clip_handles

    def _grad_runs(self, norm_group: str | None) -> GradRuns:
        """Return the runs that count for a norm group (None: the main norm), made once.

        Not in ``__init__``, since Megatron sets ``tp_group`` after it.
        """
        if norm_group not in self._runs:
            grads = [shard.grad for shard in self.optimizer.shards]
            counts = self._counts_for(norm_group)
            self._runs[norm_group] = GradRuns(self.shard_params, grads, counts)
        return self._runs[norm_group]

    def _counts_for(self, norm_group: str | None) -> Callable[[torch.nn.Parameter], bool]:
        def counts(param: torch.nn.Parameter) -> bool:
            own_group = versions.grad_norm_group(param)
            if own_group not in versions.separate_grad_norm_groups():
                own_group = None
            return own_group == norm_group and self._counts_on_this_rank(param)

        return counts

    # Gradient release: the step of this optimizer, shard by shard in the backward pass.

    def take_stats_of_shards(self) -> None:
        """From now on norms and zero counts are taken by ``launch_released``, before each launch.

        Not in ``__init__``, since Megatron sets ``tp_group`` after it.
        """
        groups = (None, *versions.separate_grad_norm_groups())
        self._released = ReleasedStats(
            self.shard_params,
            [shard.grad for shard in self.optimizer.shards],
            {group: self._counts_for(group) for group in groups},
            with_zeros=self.config.log_num_zeros_in_grad,
        )

    def begin_released_step(self) -> None:
        """Count a step, before the first ``launch_released`` of a backward pass."""
        assert self._released is not None
        self._released.clear()
        self.optimizer.table.grad_scale.fill_(1.0)
        self.optimizer.begin_step()

    def launch_released(self, index: int) -> None:
        """Step one shard, whose gradients are not needed afterwards."""
        assert self._released is not None
        self._released.take(index)
        self.optimizer.launch(index)

    def _counts_on_this_rank(self, param: torch.nn.Parameter) -> bool:
        return versions.counts_on_this_rank(
            param,
            tp_group=getattr(self, "tp_group", None),
            expert_tp_group=getattr(self, "expert_tp_group", None),
        )

    def get_grads_for_grad_norm(self, grad_norm_group: str | None = None) -> list[torch.Tensor]:
        """Return tensors whose joint L2 norm is that of this rank's gradients.

        They are norms of runs of the gradient buffer, not the gradients: Megatron takes the
        2-norm of what it gets, and the 2-norm of 2-norms is the same number. Each gradient
        element is read once, in its own dtype, and summed in fp32.
        """
        if self.is_stub_optimizer:
            return []
        if self._released is not None:
            return self._released.norms(grad_norm_group)
        norms = self._grad_runs(grad_norm_group).norms()
        if self.grad_scaler:
            norms = [norm * self.grad_scaler.inv_scale for norm in norms]
        return norms

    def squared_grad_norm(self, grad_norm_group: str | None) -> torch.Tensor:
        """Return the square of this rank's gradient norm, an fp32 scalar on the device."""
        total = torch.zeros((), dtype=torch.float32, device=torch.cuda.current_device())
        for norms in self.get_grads_for_grad_norm(grad_norm_group):
            total = total + norms.square().sum()
        return total

    def scale_to_norm(
        self, grad_norm: torch.Tensor, by_group: dict[str | None, torch.Tensor]
    ) -> None:
        """Clip: scale the gradients of each norm group so that its norm is at most ``clip_grad``.

        Args:
            grad_norm: fp32 scalar on the device, the norm of the main group.
            by_group: norms of Megatron's separate groups.
        """

        def coefficient(norm: torch.Tensor) -> torch.Tensor:
            excess: torch.Tensor = (norm + 1e-6) / self.config.clip_grad
            # A NaN norm clips nothing, as with Megatron's float norms: what is NaN stays so.
            return excess.reciprocal().clamp(max=1.0).nan_to_num(nan=1.0)

        main = coefficient(grad_norm)
        for handle in self._clip_handles:
            norm = by_group.get(versions.grad_norm_group(handle))
            assert handle.grad is not None
            handle.grad.mul_(main if norm is None else coefficient(norm))

    def count_zeros(self) -> int:
        """Return the number of zero gradient elements over all ranks of this optimizer."""
        device = torch.device(torch.cuda.current_device())
        zeros = torch.zeros((), dtype=torch.int64, device=device)
        if self._released is not None:
            zeros = self._released.count_zeros(device)
        elif not self.is_stub_optimizer:
            for norm_group in (None, *versions.separate_grad_norm_groups()):
                zeros = zeros + self._grad_runs(norm_group).count_zeros(device)
        torch.distributed.all_reduce(zeros, group=self.get_grad_stats_parallel_group())
        return int(zeros.item())

    def _copy_model_grads_to_main_grads(self) -> None:
        """Reset the gradient scale; gradients are read where they are."""
        if not self.is_stub_optimizer:
            self.optimizer.check_not_offloaded()  # before gradients are read: theirs may be freed
            self.optimizer.table.grad_scale.fill_(1.0)

    def _unscale_main_grads_and_check_for_nan(self) -> bool:
        """Put the inverse loss scale into the gradient scale and look for Inf and NaN."""
        self.found_inf.fill_(0.0)
        if not self.is_stub_optimizer:
            self.optimizer.table.grad_scale.mul_(self.grad_scaler.inv_scale)
            if self._every_run is None:
                grads = [shard.grad for shard in self.optimizer.shards]
                self._every_run = GradRuns(self.shard_params, grads, lambda _: True)
            finite = self._every_run.all_finite(self.found_inf.device)
            self.found_inf.copy_((~finite).to(self.found_inf.dtype))
        torch.distributed.all_reduce(
            self.found_inf,
            op=torch.distributed.ReduceOp.MAX,
            group=self.get_grad_stats_parallel_group(),
        )
        if not self.is_stub_optimizer:
            # A step launched in spite of an overflow changes nothing.
            self.optimizer.table.skip.copy_(self.found_inf)
        return bool(self.found_inf.item() > 0)

    @torch.no_grad()
    def _copy_model_params_to_main_params(self, state_dict: dict[str, Any] | None = None) -> None:
        """Start from the model weights: corrections become zero.

        Args:
            state_dict: model state dict of higher precision; where given, masters are split from
                its values (``--load-main-params-from-ckpt``).
        """
        if self.is_stub_optimizer:
            return
        self.read_high_parts(self.optimizer.shards)
        for shard in self.optimizer.shards:
            if shard.correction is not None:
                shard.correction.zero_()
        if state_dict is None:
            return
        source_of = self._build_model_param_to_state_dict_param_map(state_dict)
        for item in self.shard_params:
            numel = item.end - item.start
            source = source_of[item.param].reshape(-1)[item.param_start : item.param_start + numel]
            self._set_master(item, source.to(device=item.param.device, dtype=torch.float32))

    def offload_to_cpu(self) -> None:
        """Move the state to host memory and free its device memory, for inference in RL.

        The high part of the masters stays where it is: it is the weights that inference uses. That
        of quantized weights, which inference uses instead, moves.
        """
        if not self.is_stub_optimizer:
            self.optimizer.offload()
            self.view_high_parts(self.optimizer.shards)  # or their memory would not be freed
            torch.cuda.empty_cache()

    def restore_from_cpu(self) -> None:
        """Move the state back to the device, which must happen before a step."""
        if not self.is_stub_optimizer:
            self.optimizer.restore()
            self.view_high_parts(self.optimizer.shards)


def _shard_of_bucket(
    bucket: Any, buffer: Any, segments: list[Segment], flash: FlashOptimConfig
) -> BucketShard:
    rank = buffer.data_parallel_group.rank()
    numel = bucket.grad_data.numel() // buffer.data_parallel_group.size()
    quantized = is_quantized(buffer)
    if bucket.param_data is None or bucket.param_data.numel() != bucket.grad_data.numel():
        raise ValueError(
            "flash optimizers step the weights in DDP's param buffer, and this bucket has none "
            "of its gradient buffer's size; use bf16 or fp32 parameters with "
            "--use-distributed-optimizer"
        )
    mine = slice(rank * numel, (rank + 1) * numel)
    if quantized:
        param = torch.zeros(numel, dtype=torch.bfloat16, device=bucket.grad_data.device)
    else:
        check_weights(bucket.params_list, bucket.param_data)
        param = bucket.param_data[mine]
    return BucketShard(
        param=param,
        grad=bucket.grad_data[mine],
        segments=SegmentTable(segments, numel // GROUP_SIZE, bucket.grad_data.device),
        master_bits=flash.master_bits,
        exp_avg_sq_code=flash.exp_avg_sq_code,
        rule=flash.rule,
        owns_param=quantized,
    )


def _no_state_to_init(*_: Any) -> None:
    """Stand in for Megatron's ``init_state_fn``: the state exists from the start."""
