"""Groups of 32 to encode: sampled over magnitudes, drawn by hypothesis, every code of a scale."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bitwise import bf16
from hypothesis import strategies

from megatron_flashoptim.codec import spec

# Every finite bf16 scale but zero: subnormals, then all exponents.
ALL_SCALES = bf16(torch.arange(1, 0x7F80))


def random_groups(lowest: float = 1e-18, highest: float = 1e18) -> Iterator[torch.Tensor]:
    """Yield flat fp32 tensors, signed, at 37 magnitudes between the two, each of three shapes.

    Per magnitude: 32 groups of normal values, 32 that span many decades, 32 of a single huge
    value among tiny ones; and a partial last group.
    """
    generator = torch.Generator().manual_seed(0)

    def normal() -> torch.Tensor:
        return torch.randn(32, 32, generator=generator)

    for magnitude in torch.logspace(*torch.tensor([lowest, highest]).log10().tolist(), 37):
        spread = normal() * torch.exp(4 * normal()).clamp(max=100.0) / 100.0
        lone = normal() * 1e-6
        lone[:, 7] = 1.0
        groups = torch.cat([normal() / 4, spread, lone]).clamp(-1.0, 1.0)
        yield (groups * magnitude).flatten()[:-5].contiguous()


def drawn_groups() -> strategies.SearchStrategy[torch.Tensor]:
    """Draw flat fp32 tensors of 1 to 70 elements within 1e-18 to 1e18 in magnitude, or 0."""
    value = strategies.floats(-1.0, 1.0, width=32)
    return strategies.builds(
        lambda values, decade: torch.tensor(values, dtype=torch.float32) * 10.0**decade,
        strategies.lists(value, min_size=1, max_size=70),
        strategies.integers(-18, 18),
    )


def every_code(scales: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return flat codes and scales: groups of the top code and 31 others, for every scale.

    Args:
        scales: bf16 scales.
        codes: all codes of the format, the top code last.
    """
    rows = -(-codes.numel() // 31)
    body = codes[-1].repeat(rows * 31)
    body[: codes.numel()] = codes
    groups = torch.cat([codes[-1].repeat(rows, 1), body.view(rows, 31)], dim=1)
    return groups.repeat(len(scales), 1).flatten(), scales.repeat_interleave(rows)


def scales_within(low: float, high: float) -> torch.Tensor:
    """Return all bf16 scales from ``low`` to below ``high``."""
    scales = ALL_SCALES.double()
    return ALL_SCALES[(scales >= low) & (scales < high)]


def per_element(scale: torch.Tensor, numel: int) -> torch.Tensor:
    """Return the fp64 scale of each of ``numel`` elements."""
    return scale.double().repeat_interleave(32)[:numel]


def coded(root: torch.Tensor, code: spec.ExpAvgSqCode) -> torch.Tensor:
    """Return what the code of the second moment is in proportion to: r = sqrt(v), or its root."""
    return root.double() if code == "sqrt" else root.double().sqrt()


def uncoded(quantity: torch.Tensor, code: spec.ExpAvgSqCode) -> torch.Tensor:
    """Return the root r of which ``quantity`` is ``coded``."""
    return quantity if code == "sqrt" else quantity * quantity


def group_max(values: torch.Tensor) -> torch.Tensor:
    """Return the largest element of each element's group, in the shape of ``values``."""
    missing = -values.numel() % 32
    groups = torch.nn.functional.pad(values, (0, missing)).view(-1, 32)
    return groups.amax(dim=1).repeat_interleave(32)[: values.numel()]
