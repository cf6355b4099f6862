"""4-bit weights: ``NF4Tensor``, and bitsandbytes' objects and checkpoint keys to and from it."""

from .nf4_tensor import NF4Tensor

__all__ = ["NF4Tensor"]
