"""The step has stock Megatron's semantics: decay, learning rates, clipping, groups, norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoded import flash_state, stock_state
from mixed_precision import EXPERTS, MIXED
from ranks import run_ranks

from megatron_flashoptim import FlashOptimConfig
from megatron_flashoptim.optim.step import reference_step_

# Relative to the master: half a quantum of a 24-bit pattern, which keeps 15 mantissa bits.
MASTER_BOUND = 2.0**-16
# Relative to a weight: the fp32 rounding of the subtraction, on either side.
ONE_ULP = 2.0**-22
# Relative to the update: a few fp32 roundings in another order (seen: 2^-22).
UPDATE_BOUND = 2.0**-20


def _one_step(ours: bool, **options: Any) -> dict[str, Any]:
    """Take one step from fresh state; return decoded masters and moments by parameter name."""
    import tiny_gpt
    from exact_adamw import use_as_megatrons_adam

    if not ours:
        use_as_megatrons_adam()
        options["flash"] = None
    trainer = tiny_gpt.build(tiny_gpt.Setup(**options))
    before = {p: p.detach().float().view(-1).clone() for p in trainer.model[0].parameters()}
    loss, norm, zeros = trainer.step()
    names = {p: n for n, p in trainer.model[0].named_parameters()}
    result: dict[str, Any] = {"norm": norm, "zeros": zeros, "loss": loss, "params": {}}
    for member in trainer.optimizer.chained_optimizers:
        for bucket_ranges in (m for maps in member.gbuf_ranges for m in maps.values()):
            for ranges in bucket_ranges:
                for param, where in ranges["param_map"].items():
                    tensors = flash_state(member, param) if ours else stock_state(member, param)
                    owned = where["param"]
                    tensors["before"] = before[param][owned.start : owned.end]
                    in_fp32 = param.dtype == torch.float32
                    tensors["master_bound"] = 0.0 if in_fp32 else MASTER_BOUND
                    result["params"][names[param], owned.start] = tensors
    return result


def _per_element(scale: torch.Tensor, numel: int) -> torch.Tensor:
    return scale.repeat_interleave(32)[:numel]


def _assert_same_step(world_size: int, **options: Any) -> list[Any]:
    stock_ranks = run_ranks(world_size, _one_step, False, **options)
    flash_ranks = run_ranks(world_size, _one_step, True, **options)
    stock = {k: v for rank in stock_ranks for k, v in rank["params"].items()}
    flash = {k: v for rank in flash_ranks for k, v in rank["params"].items()}
    assert stock.keys() == flash.keys()
    for key in stock:
        _assert_within_format(key, stock[key], flash[key])
    for ours, theirs in zip(flash_ranks, stock_ranks, strict=True):
        assert ours["norm"] == pytest.approx(theirs["norm"], rel=2e-6)
        assert ours["zeros"] == theirs["zeros"]
        assert ours["loss"] == theirs["loss"]
    return flash_ranks


def _assert_within_format(key: Any, stock: dict[str, Any], flash: dict[str, Any]) -> None:
    """From the same start and gradients, flash differs from fp32 by one rounding of each."""
    numel = stock["param"].numel()
    error = (flash["param"] - stock["param"]).abs()
    update = (stock["param"] - stock["before"]).abs()
    bound = (flash["master_bound"] + ONE_ULP) * stock["param"].abs() + UPDATE_BOUND * update.max()
    assert (error <= bound).all(), (key, (error - bound).max())
    # Companding: dx/dz of x = z / (2 - z) is at most 2, at z = 1, so that half a code step moves
    # m by scale / 127 at most; the scale's own rounding matters for the top code alone.
    scale = _per_element(flash["exp_avg_scale"], numel)
    error = (flash["exp_avg"] - stock["exp_avg"]).abs()
    assert (error <= scale * (1 / 127 + 2.0**-20)).all(), key
    # r = sqrt(v) moves by half a step of scale / 255; a positive v gets code 1 at least.
    scale = _per_element(flash["exp_avg_sq_scale"], numel)
    error = (flash["exp_avg_sq"].sqrt() - stock["exp_avg_sq"].sqrt()).abs()
    assert (error <= scale * (1 / 255 + 2.0**-20)).all(), key


CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "bf16 gradients": {"grads_in_fp32": False},
    "several buckets": {"overlap": True, "bucket_size": 30_000},
    "tight clipping": {"optimizer": {"clip_grad": 0.05}},
    "no clipping": {"optimizer": {"clip_grad": 0.0}},
    "decoupled learning rate": {"optimizer": {"decoupled_lr": 5e-3, "decoupled_min_lr": 5e-3}},
    "large weight decay": {"optimizer": {"weight_decay": 10.0}},
    "weight decay on q and k layernorm": {"optimizer": {"apply_wd_to_qk_layernorm": True}},
    "untied embeddings": {"tied": False},
    "other betas and eps": {
        "optimizer": {"adam_beta1": 0.8, "adam_beta2": 0.99, "adam_eps": 1e-3},
        # Stochastic rounding, the choice at this beta2, may move the largest by a scale's ulp.
        "flash": FlashOptimConfig(rounding="nearest"),
    },
    "fp32 model": {"bf16": False},
    "fp32 norms, bf16 gradients": {**MIXED, "grads_in_fp32": False},
    "fp32 norms and routers": {**EXPERTS, "ep": 2},
    "tensor parallel": {"tp": 2},
    "pipeline parallel": {"pp": 2},
    "experts": {"ep": 2, "experts": 4},
}


@pytest.mark.smoke
@pytest.mark.parametrize("case", CASES)
def test_one_step_equals_stock_adamw_within_the_format(case: str) -> None:
    _assert_same_step(2, **CASES[case])


def _rows() -> list[Any]:
    import tiny_gpt

    options = {"decoupled_lr": 5e-3, "decoupled_min_lr": 5e-3, "weight_decay": 0.3}
    trainer = tiny_gpt.build(tiny_gpt.Setup(tied=False, optimizer=options))
    (member,) = trainer.optimizer.chained_optimizers
    (shard,) = member.optimizer.shards
    trainer.step()
    step_size, decay, *_ = member.optimizer.table.values.unbind(dim=1)
    names = {p: n for n, p in trainer.model[0].named_parameters()}
    lr = step_size * (1 - 0.9)  # without the bias correction of step 1
    decay = decay / lr
    return [
        (names[item.param], lr[segment.row].item(), decay[segment.row].item())
        for item, segment in zip(member.shard_params, shard.segments.segments, strict=True)
    ]


def test_several_param_groups_share_one_bucket_and_keep_their_own_hyper_parameters() -> None:
    (rows,) = run_ranks(1, _rows)
    assert len({(lr, decay) for _, lr, decay in rows}) >= 3
    for name, lr, decay in rows:
        is_embedding = "embedding" in name or "output_layer" in name
        is_matrix = name.endswith("weight") and "norm" not in name
        assert lr == pytest.approx(5e-3 if is_embedding else 1e-3), name
        assert decay == pytest.approx(0.3 if is_matrix else 0.0), name


def _clip_scale(clip_grad: float) -> tuple[float, float]:
    import tiny_gpt

    trainer = tiny_gpt.build(tiny_gpt.Setup(optimizer={"clip_grad": clip_grad}))
    grads = trainer.model[0].buffers[0].grad_data
    before: list[torch.Tensor] = []
    prepare = trainer.optimizer.prepare_grads

    def remember() -> bool:
        before.append(grads.clone())
        return prepare()

    trainer.optimizer.prepare_grads = remember
    _, norm, _ = trainer.step()
    assert torch.equal(grads, before[0]), "clipping must not touch the gradients"
    (member,) = trainer.optimizer.chained_optimizers
    return norm, member.optimizer.table.grad_scale[0].item()


def test_clipping_scales_in_the_kernel_and_leaves_the_gradient_buffer_alone() -> None:
    for norm, scale in run_ranks(2, _clip_scale, 0.05):
        assert norm > 0.05
        assert scale == pytest.approx(0.05 / (norm + 1e-6), rel=1e-5)
    for _, scale in run_ranks(2, _clip_scale, 1e6):
        assert scale == 1.0


def _loss_scaled(scale: float | None) -> tuple[float, float]:
    import tiny_gpt

    options = {"loss_scale": scale, "clip_grad": 0.0}
    trainer = tiny_gpt.build(tiny_gpt.Setup(optimizer=options))
    _, norm, _ = trainer.step()
    (member,) = trainer.optimizer.chained_optimizers
    return norm, member.optimizer.table.grad_scale[0].item()


def test_constant_loss_scale_is_divided_out_of_norm_and_update() -> None:
    # The schedule here does not multiply the loss, so that a scale of 2 halves the gradient.
    ((plain, one),) = run_ranks(1, _loss_scaled, None)
    ((halved, half),) = run_ranks(1, _loss_scaled, 2.0)
    assert halved == pytest.approx(plain / 2, rel=1e-6)
    assert (one, half) == (1.0, 0.5)


def _overflow(rank_with_inf: int) -> tuple[Any, bool, list[int]]:
    import tiny_gpt

    trainer = tiny_gpt.build(tiny_gpt.Setup(optimizer={"loss_scale": 2.0}))
    trainer.step()
    (member,) = trainer.optimizer.chained_optimizers
    (shard,) = member.optimizer.shards
    shard.grad.fill_(1.0)
    if torch.distributed.get_rank() == rank_with_inf:
        shard.grad[40] = float("inf")
    kept = [tensor.clone() for _, tensor in shard.state()]
    weights = shard.param.clone()
    result = trainer.optimizer.step()
    # Stepping in spite of it changes nothing either.
    for launched in member.optimizer.shards:
        reference_step_(
            launched,
            member.optimizer.table,
            exp_avg_sq_rounding="nearest",
            master_rounding="nearest",
        )
    same = all(torch.equal(a, b) for a, (_, b) in zip(kept, shard.state(), strict=True))
    steps = [group["step"] for group in trainer.optimizer.param_groups]
    return result, same and torch.equal(weights, shard.param), steps


def test_overflow_under_a_loss_scale_skips_the_step_on_every_rank() -> None:
    for result, untouched, steps in run_ranks(2, _overflow, 1):
        assert result == (False, None, None)
        assert untouched and set(steps) == {1}
