"""DDP's buffers with gradients that have addresses but no memory of their own.

Megatron's ``_ParamAndGradBuffer`` allocates the gradients of all its buckets and makes every
``param.main_grad`` and ``bucket.grad_data`` a view of them. Here these are views of a reserved
address range instead, and ``megatron.release.gradient_release`` puts memory behind a bucket while
it is filled and stepped. The layout, and so the optimizer state and its checkpoints, is
Megatron's.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from megatron_flashoptim.megatron import versions
from megatron_flashoptim.megatron.release.address_range import chunk_bytes_of, reserve
from megatron_flashoptim.megatron.release.grad_pool import Region

# What is overridden or called; another release's name would be ignored silently.
_NEEDED = ("_get", "offload_to_cpu", "reload_from_cpu", "reset", "scale_gradients")
MODULE = "megatron.core.distributed.param_and_grad_buffer"
PATH = "_ParamAndGradBuffer.__init__"
# Of padding in a bucket. One with more is zeroed as a whole, by a single launch.
_MOST_VIEWS = 4


class ReleasedBuffer:
    """What differs from Megatron's ``_ParamAndGradBuffer``, mixed into its class.

    Attributes:
        regions: addresses of each bucket's gradients.
        on_reset: called where Megatron zeroes the gradients, before an iteration; None until an
            optimizer has taken over.
    """

    regions: list[Region]
    on_reset: Callable[[], None] | None
    _grad_hooks: Sequence[RemovableHandle] = ()
    # Megatron's attributes.
    params: list[torch.nn.Parameter]
    buckets: list[Any]
    bucket_indices: list[tuple[int, int]]
    param_index_map: dict[torch.nn.Parameter, tuple[int, int, int]]
    grad_dtype: torch.dtype
    grad_data: torch.Tensor | None
    param_data: torch.Tensor | None

    def reserve_gradients(self) -> None:
        """Reserve addresses for the gradients, each bucket's at the start of a chunk."""
        device = torch.device(torch.cuda.current_device())
        chunk = chunk_bytes_of(device)
        sizes = [(end - start) * self.grad_dtype.itemsize for start, end in self.bucket_indices]
        addresses = reserve(sum(-(-size // chunk) for size in sizes) * chunk, device)
        self.regions = []
        offset = 0
        for size in sizes:
            self.regions.append(Region(addresses, offset, size))
            offset += -(-size // chunk) * chunk
        self._gradients = addresses.tensor.view(self.grad_dtype)
        self.on_reset = None

    def hook_parameters(
        self, hook_of: Callable[[torch.nn.Parameter], Callable[[torch.Tensor], None]]
    ) -> None:
        """Have something called when a gradient has come, before Megatron adds it.

        Args:
            hook_of: returns the hook of a parameter. It is called with the parameter, whose
                ``grad`` is set, and stands in for the one that was given before.
        """
        for handle in self._grad_hooks:
            handle.remove()
        params: Sequence[Any] = self.params  # torch has no types for the method
        # Runs in the node whose hook is DDP's, and so before that.
        self._grad_hooks = [
            param.register_post_accumulate_grad_hook(hook_of(param)) for param in params
        ]

    def padding(self) -> list[list[torch.Tensor]]:
        """Return, for each bucket, views of its gradients that together hold all its padding."""
        found = []
        for bucket, (start, end) in zip(self.buckets, self.bucket_indices, strict=True):
            used = sorted(self.param_index_map[param][:2] for param in bucket.params_list)
            after = [start, *(to for _, to in used)]
            gaps = zip(after, [*(at for at, _ in used), end], strict=True)
            views = [bucket.grad_data[at - start : to - start] for at, to in gaps if at < to]
            found.append(views if len(views) <= _MOST_VIEWS else [bucket.grad_data])
        return found

    def _get(self, shape: torch.Size, start_index: int, buffer_type: Any) -> torch.Tensor:
        if buffer_type.name != "GRAD":
            inherited: torch.Tensor = super()._get(  # type: ignore[misc]  # of Megatron's class
                shape, start_index, buffer_type=buffer_type
            )
            return inherited
        starts = [start for start, _ in self.bucket_indices]
        bucket = bisect.bisect_right(starts, start_index) - 1
        assert start_index + shape.numel() <= self.bucket_indices[bucket][1]
        first = self.regions[bucket].offset // self.grad_dtype.itemsize
        start = first + start_index - starts[bucket]
        return self._gradients[start : start + shape.numel()].view(shape)

    def reset(self) -> None:
        """Begin an iteration. Nothing is zeroed before its bucket is opened."""
        if self.on_reset is not None:
            self.on_reset()

    def scale_gradients(self, scaling_factor: float) -> None:
        """Refuse to scale gradients that are used already.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "gradients were to be scaled after the backward pass, but --flash-gradient-release has "
            "used them by then; drop --calculate-per-token-loss, or the former"
        )

    def offload_to_cpu(self, move_params: bool = True, move_grads: bool = True) -> None:
        """Offload the weights, as Megatron does; gradients have no memory between iterations."""
        super().offload_to_cpu(move_params, False)  # type: ignore[misc]  # of Megatron's class

    def reload_from_cpu(self, move_params: bool = True, move_grads: bool = True) -> None:
        """Reload the weights, as Megatron does."""
        super().reload_from_cpu(move_params, False)  # type: ignore[misc]  # of Megatron's class


def _refuse_gradient(_: torch.Tensor) -> None:
    raise RuntimeError(
        "a gradient came before an optimizer was built that gives it memory; call "
        "get_megatron_optimizer(..., flash=FlashOptimConfig(gradient_release=True)) before the "
        "first backward pass"
    )


class _WithoutGradients(TorchFunctionMode):
    """Keeps a buffer from allocating gradients while it is made."""

    def __init__(self, buffer: ReleasedBuffer) -> None:
        self._buffer = buffer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        state = vars(self._buffer)
        # Weights come first, then gradients.
        has_weights = isinstance(state.get("param_data"), torch.Tensor)
        if has_weights and state["grad_data"] is None and getattr(func, "__name__", "") == "zeros":
            self._buffer.reserve_gradients()
            kwargs = {**kwargs, "device": torch.device("meta")}
        return func(*args, **kwargs)


def _released_class(buffer_class: type) -> type:
    return type(f"Released{buffer_class.__name__}", (ReleasedBuffer, buffer_class), {})


def wrap_buffer_init(
    original: Callable[..., None], applies: Callable[[], bool]
) -> Callable[..., None]:
    """Return what stands in for ``_ParamAndGradBuffer.__init__``.

    Args:
        original: Megatron's.
        applies: whether gradients are released; asked at every call.
    """

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if not applies() or isinstance(self, ReleasedBuffer):
            original(self, *args, **kwargs)
            return
        for name in _NEEDED:
            versions.find(MODULE, f"_ParamAndGradBuffer.{name}")
        self.__class__ = _released_class(type(self))
        with _WithoutGradients(self):
            original(self, *args, **kwargs)
        if self.grad_data.device.type != "meta":
            raise ImportError(
                f"megatron-core {versions.installed_version()} allocates gradient buffers in a way "
                "that --flash-gradient-release does not know; drop the flag"
            )
        self.hook_parameters(lambda _: _refuse_gradient)

    return __init__


@contextmanager
def released_buffers() -> Iterator[None]:
    """Let every DistributedDataParallel made meanwhile have gradients without memory.

    For code that calls megatron.core without ``install()``; the optimizer must be built with
    ``FlashOptimConfig(gradient_release=True)``.
    """
    owner = versions.find(MODULE, PATH)
    bound = owner.__init__
    owner.__init__ = functools.wraps(bound)(wrap_buffer_init(bound, lambda: True))
    try:
        yield
    finally:
        owner.__init__ = bound


def check_buffer(buffer: Any, *, released: bool) -> None:
    """Refuse a buffer of DDP that was not made for how gradients are to be handled.

    Raises:
        ValueError: says how to build DDP.
    """
    if isinstance(buffer, ReleasedBuffer) and not released:
        raise ValueError(
            "DistributedDataParallel was built within released_buffers(), whose gradients have no "
            "memory without FlashOptimConfig(gradient_release=True)"
        )
    if released and not isinstance(buffer, ReleasedBuffer):
        raise ValueError(
            "gradient_release=True needs DistributedDataParallel to be built within "
            "FlashDistributedOptimizer.released_buffers(), or after megatron_flashoptim.install() "
            "with --flash-gradient-release"
        )
