#!/usr/bin/env python3
"""Compare other ways to step buckets in the backward pass with that of --flash-gradient-release.

    torchrun --nproc-per-node 2 scripts/bench_release_ways.py --micro-batch 8 --out results
    torchrun --nproc-per-node 1 scripts/bench_release_ways.py --device cpu --layers 2 --hidden 64 \\
        --heads 4 --vocab 256 --sequence 64 --bucket-size 30000 --repeats 3 --out results

Trains one GPT for each way side by side in one process, on the same tokens, taking turns; all must
have the same bits, before and after. Timed are several iterations in a row, as in
scripts/bench_gradient_release.py. Why it is done as it is: docs/gradient-release.md.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench_gpt
import torch
from bench_gpt import check_same, environment, percentiles, tokens
from bench_gradient_release import CHECKED, Trained, profiled, timed

from megatron_flashoptim.megatron.release.buffers import ReleasedBuffer


def _release_of(trained: Trained) -> Any:
    """Return what hooks itself into the bucket groups, whose inside the ways change."""
    return trained.optimizer.release


def step_before_the_next_reduction(trained: Trained) -> None:
    """Step a bucket before the next one's reduce-scatter is dispatched, not beside it."""
    _release_of(trained)._steps_first = True


def add_to_zeros(trained: Trained) -> None:
    """Zero a bucket when it is opened and let Megatron add, as with accumulation fusion."""
    release = _release_of(trained)
    for buffer in trained.chunk.buffers:
        buffer.hook_parameters(release._hook_of)
    for entry in release.groups:
        entry.zeroed = [[bucket.grad_data] for bucket in entry.group.buckets]


def step_on_a_stream_of_its_own(trained: Trained, *, at_once: bool) -> None:
    """Step beside the backward pass, at once or when the next bucket is dispatched."""
    release = _release_of(trained)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no types

    def begin() -> None:
        release.begin_iteration()
        release._stream = stream
        with torch.cuda.stream(stream):
            release._raw_stream = release._current_raw_stream()

    for buffer in trained.chunk.buffers:
        buffer.on_reset = begin
    for entry in release.groups if at_once else ():
        dispatch = entry.group.start_grad_sync

        def dispatch_and_step(force_all_reduce: bool = False, dispatch: Any = dispatch) -> None:
            dispatch(force_all_reduce=force_all_reduce)
            release._step_all_reduced()

        entry.group.start_grad_sync = dispatch_and_step


@contextlib.contextmanager
def gradients_on_the_stream_of_the_backward_pass() -> Iterator[None]:
    """Have DDP, made meanwhile, get gradients there rather than on the stream it is made on.

    Autograd calls a parameter's hooks on the stream that was current when its AccumulateGrad node
    was made, and a node lives as long as someone keeps it.
    """
    hook_parameters = ReleasedBuffer.hook_parameters

    def make_nodes_first(self: Any, hook_of: Any) -> None:
        with torch.cuda.stream(torch.cuda.default_stream()):
            self.nodes = [p.expand_as(p).grad_fn.next_functions[0][0] for p in self.params]
        hook_parameters(self, hook_of)

    ReleasedBuffer.hook_parameters = make_nodes_first  # type: ignore[method-assign]  # meanwhile
    try:
        yield
    finally:
        ReleasedBuffer.hook_parameters = hook_parameters  # type: ignore[method-assign]  # as it was


WAYS: dict[str, tuple[Callable[[Trained], None], ...]] = {
    "release": (),
    "before the next reduce-scatter": (step_before_the_next_reduction,),
    "added to zeros": (add_to_zeros,),
    "added to zeros, before": (add_to_zeros, step_before_the_next_reduction),
    "own stream, at once": (functools.partial(step_on_a_stream_of_its_own, at_once=True),),
    "own stream": (functools.partial(step_on_a_stream_of_its_own, at_once=False),),
    "gradients with the backward pass": (),
}
# What must be changed while DDP is made.
MEANWHILE = {"gradients with the backward pass": gradients_on_the_stream_of_the_backward_pass}
WITHOUT = "no release"


def build(options: argparse.Namespace, way: str) -> Trained:
    """Return a GPT that is trained in one of the ways."""
    with MEANWHILE.get(way, contextlib.nullcontext)():
        trained = Trained(options, "off" if way == WITHOUT else "on")
    for change in WAYS.get(way, ()):
        change(trained)
    return trained


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    bench_gpt.add_model_options(parser)
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences of a rank")
    parser.add_argument("--slots", type=int, default=3, help="--flash-release-slots")
    parser.add_argument("--repeats", type=int, default=12, help="samples of each")
    parser.add_argument("--in-a-row", type=int, default=5, help="iterations of a sample")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    parser.add_argument("--out", type=Path, default=Path("release_ways"), help="folder")
    parser.set_defaults(tied=False, recompute=False, fp32_gradients=False)
    return parser.parse_args()


def run_rank(options: argparse.Namespace) -> None:
    """Measure in a rank that torchrun has started."""
    trained = {way: build(options, way) for way in (WITHOUT, *options.ways)}
    for iteration in range(CHECKED):
        for one in trained.values():
            one.iterate(tokens(options, iteration))
    for way in options.ways:
        check_same(trained[WITHOUT], trained[way], way)
    samples: dict[str, list[float]] = {way: [] for way in trained}
    order = list(trained)
    gc.disable()
    for repeat in range(options.repeats):
        order.append(order.pop(0))  # who comes second finds other caches: take turns
        for way in order:
            first = CHECKED + repeat * options.in_a_row
            samples[way].append(timed(options, trained[way], first))
    gc.enable()
    for way in options.ways:
        check_same(trained[WITHOUT], trained[way], way)
    profiles = {way: profiled(options, one, way.replace(" ", "_")) for way, one in trained.items()}
    if torch.distributed.get_rank():
        return
    for way, found in samples.items():
        saved = [off - on for off, on in zip(samples[WITHOUT], found, strict=True)]
        shown = (
            ", ".join(f"{name} {value:.2f}" for name, value in percentiles(values).items())
            for values in (found, saved)
        )
        print("{:32} {} ms an iteration; saved {}".format(way, *shown))
    report = {"environment": environment(options), "samples_ms": samples, "profiles": profiles}
    (options.out / "ways.json").write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    """Compare; print; write ``ways.json``, traces and pictures."""
    options = parse()
    logging.disable(logging.WARNING)
    options.out.mkdir(parents=True, exist_ok=True)
    with bench_gpt.started_rank(options):
        run_rank(options)


if __name__ == "__main__":
    main()
