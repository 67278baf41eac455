"""Units of a checkpoint's parts, looked at in this process or in several."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from megatron_flashoptim.checkpoint import quiet
from megatron_flashoptim.checkpoint.folder import CheckpointFolder, open_folder
from megatron_flashoptim.checkpoint.state_parts import Part, parts

# Ranges that one unit has at most: some 8M elements, seconds of work.
_RANGES = 16

Ranges = Sequence[tuple[int, int]]
# Told what is done, elements done and all elements.
Tell = Callable[[str, int, int], None]


def each_unit(
    task: Callable[..., Any],
    folders: Sequence[CheckpointFolder],
    every: Sequence[Part],
    executor: Executor | None,
    tell: Callable[[int, int], None],
) -> Iterator[tuple[int, Any]]:
    """Yield the number of a part and what a task returned for some ranges of it, in order.

    Args:
        task: of a module, called with ranges, the part, and the part of the same name and number
            (or None) of each further folder.
        folders: the checkpoints, the parts being those of the first.
        every: ``parts`` of the first folder.
        executor: see ``pool``.
        tell: told elements done and all elements.
    """
    units = [
        (number, ranges[first : first + _RANGES])
        for number, part in enumerate(every)
        for ranges in [list(part.ranges())]
        for first in range(0, max(len(ranges), 1), _RANGES)
    ]
    sizes = [sum(end - start for start, end in ranges) for _, ranges in units]
    total, done = sum(sizes), 0
    paths = [folder.path for folder in folders]
    others = [_by_name(parts(folder)) for folder in folders[1:]]
    tell(0, total)
    if executor is None:
        for (number, ranges), size in zip(units, sizes, strict=True):
            yield number, task(ranges, every[number], *_same(every[number], others))
            tell(done := done + size, total)
        return
    futures = [executor.submit(_in_worker, task, paths, *unit) for unit in units]
    place = {future: position for position, future in enumerate(futures)}
    for future in as_completed(futures):
        future.result()
        tell(done := done + sizes[place[future]], total)
    # Sums of floats depend on their order, which shall be the same on every run.
    for (number, _), future in zip(units, futures, strict=True):
        yield number, future.result()


@contextmanager
def pool(processes: int) -> Iterator[Executor | None]:
    """Start the processes that ``each_unit`` works with; None for this one alone."""
    if processes == 1:
        yield None
        return
    # Spawned, not forked: this process has threads by now.
    executor = ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=quiet.start,
    )
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def _in_worker(task: Callable[..., Any], paths: list[Path], number: int, ranges: Ranges) -> Any:
    part = _parts(paths[0])[number]
    return task(ranges, part, *_same(part, [_named(path) for path in paths[1:]]))


@cache
def _parts(path: Path) -> list[Part]:
    return parts(open_folder(path))


@cache
def _named(path: Path) -> dict[tuple[str, int | None], Part]:
    return _by_name(_parts(path))


def _by_name(every: Sequence[Part]) -> dict[tuple[str, int | None], Part]:
    return {(part.name, part.index): part for part in every}


def _same(part: Part, others: Sequence[dict[tuple[str, int | None], Part]]) -> list[Part | None]:
    return [other.get((part.name, part.index)) for other in others]
