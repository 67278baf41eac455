"""FP8 weights on the CPU, in place of Transformer Engine's, which cannot be imported there.

A ``Float8`` is to Megatron what Transformer Engine's ``Float8Tensor`` with current scaling is: it
says bf16, holds e4m3 codes in uint8, which DDP moves into its param buffer, is computed with as
bf16, and is quantized from shards of master weights by ``quantize_param_shard``. Everything around
it is Megatron's own.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch

LARGEST = 448.0
BF16 = torch.bfloat16


class Float8(torch.Tensor):
    """A tensor of codes with one scale.

    Attributes:
        codes: uint8 of the tensor's shape.
        scale: fp32 scalar, what a code stands for is a multiple of.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> Float8:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=BF16)

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __repr__(self, **_: Any) -> str:
        return f"Float8({tuple(self.shape)})"

    def dequantize(self) -> torch.Tensor:
        """Return the values in bf16."""
        return (self.codes.view(torch.float8_e4m3fn).float() * self.scale).to(BF16)

    @property
    def data(self) -> Float8:
        """The tensor itself, whose codes may be moved."""
        return self

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        if function is torch.ops.aten.copy_.default and isinstance(args[0], cls):
            value = args[1].dequantize() if isinstance(args[1], cls) else args[1]
            args[0].scale.copy_(_scale(value))
            args[0].codes.copy_(_codes(value, args[0].scale))
            return args[0]
        values = [a.dequantize() if isinstance(a, cls) else a for a in args]
        return function(*values, **(kwargs or {}))


def _scale(value: torch.Tensor) -> torch.Tensor:
    return value.float().abs().max() / LARGEST


def _codes(value: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (value.float() / scale).to(torch.float8_e4m3fn).view(torch.uint8)


def quantize_linear_layers(model: torch.nn.Module) -> None:
    """Replace the weights of all linear layers, as ``fp8_model_init`` does while they are built."""
    for name, module in model.named_modules():
        if not name.rpartition(".")[2].startswith("linear_"):
            continue
        old = module.weight
        new = torch.nn.Parameter(Float8(torch.zeros(old.shape, dtype=torch.uint8), _scale(old)))
        with torch.no_grad():
            new.copy_(old.detach())
        for attribute, value in vars(old).items():
            setattr(new, attribute, value)
        new.initial = old.detach().clone()
        new.get_high_precision_init_val = MethodType(lambda p: getattr(p, "initial", None), new)
        new.clear_high_precision_init_val = MethodType(
            lambda p: p.__dict__.pop("initial", None), new
        )
        module.weight = new


def _move(weight: Float8, place: torch.Tensor) -> None:
    place.copy_(weight.codes)
    weight.codes = place


@torch.no_grad()
def _quantize_shards(
    weights: list[Float8],
    masters: list[torch.Tensor | None],
    starts: list[int | None],
    group: Any,
    *_: Any,
) -> None:
    """Quantize as Transformer Engine does: round to bf16, scale by the largest of all ranks."""
    for weight, master, start in zip(weights, masters, starts, strict=True):
        scale = torch.zeros(()) if master is None else _scale(master.to(BF16))
        torch.distributed.all_reduce(scale, op=torch.distributed.ReduceOp.MAX, group=group)
        weight.scale.copy_(scale)
        if master is not None:
            part = weight.codes.view(-1)[start : start + master.numel()]
            part.copy_(_codes(master.to(BF16), scale))


def enable() -> None:
    """Let Megatron take ``Float8`` for Transformer Engine's quantized tensors in this process."""
    from megatron.core import fp8_utils

    fp8_utils.HAVE_TE_FP8_TENSOR_CLASS = True
    fp8_utils.FP8_TENSOR_CLASS = Float8
    fp8_utils.dequantize_fp8_tensor.__globals__["is_te_min_version"] = lambda *_, **__: True
    fp8_utils._modify_underlying_storage_impl = _move
    fp8_utils._quantize_param_shard_impl = _quantize_shards
    fp8_utils.te_post_all_gather_processing = lambda weights: None
    _gather_bytes()


def _gather_bytes() -> None:
    """Let gloo gather bytes: of buckets of several dtypes at once it makes one dtype."""
    group = torch.distributed.ProcessGroup
    gather = group.allgather_into_tensor_coalesced

    def as_bytes(self: Any, into: list[Any], parts: list[Any], *options: Any) -> Any:
        views = ([t.view(torch.uint8) for t in tensors] for tensors in (into, parts))
        return gather(self, *views, *options)

    group.allgather_into_tensor_coalesced = as_bytes
