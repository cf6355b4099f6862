"""Raw ops and the choice of who runs them. ``fastlora.autograd`` is the only caller besides tests."""

from .explanation import explain
from .raw import down, gemm, mask, wgrad
from .support import backend

__all__ = ["backend", "down", "explain", "gemm", "mask", "wgrad"]
