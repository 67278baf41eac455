"""The Megatron side: optimizer subclass, layout, arguments, install()."""
