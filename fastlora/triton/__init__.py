"""The ``triton`` backend: mask, down, gemm and wgrad as Triton kernels, same contracts as reference.py and csrc/."""

from .down import down
from .gemm import gemm
from .mask import mask
from .wgrad import wgrad

__all__ = ["down", "gemm", "mask", "wgrad"]
