"""Mapping of flash state into Megatron's sharded state dicts."""
