"""Wrong inputs of the public codec are refused with what was given and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_flashoptim.codec import (
    correction_dtype,
    decode_exp_avg,
    decode_exp_avg_sq,
    encode_exp_avg,
    encode_exp_avg_sq,
    join_master,
    split_master,
)

ENCODERS = [encode_exp_avg, encode_exp_avg_sq]
DECODERS = [(decode_exp_avg, torch.int8, torch.uint8), (decode_exp_avg_sq, torch.uint8, torch.int8)]


def _refused(given: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(given)):
        call(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int32])
def test_encoding_another_dtype_than_fp32_is_refused(dtype: torch.dtype) -> None:
    for call in (*ENCODERS, split_master):
        _refused(str(dtype), call, torch.zeros(32, dtype=dtype))


@pytest.mark.parametrize("shape", [(2, 32), (1, 1, 4), ()])
def test_encoding_a_moment_that_is_not_flat_is_refused(shape: tuple[int, ...]) -> None:
    for call in ENCODERS:
        _refused(str(torch.Size(shape)), call, torch.zeros(shape))


@pytest.mark.parametrize("rounding", ["auto", "Nearest", "", None, 0])
def test_an_unknown_rounding_is_refused(rounding: Any) -> None:
    for call in (encode_exp_avg_sq, split_master):
        _refused(repr(rounding), call, torch.zeros(32), rounding=rounding)
        _refused("('nearest', 'stochastic')", call, torch.zeros(32), rounding=rounding)


@pytest.mark.parametrize("code", ["log", "Sqrt", "", None, 4])
def test_an_unknown_code_of_the_second_moment_is_refused(code: Any) -> None:
    encoded = torch.zeros(32, dtype=torch.uint8), torch.ones(1, dtype=torch.bfloat16)
    for call, args in ((encode_exp_avg_sq, (torch.zeros(32),)), (decode_exp_avg_sq, encoded)):
        _refused(repr(code), call, *args, code=code)
        _refused("('sqrt', 'fourth_root')", call, *args, code=code)


@pytest.mark.parametrize("bits", [0, 8, 23, 64, -24, "24", None])
def test_unknown_master_bits_are_refused(bits: Any) -> None:
    for call in (correction_dtype, lambda value: split_master(torch.zeros(32), bits=value)):
        _refused(repr(bits), call, bits)
        _refused("(16, 24, 32)", call, bits)


def test_correction_dtypes() -> None:
    assert [correction_dtype(bits) for bits in (16, 24, 32)] == [None, torch.int8, torch.int16]


@pytest.mark.parametrize(("decode", "right", "wrong"), DECODERS)
def test_decoding_codes_of_another_dtype_is_refused(
    decode: Callable[..., Any], right: torch.dtype, wrong: torch.dtype
) -> None:
    scale = torch.ones(1, dtype=torch.bfloat16)
    _refused(str(wrong), decode, torch.zeros(32, dtype=wrong), scale)
    _refused("[1, 32]", decode, torch.zeros(1, 32, dtype=right), scale)


@pytest.mark.parametrize(("decode", "dtype", "_"), DECODERS)
@pytest.mark.parametrize(("codes", "scales"), [(0, 1), (1, 0), (32, 2), (33, 1), (64, 3)])
def test_decoding_with_another_number_of_scales_is_refused(
    decode: Callable[..., Any], dtype: torch.dtype, _: Any, codes: int, scales: int
) -> None:
    given = (torch.zeros(codes, dtype=dtype), torch.ones(scales, dtype=torch.bfloat16))
    _refused(f"({scales},)", decode, *given)
    _refused(f"{codes} codes", decode, *given)


@pytest.mark.parametrize(("decode", "dtype", "_"), DECODERS)
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
def test_decoding_with_scales_of_another_dtype_is_refused(
    decode: Callable[..., Any], dtype: torch.dtype, _: Any, scale_dtype: torch.dtype
) -> None:
    _refused(
        str(scale_dtype), decode, torch.zeros(32, dtype=dtype), torch.ones(1, dtype=scale_dtype)
    )


def test_joining_another_high_part_than_bf16_is_refused() -> None:
    for dtype in (torch.float16, torch.float32, torch.int16):
        _refused(str(dtype), join_master, torch.zeros(4, dtype=dtype), None)


def test_joining_a_correction_of_another_dtype_or_shape_is_refused() -> None:
    high = torch.zeros(4, dtype=torch.bfloat16)
    for dtype in (torch.uint8, torch.int32, torch.float32):
        _refused(str(dtype), join_master, high, torch.zeros(4, dtype=dtype))
    _refused("[5]", join_master, high, torch.zeros(5, dtype=torch.int8))
    _refused("[2, 2]", join_master, high, torch.zeros(2, 2, dtype=torch.int8))
