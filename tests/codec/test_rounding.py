"""The pieces under the codec: bf16 rounding, square root, counter-based random bits."""

from __future__ import annotations

import pytest
import torch
from bitwise import assert_same_bits, bf16, finite_samples, fp32, fp32_ulp, patterns
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import SIGMAS

from megatron_flashoptim.codec import rounding, spec

COUNT = 1 << 16
OFFSETS = torch.arange(COUNT)
STREAMS = (spec.STREAM_EXP_AVG_SQ, spec.STREAM_EXP_AVG_SQ_SCALE, spec.STREAM_MASTER)


def _draw(seed: int = 0, step: int = 1, stream: int = 0, tensor_id: int = 0) -> torch.Tensor:
    key = rounding.tensor_key(rounding.launch_key(seed, step, stream), tensor_id)
    return rounding.random_bits(key, OFFSETS)


def _positive_patterns() -> torch.Tensor:
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1234, 0xABCD])
    return ((torch.arange(0x7F80) << 16).unsqueeze(1) + low).flatten()


def test_bf16_nearest_equals_torchs_rounding_for_every_high_part() -> None:
    bits = _positive_patterns()
    rounded = bf16(rounding.bf16_bits_nearest(bits))
    assert_same_bits(rounded, fp32(bits).to(torch.bfloat16))


def test_bf16_stochastic_rounds_up_for_as_many_draws_as_the_remainder() -> None:
    """Exact count: of the 2^16 possible draws, as many round up as the lower half says."""
    draws = torch.arange(1 << 16) << 16 | 0xFFFF
    for low in (0, 1, 0x7FFF, 0x8000, 0xFFFF):
        bits = torch.tensor(0x3F800000 + low)
        up = rounding.bf16_bits_stochastic(bits, draws) - 0x3F80
        assert ((up == 0) | (up == 1)).all()
        assert int(up.sum()) == low


def test_square_root_is_correctly_rounded() -> None:
    """y is nearest to sqrt(x) if (y - ulp/2)^2 <= x <= (y + ulp/2)^2.

    The midpoints have 25 significant bits, their squares 50: exact in fp64.
    """
    generator = torch.Generator().manual_seed(0)
    one_to_four = fp32(torch.randint(0x3F800000, 0x40800000, (1 << 20,), generator=generator))
    value = torch.cat([finite_samples(256).abs(), one_to_four])
    value = value[value > 0]
    root = rounding.sqrt_fp32(value)
    above = root.double() + fp32_ulp(root) / 2
    # Below a power of two the neighbour is half as far.
    is_power = (patterns(root) & 0x7FFFFF) == 0
    below = root.double() - fp32_ulp(root) / torch.where(is_power, 4, 2)
    assert (below * below <= value.double()).all()
    assert (value.double() <= above * above).all()


def test_square_root_of_special_values() -> None:
    roots = rounding.sqrt_fp32(fp32([0, 1 << 31, 0x7F800000, 0x7FC00000, 0xBF800000]))
    assert_same_bits(roots[:3], fp32([0, 1 << 31, 0x7F800000]))
    assert roots[3:].isnan().all()


@pytest.mark.parametrize("seed", [0, 1, 1234, 2**63 + 5, -1])
@pytest.mark.parametrize("shift", [24, 16, 8, 0])
def test_each_byte_of_the_random_bits_is_uniform(seed: int, shift: int) -> None:
    """Chi-square over 256 values: mean 255, variance 510."""
    byte = (_draw(seed, step=3) >> shift) & 0xFF
    counts = torch.bincount(byte, minlength=256).double()
    chi_square = ((counts - COUNT / 256) ** 2 / (COUNT / 256)).sum().item()
    assert abs(chi_square - 255) <= SIGMAS * 510**0.5


def test_each_random_bit_is_set_half_of_the_time() -> None:
    draws = _draw()
    for bit in range(32):
        ones = int(((draws >> bit) & 1).sum())
        assert abs(ones - COUNT / 2) <= SIGMAS * (COUNT / 4) ** 0.5, f"bit {bit}"


@pytest.mark.parametrize(
    "other",
    [
        {"stream": 1},
        {"stream": 2},
        {"step": 2},
        {"step": 1 + 2**20},
        {"seed": 1},
        {"seed": 2**32},
        {"seed": 2**63},
        {"tensor_id": 1},
        {"tensor_id": 0xFFFFFFFF},
    ],
    ids=lambda other: "{}={}".format(*next(iter(other.items()))),
)
def test_draws_of_one_element_in_two_streams_are_uncorrelated(other: dict[str, int]) -> None:
    """The correlation of n independent pairs is off zero by 1 / sqrt(n) per sigma."""
    pair = torch.stack([_draw(), _draw(**other)])
    assert not torch.equal(pair[0], pair[1])
    correlation = torch.corrcoef(rounding.uniform_from_bits(pair).double())[0, 1]
    assert correlation.abs() <= SIGMAS / COUNT**0.5
    for bit in (0, 8, 16, 24, 31):
        agree = int((((pair[0] ^ pair[1]) >> bit) & 1 == 0).sum())
        assert abs(agree - COUNT / 2) <= SIGMAS * (COUNT / 4) ** 0.5, f"bit {bit}"


@pytest.mark.parametrize("lag", [1, 2, 31, 32, 33, 1024, 4096])
def test_draws_of_neighbouring_elements_are_uncorrelated(lag: int) -> None:
    uniform = rounding.uniform_from_bits(_draw()).double()
    correlation = torch.corrcoef(torch.stack([uniform[:-lag], uniform[lag:]]))[0, 1]
    assert correlation.abs() <= SIGMAS / (COUNT - lag) ** 0.5


def test_draws_of_one_element_over_many_steps_are_uniform_and_uncorrelated() -> None:
    """What an element sees in training: its own offset, another key each step."""
    keys = [rounding.tensor_key(rounding.launch_key(7, step, 0), 11) for step in range(1, 4097)]
    offset = torch.tensor([12345])
    draws = torch.cat([rounding.random_bits(key, offset) for key in keys])
    uniform = rounding.uniform_from_bits(draws).double()
    assert abs(uniform.mean().item() - 0.5) <= SIGMAS * (1 / 12 / 4096) ** 0.5
    correlation = torch.corrcoef(torch.stack([uniform[:-1], uniform[1:]]))[0, 1]
    assert correlation.abs() <= SIGMAS / 4095**0.5


def test_no_two_streams_of_the_first_steps_share_a_key() -> None:
    keys = {
        rounding.launch_key(seed, step, stream)
        for seed in (0, 1, 2**32, 2**32 + 1)
        for step in range(1, 200)
        for stream in STREAMS
    }
    assert len(keys) == 4 * 199 * len(STREAMS)


def test_mixing_maps_distinct_inputs_to_distinct_outputs() -> None:
    """Key 0 and offsets times an odd constant run through distinct inputs of the mixer."""
    draws = rounding.random_bits(0, torch.arange(1 << 20))
    assert draws.unique().numel() == 1 << 20
    assert int(draws.min()) >= 0 and int(draws.max()) < 1 << 32


@settings(max_examples=200, deadline=None, derandomize=True)
@given(key=st.integers(0, 2**32 - 1), offset=st.integers(-(2**40), 2**40))
def test_tensor_draws_equal_the_same_hash_in_python_integers(key: int, offset: int) -> None:
    """No product wraps int64 wrongly; offsets count modulo 2^32."""
    expected = rounding.mix32(offset * spec.COUNTER_MULTIPLIER + key)
    assert rounding.random_bits(key, torch.tensor([offset])).tolist() == [expected]
    keys = torch.tensor([key])
    assert rounding.random_bits(keys, torch.tensor([offset])).tolist() == [expected]


def test_uniforms_lie_in_0_to_1_exclusive_and_take_24_bits() -> None:
    bits = torch.tensor([0, 0xFF, 0x100, 0x80000000, 0xFFFFFFFF])
    expected = torch.tensor([0.0, 0.0, 2.0**-24, 0.5, 1.0 - 2.0**-24])
    assert_same_bits(rounding.uniform_from_bits(bits), expected)


def test_random_bits_are_those_of_earlier_versions() -> None:
    """A resumed run must draw what the interrupted one would have drawn."""
    assert rounding.mix32(1) == 1753845952
    assert rounding.launch_key(1234, 1, spec.STREAM_MASTER) == LAUNCH_KEY
    key = rounding.tensor_key(LAUNCH_KEY, 0xDEADBEEF)
    assert rounding.random_bits(key, torch.arange(3)).tolist() == DRAWS


LAUNCH_KEY = 1496120220
DRAWS = [2387306179, 3846498492, 2938142509]
