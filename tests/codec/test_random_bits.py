"""Counter-based random bits: keys of groups, 16-bit draws of elements and of scales."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import SIGMAS

from megatron_flashoptim.codec import rounding, spec

GROUPS = 1 << 14
STREAMS = (spec.STREAM_EXP_AVG_SQ, spec.STREAM_MASTER)
SEEDS = [0, 1, 1234, 2**63 + 5, -1]
KINDS = ["elements", "scales", "keys"]
BITS = {"elements": 16, "scales": 16, "keys": 32}
CONSTANT = spec.COUNTER_MULTIPLIER


def _keys(
    seed: int = 0, step: int = 1, stream: int = 0, tensor_id: int = 0, groups: int = GROUPS
) -> torch.Tensor:
    key = rounding.tensor_key(rounding.launch_key(seed, step, stream), tensor_id)
    return rounding.group_key(key, torch.arange(groups))


def _draw(kind: str, keys: torch.Tensor) -> torch.Tensor:
    """Return what is drawn, flat: 32 per group of the elements, one of the scales and keys."""
    if kind == "elements":
        return rounding.element_draws(keys).flatten()
    return rounding.scale_draws(keys) if kind == "scales" else keys


def _assert_uniform(byte: torch.Tensor, what: str) -> None:
    """Chi-square over 256 values: mean 255, variance 510."""
    expected = byte.numel() / 256
    counts = torch.bincount(byte, minlength=256).double()
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - 255) <= SIGMAS * 510**0.5, what


def _assert_uncorrelated(x: torch.Tensor, y: torch.Tensor, what: str = "") -> None:
    """The correlation of n independent pairs is off zero by 1 / sqrt(n) per sigma."""
    correlation = torch.corrcoef(torch.stack([x.double(), y.double()]))[0, 1]
    assert correlation.abs() <= SIGMAS / x.numel() ** 0.5, what


def _assert_half(ones: torch.Tensor, what: str) -> None:
    count = ones.numel()
    assert abs(int(ones.sum()) - count / 2) <= SIGMAS * (count / 4) ** 0.5, what


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_byte_is_uniform(kind: str, seed: int) -> None:
    draws = _draw(kind, _keys(seed, step=3, groups=1 << 16))
    for shift in range(0, BITS[kind], 8):
        _assert_uniform((draws >> shift) & 0xFF, f"bits {shift} up")


@pytest.mark.parametrize("kind", KINDS)
def test_each_bit_is_set_half_of_the_time(kind: str) -> None:
    draws = _draw(kind, _keys())
    for bit in range(BITS[kind]):
        _assert_half((draws >> bit) & 1, f"bit {bit}")


def test_each_element_of_a_group_is_uniform_over_groups() -> None:
    draws = rounding.element_draws(_keys(groups=1 << 16))
    for element in range(spec.GROUP_SIZE):
        for shift in (0, 8):
            _assert_uniform((draws[:, element] >> shift) & 0xFF, f"element {element}")


@pytest.mark.parametrize(
    "other",
    [
        {"stream": 1},
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
@pytest.mark.parametrize("kind", KINDS)
def test_draws_under_two_keys_are_uncorrelated(kind: str, other: dict[str, int]) -> None:
    draws, others = _draw(kind, _keys()), _draw(kind, _keys(**other))
    assert not torch.equal(draws, others)
    _assert_uncorrelated(draws, others)
    for bit in range(BITS[kind]):
        _assert_half(((draws ^ others) >> bit) & 1, f"bit {bit}")


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 31, 32, 33, 34, 64, 1024, 4096])
@pytest.mark.parametrize("kind", KINDS)
def test_draws_a_lag_apart_are_uncorrelated(kind: str, lag: int) -> None:
    """Of the elements of a tensor (32 is the same place in the next group), of its scales."""
    draws = _draw(kind, _keys())
    _assert_uncorrelated(draws[:-lag], draws[lag:])


@pytest.fixture(scope="module")
def draws_of_groups() -> torch.Tensor:
    """The 33 draws of each of 2^18 groups, that of the scale last."""
    keys = _keys(groups=1 << 18)
    return torch.cat([rounding.element_draws(keys), rounding.scale_draws(keys)[:, None]], dim=1).T


def _pairs_of_draws() -> dict[tuple[int, int, int], list[tuple[int, int]]]:
    """Return pairs of the 33 draws of a group, those alike together.

    Alike are pairs of hashes as far apart (the scale's is number 16), of the same two halves. What
    one pair cannot show to 4 sigma, the mean over all alike can.
    """
    place = {i: (i // 2, i % 2) for i in range(32)} | {32: (16, 1)}
    alike: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for i, j in itertools.combinations(range(33), 2):
        distance = place[j][0] - place[i][0]
        alike.setdefault((distance, place[i][1], place[j][1]), []).append((i, j))
    return alike


def test_no_two_draws_of_a_group_are_correlated(draws_of_groups: torch.Tensor) -> None:
    """The halves of a pair, neighbouring pairs, pairs far apart, elements and the scale."""
    correlation = torch.corrcoef(draws_of_groups.double())
    count = draws_of_groups.shape[1]
    alike = _pairs_of_draws()
    assert len(alike) == 1 + 4 * 15 + 2  # the halves of a pair; 1 to 15 apart; scale and pair 0
    for what, pairs in alike.items():
        mean = torch.stack([correlation[i, j] for i, j in pairs]).mean().item()
        assert abs(mean) <= SIGMAS / (count * len(pairs)) ** 0.5, what
    of_scale = correlation[32, :32]
    assert (of_scale.abs() <= SIGMAS / count**0.5).all()


def test_any_two_draws_of_a_group_are_jointly_uniform(draws_of_groups: torch.Tensor) -> None:
    """Chi-square of their top four bits over 256 cells: mean 255 and variance 510 per pair."""
    top = draws_of_groups >> 12
    expected = top.shape[1] / 256
    for what, pairs in _pairs_of_draws().items():
        total = 0.0
        for i, j in pairs:
            counts = torch.bincount(top[i] * 16 + top[j], minlength=256).double()
            total += ((counts - expected) ** 2 / expected).sum().item()
        assert abs(total - 255 * len(pairs)) <= SIGMAS * (510 * len(pairs)) ** 0.5, what


@pytest.mark.parametrize("element", [0, 1, 24, 31, "scale"])
def test_draws_of_one_element_over_many_steps_are_uniform_and_uncorrelated(
    element: int | str,
) -> None:
    """What an element sees in training: its own group and place, another key each step."""
    steps = 4096
    keys = [rounding.tensor_key(rounding.launch_key(7, step, 0), 11) for step in range(steps)]
    group_keys = rounding.group_key(torch.tensor(keys), torch.tensor(385))
    scale_or_element = (
        rounding.scale_draws(group_keys)
        if element == "scale"
        else rounding.element_draws(group_keys)[:, element]
    )
    uniform = (scale_or_element.double() + 0.5) / 2**16
    assert abs(uniform.mean().item() - 0.5) <= SIGMAS * (1 / 12 / steps) ** 0.5
    _assert_uncorrelated(uniform[:-1], uniform[1:])


def test_no_two_streams_of_the_first_steps_share_a_key() -> None:
    keys = {
        rounding.launch_key(seed, step, stream)
        for seed in (0, 1, 2**32, 2**32 + 1)
        for step in range(1, 200)
        for stream in STREAMS
    }
    assert len(keys) == 4 * 199 * len(STREAMS)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stream", STREAMS)
def test_keys_of_a_tensor_of_steps_are_those_of_each_step(seed: int, stream: int) -> None:
    steps = [1, 2, 1000, 2**20 + 1, 2**31 - 1]
    keys = rounding.launch_keys(seed, torch.tensor(steps), stream)
    assert keys.tolist() == [rounding.launch_key(seed, step, stream) for step in steps]


def test_groups_of_a_tensor_have_distinct_keys_of_32_bits() -> None:
    """Key 0 and group numbers times an odd constant run through distinct inputs of the mixer."""
    keys = rounding.group_key(0, torch.arange(1 << 20))
    assert keys.unique().numel() == 1 << 20
    assert int(keys.min()) >= 0 and int(keys.max()) < 1 << 32


@pytest.mark.parametrize("pair", [0, 7, spec.SCALE_PAIR])
def test_distinct_group_keys_give_distinct_bits_of_a_pair(pair: int) -> None:
    """So every value of 32 bits is as frequent as any other."""
    keys = torch.cat([torch.arange(1 << 19), (1 << 32) - 1 - torch.arange(1 << 19)])
    bits = rounding.pair_bits(keys, torch.tensor(pair))
    assert bits.unique().numel() == 1 << 20
    assert int(bits.min()) >= 0 and int(bits.max()) < 1 << 32


def test_draws_have_16_bits() -> None:
    keys = _keys()
    for draws in (rounding.element_draws(keys), rounding.scale_draws(keys)):
        assert int(draws.min()) >= 0 and (1 << 16) - 100 < int(draws.max()) < 1 << 16


@settings(max_examples=200, deadline=None, derandomize=True)
@given(key=st.integers(0, 2**32 - 1), group=st.integers(-(2**40), 2**40))
def test_group_keys_equal_the_same_hash_in_python_integers(key: int, group: int) -> None:
    """No product wraps int64 wrongly; groups count modulo 2^32."""
    expected = rounding.mix32(group * CONSTANT + key)
    assert rounding.group_key(key, torch.tensor([group])).tolist() == [expected]
    keys = torch.tensor([key])
    assert rounding.group_key(keys, torch.tensor([group])).tolist() == [expected]


def _pair_bits_in_python(group_key: int, pair: int) -> int:
    value = (group_key + (pair + 1) * CONSTANT) % 2**32
    value ^= value >> 16
    value = value * spec.PAIR_MULTIPLIER % 2**32
    return value ^ (value >> 15)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(group_key=st.integers(0, 2**32 - 1))
def test_draws_are_the_halves_of_the_pairs_low_half_first(group_key: int) -> None:
    """Pairs 0 to 15 are of the elements, the upper half of pair 16 of the scale."""
    bits = [_pair_bits_in_python(group_key, pair) for pair in range(17)]
    keys = torch.tensor([group_key])
    assert rounding.pair_bits(keys, torch.arange(17)).tolist() == bits
    halves = [half for pair in bits[:16] for half in (pair & 0xFFFF, pair >> 16)]
    assert rounding.element_draws(keys).tolist() == [halves]
    assert rounding.scale_draws(keys).tolist() == [bits[16] >> 16]


def test_a_tensors_key_is_the_launch_key_under_a_mask_of_its_id() -> None:
    """So that a kernel needs no hash for it; id 0 is that of a tensor on its own."""
    assert rounding.tensor_key(0x12345678, 0) == 0x12345678
    assert rounding.tensor_key(0x12345678, 0xFFFFFFFF) == 0xEDCBA987


def test_random_bits_are_those_of_this_format_version() -> None:
    """A resumed run must draw what the interrupted one would have drawn."""
    assert spec.FORMAT_VERSION == 1
    assert rounding.mix32(1) == 1753845952
    assert rounding.launch_key(1234, 1, spec.STREAM_EXP_AVG_SQ) == 2452642526
    launch_key = rounding.launch_key(1234, 1, spec.STREAM_MASTER)
    assert launch_key == 986871781
    keys = rounding.group_key(rounding.tensor_key(launch_key, 0xDEADBEEF), torch.arange(3))
    assert keys.tolist() == [2036980068, 2270497323, 2070690478]
    draws = rounding.element_draws(keys)
    assert draws[:, :3].tolist() == [
        [45786, 52346, 35769],
        [42900, 18258, 33040],
        [27861, 50105, 47201],
    ]
    assert draws[:, 31].tolist() == [28755, 45362, 40297]
    assert rounding.scale_draws(keys).tolist() == [5474, 43308, 33405]
