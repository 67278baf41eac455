"""FlashChainedOptimizer: Megatron's chain of optimizers, all of them flash."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megatron_flashoptim.checkpoint import metadata
from megatron_flashoptim.megatron.distrib_optimizer import FlashDistributedOptimizer

logger = logging.getLogger(__name__)


class FlashChainedOptimizer(ChainedOptimizer):
    """A chain whose members are checked to be flash optimizers.

    Args:
        chained_optimizers: the members of the chain Megatron built.

    Raises:
        RuntimeError: a member is another optimizer: a binding was missed, and training would
            silently use plain Adam.
    """

    def __init__(self, chained_optimizers: list[FlashDistributedOptimizer]) -> None:
        for member in chained_optimizers:
            if not isinstance(member, FlashDistributedOptimizer):
                raise RuntimeError(
                    f"expected FlashDistributedOptimizer, but Megatron built "
                    f"{type(member).__module__}.{type(member).__qualname__}; this version of "
                    "megatron-core builds optimizers in a way megatron-flashoptim does not know"
                )
        super().__init__(chained_optimizers)

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
        """
        self.grad_norms_by_group: dict[str, torch.Tensor] = {}
        if self.prepare_grads():
            return False, None, None
        grad_norm = self.get_grad_norm()
        members = [m for m in self.chained_optimizers if not m.is_stub_optimizer]
        if any(member.config.clip_grad > 0.0 for member in members):
            self._compute_grad_norms_by_group()
        too_large = False
        for member in members:
            if member.config.clip_grad > 0.0:
                member.scale_to_norm(grad_norm, self.grad_norms_by_group)
            threshold = member.config.grad_norm_skip_threshold
            if math.isfinite(threshold) and bool(grad_norm > threshold):
                logger.info("step skipped: gradient norm %s above %s", float(grad_norm), threshold)
                too_large = True
        zeros = self.count_zeros() if self.config.log_num_zeros_in_grad else None
        success = not too_large and self.step_with_ready_grads()
        return success, grad_norm, zeros

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
            for chunk in self.model_chunks:
                chunk.start_param_sync(force_sync=True)

    def count_zeros(self) -> int:
        """Return the number of zero gradient elements over all members."""
        return sum(member.count_zeros() for member in self.chained_optimizers)

    def sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool = False, **kwargs: Any
    ) -> Any:
        """Return the members' sharded state dicts; describe the format, or check it on load.

        Megatron stores the very ``metadata`` dict it passes here as the checkpoint's content
        metadata, and passes that of the checkpoint on load.

        Raises:
            ValueError: an unsupported sharding type, or, on load, state of another optimizer,
                format or bucket layout.
        """
        content = kwargs.get("metadata")
        metadata.check_sharding_type(content)
        members = [m for m in self.chained_optimizers if not m.is_stub_optimizer]
        if content is not None and members:
            spaces = [member.bucket_space() for member in members]
            if is_loading:
                metadata.check(content.get(metadata.KEY), members[0].flash)
                metadata.check_buckets(content[metadata.KEY], spaces)
            else:
                content[metadata.KEY] = metadata.describe(members[0].flash, spaces)
        return super().sharded_state_dict(model_sharded_state_dict, is_loading, **kwargs)

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
        """Return one line: optimizer, bytes per owned parameter, rounding, launches per step."""
        members = [m for m in self.chained_optimizers if not m.is_stub_optimizer]
        owned = self.owned_parameters()
        if not owned:
            return "no trainable parameters on this rank"
        flash = members[0].flash
        beta2 = max(group["betas"][1] for m in members for group in m.optimizer.param_groups)
        launches = sum(bool(shard.segments) for m in members for shard in m.optimizer.shards)
        return (
            f"{flash.optimizer}: {self.state_bytes() / owned:.4f} bytes of state per owned "
            f"parameter, {flash.master_bits}-bit masters ({flash.master_rounding} rounding), "
            f"second moment rounded {flash.resolve_rounding(beta2)}, {launches} launches per step"
        )
