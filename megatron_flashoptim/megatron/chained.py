"""FlashChainedOptimizer: Megatron's chain of optimizers, all of them flash."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer.optimizer import ChainedOptimizer

from megatron_flashoptim.checkpoint import metadata
from megatron_flashoptim.megatron.distrib_optimizer import FlashDistributedOptimizer


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
