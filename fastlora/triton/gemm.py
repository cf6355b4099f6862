"""gemm: y = x w^T + bias + drop(h l^T), the frozen product with its K loop extended by the rank.

Persistent: one CTA per SM walks BM x BN output tiles in groups of rows, fp32 accumulator, one rounding. On sm_90 and
newer x, w and y move through tensor descriptors (TMA), whose edges are clipped by hardware (and without a low-rank term
the pipeline runs on across tiles); elsewhere, or for tensors no descriptor can name, the same loop loads through
pointers with any strides.
w may be K-major (y = x W^T) or MN-major (dX = dY W): the tile is loaded as it lies, no transposed copy. The low-rank
operands h and l are small and always come through pointers. With dropout the mask belongs to h l^T alone, so the
accumulator starts from mask * (h l^T) and the main loop adds to it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .._counters import count
from . import launch
from .dot import dot_add, lost_bits
from .mask import load_mask


@triton.jit
def _load_tile(
    src, row0, col0, rows, cols, stride_row, stride_col,
    BR: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A [BR, BC] tile through pointers, zero past the edges."""
    r = row0 + tl.arange(0, BR)
    c = col0 + tl.arange(0, BC)
    here = src + r.to(tl.int64)[:, None] * stride_row + c.to(tl.int64)[None, :] * stride_col
    if EVEN:
        return tl.load(here)
    return tl.load(here, mask=(r < rows)[:, None] & (c < cols)[None, :], other=0.0)


@triton.jit
def _low_rank(
    h_tile, l_tile, acc, lost, h, l, row0, col0, M, N, R, stride_hm, stride_hr, stride_ln, stride_lr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, RP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(acc, lost) + h[row0:] l[col0:]^T, given the first rank block's tiles."""
    acc, lost = dot_add(h_tile, l_tile, acc, lost, PRECISION)
    for r0 in tl.static_range(BR, RP, BR):
        h_tile = _load_tile(h, row0, r0, M, R, stride_hm, stride_hr, BM, BR, False)
        l_tile = _load_tile(l, r0, col0, R, N, stride_lr, stride_ln, BR, BN, False)
        acc, lost = dot_add(h_tile, l_tile.to(h_tile.dtype), acc, lost, PRECISION)
    return acc, lost


@triton.jit
def _gemm_kernel(
    x, w, y, h, l, bias, words,
    M, N, K, R, stride_xm, stride_xk, stride_wn, stride_wk, stride_ym,
    stride_hm, stride_hr, stride_ln, stride_lr, pitch,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, RP: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr, W_K_MAJOR: tl.constexpr, EVEN: tl.constexpr,
    LOW_RANK: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, HALVES: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    group_size = GROUP * tiles_n
    for tile in tl.range(
        tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=TMA and not LOW_RANK
    ):
        # Tiles in groups of GROUP block rows: what runs at once shares its operands in L2.
        first_m = tile // group_size * GROUP
        height = tl.minimum(tiles_m - first_m, GROUP)
        row0 = (first_m + tile % group_size % height) * BM
        col0 = tile % group_size // height * BN

        acc = tl.zeros((BM, BN), tl.float32)
        if LOW_RANK:
            # The first rank block is fetched before the main loop, so that its latency hides behind it.
            h_tile = _load_tile(h, row0, 0, M, R, stride_hm, stride_hr, BM, BR, False)
            l_tile = _load_tile(l, 0, col0, R, N, stride_lr, stride_ln, BR, BN, False).to(
                h_tile.dtype
            )
        lost = lost_bits(acc, DTYPE)
        if MASK:
            acc, _ = _low_rank(h_tile, l_tile, acc, lost, h, l, row0, col0, M, N, R, stride_hm, stride_hr, stride_ln,
                               stride_lr, BM, BN, BR, RP, PRECISION)  # fmt: skip
            acc = tl.where(load_mask(words, row0, col0, M, pitch, BM, BN), acc, 0.0)
        for k0 in range(0, K, BK):
            if TMA:
                x_tile = x.load([row0, k0])
                w_tile = w.load([col0, k0]).T if W_K_MAJOR else w.load([k0, col0])
            else:
                x_tile = _load_tile(x, row0, k0, M, K, stride_xm, stride_xk, BM, BK, EVEN)
                w_tile = _load_tile(w, k0, col0, K, N, stride_wk, stride_wn, BK, BN, EVEN)
            acc, lost = dot_add(x_tile, w_tile, acc, lost, PRECISION)
        if LOW_RANK and not MASK:
            acc, _ = _low_rank(h_tile, l_tile, acc, lost, h, l, row0, col0, M, N, R, stride_hm, stride_hr, stride_ln,
                               stride_lr, BM, BN, BR, RP, PRECISION)  # fmt: skip
        n = col0 + tl.arange(0, BN)
        if BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if TMA:
            if HALVES:  # two half-width stores need half the staging memory
                left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
                y.store([row0, col0], left.to(DTYPE))
                y.store([row0, col0 + BN // 2], right.to(DTYPE))
            else:
                y.store([row0, col0], acc.to(DTYPE))
        else:
            m = row0 + tl.arange(0, BM)
            here = y + m.to(tl.int64)[:, None] * stride_ym + n[None, :]
            tl.store(here, acc.to(DTYPE), mask=(m < M)[:, None] & (n < N)[None, :])


_TL_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class GemmTile:
    """Tile shape and pipeline of one launch."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    group: int = 16
    halves: bool = False  # store the tile in two halves (descriptor path)
    br: int = 16  # rank block


@functools.lru_cache(1024)
def tile_for(
    m: int, rank: int, dtype: torch.dtype, crowded: bool, device: torch.device
) -> GemmTile:
    """The tile for a problem, by arch, rows and rank."""
    if launch.interpreting():
        return GemmTile(32, 32, 32, warps=4, stages=1, group=2, halves=m > 64)
    roomy = launch.shared_memory(device) > 160 * 1024
    if dtype is torch.float32:
        return GemmTile(64, 64, 32, warps=4, stages=3)
    if m <= 64:
        rows = launch.pick(m, (16, 32, 64))
        return GemmTile(rows, 64, 128 if roomy else 64, warps=4, stages=4 if roomy else 3)
    if m <= 512:
        return GemmTile(64, 128, 64, warps=4, stages=4 if roomy else 3)
    if roomy and launch.capability(device) >= (9, 0):
        # The first rank block waits in shared memory beside three 48 KB stages and the staging of y: with more than
        # 16 ranks y is staged in halves, and a mask or an fp32 factor to convert (crowded) leaves room for 32. Without
        # a low-rank term halves were measured faster anyway.
        br = launch.pick(rank, (16, 32) if crowded else (16, 32, 64))
        return GemmTile(128, 256, 64, warps=8, stages=3, halves=rank == 0 or br > 16, br=br)
    return GemmTile(128, 128, 64 if roomy else 32, warps=8 if roomy else 4, stages=3)


def gemm(
    x: Tensor,
    w: Tensor,
    h: Tensor | None,
    l: Tensor | None,
    bias: Tensor | None,
    words: Tensor | None,
    tile: GemmTile | None = None,
) -> Tensor:
    """``reference.gemm`` on Triton. ``tile`` overrides the plan (for sweeps)."""
    m, k = x.shape
    n = w.shape[0]
    y = x.new_empty(m, n)
    if m == 0 or n == 0:
        return y
    rank = h.shape[1] if h is not None and l is not None else 0
    low_rank = rank > 0
    crowded = words is not None or (l is not None and l.dtype != x.dtype)
    tile = tile or tile_for(m, rank, x.dtype, crowded, x.device)

    k_major = w.stride(1) == 1
    w_rows = w if k_major else w.t()
    tma = (
        launch.capability(x.device) >= (9, 0)
        and k > 0
        and all(map(launch.describable, (x, w_rows, y)))
    )
    operands: tuple[Any, Any, Any] = (x, w, y)
    if tma:
        w_block = [tile.bn, tile.bk] if k_major else [tile.bk, tile.bn]
        operands = (
            TensorDescriptor.from_tensor(x, [tile.bm, tile.bk]),
            TensorDescriptor.from_tensor(w_rows, w_block),
            TensorDescriptor.from_tensor(y, [tile.bm, tile.bn // 2 if tile.halves else tile.bn]),
        )
    ctas = min(launch.multiprocessors(x.device), launch.cdiv(m, tile.bm) * launch.cdiv(n, tile.bn))
    launch.run(
        _gemm_kernel,
        (ctas,),
        x.device,
        (
            *operands, h, l, None if bias is None else bias.contiguous(), words,
            m, n, k, rank, *x.stride(), *w.stride(), y.stride(0),
            *(h.stride() if h is not None else (0, 0)), *(l.stride() if l is not None else (0, 0)),
            0 if words is None else words.shape[1],
        ),
        dict(
            BM=tile.bm, BN=tile.bn, BK=tile.bk, BR=tile.br, RP=launch.cdiv(rank, tile.br) * tile.br,
            GROUP=tile.group, TMA=tma, W_K_MAJOR=k_major,
            EVEN=m % tile.bm == 0 and n % tile.bn == 0 and k % tile.bk == 0,
            LOW_RANK=low_rank, MASK=low_rank and words is not None, BIAS=bias is not None, HALVES=tile.halves,
            DTYPE=_TL_DTYPE[x.dtype], PRECISION=launch.input_precision(x.dtype),
        ),
        tile.warps,
        tile.stages,
    )  # fmt: skip
    count("gemm", "triton")
    return y
