"""--flash-gradient-release on a GPU's streams: what must have run before what.

A GPU runs what is in different streams in any order that waits and events allow. Here streams and
events are clocks (of Lamport's kind, one count per stream), while Megatron trains for real on a
CPU rank: what one operation is ordered behind can then be read off, whatever order it was run in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from ranks import run_ranks
from test_gradient_release import OVERLAP, _build

Moment = dict[str, int]


class _Stream:
    """A stream: how much of each stream has run before what is put into it now."""

    names = 0
    made: ClassVar[list[_Stream]] = []

    def __init__(self, *_: Any, **__: Any) -> None:
        self.name = f"stream {_Stream.names}"
        _Stream.names += 1
        _Stream.made.append(self)
        self.clock: Moment = {}

    def put(self) -> Moment:
        """Put an operation in; return its moment."""
        self.clock[self.name] = self.clock.get(self.name, 0) + 1
        return dict(self.clock)

    def wait_for(self, moment: Moment) -> None:
        self.clock = {
            name: max(self.clock.get(name, 0), moment.get(name, 0))
            for name in self.clock.keys() | moment.keys()
        }

    def wait_stream(self, other: _Stream) -> None:
        self.wait_for(other.clock)

    def wait_event(self, event: _Event) -> None:
        self.wait_for(event.moment)


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.moment: Moment = {}

    def synchronize(self) -> None:
        """Only a bucket that moves to another slot waits for its last step on the host."""
        raise AssertionError("no bucket moves where the order stays")

    def record(self, stream: _Stream) -> None:
        self.moment = dict(stream.clock)


def _is_before(first: Moment, then: Moment) -> bool:
    return all(count <= then.get(name, 0) for name, count in first.items())


def _use_clocks() -> list[_Stream]:
    """Make torch's streams clocks; return the stack of current streams."""
    current = [_Stream()]

    @contextmanager
    def stream(new: _Stream) -> Iterator[None]:
        current.append(new)
        yield
        current.pop()

    def synchronize() -> None:
        # What the host puts into any stream from now on.
        for other in _Stream.made:
            current[-1].wait_stream(other)

    torch.cuda.synchronize = synchronize
    torch.cuda.Stream, torch.cuda.Event = _Stream, _Event
    torch.cuda.current_stream = lambda *_: current[-1]
    torch.cuda.stream = stream
    return current


def _ordered() -> dict[str, Any]:
    """Train with 2 slots; return which of the needed orders were seen, and how often."""
    import checkpoints

    from megatron_flashoptim.megatron.release.gradient_release import GradientRelease
    from megatron_flashoptim.optim import FlashOptimizer

    current = _use_clocks()
    trainer = _build(True, {**OVERLAP, "layers": 3}, {"release_slots": 2})
    release: GradientRelease = trainer.optimizer.release
    (member,) = trainer.optimizer.chained_optimizers
    found: dict[str, list[bool]] = {
        "slot zeroed behind its last step": [],
        "gradient on another stream behind the zeroing": [],
        "step behind a gradient on another stream": [],
        "step behind its reduction": [],
        "step behind the backward pass until then": [],
        "table filled behind the steps of before": [],
        "table filled behind the end of the step before": [],
        "table filled before the step": [],
        "end behind all steps": [],
        "gather behind all steps": [],
        "load behind a half applied update": [],
        "reading of a checkpoint behind a half applied update": [],
        "iteration behind what a failed one has open": [],
    }
    last_step_on: dict[int, Moment] = {}
    zeroed: dict[int, Moment] = {}
    on_another: dict[int, Moment] = {}
    another, yet_another = _Stream(), _Stream()
    steps: list[Moment] = []
    streams: set[str] = set()
    put_off: list[int] = []
    filled: list[Moment] = []
    ended: list[Moment] = []

    def watch(entry: Any) -> None:
        (bucket,) = entry.group.buckets
        (region,) = entry.regions
        start, finish = entry.group.start_grad_sync.args[1], entry.finish_reduce
        gather = entry.group.start_param_sync
        reduction = _Stream()
        passed: list[Moment] = []

        def counted_start(force_all_reduce: bool = False) -> None:
            start(force_all_reduce=force_all_reduce)
            reduction.wait_stream(current[-1])  # as collectives do at the call
            reduction.put()
            passed.append(current[-1].put())

        def counted_finish() -> None:
            finish()
            current[-1].wait_stream(reduction)

        def counted_gather(force_sync: bool = False) -> None:
            moment = current[-1].put()
            found["gather behind all steps"] += [_is_before(step, moment) for step in steps]
            gather(force_sync)

        def reduce_on_yet_another_stream(force_all_reduce: bool = False) -> None:
            passed[:] = [current[-1].put()]
            with torch.cuda.stream(yet_another):
                release._reduce(entry, counted_start, force_all_reduce)
            put_off.append(len(release._reduced))

        entry.group.start_grad_sync = reduce_on_yet_another_stream
        entry.finish_reduce = counted_finish
        entry.group.start_param_sync = counted_gather
        entry.check_step = lambda moment: (
            found["step behind its reduction"].append(_is_before(reduction.clock, moment)),
            found["step behind the backward pass until then"].append(
                all(_is_before(earlier, moment) for earlier in passed)
            ),
            last_step_on.__setitem__(id(region.slot), moment),
            found["step behind a gradient on another stream"].append(
                _is_before(on_another.pop(id(entry), {}), moment)
            ),
        )

        class Watched(type(bucket.grad_data)):
            """The bucket's gradients, whose zeroing is noticed."""

            def zero_(self) -> Any:
                before = last_step_on.get(id(region.slot), {})
                zeroed[id(entry)] = current[-1].put()
                if before:
                    behind = _is_before(before, zeroed[id(entry)])
                    found["slot zeroed behind its last step"].append(behind)
                return super().zero_()

        # All of them, where it would be the padding only.
        entry.zeroed = [[bucket.grad_data.as_subclass(Watched)]]

    for entry in release.groups:
        watch(entry)
    (buffer,) = trainer.model[0].buffers

    def hook_of(param: Any) -> Any:
        entry, hook = release._group_of_param[param], release._copying(param)

        def comes_on_another_stream(_: torch.Tensor) -> None:
            opens = release.groups.index(entry) % 2
            if (opens and not entry.arrived) or (param.ndim < 2 and entry.arrived):
                with torch.cuda.stream(another):
                    hook(param)
                    on_another[id(entry)] = another.put()
                found["gradient on another stream behind the zeroing"].append(
                    _is_before(zeroed[id(entry)], on_another[id(entry)])
                )
            else:
                hook(param)

        return comes_on_another_stream

    buffer.hook_parameters(hook_of)
    of_launch = {launch: entry for entry in release.groups for launch in entry.launches}
    launch, fill = FlashOptimizer.launch, type(member.optimizer.table).fill

    def counted_launch(self: Any, index: int) -> None:
        moment = current[-1].put()
        found["table filled before the step"].append(_is_before(filled[-1], moment))
        of_launch[member, index].check_step(moment)
        steps.append(moment)
        streams.add(current[-1].name)
        launch(self, index)

    def counted_fill(self: Any, *args: Any, **kwargs: Any) -> None:
        filled.append(current[-1].put())
        found["table filled behind the steps of before"] += [
            _is_before(step, filled[-1]) for step in steps
        ]
        found["table filled behind the end of the step before"] += [
            _is_before(end, filled[-1]) for end in ended
        ]
        fill(self, *args, **kwargs)

    FlashOptimizer.launch = counted_launch
    type(member.optimizer.table).fill = counted_fill
    for _ in range(3):
        trainer.step()
        ended.append(current[-1].put())
        moment = ended[-1]
        found["end behind all steps"] += [_is_before(step, moment) for step in steps]
    model = checkpoints.sharded_model(trainer)
    metadata = checkpoints.metadata_of(checkpoints.DP_RESHARDABLE)
    checkpoints.saved_state(trainer, metadata)
    loads = {
        "load behind a half applied update": release.forget,
        "reading of a checkpoint behind a half applied update": lambda: (
            trainer.optimizer.sharded_state_dict(model, is_loading=True, metadata=metadata)
        ),
    }
    for order, load in loads.items():
        steps.clear()
        trainer.step(update=False)
        load()
        found[order] += [_is_before(step, current[-1].put()) for step in steps]
    release.forget()
    trainer.model[0].zero_grad_buffer()
    with torch.cuda.stream(_Stream()):
        release._open(release.groups[0])
        moment = current[-1].put()
    trainer.model[0].zero_grad_buffer()
    found["iteration behind what a failed one has open"].append(
        _is_before(moment, current[-1].put())
    )
    return {
        "found": found,
        "streams of steps": [current[0].name, *sorted(streams)],
        "put off": put_off,
        "buckets": len(release.groups),
    }


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="replaces torch's streams, which kernels of a GPU need"
)
def test_what_shares_memory_is_ordered_on_the_streams_of_a_gpu() -> None:
    (rank,) = run_ranks(1, _ordered)
    # Whatever stream was current when a bucket was reduced.
    compute, step = rank["streams of steps"]
    assert compute == step
    assert set(rank["put off"]) == {1}
    steps = 3 * rank["buckets"]
    for order, seen in rank["found"].items():
        assert all(seen), f"{order}: {seen}"
        # Two slots are fresh in the first iteration; nothing is stepped before its table.
        at_least = {
            "slot zeroed behind its last step": steps - 2,
            "table filled behind the steps of before": rank["buckets"],
            "table filled behind the end of the step before": 2,
            "gradient on another stream behind the zeroing": rank["buckets"],
            "load behind a half applied update": rank["buckets"],
            "iteration behind what a failed one has open": 1,
            "reading of a checkpoint behind a half applied update": rank["buckets"],
        }
        assert len(seen) >= at_least.get(order, steps), order
