"""fp32 parameters of a bf16 model: their own masters, in buckets of their own, 8-bit moments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixed_precision import EXPERTS, MIXED, is_kept_in_fp32
from ranks import run_ranks

from megatron_flashoptim import FlashOptimConfig
from megatron_flashoptim.optim.adamw import reference_adamw_step_

STOCHASTIC = FlashOptimConfig(master_bits=16, master_rounding="stochastic")


def _built(**options: Any) -> dict[str, Any]:
    import tiny_gpt

    trainer = tiny_gpt.build(tiny_gpt.Setup(**options))
    before = trainer.weights()
    trainer.train(2)
    names = {p: n for n, p in trainer.model[0].named_parameters()}
    found: dict[str, Any] = {"shards": [], "moved": {}}
    for name, weight in trainer.weights().items():
        found["moved"][name] = weight.dtype, not torch.equal(weight, before[name])
    for member in trainer.optimizer.chained_optimizers:
        for item in member.shard_params:
            shard = member.optimizer.shards[item.shard]
            view = item.param.detach().view(-1)[item.param_start :]
            found["shards"].append(
                {
                    "name": names[item.param],
                    "is_view": view.data_ptr() == shard.param[item.start :].data_ptr(),
                    "dtypes": (shard.param.dtype, shard.grad.dtype),
                    "corrected": shard.correction is not None,
                    "state": sum(t.nbytes for _, t in shard.state()) / shard.param.numel(),
                }
            )
    found["line"] = trainer.optimizer.describe()
    found["owned"] = trainer.optimizer.owned_parameters()
    return found


@pytest.mark.parametrize("flash", [FlashOptimConfig(), STOCHASTIC], ids=["24 bits", "16 bits"])
def test_the_weight_is_the_master_and_has_no_correction(flash: FlashOptimConfig) -> None:
    options = {**EXPERTS, "ep": 2, "grads_in_fp32": False, "flash": flash}
    for rank in run_ranks(2, _built, **options):
        in_fp32 = 0
        for shard in rank["shards"]:
            fp32 = is_kept_in_fp32(shard["name"])
            dtype = torch.float32 if fp32 else torch.bfloat16
            assert shard["is_view"] and shard["dtypes"] == (dtype, dtype), shard["name"]
            assert shard["corrected"] == (not fp32 and flash.master_bits == 24), shard["name"]
            assert shard["state"] == 2.125 + shard["corrected"], shard["name"]
            in_fp32 += fp32
        assert 0 < in_fp32 < len(rank["shards"])
        for name, (dtype, moved) in rank["moved"].items():
            assert moved and (dtype == torch.float32) == is_kept_in_fp32(name), name


def test_the_start_up_line_counts_fp32_weights() -> None:
    norms = 5 * 2 * 64  # weight and bias of two norms in each of two layers, and of the last one
    (mixed,) = run_ranks(1, _built, **MIXED)
    assert (
        f"24-bit masters (nearest rounding), {norms} of {mixed['owned']} weights" in mixed["line"]
    )
    (fp32,) = run_ranks(1, _built, bf16=False)
    assert "fp32 weights as masters" in fp32["line"] and "24-bit" not in fp32["line"]
    (bf16,) = run_ranks(1, _built)
    assert "24-bit masters (nearest rounding), second moment" in bf16["line"]


def _overflow(in_fp32: bool) -> tuple[Any, bool, set[int]]:
    """Overflow one gradient element on rank 1, of a norm or of another parameter."""
    import tiny_gpt

    options = {"loss_scale": 2.0, "clip_grad": 0.0}
    trainer = tiny_gpt.build(tiny_gpt.Setup(**MIXED, grads_in_fp32=False, optimizer=options))
    trainer.step()
    (member,) = trainer.optimizer.chained_optimizers
    shards = member.optimizer.shards
    dtype = torch.float32 if in_fp32 else torch.bfloat16
    for shard in shards:
        shard.grad.fill_(1.0)
        if torch.distributed.get_rank() == 1 and shard.param.dtype == dtype:
            shard.grad[40] = float("inf")

    def everything() -> list[torch.Tensor]:
        return [t.clone() for shard in shards for _, t in [("", shard.param), *shard.state()]]

    before = everything()
    result = trainer.optimizer.step()
    for shard in shards:  # a step launched in spite of it
        reference_adamw_step_(
            shard,
            member.optimizer.table,
            exp_avg_sq_rounding="nearest",
            master_rounding="nearest",
        )
    same = all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    return result, same, {group["step"] for group in trainer.optimizer.param_groups}


@pytest.mark.parametrize("in_fp32", [False, True])
def test_overflow_in_either_buffer_changes_no_byte_of_both(in_fp32: bool) -> None:
    for result, same, steps in run_ranks(2, _overflow, in_fp32):
        assert result == (False, None, None)
        assert same and steps == {1}
