"""FlashChainedOptimizer: Megatron's chain of optimizers, all of them flash."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.utils import log_single_rank

from megatron_flashoptim.megatron import versions
from megatron_flashoptim.megatron.bucket_clipping import BucketClipping
from megatron_flashoptim.megatron.chained_checkpointing import ChainedCheckpointing
from megatron_flashoptim.megatron.distrib_optimizer import FlashDistributedOptimizer
from megatron_flashoptim.megatron.early_gather import EarlyGather
from megatron_flashoptim.megatron.release.gradient_release import GradientRelease
from megatron_flashoptim.megatron.release.support import check_release

logger = logging.getLogger(__name__)


class FlashChainedOptimizer(ChainedCheckpointing, ChainedOptimizer):
    """A chain whose members are checked to be flash optimizers.

    A member is a stub, without state and parameters, where no rank trains any parameter of its
    kind: dense ones, or with ``--overlap-param-gather-with-optimizer-step`` those of some model
    chunks. Megatron gives all ranks the param groups of each, so that a member is a stub on all
    ranks or on none, and what the others agree on is a collective of all ranks.

    Args:
        chained_optimizers: the members of the chain Megatron built.

    Attributes:
        release: steps the members in the backward pass (``--flash-gradient-release``), or None.

    Raises:
        RuntimeError: a member is another optimizer: a binding was missed, and training would
            silently use plain Adam.
        ValueError: an option that cannot be used with gradient release or clipping by bucket.
    """

    chained_optimizers: list[FlashDistributedOptimizer]

    def __init__(self, chained_optimizers: list[FlashDistributedOptimizer]) -> None:
        for member in chained_optimizers:
            if not isinstance(member, FlashDistributedOptimizer):
                raise RuntimeError(
                    f"expected FlashDistributedOptimizer, but Megatron built "
                    f"{type(member).__module__}.{type(member).__qualname__}; this version of "
                    "megatron-core builds optimizers in a way megatron-flashoptim does not know"
                )
        super().__init__(chained_optimizers)
        members = [member for member in chained_optimizers if not member.is_stub_optimizer]
        # Here too, since a Megatron with one of patches/ does not call get_megatron_optimizer.
        for member in members:
            check_release(member.config, self.model_chunks, member.flash)
        self._early_gather: EarlyGather | None = None
        if members and members[0].flash.early_param_gather:
            self._early_gather = EarlyGather(self.model_chunks, members)
        self.release: GradientRelease | None = None
        if members and members[0].flash.gradient_release:
            self.release = GradientRelease(self.model_chunks, members)
        for member in members:
            if member.flash.bucket_clip_grad > 0.0:
                BucketClipping(member, member.flash.bucket_clip_grad)

    @torch.no_grad()
    def step(self) -> tuple[bool, torch.Tensor | None, int | None]:
        """Step all members: gradient norm, clipping, update, without waiting for the device.

        The norm and the clip coefficient stay on the device, and clipping multiplies the gradient
        scale that the step kernel applies. The host waits only where Megatron's own options need
        a number on the host: a loss scale, ``--log-num-zeros-in-grad``, a finite
        ``grad_norm_skip_threshold``.

        Returns:
            ``(success, grad_norm, num_zeros_in_grad)`` as of Megatron's ``ChainedOptimizer``; the
            norm is an fp32 scalar on the device.

        Raises:
            RuntimeError: with gradient release, the backward pass has not stepped every bucket.
        """
        self.grad_norms_by_group: dict[str | None, torch.Tensor] = {}
        if self.release is not None:
            self.release.finish_step()
        if self._early_gather is not None:
            self._early_gather.begin()
        if self.prepare_grads():
            return False, None, None
        members = [m for m in self.chained_optimizers if not m.is_stub_optimizer]
        with self._timed("optimizer-clip-main-grad"):
            grad_norm = self.get_grad_norm()
            clips = any(member.config.clip_grad > 0.0 for member in members)
            if clips and versions.separate_grad_norm_groups():
                self._compute_grad_norms_by_group()
            for member in members:
                if member.config.clip_grad > 0.0:
                    member.scale_to_norm(grad_norm, self.grad_norms_by_group)
        too_large = False
        for member in members:
            threshold = versions.grad_norm_skip_threshold(member.config)
            if math.isfinite(threshold) and bool(grad_norm > threshold):
                message = f"step skipped: gradient norm {float(grad_norm)} above {threshold}"
                log_single_rank(logger, logging.INFO, message)
                too_large = True
        zeros = None
        if self.config.log_num_zeros_in_grad:
            with self._timed("optimizer-count-zeros"):
                zeros = self.count_zeros()
        success = not too_large and self.step_with_ready_grads()
        return success, grad_norm, zeros

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Run Megatron's timer of that name; below its log level the host waits for nothing.

        Megatron's chain lacks these timers, though its log and its single optimizers have them.
        """
        timers = self.config.timers
        if timers is not None:
            timers(name, log_level=1).start(barrier=self.config.barrier_with_L1_time)
        yield
        if timers is not None:
            timers(name).stop()

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Step all members, and with early gather dispatch the gathers of their weights."""
        if self._early_gather is None:
            return bool(super().step_with_ready_grads())
        self._early_gather.begin()
        success = bool(super().step_with_ready_grads())
        with self._timed("optimizer-inner-step"):  # more of what the members' step has timed
            self._early_gather.launch_and_gather()
        return success

    def _step(self) -> bool:
        """Step all members; gather the first model chunk while later ones are being stepped.

        The latter with ``--overlap-param-gather-with-optimizer-step``, for which the first member
        is the first chunk's and the next ones are the others' and that of all chunks' experts.
        Megatron gathers the first chunk once the first member has stepped, its experts too, which
        are then overwritten or used as they were (seen in 0.19.2). Here they are stepped first.
        """
        if not self.config.overlap_param_gather_with_optimizer_step:
            return bool(super()._step())
        first_chunk = self.model_chunks[0]
        early = [first_chunk in member.model_chunks for member in self.chained_optimizers]
        success = True
        for before_the_gather in (True, False):
            for member, is_early in zip(self.chained_optimizers, early, strict=True):
                if is_early == before_the_gather:
                    success &= bool(member.step_with_ready_grads())
            if before_the_gather:
                first_chunk.start_param_sync(force_dispatch=True)
        return success

    @torch.no_grad()
    def get_grad_norm(self) -> torch.Tensor:
        """Return the L2 norm of all gradients over all ranks, an fp32 scalar on the device."""
        return self._get_grad_norm_for_group(None)

    def _get_grad_norm_for_group(self, grad_norm_group: str | None) -> torch.Tensor:
        """Return the norm of one of Megatron's norm groups (None: the main one)."""
        groups: dict[Any, torch.Tensor] = {}
        for member in self.chained_optimizers:
            group = member.get_grad_stats_parallel_group()
            squared = member.squared_grad_norm(grad_norm_group)
            groups[group] = groups[group] + squared if group in groups else squared
        for group, squared in groups.items():
            torch.distributed.all_reduce(squared, group=group)
        return torch.stack(list(groups.values())).sum().sqrt()

    def reload_model_params(self, state_dict: Any = None) -> None:
        """Refresh masters from the model weights, or from a state dict of higher precision.

        A state dict rewrites each rank's own part of the weights, so they are gathered again.
        """
        super().reload_model_params(state_dict=state_dict)
        if state_dict is not None:
            self._gather_weights()

    def count_zeros(self) -> int:
        """Return the number of zero gradient elements over all members."""
        return sum(member.count_zeros() for member in self.chained_optimizers)

    def state_bytes(self) -> int:
        """Return the bytes of optimizer state on this rank."""
        return sum(
            member.optimizer.nbytes()
            for member in self.chained_optimizers
            if not member.is_stub_optimizer
        )

    def owned_parameters(self) -> int:
        """Return the number of parameter elements this rank owns the state of."""
        return sum(
            item.end - item.start
            for member in self.chained_optimizers
            for item in member.shard_params
        )

    def describe(self) -> str:
        """Return one line: optimizer, bytes per owned parameter, masters, rounding, launches."""
        members = [m for m in self.chained_optimizers if not m.is_stub_optimizer]
        owned = self.owned_parameters()
        if not owned:
            return "no trainable parameters on this rank"
        flash = members[0].flash
        rounded = ""
        if flash.rule.keeps_exp_avg_sq:
            found = sorted({member.optimizer.exp_avg_sq_rounding() for member in members})
            rounded = f"second moment rounded {' and '.join(found)}, "
        launches = sum(bool(shard.segments) for m in members for shard in m.optimizer.shards)
        counted = "1 launch" if launches == 1 else f"{launches} launches"
        return (
            f"{flash.optimizer}: {self.state_bytes() / owned:.4f} bytes of state per owned "
            f"parameter, {self._describe_masters(members, owned)}, {rounded}{counted} per step"
            + (", in the backward pass" if flash.gradient_release else "")
        )

    @staticmethod
    def _describe_masters(members: list[FlashDistributedOptimizer], owned: int) -> str:
        flash = members[0].flash
        items = [(m.optimizer.shards[item.shard], item) for m in members for item in m.shard_params]
        fp32 = sum(i.end - i.start for _, i in items if i.param.dtype == torch.float32)
        if fp32 == owned:
            return "fp32 weights as masters"
        masters = f"{flash.master_bits}-bit masters ({flash.master_rounding} rounding)"
        if fp32:
            masters += f", {fp32} of {owned} weights fp32 masters"
        quantized = sum(item.end - item.start for shard, item in items if shard.owns_param)
        if quantized:
            masters += f", {quantized} with a bf16 high part beside the quantized weight"
        return masters
