"""Bytes in and out of registers: one byte permutation per code instead of a conversion.

Four codes share a 32-bit register. A conversion from an integer byte to fp32 runs on the pipe of
the reciprocals, at a quarter of the rate of a multiplication; a permutation that puts the byte
below the exponent of 2^23, and a subtraction, do not.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from megatron_flashoptim.kernels.arithmetic import INTERPRETED


@triton.jit
def _above_2_to_23(code):
    """Return 2^23 + code for uint8 as fp32."""
    bits = tl.inline_asm_elementwise(
        """
        prmt.b32 $0, $4, 0x4B000000, 0x7440;
        prmt.b32 $1, $4, 0x4B000000, 0x7441;
        prmt.b32 $2, $4, 0x4B000000, 0x7442;
        prmt.b32 $3, $4, 0x4B000000, 0x7443;
        """,
        "=r,=r,=r,=r,r",
        [code],
        tl.int32,
        is_pure=True,
        pack=4,
    )
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def unsigned_byte_to_fp32(code):
    """Convert uint8 to fp32 (exact)."""
    if INTERPRETED:
        return code.to(tl.float32)
    else:
        return _above_2_to_23(code) - 8388608.0


@triton.jit
def multiply_unsigned_byte(factor, code):
    """Return fp32 ``factor`` (below 2^104) times uint8 ``code``, rounded once."""
    if INTERPRETED:
        return factor * code.to(tl.float32)
    else:
        # The fused operation takes off 2^23 times the factor, exactly.
        return tl.fma(factor, _above_2_to_23(code), factor * -8388608.0)


@triton.jit
def signed_byte_to_fp32(code):
    """Convert int8 to fp32 (exact)."""
    if INTERPRETED:
        return code.to(tl.float32)
    else:
        # Flipping the sign bit adds 128, which the subtraction takes off with 2^23.
        bits = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 biased;
            xor.b32 biased, $4, 0x80808080;
            prmt.b32 $0, biased, 0x4B000000, 0x7440;
            prmt.b32 $1, biased, 0x4B000000, 0x7441;
            prmt.b32 $2, biased, 0x4B000000, 0x7442;
            prmt.b32 $3, biased, 0x4B000000, 0x7443;
            }
            """,
            "=r,=r,=r,=r,r",
            [code],
            tl.int32,
            is_pure=True,
            pack=4,
        )
        return bits.to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def add_signed_byte(bits, correction):
    """Return ``bits + 256 * correction`` for int32 and int8 tensors."""
    if INTERPRETED:
        return bits + (correction.to(tl.int32) << 8)
    else:
        # Byte 1 of each result is the code, bytes 2 and 3 are its sign.
        shifted = tl.inline_asm_elementwise(
            """
            prmt.b32 $0, $4, 0, 0x8804;
            prmt.b32 $1, $4, 0, 0x9914;
            prmt.b32 $2, $4, 0, 0xaa24;
            prmt.b32 $3, $4, 0, 0xbb34;
            """,
            "=r,=r,=r,=r,r",
            [correction],
            tl.int32,
            is_pure=True,
            pack=4,
        )
        return bits + shifted


def _gather(index: int) -> tl.constexpr:
    """Return the assembly that gathers one byte of each of four registers."""
    selector = f"0x00{4 + index}{index}"
    return tl.constexpr(
        f"""
        {{
        .reg .b32 low, high;
        prmt.b32 low, $1, $2, {selector};
        prmt.b32 high, $3, $4, {selector};
        prmt.b32 $0, low, high, 0x5410;
        }}
        """
    )


GATHER_BYTE_0 = _gather(0)
GATHER_BYTE_1 = _gather(1)
GATHER_BYTE_2 = _gather(2)


@triton.jit
def _gathered(bits, assembly: tl.constexpr):
    return tl.inline_asm_elementwise(assembly, "=r,r,r,r,r", [bits], tl.int8, is_pure=True, pack=4)


@triton.jit
def low_byte(bits):
    """Return the lowest byte of an int32 tensor as int8."""
    if INTERPRETED:
        return bits.to(tl.int8)
    else:
        return _gathered(bits, GATHER_BYTE_0)


@triton.jit
def second_byte(bits):
    """Return bits 8 to 15 of an int32 tensor as int8."""
    if INTERPRETED:
        return (bits >> 8).to(tl.int8)
    else:
        return _gathered(bits, GATHER_BYTE_1)


@triton.jit
def third_byte(bits):
    """Return bits 16 to 23 of an int32 tensor as uint8."""
    if INTERPRETED:
        return (bits >> 16).to(tl.uint8)
    else:
        return _gathered(bits, GATHER_BYTE_2).to(tl.uint8, bitcast=True)


@triton.jit
def upper_half(bits):
    """Return the upper 16 bits of an int32 tensor as bf16 patterns."""
    if INTERPRETED:
        half = (bits >> 16).to(tl.int16)
    else:
        half = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [bits], tl.int16, is_pure=True, pack=2
        )
    return half.to(tl.bfloat16, bitcast=True)


@triton.jit
def store_group_scale(scale_ptr, group, bits, mask):
    """Store a bf16 scale pattern per group, ``[GROUPS]`` int32, from where it is computed.

    ``tl.store`` spreads a tile over all threads first, through shared memory and two barriers of
    the whole program; here each of the threads that share a group stores the same two bytes.
    """
    if INTERPRETED:
        scale = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
        tl.store(scale_ptr + group, scale, mask=mask)
    else:
        tl.inline_asm_elementwise(
            """
            {
            .reg .pred inside;
            .reg .b16 scale;
            setp.ne.b32 inside, $3, 0;
            cvt.u16.u32 scale, $2;
            @inside st.global.b16 [$1], scale;
            mov.b32 $0, 0;
            }
            """,
            "=r,l,r,r",
            [(scale_ptr + group).to(tl.int64), bits, mask.to(tl.int32)],
            tl.int32,
            is_pure=False,
            pack=1,
        )
