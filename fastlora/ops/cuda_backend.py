"""The ``cuda`` backend: the hand-written kernels of csrc/, called through the op library."""

from __future__ import annotations

import torch
from torch import Tensor

from .._counters import count
from .support import Fit


def mask(rng_state: Tensor, rows: int, cols: int, keep: int) -> Tensor:
    """``reference.mask`` by csrc/dropout."""
    count("mask", "cuda")
    return torch.ops.fastlora._dropout_mask(rng_state, rows, cols, keep)


def _rows_miss(name: str, t: Tensor, along: int) -> str | None:
    """Why TMA cannot read the matrix by contiguous lines along dimension ``along``."""
    if t.stride(along) != 1 and t.shape[along] != 1:
        return f"{name} is not contiguous along dimension {along}"
    if t.shape[1 - along] != 1 and t.stride(1 - along) < t.shape[along]:
        return f"{name}'s lines overlap"
    if t.data_ptr() % 16 or (t.stride(1 - along) % 8 and t.shape[1 - along] != 1):
        return f"{name} must start at, and have lines apart by, multiples of 16 bytes"
    return None


def gemm_fit(x: Tensor, w: Tensor, h: Tensor | None, l: Tensor | None, words: Tensor | None) -> Fit:
    """How the tensors of a gemm suit csrc/gemm/sm90.cu."""
    m, k = x.shape
    n = w.shape[0]
    if k == 0 or n % 8 or max(m, n, k) > 2**31 - 1024:
        return Fit(f"needs K >= 1, N a multiple of 8 and sizes below 2^31, got {(m, n, k)}")
    if (h is None) != (l is None):
        return Fit("h and l come together")
    along = 1 if w.stride(1) == 1 else 0
    miss = _rows_miss("x", x, 1) or _rows_miss("w", w, along)
    if h is not None and l is not None and h.shape[1]:
        if l.dtype != x.dtype:
            return Fit(f"l is {l.dtype} beside {x.dtype}")
        miss = miss or _rows_miss("h", h, 1) or _rows_miss("l", l, along)
    return Fit(miss, _slower(m, n, words))


def _slower(m: int, n: int, words: Tensor | None) -> str | None:
    """Where the Triton kernel was measured faster (benchmarks/NOTES.md)."""
    if m <= 64 or -(-m // 128) * -(-n // 256) < 100:
        return "with this few tiles the Triton kernel is faster: this one does not split K"
    if m > 4096 or (words is not None and m > 1024):
        return "with this many rows the Triton kernel is as fast, and faster with a mask"
    return None


def gemm(
    x: Tensor,
    w: Tensor,
    h: Tensor | None,
    l: Tensor | None,
    bias: Tensor | None,
    words: Tensor | None,
    config: list[int] | None = None,
) -> Tensor:
    """``reference.gemm`` by csrc/gemm. ``config`` is a flat ``fastlora._core.TileConfig`` (for sweeps)."""
    count("gemm", "cuda")
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
        bias = bias.clone() if bias.data_ptr() % 4 else bias
    return torch.ops.fastlora._gemm_sm90(x, w, h, l, bias, words, config)
