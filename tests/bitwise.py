"""Floats as bit patterns: making them, reading them, comparing them bit for bit."""

from __future__ import annotations

from fractions import Fraction

import torch

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def from_patterns(patterns: torch.Tensor | list[int], dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor of ``dtype`` whose elements have these unsigned patterns."""
    wide = torch.as_tensor(patterns, dtype=torch.int64)
    return wide.to(_INTEGER_OF_SIZE[dtype.itemsize]).view(dtype)


def fp32(patterns: torch.Tensor | list[int]) -> torch.Tensor:
    """Return fp32 values from their unsigned patterns."""
    return from_patterns(patterns, torch.float32)


def bf16(patterns: torch.Tensor | list[int]) -> torch.Tensor:
    """Return bf16 values from their unsigned patterns."""
    return from_patterns(patterns, torch.bfloat16)


def patterns(values: torch.Tensor) -> torch.Tensor:
    """Return the unsigned patterns of any 1-, 2- or 4-byte tensor as int64."""
    size = values.dtype.itemsize
    raw = values.contiguous().view(_INTEGER_OF_SIZE[size]).to(torch.int64)
    return raw & ((1 << 8 * size) - 1)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Fail, naming the first differing element, unless dtype, shape and every bit agree."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, expected {expected.shape}"
    differs = (patterns(actual) != patterns(expected)).flatten().nonzero().flatten()
    if differs.numel():
        at = int(differs[0])
        got, want = (t.flatten()[at].item() for t in (actual, expected))
        raise AssertionError(
            f"{what}: {differs.numel()} of {actual.numel()} elements differ; "
            f"first at {at}: {got!r}, expected {want!r}"
        )


def quiet(values: torch.Tensor) -> torch.Tensor:
    """Give every NaN one pattern: IEEE leaves sign and payload of a computed NaN open."""
    if not values.dtype.is_floating_point:
        return values
    return torch.where(values.isnan(), torch.nan, values)


def finite_samples(per_exponent: int = 64, seed: int = 0) -> torch.Tensor:
    """Return finite fp32 values of every exponent and both signs.

    Each exponent (the subnormals' 0 included) gets the mantissas around every carry of the
    24-bit and bf16 roundings, and ``per_exponent`` random ones.
    """
    edges = [0, 1, 0x7F, 0x80, 0x81, 0xFF, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x7F7F7F, 0x7F7F80]
    edges += [0x7F7FFF, 0x7F8000, 0x7FFF7F, 0x7FFF80, 0x7FFFFF]
    generator = torch.Generator().manual_seed(seed)
    random = torch.randint(0, 1 << 23, (255, per_exponent), generator=generator)
    mantissa = torch.cat([torch.tensor(edges).expand(255, -1), random], dim=1)
    magnitude = mantissa + (torch.arange(255) << 23).unsqueeze(1)
    return fp32(torch.cat([magnitude, magnitude + (1 << 31)]).flatten())


def nearest_fp32(exact: Fraction) -> float:
    """Return the fp32 number nearest to ``exact``, ties to even; an infinity where it overflows.

    Plain integers and fractions: nothing here rounds but the one ``round``. A result of zero is
    positive for an ``exact`` of zero, else it has the sign of ``exact``.
    """
    magnitude = abs(exact)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** exponent:
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, -126) - 23)
    rounded = round(magnitude / quantum) * quantum  # Python rounds halves to even
    value = float(rounded) if rounded < 2**128 else float("inf")  # exact: 24 bits
    return -value if exact < 0 else value


def fp32_ulp(values: torch.Tensor) -> torch.Tensor:
    """Return, in fp64, the distance of neighbouring fp32 numbers in each value's binade."""
    exponent = ((patterns(values) >> 23) & 0xFF).clamp(min=1)
    return torch.ldexp(torch.ones_like(values, dtype=torch.float64), exponent - 127 - 23)
