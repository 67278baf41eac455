"""Triton kernels: device functions of the codec and one fused step per update rule."""
