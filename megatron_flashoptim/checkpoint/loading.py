"""Loading: sharded tensors to read into, and what is to be done once they are read.

State is read in place wherever checkpoint and run store it alike. Where they do not, it is read
into a temporary tensor, and an action made for it converts it afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject

from megatron_flashoptim.checkpoint.conversion import convert_correction
from megatron_flashoptim.codec.master import correction_dtype

TENSORS = "tensors"
_LOADING = "loading"


@dataclass
class Loading:
    """Sharded tensors by number, in the order in which they were added.

    Attributes:
        sharded: what Megatron reads; its data are live state or temporary tensors.
        targets: the same data, which Megatron may have replaced in the loaded state dict.
        actions: called in order after everything is read.
    """

    sharded: dict[str, ShardedTensor] = field(default_factory=dict)
    targets: dict[str, torch.Tensor] = field(default_factory=dict)
    actions: list[Callable[[], None]] = field(default_factory=list)

    def read(self, sharded: ShardedTensor) -> None:
        """Add a sharded tensor to be read into its data."""
        number = str(len(self.sharded))
        self.targets[number] = sharded.data
        self.sharded[number] = sharded

    def read_correction(self, sharded: ShardedTensor, saved_bits: int) -> None:
        """Add a correction, held by the checkpoint with these master bits, to be converted.

        Args:
            sharded: with the live correction as its data.
            saved_bits: master bits of the checkpoint.
        """
        live = sharded.data
        dtype = correction_dtype(saved_bits)
        if dtype == live.dtype:
            self.read(sharded)
        elif dtype is None:
            self.actions.append(_Zero(live))
        else:
            saved = torch.zeros_like(live, dtype=dtype, memory_format=torch.contiguous_format)
            self.read(replace(sharded, data=saved, dtype=dtype))
            self.actions.append(_Convert(saved, live))

    def state_dict(self) -> dict[str, object]:
        """Return the sharded state dict; ``finish`` takes what Megatron makes of it."""
        return {TENSORS: dict(self.sharded), _LOADING: LocalNonpersistentObject(self)}


@torch.no_grad()
def finish(loaded: dict[str, object]) -> None:
    """Put loaded state where it belongs, given the loaded twin of ``Loading.state_dict()``."""
    loading = loaded[_LOADING]
    assert isinstance(loading, Loading)
    tensors = loaded.get(TENSORS, {})
    assert isinstance(tensors, dict)
    for number, target in loading.targets.items():
        source = tensors[number]
        if source.data_ptr() != target.data_ptr():  # read by another rank, or moved
            target.copy_(source.view(target.shape))
    for action in loading.actions:
        action()


def saved_state_dict(sharded: list[ShardedTensor]) -> dict[str, object]:
    """Return the sharded state dict of state to be saved."""
    return {TENSORS: {str(number): tensor for number, tensor in enumerate(sharded)}}


@dataclass(frozen=True)
class _Zero:
    """The checkpoint's masters are the weights alone."""

    correction: torch.Tensor

    def __call__(self) -> None:
        self.correction.zero_()


@dataclass(frozen=True)
class _Convert:
    """Convert a correction that was saved with another width."""

    saved: torch.Tensor
    correction: torch.Tensor

    def __call__(self) -> None:
        self.correction.copy_(convert_correction(self.saved, self.correction.dtype))
