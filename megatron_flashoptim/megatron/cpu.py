"""Run Megatron on CPU ranks with gloo: for the demo and the tests, never where a GPU is.

Megatron calls CUDA by name. ``enable()`` redirects those calls in this process: tensors stay on
the CPU, streams and events do nothing, the CUDA generator is the CPU's, and type names read
``torch.cuda.*`` as Megatron expects. Call it before anything imports ``megatron``. ``.cuda()`` is
the identity here, where a GPU would copy.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import importlib
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

_CPU = torch.device("cpu")

# Flags without which Megatron would call compiled CUDA code; scripts add them for --device cpu.
MEGATRON_FLAGS = (
    "--transformer-impl",
    "local",
    "--distributed-backend",
    "gloo",
    "--use-cpu-initialization",
    "--no-rope-fusion",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-bias-gelu-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
    "--no-persist-layer-norm",
    "--num-workers",
    "0",
)

# Functions and methods that take a device.
_FACTORIES = (
    *("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "linspace", "eye"),
    *("rand", "randn", "randint", "zeros_like", "ones_like", "empty_like", "full_like"),
    *("rand_like", "randn_like"),
)
_METHODS = ("to", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor")

_enabled = False


def enable() -> None:
    """Redirect CUDA to the CPU in this process; idempotent.

    Raises:
        RuntimeError: a GPU is there, or Megatron was imported before.
    """
    global _enabled
    if _enabled:
        return
    if torch.cuda.is_available():
        raise RuntimeError(
            "--device cpu redirects CUDA calls to the CPU and is refused where a GPU is visible; "
            "drop the option, or hide the GPUs with CUDA_VISIBLE_DEVICES="
        )
    if any(name == "megatron" or name.startswith("megatron.core") for name in sys.modules):
        raise RuntimeError("enable the CPU redirection before anything imports megatron")
    _enabled = True
    # Megatron's fusions are torch.compile functions: slow to compile, and no faster on a CPU.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    importlib.import_module("torch._dynamo")  # reads torch's functions before they change
    # Where a default device is in force (the planner's meta device), torch looks its factories up
    # in a set that it makes when first asked; it must hold torch's own functions.
    importlib.import_module("torch.utils._device")._device_constructors()
    torch.set_num_threads(1)
    _redirect_tensors()
    _redirect_cuda_module()
    _patch_megatron()


class _InertStream:
    """A stream or event on a device where everything is synchronous."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = _CPU

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing

    def record_event(self, *_: Any) -> _InertStream:
        return _InertStream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _as_if_moved_to_cpu(value: Any, as_numpy: bool = False, **_: Any) -> Any:
    """Twin of Megatron's ``maybe_move_tensor_to_cpu``, which leaves CPU tensors as they are."""
    return value.numpy() if as_numpy and torch.is_tensor(value) else value


def _to_cpu(value: Any) -> Any:
    """Replace a CUDA device in whatever form it is given by the CPU."""
    if isinstance(value, str) and value.startswith("cuda"):
        return _CPU
    if isinstance(value, torch.device) and value.type == "cuda":
        return _CPU
    return value


def _device_to_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def redirected(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            device = kwargs["device"]
            kwargs["device"] = _CPU if isinstance(device, int) else _to_cpu(device)
        kwargs.pop("pin_memory", None)  # which needs a driver
        return function(*map(_to_cpu, args), **kwargs)

    return redirected


def _redirect_tensors() -> None:
    for name in _FACTORIES:
        setattr(torch, name, _device_to_cpu(getattr(torch, name)))
    for name in _METHODS:
        setattr(torch.Tensor, name, _device_to_cpu(getattr(torch.Tensor, name)))
    plain_type = torch.Tensor.type

    def type_named_cuda(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return f"torch.cuda.{plain_type(self).rpartition('.')[2]}"
        return plain_type(self, dtype, *args, **kwargs)

    # Not by assignment, which type checkers refuse; replacing them is what this module is for.
    for name, method in (("type", type_named_cuda), ("cuda", lambda self, *_, **__: self)):
        setattr(torch.Tensor, name, method)


def _redirect_cuda_module() -> None:
    cuda: Any = torch.cuda
    stream = _InertStream()
    cuda.current_device = lambda: _CPU
    cuda.device_count = lambda: 1
    cuda.get_device_capability = lambda *_: (0, 0)
    # Of older ones Megatron demands CUDA_DEVICE_MAX_CONNECTIONS=1 with tensor parallelism.
    cuda.get_device_properties = lambda *_: SimpleNamespace(name="cpu", major=10, minor=0)
    cuda.get_device_name = lambda *_: "cpu"
    cuda.Stream = cuda.Event = _InertStream
    cuda.current_stream = cuda.default_stream = lambda *_: stream
    cuda.stream = lambda *_: contextlib.nullcontext()
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *_, **__: torch.set_rng_state(
        state
    )
    # Not torch.manual_seed, which calls these in turn.
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    cuda.manual_seed_all = _nothing
    for name in (
        "synchronize",
        "set_device",
        "set_stream",
        "empty_cache",
        "reset_peak_memory_stats",
    ):
        setattr(cuda, name, _nothing)
    for name in (
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
        "device_memory_used",
    ):
        setattr(cuda, name, lambda *_: 0)
    cuda.memory_stats = lambda *_: collections.defaultdict(int)  # every figure is 0


def _let_norms_be_sequence_parallel(norm_class: Any) -> None:
    """Flag weights of torch's norms as Transformer Engine and Apex do.

    Megatron's wrapper refuses ``--sequence-parallel``, because gradients of norms must then be
    summed over tensor-parallel ranks. Megatron does that for flagged parameters.
    """
    make = norm_class.__new__

    def flagged(cls: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm = make(cls, plain, *args, **kwargs)
        for param in norm.parameters():
            param.sequence_parallel = config.sequence_parallel
        return norm

    norm_class.__new__ = flagged


def _patch_megatron() -> None:
    """Replace the few Megatron functions that no redirection of torch can reach."""
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher.maybe_move_tensor_to_cpu = _as_if_moved_to_cpu
    norms: Any = importlib.import_module("megatron.core.transformer.torch_norm")
    _let_norms_be_sequence_parallel(norms.WrappedTorchNorm)
    init_process_group = torch.distributed.init_process_group

    @functools.wraps(init_process_group)
    def without_device_id(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_id", None)
        return init_process_group(*args, **kwargs)

    torch.distributed.init_process_group = without_device_id
    try:
        training: Any = importlib.import_module("megatron.training.training")
    except ImportError:
        return  # megatron.core alone
    initialize: Any = importlib.import_module("megatron.training.initialize")
    # Compiles nothing here, and draws as many numbers as a micro-batch has elements from the
    # generator that initial weights are drawn from next: on a GPU that is another one.
    initialize._warmup_jit_function = _nothing
    training.initialize_megatron = functools.partial(
        training.initialize_megatron, allow_no_cuda=True
    )
