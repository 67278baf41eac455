"""Gather the weights of a bucket as soon as it is stepped (``--flash-early-param-gather``).

With ``--overlap-param-gather`` Megatron's DistributedDataParallel starts the first all-gather in
the next forward pass, and each further one when the one before it has arrived. Here the step
launches the shards in the order in which the forward pass needs them, and dispatches the gather of
a bucket group behind the last of its launches: a collective waits for what the current stream holds
at the call, so that it runs beside the launches that come after.

To DistributedDataParallel this is what ``--overlap-param-gather-with-optimizer-step`` is for its
first model chunk: a chunk so marked waits for its gathers in the forward pass and starts none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_flashoptim.megatron.distrib_optimizer import FlashDistributedOptimizer
from megatron_flashoptim.optim import FlashOptimizer


@dataclass
class _GroupOfBuckets:
    """A bucket group of DDP, and the launches that its gather comes behind."""

    group: Any
    launches: list[tuple[FlashOptimizer, int]] = field(default_factory=list)


class EarlyGather:
    """Launches the shards of a chain's members, and gathers each bucket group behind its own.

    Args:
        chunks: model chunks wrapped in DDP, with ``overlap_param_gather``.
        members: the chain's members that have parameters; from now on their ``step`` leaves the
            launches to ``launch_and_gather``.
    """

    def __init__(self, chunks: Sequence[Any], members: Sequence[FlashDistributedOptimizer]) -> None:
        self._chunks = list(chunks)
        self._order = [_GroupOfBuckets(group) for chunk in chunks for group in _as_needed(chunk)]
        group_of = {id(bucket): entry for entry in self._order for bucket in entry.group.buckets}
        for member in members:
            member.optimizer.defers_launches = True
            for index, bucket in enumerate(member.shard_buckets):
                group_of[id(bucket)].launches.append((member.optimizer, index))

    def begin(self) -> None:
        """Have the next forward pass gather the weights, unless ``launch_and_gather`` does.

        A skipped step then gathers as Megatron does. Gathers that no forward pass has waited for,
        of unused parameters, are waited for: a step may not change what a gather still sends.
        """
        for chunk in self._chunks:
            chunk.overlap_param_gather_with_optimizer_step = False
        for entry in self._order:
            if entry.group.param_gather_handle is not None:
                entry.group.start_param_sync(force_sync=True)

    def launch_and_gather(self) -> None:
        """Launch every shard of a step that the members have begun, and gather it."""
        for chunk in self._chunks:
            chunk.overlap_param_gather_with_optimizer_step = True
        for entry in self._order:
            for optimizer, index in entry.launches:
                optimizer.launch(index)
            entry.group.start_param_sync()


def _as_needed(chunk: Any) -> list[Any]:
    """Return a chunk's bucket groups, dense and of experts, in the order of the forward pass.

    As Megatron does when it fills buckets from the last parameter to the first, this takes the
    order in which parameters were registered for that in which they are used.
    """
    place = {param: number for number, param in enumerate(chunk.module.parameters())}
    groups = [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]
    return sorted(groups, key=lambda group: min(place[param] for param in group.params))
