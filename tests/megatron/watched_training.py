"""Megatron's training loop on forked ranks, looked at from inside: steps, log lines, exit."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pretraining
from exact_adamw import use_as_megatrons_adam
from ranks import run_ranks

FLASH = ("--optimizer", "flash_adamw")
ADAM = ("--optimizer", "adam")


def train(
    corpus: Path, *flags: str, ranks: int = 1, watch: Callable[[], dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Train on forked ranks; ``--optimizer adam`` is exact fp32 AdamW in Megatron's own classes.

    Args:
        corpus: folder of the corpus.
        *flags: flags beside those of ``pretraining.MODEL``, which they override.
        ranks: number of data-parallel ranks.
        watch: called on each rank before the training script; wraps functions of Megatron and
            returns the dict that it fills.

    Returns:
        What each rank's ``watch`` filled, and ``log`` (messages by the name of their logger),
        ``exit`` (code of ``SystemExit`` or None) and ``error`` (of a RuntimeError, or None).
    """
    return run_ranks(ranks, train_here, corpus, flags, watch)


def train_here(
    corpus: Path, flags: tuple[str, ...], watch: Callable[[], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Train on this rank, as ``train`` does on each; returns the same."""
    script = [str(pretraining.SCRIPT), *pretraining.MODEL, *pretraining.device_flags()]
    arguments = [*script, *pretraining.data_flags(corpus), *flags]
    logging.disable(logging.NOTSET)
    use_as_megatrons_adam()
    found: dict[str, Any] = {} if watch is None else watch()
    log: dict[str, list[str]] = {}
    handler = logging.Handler()
    handler.emit = lambda record: log.setdefault(record.name, []).append(record.getMessage())
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)  # as Megatron does in a process of its own
    found.update(log=log, exit=None, error=None)
    try:
        pretraining._pretrain(arguments)
    except SystemExit as stop:
        found["exit"] = stop.code
    except RuntimeError as problem:
        found["error"] = str(problem)
    return found


@contextlib.contextmanager
def _nothing(*_: Any) -> Iterator[None]:
    yield


def around_steps(
    around: Callable[[Any, int], contextlib.AbstractContextManager[None]] = _nothing,
    change: Callable[[Callable[..., Any], int], Callable[..., Any]] | None = None,
) -> None:
    """Wrap Megatron's ``train_step`` in this process.

    Args:
        around: context manager of the optimizer and the number of the step, from 1, entered
            around each step.
        change: takes the forward step function and the number, returns what stands in for it.
    """
    from megatron.training import training

    original, number = training.train_step, 0

    def train_step(forward_step: Any, data: Any, model: Any, optimizer: Any, *args: Any, **kw: Any):
        nonlocal number
        number += 1
        forward = forward_step if change is None else change(forward_step, number)
        with around(optimizer, number):
            return original(forward, data, model, optimizer, *args, **kw)

    training.train_step = train_step
