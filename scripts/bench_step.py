#!/usr/bin/env python3
"""Time one fused step of a bucket shard on a GPU, beside its ceiling and other optimizers.

First a gate: the compiled kernel must agree bit for bit with the plain PyTorch reference, or
nothing is timed. Then, in one run on the same device: a device-to-device copy (the ceiling), this
project's step, flashoptim's fused step where the package is importable, and on fp32, followed by a
copy to bf16, torch's fused AdamW and Transformer Engine's FusedAdam where that is importable.

    python scripts/bench_step.py --json step.json
    python scripts/bench_step.py --rule flash_lion flash_sgd --ours-only
    python scripts/bench_step.py --numel 1e6 4e6 40e6 --params 300 --grad-dtype bf16
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python scripts/bench_step.py --gate-only

Bytes count every tensor read once and written once. "device" is the time in a CUDA graph,
where small launches do not wait for the host; "over" is by what share it exceeds those bytes at the
copy's rate plus one launch, which is a step of 512 elements. Needs an NVIDIA GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_flashoptim.codec.spec import GROUP_SIZE, MASTER_BITS, ROUNDINGS
from megatron_flashoptim.kernels.step import LARGE, LARGE_NUMEL, SMALL, Geometry
from megatron_flashoptim.optim import BucketShard
from megatron_flashoptim.optim.hyper import HyperRow, HyperTable
from megatron_flashoptim.optim.rules import RULES, Rule, rule_of
from megatron_flashoptim.optim.segments import Segment, SegmentTable
from megatron_flashoptim.optim.step import launch_step_kernel_, reference_step_

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Distinct sets of tensors that small sizes rotate among, so that the L2 cache holds none of them.
CACHE_BYTES = 256 << 20
MOST_SETS = 16
# Elements of a step that does nothing to speak of.
LAUNCH_NUMEL = 512


@dataclass(frozen=True)
class Row:
    """One measurement: milliseconds are per step over ``numel`` elements."""

    what: str
    numel: int
    params: int
    grad_dtype: str
    master_bits: int
    rounding: str
    bytes_per_element: float
    p20_ms: float
    p50_ms: float
    p80_ms: float
    ms_per_1b: float
    gb_per_s: float
    share_of_copy: float | None
    over_floor_and_launch: float | None
    device_ms: float


def make_shard(
    numel: int,
    grad_dtype: str,
    master_bits: int,
    params: int,
    *,
    rule: str = "flash_adamw",
    device: str = "cuda",
) -> BucketShard:
    """Return a shard of ``params`` equal parameters with random weights and gradients."""
    groups = numel // GROUP_SIZE
    starts = sorted({index * groups // params for index in range(params)})
    segments = [Segment(start, n % 2, 12345 + n, 0) for n, start in enumerate(starts)]
    generator = torch.Generator(device).manual_seed(numel)
    weight = torch.randn(numel, device=device, generator=generator).mul_(0.02)
    grad = torch.randn(numel, device=device, generator=generator).mul_(1e-3)
    return BucketShard(
        param=weight.to(torch.bfloat16),
        grad=grad.to(DTYPES[grad_dtype]),
        segments=SegmentTable(segments, groups, device),
        master_bits=master_bits,
        rule=rule_of(rule),
    )


def step_bytes(shard: BucketShard) -> float:
    """Return the bytes per element of a step: state and weight read and written, gradient read."""
    state = sum(tensor.nbytes for _, tensor in shard.state())
    return (2 * (shard.param.nbytes + state) + shard.grad.nbytes) / shard.param.numel()


def make_table(step: int, rule: Rule, device: str = "cuda") -> HyperTable:
    """Return the hyper-parameters of two param groups at a step, with clipping at work."""
    table = HyperTable(2, device)
    table.fill(
        [
            HyperRow.of(rule, {**rule.defaults, "lr": 1e-3, "weight_decay": decay, "step": step})
            for decay in (0.1, 0.0)
        ],
        seed=1,
    )
    table.grad_scale.fill_(0.73)
    return table


def gate(geometry: Geometry | None, rule: str) -> int:
    """Compare kernel and reference bit for bit; return the number of combinations checked.

    Raises:
        SystemExit: names the first tensor that differs.
    """
    geometries = [geometry] if geometry else [LARGE, SMALL]
    of_exp_avg_sq = ROUNDINGS if rule_of(rule).keeps_exp_avg_sq else ROUNDINGS[:1]
    combinations = itertools.product(geometries, DTYPES, MASTER_BITS, of_exp_avg_sq, ROUNDINGS)
    checked = 0
    for geometry, grad_dtype, bits, rounding, master_rounding in combinations:
        ours, reference = (
            make_shard(70016, grad_dtype, bits, 37, rule=rule, device="cpu") for _ in range(2)
        )
        on_gpu = _to_gpu(ours)
        for step in range(1, 4):
            scale = 10.0 ** torch.randint(-12, 3, (reference.grad.numel() // 64, 1)).float()
            grad = (torch.randn(len(scale), 64) * scale).view(-1)
            reference.grad.copy_(grad)
            on_gpu.grad.copy_(reference.grad)
            options: dict[str, Any] = {
                "exp_avg_sq_rounding": rounding,
                "master_rounding": master_rounding,
            }
            reference_step_(reference, make_table(step, reference.rule, "cpu"), **options)
            launch_step_kernel_(on_gpu, make_table(step, ours.rule), **options, geometry=geometry)
            named = [("param", reference.param, on_gpu.param)]
            named += [
                (name, tensor, dict(on_gpu.state())[name]) for name, tensor in reference.state()
            ]
            for name, expected, got in named:
                same = torch.equal(expected.view(torch.uint8), got.cpu().view(torch.uint8))
                if not same:
                    count = int((expected.float() != got.cpu().float()).sum())
                    raise SystemExit(
                        f"kernel and reference differ in {count} of {expected.numel()} elements "
                        f"of {name}: {rule}, step {step}, {grad_dtype} gradients, {bits} bits, "
                        f"{rounding}/{master_rounding} rounding"
                    )
        checked += 1
    return checked


def _to_gpu(shard: BucketShard) -> BucketShard:
    segments = SegmentTable(shard.segments.segments, shard.num_groups, "cuda")
    return BucketShard(
        shard.param.cuda(), shard.grad.cuda(), segments, shard.master_bits, rule=shard.rule
    )


def time_ms(launches: list[Callable[[], Any]], repeats: int) -> tuple[float, float, float]:
    """Return p20, p50 and p80 of the milliseconds per launch, taking turns over ``launches``.

    Short launches are timed in runs long enough for the event clock, so that the host's own
    overhead shows only where the GPU waits for it.
    """
    for launch in launches * 3:
        launch()
    torch.cuda.synchronize()
    once = _elapsed(launches[:1])
    inner = max(1, int(2.0 / max(once, 1e-3)))
    turns = itertools.cycle(launches)
    samples = sorted(_elapsed([next(turns) for _ in range(inner)]) / inner for _ in range(repeats))
    p20, p50, p80 = (samples[int(q * (repeats - 1))] for q in (0.2, 0.5, 0.8))
    return p20, p50, p80


def graph_ms(launches: list[Callable[[], Any]], repeats: int) -> float:
    """Return the median milliseconds per launch replayed from a CUDA graph: the device's part."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches * MOST_SETS:
            launch()
    times = sorted(_elapsed([graph.replay]) for _ in range(repeats))
    return times[repeats // 2] / (len(launches) * MOST_SETS)


def _elapsed(launches: list[Callable[[], Any]]) -> float:
    # torch.cuda.Event has no annotations.
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for launch in launches:
        launch()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


class Bench:
    """Measures rows against the copy ceiling of the same run."""

    def __init__(self, repeats: int, geometry: Geometry | None = None) -> None:
        self.repeats = repeats
        self.geometry = geometry
        self.rows: list[Row] = []
        self.copy_gb_per_s: float | None = None
        self.launch_ms: float | None = None

    def copy(self, numel: int = 1 << 30) -> None:
        """Measure a device-to-device copy of ``numel`` bytes, read once and written once."""
        source = torch.randint(256, (numel,), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        self._add("copy", numel, [lambda: target.copy_(source)], 2.0)
        self.copy_gb_per_s = self.rows[-1].gb_per_s

    def ours(
        self,
        numel: int,
        grad: str,
        bits: int,
        rounding: str,
        params: int,
        rule: str = "flash_adamw",
        what: str | None = None,
    ) -> None:
        """Measure this project's step."""
        first = make_shard(numel, grad, bits, params, rule=rule)
        per_element = step_bytes(first)
        sets = min(MOST_SETS, max(1, int(CACHE_BYTES // (numel * per_element))))
        table = make_table(10, first.rule)
        options: dict[str, Any] = {
            "exp_avg_sq_rounding": rounding,
            "master_rounding": "stochastic" if bits == 16 else "nearest",
            "geometry": self.geometry,
        }
        others = (make_shard(numel, grad, bits, params, rule=rule) for _ in range(sets - 1))
        shards = [first, *others]

        def launch(shard: BucketShard) -> Callable[[], None]:
            return lambda: launch_step_kernel_(shard, table, **options)

        launches = [launch(shard) for shard in shards]
        self._add(what or rule, numel, launches, per_element, grad, bits, rounding, params)

    def launch(self) -> None:
        """Measure a step of one tile: what a launch costs that has next to nothing to do."""
        self.ours(LAUNCH_NUMEL, "bf16", 24, "nearest", 1, what="one launch")
        self.launch_ms = self.rows[-1].device_ms

    def flashoptim(self, numel: int, grad: str) -> None:
        """Measure flashoptim's fused step on the same number of elements, one parameter."""
        if importlib.util.find_spec("flashoptim") is None:
            return
        from flashoptim.optimizers import _fused_adam_step

        state = make_shard(numel, grad, 24, 1)
        scales = torch.zeros(2, numel // GROUP_SIZE, dtype=torch.float16, device="cuda")

        def launch() -> None:
            _fused_adam_step(
                *(state.exp_avg, scales[0], state.exp_avg_sq, scales[1]),
                *(state.param, state.grad, state.correction),
                *(1e-3, 0.9, 0.95, 1e-8, 0.1, True, 10),
            )

        per_element = 10.25 + DTYPES[grad].itemsize
        version = importlib.metadata.version("flashoptim")
        self._add(f"flashoptim {version}", numel, [launch], per_element, grad, 24, "nearest")

    def torch_fused(self, numel: int) -> None:
        """Measure torch's fused AdamW on fp32 plus a copy of the weights to bf16."""
        weight = torch.nn.Parameter(torch.randn(numel, device="cuda"))
        weight.grad = torch.randn_like(weight)
        low = torch.empty(numel, dtype=torch.bfloat16, device="cuda")
        optimizer = torch.optim.AdamW([weight], fused=True)

        def launch() -> None:
            optimizer.step()
            low.copy_(weight.detach())

        # fp32 weight, two moments: read and written; gradient read; weight read, bf16 written.
        self._add("torch AdamW(fused) + bf16 copy", numel, [launch], 34.0, "fp32", 32)

    def transformer_engine(self, numel: int) -> None:
        """Measure Transformer Engine's FusedAdam on fp32 plus a copy of the weights to bf16."""
        if importlib.util.find_spec("transformer_engine") is None:
            return
        FusedAdam = importlib.import_module("transformer_engine.pytorch.optimizers").FusedAdam
        weight = torch.nn.Parameter(torch.randn(numel, device="cuda"))
        weight.grad = torch.randn_like(weight)
        low = torch.empty(numel, dtype=torch.bfloat16, device="cuda")
        optimizer = FusedAdam([weight], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)

        def launch() -> None:
            optimizer.step()
            low.copy_(weight.detach())

        version = importlib.metadata.version("transformer-engine")
        what = f"TE {version} FusedAdam + bf16 copy"
        self._add(what, numel, [launch], 34.0, "fp32", 32)

    def _add(
        self,
        what: str,
        numel: int,
        launches: list[Callable[[], Any]],
        per_element: float,
        grad: str = "-",
        bits: int = 0,
        rounding: str = "-",
        params: int = 1,
    ) -> None:
        p20, p50, p80 = time_ms(launches, self.repeats)
        device_ms = graph_ms(launches, self.repeats) if numel < LARGE_NUMEL else p50
        rate = numel * per_element / p50 / 1e6
        row = Row(
            what=what,
            numel=numel,
            params=params,
            grad_dtype=grad,
            master_bits=bits,
            rounding=rounding,
            bytes_per_element=per_element,
            p20_ms=p20,
            p50_ms=p50,
            p80_ms=p80,
            ms_per_1b=p50 / numel * 1e9,
            gb_per_s=rate,
            share_of_copy=rate / self.copy_gb_per_s if self.copy_gb_per_s else None,
            over_floor_and_launch=self._over_floor(numel * per_element, device_ms),
            device_ms=device_ms,
        )
        self.rows.append(row)
        print(format_row(row), flush=True)
        torch.cuda.empty_cache()

    def _over_floor(self, nbytes: float, ms: float) -> float | None:
        """Return by what share a time exceeds the bytes at the copy's rate and one launch."""
        if self.copy_gb_per_s is None or self.launch_ms is None:
            return None
        return ms / (nbytes / self.copy_gb_per_s / 1e6 + self.launch_ms) - 1.0


HEADER = (
    f"{'what':32} {'elements':>11} {'params':>6} {'grad':>5} {'bits':>4} {'rounding':>10} "
    f"{'p20 ms':>8} {'p50 ms':>8} {'p80 ms':>8} {'device':>8} {'ms/1B':>7} {'GB/s':>6} "
    f"{'of copy':>8} {'over':>6}"
)


def format_row(row: Row) -> str:
    """Return the row as a line under ``HEADER``."""
    share = f"{row.share_of_copy:.1%}" if row.share_of_copy is not None else "-"
    over = f"{row.over_floor_and_launch:.0%}" if row.over_floor_and_launch is not None else "-"
    return (
        f"{row.what:32} {row.numel:>11} {row.params:>6} {row.grad_dtype:>5} "
        f"{row.master_bits or '-':>4} {row.rounding:>10} {row.p20_ms:8.4f} {row.p50_ms:8.4f} "
        f"{row.p80_ms:8.4f} {row.device_ms:8.4f} {row.ms_per_1b:7.3f} {row.gb_per_s:6.0f} "
        f"{share:>8} {over:>6}"
    )


def environment() -> dict[str, str]:
    """Return device, versions and commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": importlib.metadata.version("triton"),
        "commit": commit.stdout.strip() or "unknown",
    }


def sizes(values: list[float]) -> Iterator[int]:
    """Yield element counts rounded down to whole groups."""
    for value in values:
        yield int(value) // GROUP_SIZE * GROUP_SIZE


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--numel", type=float, nargs="+", default=[2.0**29], help="elements")
    parser.add_argument("--rule", choices=RULES, nargs="+", default=["flash_adamw"])
    parser.add_argument("--params", type=int, default=300, help="parameters in the bucket")
    parser.add_argument("--grad-dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--master-bits", type=int, choices=MASTER_BITS, nargs="+", default=[24])
    parser.add_argument("--rounding", choices=ROUNDINGS, nargs="+", default=list(ROUNDINGS))
    parser.add_argument("--repeats", type=int, default=30, help="samples per row")
    parser.add_argument(
        "--geometry",
        type=int,
        nargs=5,
        metavar="N",
        help="groups per tile, tiles per program, stages, warps and registers of the launch; "
        "chosen by size if not given",
    )
    parser.add_argument("--skip-gate", action="store_true", help="for tuning: time unchecked code")
    parser.add_argument("--gate-only", action="store_true", help="check and time nothing")
    parser.add_argument("--ours-only", action="store_true", help="leave out other optimizers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU")
    where = environment()
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    geometry = Geometry(*options.geometry) if options.geometry else None
    checked = 0 if options.skip_gate else sum(gate(geometry, rule) for rule in options.rule)
    print(f"gate: kernel equals the reference bit for bit in {checked} combinations, 3 steps each")
    if options.gate_only:
        return
    print(HEADER)
    bench = Bench(options.repeats, geometry)
    bench.copy()
    bench.launch()
    for numel in sizes(options.numel):
        for rule, grad, bits, rounding in itertools.product(
            options.rule, options.grad_dtype, options.master_bits, options.rounding
        ):
            # The rounding is of the second moment: without one, the first given is the only one.
            if rule_of(rule).keeps_exp_avg_sq or rounding == options.rounding[0]:
                bench.ours(numel, grad, bits, rounding, options.params, rule)
        if not options.ours_only:
            for grad in options.grad_dtype:
                bench.flashoptim(numel, grad)
            bench.torch_fused(numel)
            bench.transformer_engine(numel)
    if options.json:
        report = {"environment": where, "checked": checked, "rows": [asdict(r) for r in bench.rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
