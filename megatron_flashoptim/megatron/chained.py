"""FlashChainedOptimizer: Megatron's chain of optimizers, all of them flash."""

from __future__ import annotations

from megatron.core.optimizer.optimizer import ChainedOptimizer

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

    def count_zeros(self) -> float:
        """Return the number of zero gradient elements over all members."""
        return float(sum(member.count_zeros() for member in self.chained_optimizers))

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
        if not members:
            return "no trainable parameters on this rank"
        flash = members[0].flash
        beta2 = max(group["betas"][1] for m in members for group in m.optimizer.param_groups)
        owned = max(self.owned_parameters(), 1)
        launches = sum(bool(shard.segments) for m in members for shard in m.optimizer.shards)
        return (
            f"{flash.optimizer}: {self.state_bytes() / owned:.4f} bytes of state per owned "
            f"parameter, {flash.master_bits}-bit masters ({flash.master_rounding} rounding), "
            f"second moment rounded {flash.resolve_rounding(beta2)}, {launches} launches per step"
        )
