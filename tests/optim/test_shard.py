"""BucketShard: 3.125 bytes per element, zero state, wrong views refused."""

from __future__ import annotations

import pytest
import torch
from shards import Parameter, segments_of

from megatron_flashoptim.optim import BucketShard
from megatron_flashoptim.optim.segments import SegmentTable
from megatron_flashoptim.optim.shard import ELEMENT_STATE, GROUP_STATE

BF16, FP32 = torch.bfloat16, torch.float32


def _segments(groups: int) -> SegmentTable:
    return segments_of([Parameter(0, groups)], 0, groups)


def _shard(numel: int, dtype: torch.dtype = BF16, bits: int = 24) -> BucketShard:
    param = torch.zeros(numel, dtype=dtype)
    return BucketShard(param, torch.zeros(numel, dtype=BF16), _segments(numel // 32), bits)


@pytest.mark.parametrize(
    ("dtype", "bits", "bytes_per_element"),
    [(BF16, 24, 3.125), (BF16, 32, 4.125), (BF16, 16, 2.125), (FP32, 24, 2.125)],
    ids=str,
)
def test_state_has_the_promised_bytes_per_element(
    dtype: torch.dtype, bits: int, bytes_per_element: float
) -> None:
    """Two codes, two bf16 scales per 32 elements, and the correction; then the tables."""
    shard = _shard(64 * 1024, dtype, bits)
    state = sum(tensor.nbytes for _, tensor in shard.state())
    assert state == bytes_per_element * 64 * 1024
    assert shard.nbytes() == state + shard.segments.nbytes()
    assert shard.segments.nbytes() < 0.003 * 64 * 1024


@pytest.mark.parametrize(
    ("dtype", "bits", "correction"),
    [(BF16, 24, torch.int8), (BF16, 32, torch.int16), (BF16, 16, None), (FP32, 24, None)],
    ids=str,
)
def test_state_tensors_have_their_dtypes_and_lengths_and_start_at_zero(
    dtype: torch.dtype, bits: int, correction: torch.dtype | None
) -> None:
    shard = _shard(96, dtype, bits)
    state = dict(shard.state())
    dtypes = {
        "correction": correction,
        "exp_avg": torch.int8,
        "exp_avg_sq": torch.uint8,
        "exp_avg_scale": BF16,
        "exp_avg_sq_scale": BF16,
    }
    expected = {name: dtype for name, dtype in dtypes.items() if dtype is not None}
    assert list(state) == list(expected)
    for name, tensor in state.items():
        assert tensor.dtype == expected[name]
        assert tensor.shape == ((96,) if name in ELEMENT_STATE else (3,))
        assert not tensor.any()
    assert set(expected) <= {*ELEMENT_STATE, *GROUP_STATE}


def test_param_and_grad_are_the_given_views() -> None:
    buffer, grads = torch.zeros(128, dtype=BF16), torch.zeros(128)
    shard = BucketShard(buffer[32:96], grads[64:], _segments(2))
    assert shard.param.data_ptr() == buffer[32:].data_ptr()
    assert shard.grad.data_ptr() == grads[64:].data_ptr()
    assert shard.num_groups == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8], ids=str)
def test_views_of_another_dtype_are_refused(dtype: torch.dtype) -> None:
    good, bad = torch.zeros(32, dtype=BF16), torch.zeros(32, dtype=dtype)
    with pytest.raises(ValueError, match=f"the param shard must be bf16 or fp32, got {dtype}"):
        BucketShard(bad, good, _segments(1))
    with pytest.raises(ValueError, match=f"the grad shard must be bf16 or fp32, got {dtype}"):
        BucketShard(good, bad, _segments(1))


def test_views_that_are_not_flat_and_of_one_length_are_refused() -> None:
    flat = torch.zeros(64, dtype=BF16)
    with pytest.raises(ValueError, match="the param shard must be flat with 64 elements"):
        BucketShard(flat.view(2, 32), flat, _segments(2))
    with pytest.raises(ValueError, match="the grad shard must be flat with 64 elements"):
        BucketShard(flat, flat[:32], _segments(2))
    with pytest.raises(ValueError, match="the grad shard must be flat with 64 elements"):
        BucketShard(flat, torch.zeros(128)[::2], _segments(2))


@pytest.mark.parametrize("numel", [1, 31, 33, 100])
def test_a_part_of_a_group_is_refused(numel: int) -> None:
    with pytest.raises(ValueError, match=f"whole groups of 32, got {numel} elements"):
        _shard(numel)


def test_a_segment_table_of_another_length_is_refused() -> None:
    param = torch.zeros(64, dtype=BF16)
    with pytest.raises(ValueError, match="another number of groups"):
        BucketShard(param, param.clone(), _segments(3))


def test_unknown_master_bits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(16, 24, 32\), got 8"):
        _shard(32, bits=8)
