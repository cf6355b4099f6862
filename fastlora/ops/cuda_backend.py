"""The ``cuda`` backend: the hand-written kernels of csrc/, called through the op library."""

from __future__ import annotations

import torch
from torch import Tensor

from .._counters import count


def mask(rng_state: Tensor, rows: int, cols: int, keep: int) -> Tensor:
    """``reference.mask`` by csrc/dropout."""
    count("mask", "cuda")
    return torch.ops.fastlora._dropout_mask(rng_state, rows, cols, keep)
