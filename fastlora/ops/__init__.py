"""Raw ops and the choice of who runs them. ``fastlora.autograd`` is the only caller besides tests."""

from .explanation import explain
from .linear import lora_backward, lora_forward
from .raw import down, gemm, mask, wgrad
from .support import backend

__all__ = [
    "backend",
    "down",
    "explain",
    "gemm",
    "lora_backward",
    "lora_forward",
    "mask",
    "wgrad",
]
