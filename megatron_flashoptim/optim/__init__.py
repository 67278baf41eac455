"""What a step is, without Megatron: bucket shards, hyper-parameters, update rules."""

from megatron_flashoptim.optim.config import FlashOptimConfig
from megatron_flashoptim.optim.optimizer import FlashOptimizer
from megatron_flashoptim.optim.shard import BucketShard

__all__ = ["BucketShard", "FlashOptimConfig", "FlashOptimizer"]
