"""Every update rule beside AdamW is its formula: torch's, or the paper's, in exact arithmetic."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitwise import fp32_ulp
from rows import RULE_OPTIONS
from shards import (
    GROUP,
    GuardedShard,
    Parameter,
    gradient_of_groups,
    master_weight,
    segments_of,
)
from tolerances import (
    FIRST_STEP_RELATIVE,
    LION_AGREEMENT,
    RULE_UPDATE_RELATIVE,
    TRAINED_LOSS,
    TRAINED_WEIGHTS,
)

from megatron_flashoptim.codec import decode_exp_avg, decode_exp_avg_sq, encode_exp_avg
from megatron_flashoptim.optim import BucketShard, FlashOptimConfig, FlashOptimizer
from megatron_flashoptim.optim.footprint import flash_state_bytes
from megatron_flashoptim.optim.hyper import HyperRow, HyperTable
from megatron_flashoptim.optim.rules import RULES, rule_of
from megatron_flashoptim.optim.segments import Segment, SegmentTable
from megatron_flashoptim.optim.step import reference_step_

PARAMETERS = (
    Parameter(start=0, groups=9, row=0),
    Parameter(start=9, groups=1, row=1),
    Parameter(start=10, groups=30, row=2),
)
GROUPS = 40
GRAD_SCALE = (0.7, 1.0, 1e-3)
NEAREST: Any = {"exp_avg_sq_rounding": "nearest", "master_rounding": "nearest"}
RATES = [
    {"lr": 1e-3, "weight_decay": 0.1},
    {"lr": 3e-2, "weight_decay": 0.0},
    {"lr": 5e-4, "weight_decay": 0.3},
]
# What the rule takes from each param group.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "flash_adam": [
        {"betas": (0.9, 0.95), "eps": 1e-8},
        {"betas": (0.8, 0.99), "eps": 1e-3},
        {"betas": (0.0, 0.5), "eps": 1e-15},
    ],
    **RULE_OPTIONS,
}


def _groups(name: str, step: int) -> list[dict[str, Any]]:
    pairs = zip(RATES, OPTIONS[name], strict=True)
    return [{**rates, **options, "step": step} for rates, options in pairs]


def _shard(name: str, dtype: torch.dtype, master_bits: int) -> GuardedShard:
    weight = torch.randn(GROUPS * GROUP, generator=torch.Generator().manual_seed(0))
    segments = segments_of(PARAMETERS, 0, GROUPS)
    return GuardedShard(
        weight.to(dtype), torch.zeros_like(weight), segments, master_bits, rule=rule_of(name)
    )


def _table(name: str, step: int) -> HyperTable:
    table = HyperTable(3, "cpu")
    table.fill([HyperRow.of(rule_of(name), group) for group in _groups(name, step)], seed=0)
    table.grad_scale.copy_(torch.tensor(GRAD_SCALE))
    return table


class Exact:
    """State and hyper-parameters of each element in fp64, and the formulas on them.

    A formula returns the update that is subtracted, the same with every term at its magnitude, the
    new first moment, the new second moment or None, and where the update may jump.
    """

    def __init__(self, shard: BucketShard, name: str, step: int) -> None:
        self._row = shard.segments.per_group(shard.segments.row).repeat_interleave(GROUP)
        self._groups = _groups(name, step)
        self.step = step
        self.w = master_weight(shard).double()
        self.m = decode_exp_avg(shard.exp_avg, shard.exp_avg_scale).double()
        self.g = shard.grad.double() * torch.tensor(GRAD_SCALE).double()[self._row]
        self.v = torch.zeros(())
        if shard.exp_avg_sq is not None and shard.exp_avg_sq_scale is not None:
            self.v = decode_exp_avg_sq(shard.exp_avg_sq, shard.exp_avg_sq_scale).double()

    def of(self, name: str) -> torch.Tensor:
        values = [group[name] for group in self._groups]
        return torch.tensor(values, dtype=torch.float64)[self._row]

    def flash_adam(self) -> tuple[torch.Tensor, ...]:
        beta1, beta2 = self.of("betas").unbind(dim=1)
        decay = self.of("weight_decay") * self.w
        g, size = self.g + decay, self.g.abs() + decay.abs()
        m = beta1 * self.m + (1 - beta1) * g
        v = beta2 * self.v + (1 - beta2) * g**2
        largest = beta1 * self.m.abs() + (1 - beta1) * size
        # Terms that cancel in g are off by more of the root than of their own sum.
        off = ((1 - beta2) * g.abs() * size / v.clamp(min=1e-300)).clamp(min=1.0)
        root = (v / (1 - beta2**self.step)).sqrt() + self.of("eps")
        factor = self.of("lr") / (1 - beta1**self.step) / root
        return factor * m, factor * largest * off, m, v, torch.zeros_like(m, dtype=torch.bool)

    def flash_lion(self) -> tuple[torch.Tensor, ...]:
        beta1, beta2 = self.of("betas").unbind(dim=1)
        mixed = beta1 * self.m + (1 - beta1) * self.g
        magnitude = beta1 * self.m.abs() + (1 - beta1) * self.g.abs()
        update = self.of("lr") * (mixed.sign() + self.of("weight_decay") * self.w)
        m = beta2 * self.m + (1 - beta2) * self.g
        jumps = (mixed.abs() < 2.0**-21 * magnitude) & (mixed != 0)
        return update, update.abs() + self.of("lr"), m, torch.zeros(()), jumps

    def flash_sgd(self) -> tuple[torch.Tensor, ...]:
        momentum, nesterov = self.of("momentum"), self.of("nesterov") == 1
        decoupled = self.of("decoupled_weight_decay")
        decay = self.of("weight_decay") * self.w
        g = self.g + (1 - decoupled) * decay
        m = momentum * self.m + g
        direction = torch.where(nesterov, g + momentum * m, m)
        size = 3 * (self.m.abs() + self.g.abs() + decay.abs())
        lr = self.of("lr")
        return (
            lr * (direction + decoupled * decay),
            lr * size,
            m,
            torch.zeros(()),
            torch.zeros_like(m, dtype=torch.bool),
        )


@pytest.mark.parametrize(
    ("dtype", "master_bits"), [(torch.bfloat16, 24), (torch.bfloat16, 32), (torch.float32, 24)]
)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_step_is_the_formula_in_fp64_up_to_fp32_roundings(
    name: str, dtype: torch.dtype, master_bits: int
) -> None:
    """Given the decoded state; at 24 bits within half a quantum (2^7 ulps) of it."""
    shard = _shard(name, dtype, master_bits)
    for step in range(1, 5):
        shard.grad.copy_(gradient_of_groups(step, GROUPS))
        exact = Exact(shard, name, step)
        update, size, m, v, jumps = getattr(exact, name)()
        reference_step_(shard, _table(name, step), **NEAREST)
        stored = master_weight(shard)
        ulps = 0.5 + (2.0**7 if dtype == torch.bfloat16 and master_bits == 24 else 0.0)
        bound = RULE_UPDATE_RELATIVE * size + ulps * fp32_ulp(stored)
        wrong = (stored.double() - (exact.w - update)).abs() > bound
        assert not (wrong & ~jumps).any(), f"step {step}: {int(wrong.sum())} elements"
        assert jumps.sum() < 5
        codes, scales = encode_exp_avg(m.float())
        assert ((shard.exp_avg.int() - codes.int()).abs() <= 1).all()
        assert ((shard.exp_avg_scale.double() / scales.double() - 1).abs() <= 2.0**-7).all()
        if shard.exp_avg_sq is not None and shard.exp_avg_sq_scale is not None:
            scale = shard.exp_avg_sq_scale.double().repeat_interleave(GROUP)
            decoded = decode_exp_avg_sq(shard.exp_avg_sq, shard.exp_avg_sq_scale).double()
            off = 255 * (decoded.sqrt() - v.sqrt()) / scale
            assert (off.abs() <= 1.001).all()
    shard.check_guards()


class ExactLion(torch.optim.Optimizer):
    """Lion as in its paper, in the dtype of the parameters."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    # The base class's overloads return a closure's loss; there is no closure here.
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                m = self.state[param].setdefault("exp_avg", torch.zeros_like(param))
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.sub_((beta1 * m + (1 - beta1) * param.grad).sign(), alpha=group["lr"])
                m.mul_(beta2).add_(param.grad, alpha=1 - beta2)


LIKE_TORCH: dict[str, tuple[str, dict[str, Any], Callable[[Any], torch.optim.Optimizer]]] = {
    "adam": (
        "flash_adam",
        {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.98), "eps": 1e-8},
        lambda p: torch.optim.Adam(p, 0.01, (0.9, 0.98), 1e-8, 0.1),
    ),
    "lion": (
        "flash_lion",
        {"lr": 0.003, "weight_decay": 0.1, "betas": (0.95, 0.98)},
        lambda p: ExactLion(p, 0.003, (0.95, 0.98), 0.1),
    ),
    "sgd, momentum, L2": (
        "flash_sgd",
        {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "decoupled_weight_decay": False},
        lambda p: torch.optim.SGD(p, 0.02, 0.9, 0.0, 0.1),
    ),
    "sgd, Nesterov, L2": (
        "flash_sgd",
        {
            **{"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9},
            **{"decoupled_weight_decay": False, "nesterov": True},
        },
        lambda p: torch.optim.SGD(p, 0.02, 0.9, 0.0, 0.1, nesterov=True),
    ),
}


class Regression:
    """Noisy logistic regression of 32 classes, whose weights an optimizer of either kind steps."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self._truth = torch.randn(64, 32, generator=generator)
        self._generator = torch.Generator().manual_seed(4)
        self.start = 0.1 * torch.randn(64, 32, generator=generator)

    def gradient(self, weight: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Return loss and gradient of a fresh batch."""
        inputs = torch.randn(128, 64, generator=self._generator)
        noise = torch.randn(128, 32, generator=self._generator)
        labels = (inputs @ self._truth + 4 * noise).argmax(dim=1)
        weight = weight.detach().to(torch.float32).requires_grad_()
        loss = torch.nn.functional.cross_entropy(inputs @ weight, labels)
        loss.backward()
        assert weight.grad is not None
        return loss.item(), weight.grad


def _train_exact(case: str, steps: int, dtype: torch.dtype) -> tuple[list[float], torch.Tensor]:
    task = Regression()
    weight = torch.nn.Parameter(task.start.to(torch.bfloat16).to(dtype))
    optimizer = LIKE_TORCH[case][2]([weight])
    losses = []
    for _ in range(steps):
        loss, gradient = task.gradient(weight)
        weight.grad = gradient.to(dtype)
        optimizer.step()
        losses.append(loss)
    return losses, weight.detach()


def _train_flash(
    case: str, steps: int, master_bits: Any = 24
) -> tuple[list[float], torch.Tensor, BucketShard]:
    name, options, _ = LIKE_TORCH[case]
    task = Regression()
    numel = task.start.numel()
    shard = BucketShard(
        task.start.flatten().to(torch.bfloat16),
        torch.zeros(numel),
        SegmentTable([Segment(0, 0, 1, 0)], numel // GROUP, "cpu"),
        master_bits,
        rule=rule_of(name),
    )
    params = [{"params": [torch.nn.Parameter(torch.zeros(1))]}]
    config = FlashOptimConfig(optimizer=name, master_bits=master_bits)
    optimizer = FlashOptimizer(params, config, **options)
    optimizer.attach([shard], [0], "cpu")
    losses = []
    for _ in range(steps):
        # The exact run's forward pass has fp32 weights too: what differs is the state.
        loss, gradient = task.gradient(master_weight(shard).view(64, 32))
        shard.grad.copy_(gradient.flatten())
        optimizer.step()
        losses.append(loss)
    return losses, master_weight(shard).view(64, 32), shard


@pytest.mark.parametrize("case", LIKE_TORCH)
def test_the_first_step_is_that_of_torch_s_optimizer(case: str) -> None:
    """From zero state, which is exact: so is torch's first momentum, the gradient itself."""
    _, ours, _ = _train_flash(case, 1, master_bits=32)
    _, exact = _train_exact(case, 1, torch.float64)
    assert not torch.equal(ours.double(), Regression().start.to(torch.bfloat16).double())
    assert (
        (ours.double() - exact).abs() <= FIRST_STEP_RELATIVE * exact.abs().clamp(min=0.01)
    ).all()


@pytest.mark.parametrize("case", LIKE_TORCH)
def test_training_for_400_steps_ends_where_the_exact_optimizer_does(case: str) -> None:
    """8-bit state against fp32 state: same data, loss over the last steps, and the weights."""
    steps, last = 400, 50
    exact, exact_weight = _train_exact(case, steps, torch.float32)
    ours, weight, _ = _train_flash(case, steps)
    ours_end, exact_end = (sum(losses[-last:]) / last for losses in (ours, exact))
    assert exact_end < 0.75 * exact[0], "it must learn for this to mean anything"
    away = ((weight - exact_weight).norm() / exact_weight.norm()).item()
    print(f"{case}: loss {ours_end:.4f}, exact {exact_end:.4f}; weights {away:.2%} apart")
    assert abs(ours_end / exact_end - 1) < TRAINED_LOSS
    assert away < TRAINED_WEIGHTS[LIKE_TORCH[case][0]]


def test_lion_takes_nearly_all_signs_of_exact_lion() -> None:
    """Codes near 0 and rounding to nearest may turn signs where momentum and gradient cancel."""
    task = Regression()
    weight = task.start.to(torch.bfloat16).float()
    numel = weight.numel()
    segments = SegmentTable([Segment(0, 0, 1, 0)], numel // GROUP, "cpu")
    shard = BucketShard(weight.flatten(), torch.zeros(numel), segments, rule=rule_of("flash_lion"))
    exact = torch.zeros(numel, dtype=torch.float64)
    beta1, beta2 = 0.95, 0.98
    table = HyperTable(1, "cpu")
    agreed = []
    for step in range(1, 301):
        before = shard.param.clone()
        _, gradient = task.gradient(before.view(64, 32))
        shard.grad.copy_(gradient.flatten())
        group = {"lr": 0.003, "weight_decay": 0.0, "betas": (beta1, beta2), "step": step}
        table.fill([HyperRow.of(shard.rule, group)], seed=0)
        reference_step_(shard, table, **NEAREST)
        g = shard.grad.double()
        wanted = (beta1 * exact + (1 - beta1) * g).sign()
        exact = beta2 * exact + (1 - beta2) * g
        agreed.append(((before - shard.param).double().sign() == wanted).double().mean().item())
    share = sum(agreed[100:]) / len(agreed[100:])
    print(f"signs that agree with exact Lion's: {share:.3%}, in the worst step {min(agreed):.3%}")
    assert share > LION_AGREEMENT


def test_lion_s_sign_of_0_is_0_and_a_nan_shows() -> None:
    shard = _shard("flash_lion", torch.float32, 24)
    before = shard.param.clone()
    shard.grad.zero_()
    shard.grad[:3] = torch.tensor([1.0, -1.0, torch.nan])
    groups = [{"lr": 0.5, "weight_decay": 0.0, "betas": (0.9, 0.9), "step": 1}] * 3
    table = HyperTable(3, "cpu")
    table.fill([HyperRow.of(shard.rule, group) for group in groups], seed=0)
    reference_step_(shard, table, **NEAREST)
    assert (shard.param[:2] - before[:2]).tolist() == pytest.approx([-0.5, 0.5])
    assert shard.param[2].isnan()
    assert torch.equal(shard.param[3:], before[3:])


PAGE = Path(__file__).parents[2] / "docs" / "rules.md"
# Moments, and bytes of state per parameter with 24-bit masters, as the page has them.
STATE = {
    name: (int(moments), float(size))
    for name, moments, size in re.findall(
        r"^\| `(flash_\w+)` \| (\d) \| ([\d.]+) \|", PAGE.read_text(), re.MULTILINE
    )
}


def test_the_page_has_a_row_for_every_rule() -> None:
    assert set(STATE) == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_a_shard_holds_what_the_rule_needs_and_nothing_else(name: str) -> None:
    numel = 1 << 16
    segments = SegmentTable([Segment(0, 0, 1, 0)], numel // GROUP, "cpu")
    zeros = torch.zeros(numel, dtype=torch.bfloat16)
    shard = BucketShard(zeros, zeros.clone(), segments, rule=rule_of(name))
    moments, per_element = STATE[name]
    names = ["exp_avg", "exp_avg_sq"][:moments]
    state = dict(shard.state())
    assert set(state) == {"correction", *names, *(f"{moment}_scale" for moment in names)}
    assert sum(tensor.nbytes for tensor in state.values()) == per_element * numel
    assert flash_state_bytes(shard.rule, 24) == per_element
    if "exp_avg_sq" not in names:
        assert shard.exp_avg_sq is None and shard.exp_avg_sq_scale is None


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"optimizer": "flash_lion", "rounding": "nearest"}, ["--flash-rounding", "flash_lion"]),
        (
            {"optimizer": "flash_sgd", "exp_avg_sq_code": "fourth_root"},
            ["--flash-exp-avg-sq-code", "flash_sgd keeps none"],
        ),
        ({"optimizer": "flash_lion", "sgd_nesterov": True}, ["--flash-sgd-nesterov", "flash_sgd"]),
        ({"sgd_nesterov": True}, ["--flash-sgd-nesterov", "flash_adamw", "drop the flag"]),
        ({"optimizer": "flash_sign"}, ["--optimizer must be one of", "'flash_sign'"]),
    ],
)
def test_fields_that_a_rule_has_no_use_for_are_refused(
    options: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(ValueError) as problem:
        FlashOptimConfig(**options)
    for part in parts:
        assert part in str(problem.value)


def test_an_option_of_another_rule_is_refused() -> None:
    params = [{"params": [torch.nn.Parameter(torch.zeros(1))]}]
    with pytest.raises(ValueError, match="flash_lion takes betas; got eps"):
        FlashOptimizer(params, FlashOptimConfig(optimizer="flash_lion"), eps=1e-8)


def test_a_rule_registered_under_another_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "flash_other", RULES["flash_lion"])
    with pytest.raises(
        ValueError, match="registered as flash_other, and its rule's name is flash_"
    ):
        rule_of("flash_other")


def test_a_rule_is_pickled_by_name() -> None:
    """Shards refer to it, and parameters of the model to shards."""
    rule = rule_of("flash_sgd")
    assert pickle.loads(pickle.dumps(rule)) is rule and copy.deepcopy(rule) is rule
