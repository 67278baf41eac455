"""BucketShard: the flat optimizer state of one data-parallel shard of one bucket."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_flashoptim.codec.master import correction_dtype
from megatron_flashoptim.codec.spec import GROUP_SIZE, ExpAvgSqCode
from megatron_flashoptim.optim.rules import EXP_AVG as EXP_AVG
from megatron_flashoptim.optim.rules import EXP_AVG_SQ as EXP_AVG_SQ
from megatron_flashoptim.optim.rules import Rule, rule_of
from megatron_flashoptim.optim.segments import SegmentTable

# Names of the state tensors; also the last part of their checkpoint keys.
HIGH = "high"
CORRECTION = "correction"
EXP_AVG_SCALE = "exp_avg_scale"
EXP_AVG_SQ_SCALE = "exp_avg_sq_scale"

# One element per parameter element, and one per quantization group.
ELEMENT_STATE = (HIGH, CORRECTION, EXP_AVG, EXP_AVG_SQ)
GROUP_STATE = (EXP_AVG_SCALE, EXP_AVG_SQ_SCALE)

# Dtype of each moment's codes, and the name of its scales.
MOMENTS = {EXP_AVG: (torch.int8, EXP_AVG_SCALE), EXP_AVG_SQ: (torch.uint8, EXP_AVG_SQ_SCALE)}


@dataclass
class BucketShard:
    """Views of this rank's part of a bucket's buffers, and the optimizer state beside them.

    Attributes:
        param: flat bf16 or fp32 view of the param buffer, n elements, n a multiple of 32. A bf16
            view is the high part of the master weight; an fp32 view is the master itself.
            Where the model's weights are in another format, a bf16 tensor of the shard's own.
        grad: flat bf16 or fp32 view of the grad buffer, n elements.
        segments: which parameter each quantization group belongs to.
        master_bits: 16, 24 or 32 for a bf16 ``param``.
        exp_avg_sq_code: code of the second moment, see ``codec.spec``.
        rule: the update rule, which says what moments there are; AdamW's if not given.
        owns_param: whether ``param`` is no view of a param buffer, and thus part of the state.
        correction: int8 (24 bits) or int16 (32 bits), n elements; None for 16-bit masters and
            for fp32 parameters.
        exp_avg: int8 codes of the first moment, n elements.
        exp_avg_scale: bf16 scales, n / 32 elements.
        exp_avg_sq: uint8 codes of the second moment, n elements; None where the rule has none.
        exp_avg_sq_scale: bf16 scales, n / 32 elements; None where the rule has none.
        launches: kernel launches made ready on these tensors, by their options.

    Raises:
        ValueError: views of the wrong dtype or length.
    """

    param: torch.Tensor
    grad: torch.Tensor
    segments: SegmentTable
    master_bits: int = 24
    exp_avg_sq_code: ExpAvgSqCode = "sqrt"
    rule: Rule = field(default_factory=lambda: rule_of("flash_adamw"))
    owns_param: bool = False
    correction: torch.Tensor | None = field(init=False)
    exp_avg: torch.Tensor = field(init=False)
    exp_avg_scale: torch.Tensor = field(init=False)
    exp_avg_sq: torch.Tensor | None = field(init=False, default=None)
    exp_avg_sq_scale: torch.Tensor | None = field(init=False, default=None)
    launches: dict[tuple[Any, ...], tuple[Any, Any]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        numel = self.param.numel()
        for name, view in (("param", self.param), ("grad", self.grad)):
            if view.dtype not in (torch.bfloat16, torch.float32):
                raise ValueError(f"the {name} shard must be bf16 or fp32, got {view.dtype}")
            if view.shape != (numel,) or not view.is_contiguous():
                raise ValueError(f"the {name} shard must be flat with {numel} elements")
        if numel % GROUP_SIZE:
            raise ValueError(
                f"a shard must hold whole groups of {GROUP_SIZE}, got {numel} elements"
            )
        if self.segments.num_groups != numel // GROUP_SIZE:
            raise ValueError("the segment table covers another number of groups than the shard")
        dtype = correction_dtype(self.master_bits)
        keeps_correction = dtype is not None and self.param.dtype == torch.bfloat16
        self.correction = self._zeros(numel, dtype) if keeps_correction else None
        for moment in self.rule.moments:
            dtype, scale = MOMENTS[moment]
            setattr(self, moment, self._zeros(numel, dtype))
            setattr(self, scale, self._zeros(numel // GROUP_SIZE, torch.bfloat16))

    def _zeros(self, numel: int, dtype: torch.dtype | None) -> torch.Tensor:
        return torch.zeros(numel, dtype=dtype, device=self.param.device)

    @property
    def high(self) -> torch.Tensor | None:
        """The high part of the master where it is no view of the weights, else None."""
        return self.param if self.owns_param else None

    @property
    def num_groups(self) -> int:
        """Number of quantization groups."""
        return self.segments.num_groups

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield name and tensor of the state that is checkpointed, in a fixed order."""
        for name in (*ELEMENT_STATE, *GROUP_STATE):
            tensor = getattr(self, name)
            if tensor is not None:
                yield name, tensor

    def move_state(self, device: torch.device | str) -> None:
        """Move the checkpointed state to a device; the tensors stay the same objects."""
        for _, tensor in self.state():
            tensor.data = tensor.data.to(device)

    def nbytes(self) -> int:
        """Return the bytes of all tensors the shard holds beside views of Megatron's buffers."""
        return sum(t.nbytes for _, t in self.state()) + self.segments.nbytes()
