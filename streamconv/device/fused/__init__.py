"""Fused kernels for the ring: one launch for each encoding of a step, where the torch definition makes tens.

`kernel_of` says which encodings have one; what has none runs its torch definition. The bytes are the same.
"""

from streamconv.device.fused.registry import Kernel, Launch, Unfused, abandon, has_kernel, kernel_of, works

__all__ = ["Kernel", "Launch", "Unfused", "abandon", "has_kernel", "kernel_of", "works"]
