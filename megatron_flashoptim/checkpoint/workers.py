"""Processes that check, convert and verify parts of a checkpoint side by side."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan

from megatron_flashoptim.checkpoint import quiet, writer
from megatron_flashoptim.checkpoint.deviation import Report
from megatron_flashoptim.checkpoint.folder import COMMON_KEY, CheckpointFolder, open_folder
from megatron_flashoptim.checkpoint.model_state import Chunk, Span
from megatron_flashoptim.checkpoint.reader import CheckpointReader
from megatron_flashoptim.checkpoint.recoding import Recoding
from megatron_flashoptim.optim.config import FlashOptimConfig


@dataclass(frozen=True)
class Job:
    """What all tasks of a conversion share.

    Attributes:
        source: folder of the iteration.
        target: ``"flash"`` or ``"adam"``.
        flash: format of new flash state.
    """

    source: Path
    target: str
    flash: FlashOptimConfig


@dataclass(frozen=True)
class PartTask:
    """One part to be written.

    Attributes:
        number, plan: of the part, see ``writer.write_part``.
        spans: what it is made of.
        damaged: chunks to be mended.
        folder, records: where to.
        common: the new common state, in the part with the byte strings.
    """

    number: int
    plan: SavePlan
    spans: Sequence[Span]
    damaged: frozenset[Chunk]
    folder: Path
    records: Path
    common: bytes


class Pool:
    """A number of processes; 1 is this one.

    Args:
        job: what all tasks share.
        processes: how many.
    """

    def __init__(self, job: Job, processes: int) -> None:
        self._job = job
        for of_another in (_source, _recoding, _reader):  # whose folders had the same names
            of_another.cache_clear()
        self._executor = None
        if processes > 1:
            # Spawned, not forked: this process has threads by now.
            self._executor = ProcessPoolExecutor(
                processes,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=quiet.start,
            )

    def __enter__(self) -> Pool:
        # Tensors are small; threads would mostly wait for each other. Processes do not.
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._threads)
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def check(self, chunks: Sequence[Chunk]) -> Iterator[tuple[int, bool]]:
        """Yield number and whether its masters belong to its weights, of each chunk."""
        yield from self._each(_check, ((n, self._job, chunk) for n, chunk in enumerate(chunks)))

    def write(self, tasks: Iterable[PartTask]) -> Iterator[int]:
        """Write parts; yields the elements of each."""
        yield from self._each(_write, ((self._job, task) for task in tasks))

    def verify(self, folder: Path, records: Path, parts: int) -> Iterator[int]:
        """Read parts back; yields the number of each.

        Raises:
            ValueError: a part is not what was to be written.
        """
        yield from self._each(_verify, ((folder, records, number) for number in range(parts)))

    def _each(
        self, task: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]
    ) -> Iterator[Any]:
        """Yield what a task returns for each arguments, in any order."""
        if self._executor is None:
            for each in arguments:
                yield task(*each)
            return
        futures = [self._executor.submit(task, *each) for each in arguments]
        for future in as_completed(futures):
            yield future.result()


@cache
def _source(folder: Path) -> CheckpointFolder:
    """Return a source, opened once in each process, which then checks each item once."""
    return open_folder(folder, checked=True)


@cache
def _recoding(job: Job) -> Recoding:
    return Recoding(_source(job.source), job.target, job.flash)


@cache
def _reader(folder: Path) -> CheckpointReader:
    return CheckpointReader(folder)


def _check(number: int, job: Job, chunk: Chunk) -> tuple[int, bool]:
    return number, _recoding(job).belongs(chunk)


@torch.no_grad()
def _write(job: Job, task: PartTask) -> int:
    recoding = _recoding(job)
    reader = _source(job.source).reader
    report = Report()
    span_of = {
        (box.key, box.box.offset): span for span in task.spans for box in recoding.boxes(span)
    }
    current: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    def produce(index: MetadataIndex) -> torch.Tensor | bytes:
        if index.offset is None:
            return task.common if index.fqn == COMMON_KEY else reader.read_bytes(index.fqn)
        wanted = (index.fqn, tuple(index.offset))
        if wanted not in current:
            current.clear()
            current.update(recoding.produce(span_of[wanted], task.damaged, report))
        return current.pop(wanted)

    writer.write_part(task.folder, task.records, task.number, task.plan, produce, report)
    return sum(span.numel for span in task.spans)


def _verify(folder: Path, records: Path, number: int) -> int:
    record = writer.read_record(records, number)
    assert record is not None
    try:
        writer.verify_part(_reader(folder), record)
    except ValueError:
        writer.forget_part(records, number)
        raise
    return number
