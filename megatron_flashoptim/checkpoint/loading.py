"""Loading: sharded tensors to read into, and what is to be done once they are read.

State is read in place wherever checkpoint and run store it alike. Where they do not, it is read
into a temporary tensor, and an action made for it converts it afterwards.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_flashoptim.checkpoint.conversion import convert_correction
from megatron_flashoptim.checkpoint.reader import CheckpointReader
from megatron_flashoptim.codec.master import correction_dtype

logger = logging.getLogger(__name__)

TENSORS = "tensors"
_LOADING = "loading"
# Keys told of those that a checkpoint lacks.
_NAMED = 5


class ReadsFolder:
    """What reads more of a checkpoint's folder once Megatron has loaded it.

    Attributes:
        folder: the checkpoint's, None until ``tell_folder``.
    """

    folder: str | None = None


def tell_folder(sharded_state_dict: object, folder: str) -> None:
    """Give the checkpoint's folder to all in a sharded state dict that read it."""
    if not isinstance(sharded_state_dict, dict | list):
        return
    for value in nested_values(sharded_state_dict):
        if isinstance(value, LocalNonpersistentObject) and isinstance(value.obj, ReadsFolder):
            value.obj.folder = str(folder)


def warn_of_other_rows(sharded_state_dict: object, metadata: Metadata) -> None:
    """Warn where the vocabulary is padded to other rows than in the checkpoint, once.

    Args:
        sharded_state_dict: to be loaded.
        metadata: of the checkpoint.
    """
    if not isinstance(sharded_state_dict, dict):
        return
    # The optimizer's state follows the weights.
    weights = {key: value for key, value in sharded_state_dict.items() if key != "optimizer"}
    for tensor in nested_values(weights):
        if not isinstance(tensor, ShardedTensor) or not tensor.allow_shape_mismatch:
            continue
        saved = metadata.state_dict_metadata.get(tensor.key)
        if not isinstance(saved, TensorStorageMetadata) or not tensor.global_shape:
            continue
        rows, wanted = saved.size[0], tensor.global_shape[0]
        if rows != wanted:
            logger.warning(
                "%s has %d rows in the checkpoint and %d in this run: Megatron pads the vocabulary "
                "to a multiple of --make-vocab-size-divisible-by times the tensor parallel size. "
                "%s; unless that is wanted, choose the number so that there are %d rows",
                tensor.key,
                rows,
                wanted,
                "New rows start as zeros, and the loss jumps until they are trained away"
                if wanted > rows
                else "The last rows are dropped",
                rows,
            )
            return


@dataclass
class Loading(ReadsFolder):
    """Sharded tensors by number, in the order in which they were added.

    Attributes:
        sharded: what Megatron reads; its data are live state or temporary tensors.
        targets: the same data, which Megatron may have replaced in the loaded state dict.
        weights: to be read from the folder, since Megatron reads the same elements otherwise.
        actions: called in order after everything is read.
    """

    sharded: dict[str, ShardedTensor] = field(default_factory=dict)
    targets: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: list[ShardedTensor] = field(default_factory=list)
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

    def read_weights(self) -> None:
        """Read ``weights`` into their data.

        Raises:
            ValueError: nobody has told the folder, or it is damaged.
        """
        if not self.weights:
            return
        if self.folder is None:
            raise ValueError(
                "high parts of quantized weights are read from the checkpoint's folder, which is "
                "known only after megatron_flashoptim.install(); call it before "
                "dist_checkpointing.load"
            )
        reader = CheckpointReader(self.folder)
        for sharded in self.weights:
            read = torch.zeros_like(sharded.data, device="cpu")
            partly = sharded.allow_shape_mismatch
            reader.read_into(read, sharded.key, sharded.global_offset, partly=partly)
            sharded.data.copy_(read)

    def state_dict(self) -> dict[str, object]:
        """Return the sharded state dict; ``finish`` takes what Megatron makes of it."""
        return {TENSORS: dict(self.sharded), _LOADING: LocalNonpersistentObject(self)}


@torch.no_grad()
def finish(loaded: dict[str, object]) -> None:
    """Put loaded state where it belongs, given the loaded twin of ``Loading.state_dict()``.

    Raises:
        ValueError: Megatron has left out tensors that the checkpoint lacks, as it does with some
            values of ``--dist-ckpt-strictness``; or as of ``Loading.read_weights``.
    """
    loading = loaded[_LOADING]
    assert isinstance(loading, Loading)
    tensors = loaded.get(TENSORS, {})
    assert isinstance(tensors, dict)
    lacking = {tensor.key for number, tensor in loading.sharded.items() if number not in tensors}
    if lacking:
        raise ValueError(
            f"the checkpoint lacks {', '.join(sorted(lacking)[:_NAMED])}"
            + (f" and {len(lacking) - _NAMED} more" if len(lacking) > _NAMED else "")
            + ": flash state cannot be loaded in part. Drop --dist-ckpt-strictness and build the "
            "model that was saved, or load what weights there are with --no-load-optim "
            "--no-load-rng"
        )
    for number, target in loading.targets.items():
        source = tensors[number]
        if source.data_ptr() != target.data_ptr():  # read by another rank, or moved
            target.copy_(source.view(target.shape))
    loading.read_weights()
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
