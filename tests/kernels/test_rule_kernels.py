"""The kernel of every update rule beside AdamW equals its plain PyTorch twin bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from docs_rule import register
from rows import RULE_OPTIONS
from shards import GROUP, GuardedShard, Parameter, assert_same_state, is_unchanged, segments_of

from megatron_flashoptim.kernels.step import SMALL, Geometry
from megatron_flashoptim.optim.hyper import HyperRow, HyperTable
from megatron_flashoptim.optim.rules import RULES, rule_of
from megatron_flashoptim.optim.step import launch_step_kernel_, reference_step_

# A whole entry of 64 groups and a part of another; padding, and three rows within one tile.
PARAMETERS = (
    Parameter(start=1, groups=6, row=0, tensor_id=12345),
    Parameter(start=9, groups=2, row=1, tensor_id=0xDEADBEEF),
    Parameter(start=11, groups=60, row=2, tensor_id=3),
)
GROUPS = 73
# The last steps as far as the weights are large, so that the last bit of an update shows in them.
RATES = [
    {"lr": 1e-3, "weight_decay": 0.1},
    {"lr": 3e-2, "weight_decay": 0.0},
    {"lr": 0.9, "weight_decay": 0.3},
]
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "flash_adam": [
        {"betas": (0.9, 0.95), "eps": 1e-8},
        {"betas": (0.8, 0.999), "eps": 1e-5},
        {"betas": (0.0, 0.5), "eps": 1e-15},
    ],
    **RULE_OPTIONS,
}
OF_THE_DOCS = [{"beta": 0.9}, {"beta": 0.5}, {"beta": 0.0}]
BF16, FP32 = torch.bfloat16, torch.float32
# Weights, gradients, bits of the master, rounding of all that is rounded.
FORMATS = {
    "24 bits": (BF16, BF16, 24, "nearest"),
    "32 bits, stochastic": (BF16, FP32, 32, "stochastic"),
    "16 bits, stochastic": (BF16, BF16, 16, "stochastic"),
    "fp32 weights": (FP32, FP32, 24, "nearest"),
}
# What a launch in Triton's interpreter costs is its programs: one of few.
GEOMETRIES = [None, Geometry(32, 2, SMALL.num_stages, SMALL.num_warps, SMALL.max_registers)]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def _rows(name: str, step: int) -> list[HyperRow]:
    pairs = zip(RATES, OPTIONS[name], strict=True)
    return [
        HyperRow.of(rule_of(name), {**rates, **options, "step": step}) for rates, options in pairs
    ]


def _gradient(step: int) -> torch.Tensor:
    """Many decades within each group; in the second step NaN, infinity, zeros and extremes."""
    generator = torch.Generator().manual_seed(step)
    spread = torch.exp(2 * torch.randn(GROUPS, GROUP, generator=generator) - 8)
    gradient = torch.randn(GROUPS, GROUP, generator=generator) * spread
    if step == 2:
        gradient[0::8, 3] = torch.nan
        gradient[1::8, 31] = torch.inf
        gradient[2::8, 0] = -torch.inf
        gradient[3::8] = 0.0
        gradient[4::8] = -0.0
        gradient[5::8] *= 1e30
        gradient[6::8] *= 1e-30
    return gradient.flatten()


def _check(name: str, device: str, kind: str, steps: int = 3) -> GuardedShard:
    param, grad, bits, rounding = FORMATS[kind]
    weight = torch.randn(GROUPS * GROUP, generator=torch.Generator().manual_seed(0))
    kernel, reference = (
        GuardedShard(
            weight.to(on, param),
            torch.zeros(len(weight), dtype=grad, device=on),
            segments_of(PARAMETERS, 0, GROUPS, on),
            bits,
            rule=rule_of(name),
        )
        for on in (device, "cpu")
    )
    table, reference_table = HyperTable(3, device), HyperTable(3, "cpu")
    for one in (table, reference_table):
        one.grad_scale.copy_(torch.tensor([0.7, 1.0, 0.031]))
    options: Any = {"exp_avg_sq_rounding": rounding, "master_rounding": rounding}
    for step in range(1, steps + 1):
        for one in (kernel, reference):
            one.grad.copy_(_gradient(step))
        given = kernel.grad.clone()
        table.fill(_rows(name, step), seed=3)
        reference_table.fill(_rows(name, step), seed=3)
        launch_step_kernel_(kernel, table, **options, geometry=GEOMETRIES[step % 2])
        reference_step_(reference, reference_table, **options)
        assert_same_state(kernel, reference, f"{name}, step {step}:")
        assert is_unchanged(kernel.grad, given)
        if step != 2:  # groups with extreme gradients keep zeros
            assert kernel.exp_avg.count_nonzero() > 0.5 * kernel.exp_avg.numel()
    kernel.check_guards()
    reference.check_guards()
    assert not torch.equal(kernel.param.cpu(), weight.to(param))
    return kernel


def test_every_rule_is_tested() -> None:
    assert set(RULES) == {*OPTIONS, "flash_adamw"}


# Formats are the frame's: at full length once where it has one moment, as in AdamW's tests for two.
CASES = [(name, kind) for name in OPTIONS for kind in FORMATS]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_kernel_equals_reference_bit_for_bit(device: str, name: str, kind: str) -> None:
    """Steps of three param groups in one bucket, the second of extreme gradients."""
    _check(name, device, kind, steps=3 if kind == "24 bits" or name == "flash_lion" else 2)


def test_the_example_of_the_docs_is_a_rule(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file and one line: the page's module is stepped by kernel and reference alike."""
    name = register(tmp_path, monkeypatch)
    monkeypatch.setitem(OPTIONS, name, OF_THE_DOCS)
    # torch.sign(NaN) is 0 on both sides.
    shard = _check(name, device, "24 bits")
    assert shard.exp_avg_sq is None
