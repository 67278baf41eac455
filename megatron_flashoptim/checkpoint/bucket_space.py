"""``dp_reshardable``: the flat state of each bucket as one sharded tensor per kind of state.

Parameters start at whole quantization groups of a bucket, whatever the data-parallel size, so a
bucket's state without the padding at its end is the same tensor on any number of ranks. Each
rank contributes its own slice; nothing is gathered or copied.

The bf16 high part of the master is the model weight, which the checkpoint holds already; that of
a quantized weight is state as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.dist_checkpointing import ShardedTensor

from megatron_flashoptim.checkpoint.loading import Loading, saved_state_dict
from megatron_flashoptim.codec.spec import GROUP_SIZE
from megatron_flashoptim.optim.shard import CORRECTION, GROUP_STATE, BucketShard

# In place of a dtype: weights of another format, beside which the state has a high part.
QUANTIZED = "quantized"


@dataclass(frozen=True)
class BucketSpace:
    """The buckets of one distributed optimizer, as a checkpoint sees them.

    Attributes:
        buffers: Megatron's param and grad buffers.
        shards: this rank's shards, in the order of buffers and buckets.
        dp_rank: rank in the data-parallel group that shares the optimizer state.
        dp_group_index: index of that group; part of the keys.
        instance: number of the distributed optimizer instance; 0 is saved.
    """

    buffers: Sequence[Any]
    shards: Sequence[BucketShard]
    dp_rank: int
    dp_group_index: int
    instance: int

    def saving(self) -> dict[str, object]:
        """Return the sharded state dict to save."""
        return saved_state_dict([sharded for _, sharded in self._sharded()])

    def loading(self, saved_bits: int) -> dict[str, object]:
        """Return the sharded state dict to load, see ``loading.finish``.

        Args:
            saved_bits: master bits of the checkpoint.
        """
        loading = Loading()
        for name, sharded in self._sharded():
            if name == CORRECTION:
                loading.read_correction(sharded, saved_bits)
            else:
                loading.read(sharded)
        return loading.state_dict()

    def _sharded(self) -> Iterator[tuple[str, ShardedTensor]]:
        """Yield name and sharded tensor of the live state.

        Keys follow Megatron's:
        ``optimizer.distributed.dp_group_idx_I.gbuf_idx_J.bucket_idx_K.NAME``.
        """
        prefix = f"optimizer.distributed.dp_group_idx_{self.dp_group_index}"
        for name, bucket, shard in self.named_buckets():
            unpadded = -(-bucket.numel_unpadded // GROUP_SIZE) * GROUP_SIZE
            for state_name, tensor in shard.state():
                total = unpadded // (GROUP_SIZE if state_name in GROUP_STATE else 1)
                start = self.dp_rank * tensor.numel()
                length = max(0, min(tensor.numel(), total - start))
                if length == 0:
                    continue  # this rank's slice is padding at the bucket's end
                yield (
                    state_name,
                    ShardedTensor(
                        f"{prefix}.{name}.{state_name}",
                        tensor[:length],
                        tensor.dtype,
                        (length,),
                        (total,),
                        (start,),
                        axis_fragmentations=None,
                        replica_id=(self.instance, 0, 0),
                    ),
                )

    def named_buckets(self) -> Iterator[tuple[str, Any, BucketShard]]:
        """Yield the key part, ``gbuf_idx_J.bucket_idx_K``, Megatron's bucket and our shard."""
        buckets = (
            (f"gbuf_idx_{gbuf_index}.bucket_idx_{bucket_index}", bucket)
            for gbuf_index, buffer in enumerate(self.buffers)
            for bucket_index, bucket in enumerate(buffer.buckets)
        )
        for (name, bucket), shard in zip(buckets, self.shards, strict=True):
            yield name, bucket, shard

    def layout(self) -> list[list[int]]:
        """Return the number of elements of each bucket of each buffer, without end padding."""
        return [[bucket.numel_unpadded for bucket in buffer.buckets] for buffer in self.buffers]

    def weights(self) -> list[str]:
        """Return the dtype of each buffer's weights, ``"bfloat16"`` and so on, or ``QUANTIZED``."""
        shards = iter(self.shards)
        of_buffers = [[next(shards) for _ in buffer.buckets] for buffer in self.buffers]
        return [
            QUANTIZED if first.owns_param else str(first.param.dtype).removeprefix("torch.")
            for first, *_ in of_buffers
        ]
