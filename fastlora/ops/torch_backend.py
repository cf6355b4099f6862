"""The ``torch`` backend: reference.py on the caller's dtype, counted. The op library makes masks where it is built."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _library, reference
from .._counters import count


def mask(rng_state: Tensor, rows: int, cols: int, keep: int) -> Tensor:
    """``reference.mask``, two orders of magnitude faster on a CPU where the library is built."""
    count("mask", "torch")
    if rng_state.device.type == "cpu" and _library.load(rng_state.device):
        return torch.ops.fastlora._dropout_mask(rng_state, rows, cols, keep)
    return reference.mask(rng_state, rows, cols, keep)


def down(
    x: Tensor,
    l: Tensor,
    scaling: Tensor | None,
    scale: float,
    rng_state: Tensor | None,
    keep: int,
    emit_cols: int,
) -> tuple[Tensor, Tensor | None]:
    """``reference.down`` with the mask it needs, or beside the mask it is asked for."""
    words = None
    if rng_state is not None:
        words = mask(rng_state, x.shape[0], emit_cols or x.shape[1], keep)
    count("down", "torch")
    if emit_cols:
        return reference.down(x, l, scaling, scale), words
    return reference.down(x, l, scaling, scale, words), None


def gemm(*args: Any) -> Tensor:
    """``reference.gemm``."""
    count("gemm", "torch")
    return reference.gemm(*args)


def wgrad(*args: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``reference.wgrad``."""
    count("wgrad", "torch")
    return reference.wgrad(*args)
