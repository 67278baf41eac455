"""Reciprocal, square root and fused multiply-add of the kernels are correctly rounded.

On a GPU for every mantissa; in the interpreter, which takes other paths, for a sample.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from bitwise import assert_same_bits, finite_samples, fp32

from megatron_flashoptim.codec import rounding
from megatron_flashoptim.kernels import arithmetic

SIZE = 1024
LAUNCH = {"enable_fp_fusion": False}
# NaN and infinity are part of what is compared.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@triton.jit
def _reciprocal_kernel(value_ptr, result_ptr, SIZE: tl.constexpr):
    offsets = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(result_ptr + offsets, arithmetic.reciprocal(tl.load(value_ptr + offsets)))


@triton.jit
def _square_root_kernel(value_ptr, result_ptr, SIZE: tl.constexpr):
    offsets = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(result_ptr + offsets, arithmetic.square_root(tl.load(value_ptr + offsets)))


@triton.jit
def _fma_kernel(x_ptr, y_ptr, z_ptr, result_ptr, SIZE: tl.constexpr):
    offsets = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x, y, z = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets), tl.load(z_ptr + offsets)
    tl.store(result_ptr + offsets, arithmetic.fma(x, y, z))


def _mantissas(device: str) -> torch.Tensor:
    """Every fp32 mantissa on a GPU, every 521st elsewhere."""
    return torch.arange(0, 1 << 23, 1 if device == "cuda" else 521)


def _run(kernel, device: str, *values: torch.Tensor) -> torch.Tensor:
    count = values[0].numel()
    padded = [torch.nn.functional.pad(v, (0, -count % SIZE), value=1.0).to(device) for v in values]
    result = torch.full_like(padded[0], 99.0)
    kernel[(len(result) // SIZE,)](*padded, result, SIZE=SIZE, **LAUNCH)
    return result.cpu()[:count]


@pytest.mark.parametrize("exponent", [-126, -100, -74, -1, 0, 1, 7, 64, 100, 125])
def test_reciprocals_are_correctly_rounded(device: str, exponent: int) -> None:
    """Of every mantissa at these exponents, all there are between the format's limits."""
    values = fp32(_mantissas(device) + (exponent + 127 << 23))
    result = _run(_reciprocal_kernel, device, values)
    assert_same_bits(result, rounding.reciprocal_fp32(values))


def test_a_reciprocal_that_would_be_subnormal_is_zero_and_of_no_number_is_nan(device: str) -> None:
    values = torch.tensor([2.0**126, 2.0**126 * 1.25, 3e38, torch.inf, 0.0, torch.nan])
    result = _run(_reciprocal_kernel, device, values)
    assert result[:3].tolist() == [2.0**-126, 0.0, 0.0]
    assert result[3:].isnan().all()


@pytest.mark.parametrize("exponent", [-100, -99, -50, -1, 0, 1, 2, 63, 126, 127])
def test_square_roots_are_correctly_rounded(device: str, exponent: int) -> None:
    values = fp32(_mantissas(device) + (exponent + 127 << 23))
    assert_same_bits(_run(_square_root_kernel, device, values), rounding.sqrt_fp32(values))


def test_the_square_root_of_infinity_or_nan_is_nan(device: str) -> None:
    values = torch.tensor([torch.inf, torch.nan])
    assert _run(_square_root_kernel, device, values).isnan().all()


def test_fused_multiply_add_equals_the_reference(device: str) -> None:
    """Ordinary and cancelling products, subnormal results; on a GPU also magnitudes far apart and
    near powers of two, where the interpreter, which rounds twice, is off.
    """
    generator = torch.Generator().manual_seed(0)
    x, y, z = torch.randn(3, 1 << 16, generator=generator)
    x, y, z = torch.cat([x, x]), torch.cat([y, y]), torch.cat([z, -(x * y)])
    if device == "cuda":
        samples = finite_samples(8)
        more = [samples[torch.randperm(len(samples), generator=generator)] for _ in range(3)]
        x, y = torch.cat([x, more[0], x * 1e-30]), torch.cat([y, more[1], y * 1e-12])
        z = torch.cat([z, more[2], z * 1e-40])
    expected = rounding.fma_fp32(x, y, z)
    result = _run(_fma_kernel, device, x, y, z)
    both = ~(expected.isnan() & result.isnan())
    assert both.float().mean() > 0.9
    assert_same_bits(result[both], expected[both])
