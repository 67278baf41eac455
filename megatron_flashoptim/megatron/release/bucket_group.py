"""A bucket group of DDP under gradient release: its state in an iteration, memory and launches."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_flashoptim.megatron.distrib_optimizer import FlashDistributedOptimizer
from megatron_flashoptim.megatron.release.grad_pool import Region


class State(enum.Enum):
    """Where a bucket group is in an iteration."""

    IDLE = enum.auto()
    OPEN = enum.auto()
    REDUCED = enum.auto()
    STEPPED = enum.auto()


@dataclass(eq=False)
class BucketGroup:
    """A bucket group of DDP, its memory and its launches.

    Attributes:
        group: Megatron's ``_ParamAndGradBucketGroup``.
        finish_reduce: its own ``finish_grad_sync``.
        opened: recorded behind the zeroing of what ``zeroed`` names.
        stepped: recorded behind its last launch.
        regions: addresses of the gradients of its buckets.
        zeroed: for each bucket, views of its gradients that are zeroed when it is opened.
        launches: member and index of each shard.
        names: of its parameters.
        arrived: names of the parameters whose gradient has come.
        streams: on which it was opened, gradients have come, and it was reduced, by raw stream.
        reduced: recorded on each of them when it was reduced.
        state: where it is in this iteration.
    """

    group: Any
    finish_reduce: Callable[[], None]
    opened: Any
    stepped: Any
    regions: list[Region] = field(default_factory=list)
    zeroed: list[list[torch.Tensor]] = field(default_factory=list)
    launches: list[tuple[FlashDistributedOptimizer, int]] = field(default_factory=list)
    names: dict[torch.nn.Parameter, str] = field(default_factory=dict)
    arrived: set[str] = field(default_factory=set)
    streams: dict[int, Any] = field(default_factory=dict)
    reduced: dict[int, Any] = field(default_factory=dict)
    state: State = State.IDLE
