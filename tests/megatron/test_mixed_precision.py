"""fp32 parameters of a bf16 model: their own masters, in buckets of their own, 8-bit moments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixed_precision import EXPERTS, MIXED, is_kept_in_fp32
from ranks import run_ranks

from megatron_flashoptim import FlashOptimConfig
from megatron_flashoptim.optim.step import reference_step_

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
        reference_step_(
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


def _half(model: Any) -> None:
    model.half()


def _refusal(prepare_model: Any) -> str:
    import tiny_gpt

    try:
        tiny_gpt.build(tiny_gpt.Setup(prepare_model=prepare_model))
    except ValueError as problem:
        return str(problem)
    return ""


def test_fp16_weights_are_refused_also_where_no_option_says_so() -> None:
    (message,) = run_ranks(1, _refusal, _half)
    assert "Parameter of torch.float16" in message and "without --fp16" in message


class _Quantized(torch.Tensor):
    """A tensor that says bf16 and wraps bytes, made as Transformer Engine's FP8 weights are."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> _Quantized:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.bfloat16)

    def __init__(self, data: torch.Tensor) -> None:
        self._data = data

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        assert function is torch.ops.aten.detach.default
        return cls(args[0]._data)


def test_weights_that_are_no_views_of_the_param_buffer_are_refused() -> None:
    from megatron_flashoptim.megatron.layout import check_weights

    buffer = torch.zeros(64, dtype=torch.bfloat16)
    bytes_of_fp8 = torch.zeros(64, dtype=torch.uint8)
    check_weights([torch.nn.Parameter(buffer[:32]), torch.nn.Parameter(buffer[32:])], buffer)
    for param, data, named in (
        (torch.nn.Parameter(_Quantized(bytes_of_fp8)), bytes_of_fp8, "in a buffer of torch.uint8"),
        (torch.nn.Parameter(_Quantized(bytes_of_fp8)), buffer, "a _Quantized of torch.bfloat16"),
        (torch.nn.Parameter(buffer.clone()), buffer, "a Parameter of torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=named):
            check_weights([param], data)


def _configured(recipe: str) -> tuple[str | None, bool, list[str | None]]:
    """Return what Megatron makes of ``--fp8-format`` for the optimizer, and our refusals of it."""
    from megatron.training import arguments, training
    from test_hook import BASE, _parse

    from megatron_flashoptim.megatron.support import first_refusal

    base = [flag for flag in BASE if flag not in ("--transformer-impl", "local")]
    args = _parse(
        *("--optimizer", "flash_adamw", "--fp8-format", "hybrid", "--fp8-recipe", recipe),
        base=base,
    )
    assert not isinstance(args, str), args
    args = arguments.validate_args(args)
    optimizer, _ = training.get_megatron_optimizer_config(args)
    configs = (optimizer, training.get_megatron_ddp_config(args))
    refusals = [first_refusal("flash_adamw", config) for config in configs]
    return optimizer.fp8_recipe, args.fp8_param_gather, refusals


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_fp8_computation_on_bf16_weights_is_accepted(recipe: str) -> None:
    assert run_ranks(1, _configured, recipe) == [(recipe, False, [None, None])]
