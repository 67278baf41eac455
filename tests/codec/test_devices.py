"""The codec gives the same bits on CPU and GPU, so that checkpoints move between them."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from bitwise import assert_same_bits, finite_samples, patterns, quiet
from groups import ALL_SCALES, every_code

from megatron_flashoptim.codec import (
    decode_exp_avg,
    decode_exp_avg_sq,
    encode_exp_avg,
    encode_exp_avg_sq,
    join_master,
    rounding,
    spec,
    split_master,
)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="compares CPU and GPU, and no GPU is visible"
)


@pytest.mark.parametrize("mode", spec.ROUNDINGS)
@pytest.mark.parametrize("bits", [16, 24, 32])
def test_master_weights_have_the_same_bits_on_cpu_and_gpu(bits: int, mode: spec.Rounding) -> None:
    weight = torch.cat([finite_samples(), torch.tensor([torch.inf, -torch.inf, torch.nan])])
    on_cpu = split_master(weight, bits=bits, rounding=mode)
    on_gpu = split_master(weight.cuda(), bits=bits, rounding=mode)
    assert_same_bits(on_gpu[0].cpu(), on_cpu[0])
    joined = join_master(*on_gpu).cpu()
    assert_same_bits(quiet(joined), quiet(join_master(*on_cpu)))
    assert (on_cpu[1] is None) == (on_gpu[1] is None)
    if on_cpu[1] is not None:
        assert_same_bits(on_gpu[1].cpu(), on_cpu[1])


def test_encoded_moments_have_the_same_bits_on_cpu_and_gpu() -> None:
    values = finite_samples(256)
    values = values[torch.randperm(values.numel(), generator=torch.Generator().manual_seed(0))]
    pairs = [(encode_exp_avg(values), encode_exp_avg(values.cuda()))]
    for code, mode in itertools.product(spec.EXP_AVG_SQ_CODES, spec.ROUNDINGS):
        encode = partial(encode_exp_avg_sq, code=code, rounding=mode)
        pairs.append((encode(values.abs()), encode(values.abs().cuda())))
    for on_cpu, on_gpu in pairs:
        assert_same_bits(on_gpu[0].cpu(), on_cpu[0], "codes")
        assert_same_bits(on_gpu[1].cpu(), on_cpu[1], "scales")


def test_decoded_moments_have_the_same_bits_on_cpu_and_gpu_for_every_scale_and_code() -> None:
    for decode, all_codes in (
        (decode_exp_avg, torch.arange(-127, 128).to(torch.int8)),
        (decode_exp_avg_sq, torch.arange(256).to(torch.uint8)),
        (partial(decode_exp_avg_sq, code="fourth_root"), torch.arange(256).to(torch.uint8)),
    ):
        codes, scales = every_code(ALL_SCALES, all_codes)
        on_gpu = decode(codes.cuda(), scales.cuda()).cpu()
        assert_same_bits(on_gpu, decode(codes, scales))


def test_fused_multiply_adds_and_reciprocals_have_the_same_bits_on_cpu_and_gpu() -> None:
    values = finite_samples(256)
    generator = torch.Generator().manual_seed(1)
    x, y, z = (values[torch.randperm(values.numel(), generator=generator)] for _ in range(3))
    for addend in (z, -(x * y), (x * y) * 2.0**-24):
        on_gpu = rounding.fma_fp32(x.cuda(), y.cuda(), addend.cuda()).cpu()
        assert_same_bits(quiet(on_gpu), quiet(rounding.fma_fp32(x, y, addend)))
    on_gpu = rounding.reciprocal_fp32(values.abs().cuda()).cpu()
    assert_same_bits(on_gpu, rounding.reciprocal_fp32(values.abs()))
    assert patterns(on_gpu).bool().any()
