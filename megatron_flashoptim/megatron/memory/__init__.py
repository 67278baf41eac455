"""Bytes on a rank: planned from Megatron's arguments, in Megatron's own report, and live."""
