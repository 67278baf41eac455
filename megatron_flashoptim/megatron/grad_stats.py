"""Gradient norm and zero count over bucket shards, with Megatron's rules for what counts.

Megatron leaves out parameters that another rank counts too: shared embeddings and duplicates
over tensor parallelism. What remains are runs of consecutive parameters in each shard; padding
between them is zero in the gradient buffer and may be read along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# Elements from which a view has a kernel of its own. torch._foreach_norm reads 320 chunks of 65,536
# elements to a launch, and what is left in another one that most of the device has no part in.
_LARGE = 2**22


@dataclass(frozen=True)
class ShardParam:
    """Where the elements of one parameter lie in a shard.

    Attributes:
        param: the model parameter.
        shard: index of the shard.
        start, end: element range in the shard.
        param_start: element of the parameter at ``start``.
        group_index: index of the parameter's param group.
    """

    param: torch.nn.Parameter
    shard: int
    start: int
    end: int
    param_start: int
    group_index: int


class GradRuns:
    """Runs of gradient elements that count for one statistic.

    Args:
        params: parameters of all shards, in order of shard and start.
        grads: flat gradient view of each shard.
        counts: whether a parameter counts on this rank.
    """

    def __init__(
        self,
        params: list[ShardParam],
        grads: list[torch.Tensor],
        counts: Callable[[torch.nn.Parameter], bool],
    ) -> None:
        runs: list[tuple[int, int, int]] = []
        self.numel = 0
        previous: ShardParam | None = None
        for item in params:
            counted = counts(item.param)
            if counted:
                self.numel += item.end - item.start
                if previous is not None and previous.shard == item.shard:
                    shard, start, _ = runs.pop()
                    runs.append((shard, start, item.end))
                else:
                    runs.append((item.shard, item.start, item.end))
            previous = item if counted else None
        self.views = [grads[shard][start:end] for shard, start, end in runs]

    def norms(self) -> list[torch.Tensor]:
        """Return fp32 L2 norms whose own L2 norm is that of the gradients; no host sync.

        One tensor with an element per run, computed in fp32 whatever the gradients' dtype; an
        empty list if nothing counts on this rank.
        """
        norms = self.norm_of_each()
        if len(norms) == 1:
            return [norms[0].reshape(1)]  # which launches nothing
        return [torch.stack(norms)] if norms else []

    def norm_of_each(self) -> list[torch.Tensor]:
        """Return an fp32 scalar per run, its L2 norm; no host sync."""
        small = [view for view in self.views if view.numel() < _LARGE]
        together = iter(torch._foreach_norm(small, 2, dtype=torch.float32) if small else ())
        return [
            next(together)
            if view.numel() < _LARGE
            else torch.linalg.vector_norm(view, dtype=torch.float32)
            for view in self.views
        ]

    def all_finite(self, device: torch.device | str) -> torch.Tensor:
        """Return a bool scalar on the device: whether every gradient element is finite."""
        finite = torch.ones((), dtype=torch.bool, device=device)
        if self.views:
            finite &= (
                torch.stack(list(torch._foreach_norm(self.views, float("inf")))).isfinite().all()
            )
        return finite

    def count_zeros(self, device: torch.device | str) -> torch.Tensor:
        """Return the number of zero elements as an int64 scalar on the device."""
        zeros = torch.tensor(self.numel, dtype=torch.int64, device=device)
        for view in self.views:
            zeros -= torch.count_nonzero(view)
        return zeros


class ReleasedStats:
    """Gradient statistics taken shard by shard, each while its gradients are there.

    Args:
        params: parameters of all shards, in order of shard and start.
        grads: flat gradient view of each shard.
        counts: for each norm group, whether a parameter counts on this rank.
        with_zeros: count zeros too, which reads the gradients once more.
    """

    def __init__(
        self,
        params: list[ShardParam],
        grads: list[torch.Tensor],
        counts: Mapping[str | None, Callable[[torch.nn.Parameter], bool]],
        *,
        with_zeros: bool,
    ) -> None:
        of_shard: list[list[ShardParam]] = [[] for _ in grads]
        for item in params:
            of_shard[item.shard].append(item)
        self._runs = {
            group: [GradRuns(items, grads, counted) for items in of_shard]
            for group, counted in counts.items()
        }
        self._with_zeros = with_zeros
        self._norms: dict[str | None, list[list[torch.Tensor]]] = {}
        self.clear()

    def clear(self) -> None:
        """Forget what was taken, before another backward pass."""
        self._norms = {group: [[] for _ in runs] for group, runs in self._runs.items()}
        self._counted = 0
        self._nonzeros: list[torch.Tensor] = []

    def take(self, shard: int) -> None:
        """Take the statistics of one shard's gradients; no host sync."""
        for group, runs in self._runs.items():
            self._norms[group][shard] = runs[shard].norm_of_each()
            if self._with_zeros:
                self._counted += runs[shard].numel
                self._nonzeros += [torch.count_nonzero(view) for view in runs[shard].views]

    def norms(self, group: str | None) -> list[torch.Tensor]:
        """Return what ``GradRuns.norms`` of all shards would, in the same order."""
        taken = [norm for norms in self._norms.get(group, []) for norm in norms]
        return [torch.stack(taken)] if taken else []

    def count_zeros(self, device: torch.device) -> torch.Tensor:
        """Return the number of zero elements as an int64 scalar on the device."""
        zeros = torch.tensor(self._counted, dtype=torch.int64, device=device)
        return zeros - sum(self._nonzeros)
