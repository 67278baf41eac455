"""Tell which gradients are about to be written by fused GEMMs (gradient accumulation fusion).

A layer with fused accumulation writes ``param.main_grad`` in its backward function, before any hook
of the parameter runs. What runs before that function is a hook on the autograd node of the layer's
output. So every module announces its parameters, and those that it is called with (tied
embeddings), when the gradient of its output is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch


def announce_gradients(
    model: torch.nn.Module, about_to_be_written: Callable[[torch.nn.Parameter], None]
) -> None:
    """Have a function called before the backward pass of each module that uses parameters.

    Args:
        model: whose modules get a forward hook.
        about_to_be_written: called with each parameter of a module whose backward begins.
    """

    def in_forward(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        params = [p for p in module._parameters.values() if p is not None and p.requires_grad]
        params += [p for p in _tensors((args, kwargs)) if isinstance(p, torch.nn.Parameter)]
        if not params:
            return

        def in_backward(_: Any) -> None:
            for param in params:
                about_to_be_written(param)

        for tensor in _tensors(output):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(in_backward)

    for module in model.modules():
        module.register_forward_hook(in_forward, with_kwargs=True)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested tuples, lists and dicts."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
