"""Norms of gradient runs: which elements, and in which order, however large the runs are."""

from __future__ import annotations

import pytest
import torch

from megatron_flashoptim.megatron import grad_stats
from megatron_flashoptim.megatron.grad_stats import GradRuns, ReleasedStats, ShardParam

SIZES = (64, 1024, 32, 96, 2048, 32)
UNCOUNTED = (2, 5)
# Parameters 0 and 1 and the padding between them are one run; 3 and 4 lie in another shard.
RUNS = ((0, 0, 1088 + 32), (1, 0, 96 + 2048))


def _stats() -> tuple[list[ShardParam], list[torch.Tensor], list[torch.nn.Parameter]]:
    owned = [torch.nn.Parameter(torch.zeros(size)) for size in SIZES]
    starts = (0, 96, 1120, 0, 96, 2144)
    params = [
        ShardParam(param, number // 3, start, start + param.numel(), 0, 0)
        for number, (param, start) in enumerate(zip(owned, starts, strict=True))
    ]
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(size, generator=generator).bfloat16() for size in (1152, 2176)]
    grads[0][64:96] = 0  # padding
    return params, grads, owned


@pytest.mark.parametrize("large", [1, 1500, 10_000], ids=["all large", "both kinds", "all small"])
def test_norms_are_those_of_each_run_in_order(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grad_stats, "_LARGE", large)
    params, grads, owned = _stats()

    def counts(param: torch.nn.Parameter) -> bool:
        return all(param is not owned[number] for number in UNCOUNTED)

    runs = GradRuns(params, grads, counts)
    expected = [grads[shard][start:end].double().norm() for shard, start, end in RUNS]
    (norms,) = runs.norms()
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms.double(), torch.stack(expected), rtol=1e-6, atol=0)
    assert runs.numel == sum(size for n, size in enumerate(SIZES) if n not in UNCOUNTED)
    # Taken shard by shard, in another order: the same bits.
    released = ReleasedStats(params, grads, {None: counts}, with_zeros=False)
    for shard in (1, 0):
        released.take(shard)
    (taken,) = released.norms(None)
    assert torch.equal(taken, norms)
