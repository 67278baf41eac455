"""Arithmetic that rounds correctly, and so alike on every device, without a branch.

The compiler's own division and square root branch for extreme operands; that costs registers and
instructions that these, whose operands are known to be ordinary, do without.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

# Triton's interpreter runs no inline assembly and does not fuse ``tl.fma``.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def fma(x, y, z):
    """Twin of ``codec.rounding.fma_fp32``."""
    if INTERPRETED:
        # Rounds twice, which shows in one of 2^29 results.
        return (x.to(tl.float64) * y.to(tl.float64) + z).to(tl.float32)
    else:
        return tl.fma(x, y, z)


@triton.jit
def reciprocal(value):
    """Twin of ``codec.rounding.reciprocal_fp32`` for normal numbers; NaN of 0 and Inf.

    One Newton step on the hardware's estimate. ``tests/kernels`` compare it with division for
    every mantissa on a GPU.
    """
    if INTERPRETED:
        inverse = tl.div_rn(tl.full(value.shape, 1.0, tl.float32), value)
        inverse = tl.where(inverse < 2.0**-126, 0.0, inverse)
        return tl.where((value == 0.0) | (value == float("inf")), float("nan"), inverse)
    else:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .f32 estimate, negated, error;
            rcp.approx.ftz.f32 estimate, $1;
            neg.f32 negated, $1;
            fma.rn.f32 error, negated, estimate, 0f3F800000;
            fma.rn.f32 $0, estimate, error, estimate;
            }
            """,
            "=f,f",
            [value],
            tl.float32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def square_root(value):
    """Return the correctly rounded square root of numbers from 2^-100 up; NaN of Inf.

    One Newton step on the hardware's estimate; compared on a GPU for every mantissa.
    """
    if INTERPRETED:
        return tl.where(value == float("inf"), float("nan"), tl.sqrt_rn(value))
    else:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .f32 estimate, half, root, negated, error;
            rsqrt.approx.ftz.f32 estimate, $1;
            mul.f32 root, $1, estimate;
            mul.f32 half, estimate, 0f3F000000;
            neg.f32 negated, root;
            fma.rn.f32 error, negated, root, $1;
            fma.rn.f32 $0, error, half, root;
            }
            """,
            "=f,f",
            [value],
            tl.float32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def multiply_saturated(x, y):
    """Return ``x * y`` clamped to [0, 1]; 0 for NaN."""
    if INTERPRETED:
        product = x * y
        return tl.where(product == product, tl.minimum(tl.maximum(product, 0.0), 1.0), 0.0)
    else:
        return tl.inline_asm_elementwise(
            "mul.sat.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _maximum(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def group_maximum(value):
    """Return the largest of each row of ``[GROUPS, 32]``, NaN if there is one, ``[GROUPS]``."""
    return tl.reduce(value, 1, _maximum)
