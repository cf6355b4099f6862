"""wgrad: dA = g^T drop(x) [r, K], dB = dY^T h [N, r] and dbias = sum_m dY [N], all in one launch; memory-bound.

Both products are out[n, r] = sum_m v[m, n] u[m, r] with a wide v (x or dY) and a skinny u (g or h). A CTA owns BN
columns of v and all rows, or, when that makes too few CTAs, a run of rows: then it leaves fp32 partials [splits, n, r],
and a second launch sums them in index order, so the result never depends on who finished first. CTAs below ``ctas_a`` work on dA, the others on dB.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._counters import count
from . import launch
from .dot import dot_add, lost_bits
from .mask import expand, load_words


@triton.jit
def _partial(
    v, u, out, bias_out, words, task, run,
    M, N, R, stride_vm, stride_vn, stride_um, stride_ur, stride_on, stride_or, pitch,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    MASK: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One (split, rank block, column block) of out[split, n, r] = sum_m v[m, n] u[m, r]."""
    blocks_n = tl.cdiv(N, BN)
    blocks_r = tl.cdiv(R, BR)
    col0 = task % blocks_n * BN
    rank0 = task // blocks_n % blocks_r * BR
    split = task // (blocks_n * blocks_r)
    n = col0 + tl.arange(0, BN)
    r = rank0 + tl.arange(0, BR)
    begin = split * run
    end = begin + tl.minimum(run, M - begin)

    v_cols = v + n.to(tl.int64)[None, :] * stride_vn
    u_cols = u + r.to(tl.int64)[None, :] * stride_ur
    acc = tl.zeros((BN, BR), tl.float32)
    lost = lost_bits(acc, v.dtype.element_ty)
    bias_acc = tl.zeros(
        (BM, BN), tl.float32
    )  # summed at the end: a sum across warps at every step waits
    for m0 in range(begin, end, BM):
        m = m0 + tl.arange(0, BM)
        rows = m.to(tl.int64)[:, None]
        inside = (m < end)[:, None]
        v_tile = tl.load(v_cols + rows * stride_vm, mask=inside & (n < N)[None, :], other=0.0)
        u_tile = tl.load(u_cols + rows * stride_um, mask=inside & (r < R)[None, :], other=0.0)
        if BIAS:
            bias_acc += v_tile.to(tl.float32)
        if MASK:
            kept = expand(load_words(words, m0, col0, M, pitch, BM, BN), BM, BN)
            v_tile = tl.where(kept, v_tile, 0.0)
        acc, lost = dot_add(v_tile.T, u_tile, acc, lost, PRECISION)

    here = out + tl.cast(split, tl.int64) * N * R
    here += n.to(tl.int64)[:, None] * stride_on + r.to(tl.int64)[None, :] * stride_or
    tl.store(here, acc.to(out.dtype.element_ty), mask=(n < N)[:, None] & (r < R)[None, :])
    if BIAS:
        if rank0 == 0:
            there = bias_out + tl.cast(split, tl.int64) * N + n
            tl.store(there, tl.sum(bias_acc, axis=0).to(bias_out.dtype.element_ty), mask=n < N)


@triton.jit
def _wgrad_kernel(
    x, g, out_a, dy, h, out_b, bias_out, words, ctas_a, run,
    M, K, N, R, stride_xm, stride_xk, stride_gm, stride_gr, stride_ym, stride_yn, stride_hm, stride_hr,
    stride_an, stride_ar, stride_bn, stride_br, pitch,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    DO_A: tl.constexpr, DO_B: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    launch.enter_chain(CHAIN)
    task = tl.program_id(0)
    if DO_A:
        if task < ctas_a:
            _partial(x, g, out_a, None, words, task, run, M, K, R, stride_xm, stride_xk, stride_gm,
                     stride_gr, stride_an, stride_ar, pitch, BM, BN, BR, MASK, False, PRECISION)  # fmt: skip
    if DO_B:
        if task >= ctas_a:
            _partial(dy, h, out_b, bias_out, None, task - ctas_a, run, M, N, R, stride_ym, stride_yn,
                     stride_hm, stride_hr, stride_bn, stride_br, 0, BM, BN, BR, False, BIAS, PRECISION)  # fmt: skip


@triton.jit
def _sum_splits(
    partial,
    out,
    block,
    rows,
    cols,
    splits,
    stride_row,
    stride_col,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """out[n, r] = sum over splits of partial[s, n, r], in index order, for BN rows."""
    n = block * BN + tl.arange(0, BN)
    for r0 in range(0, cols, BR):
        r = r0 + tl.arange(0, BR)
        inside = (n < rows)[:, None] & (r < cols)[None, :]
        acc = tl.zeros((BN, BR), tl.float32)
        here = partial + n.to(tl.int64)[:, None] * cols + r[None, :]
        for _ in range(splits):
            acc += tl.load(here, mask=inside, other=0.0)
            here += tl.cast(rows, tl.int64) * cols
        to = out + n.to(tl.int64)[:, None] * stride_row + r.to(tl.int64)[None, :] * stride_col
        tl.store(to, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _reduce_kernel(
    partial_a, d_a, partial_b, d_b, bias_partial, d_bias, blocks_a, K, N, R, splits,
    BN: tl.constexpr, BR: tl.constexpr, DO_A: tl.constexpr, DO_B: tl.constexpr, BIAS: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    launch.enter_chain(CHAIN)
    block = tl.program_id(0)
    if DO_A:
        if block < blocks_a:
            _sum_splits(partial_a, d_a, block, K, R, splits, 1, K, BN, BR)
    if DO_B:
        if block >= blocks_a:
            _sum_splits(partial_b, d_b, block - blocks_a, N, R, splits, R, 1, BN, BR)
            if BIAS:
                _sum_splits(bias_partial, d_bias, block - blocks_a, N, 1, splits, 1, 1, BN, 1)


@dataclass(frozen=True)
class WgradTile:
    """Tile shape, and how many CTAs the launch should have at least (rows are split to get there)."""

    bm: int
    bn: int
    br: int
    warps: int
    stages: int
    ctas: int


@functools.lru_cache(1024)
def tile_for(
    rank: int, columns: int, dtype: torch.dtype, masked: bool, device: torch.device
) -> WgradTile:
    """The tile for a rank, the ``columns`` of x and dY together, and a dtype."""
    br = launch.pick(rank, (16, 32, 64, 128))
    sms = launch.multiprocessors(device)
    if launch.interpreting():
        return WgradTile(bm=32, bn=32, br=min(br, 32), warps=4, stages=1, ctas=sms)
    if dtype is torch.float32:
        return WgradTile(bm=32, bn=64, br=min(br, 32), warps=4, stages=3, ctas=2 * sms)
    if masked:
        return WgradTile(bm=64, bn=128, br=br, warps=4, stages=3, ctas=4 * sms)
    if br == 128:  # more columns for each read of u
        stages = launch.stages_that_fit(4, 2 * 64 * (128 + br), device)
        return WgradTile(bm=64, bn=128, br=br, warps=8, stages=stages, ctas=sms * 9 // 10)
    # One CTA an SM keeps as many bytes in flight as several with shallower pipelines, and needs no second launch.
    alone = launch.cdiv(columns, 64) * launch.cdiv(rank, br) <= sms
    stages = launch.stages_that_fit(8 if alone else 4, 2 * 64 * (64 + br), device)
    return WgradTile(bm=64, bn=64, br=br, warps=4, stages=stages, ctas=sms * 9 // 10)


def wgrad(
    x: Tensor | None,
    g: Tensor | None,
    dy: Tensor | None,
    h: Tensor | None,
    words: Tensor | None,
    dtype_a: torch.dtype,
    dtype_b: torch.dtype,
    dtype_bias: torch.dtype | None,
    tile: WgradTile | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``reference.wgrad`` on Triton. ``tile`` overrides the plan (for sweeps)."""
    k = x.shape[1] if x is not None and g is not None else 0
    n = dy.shape[1] if dy is not None and h is not None else 0
    d_a = None if x is None or g is None else g.new_empty(g.shape[1], k, dtype=dtype_a)
    d_b = None if dy is None or h is None else h.new_empty(n, h.shape[1], dtype=dtype_b)
    d_bias = None
    if dy is not None and dtype_bias is not None:
        d_bias = dy.new_empty(dy.shape[1], dtype=dtype_bias)

    like, skinny = (x, g) if k else (dy, h)
    m, rank = (0, 0) if skinny is None else skinny.shape
    idle = m == 0 or rank == 0 or k + n == 0
    if d_bias is not None and dy is not None and (idle or n == 0):  # no pass over dY to ride on
        d_bias.copy_(dy.sum(0, dtype=torch.float32))
    if idle or like is None:
        for d in (d_a, d_b):
            if d is not None:
                d.zero_()
        return d_a, d_b, d_bias
    do_a, do_b = k > 0, n > 0

    tile = tile or tile_for(rank, k + n, like.dtype, words is not None, like.device)
    blocks_r = launch.cdiv(rank, tile.br)
    columns_a, columns_b = launch.cdiv(k, tile.bn), launch.cdiv(n, tile.bn)
    parts = launch.cdiv(tile.ctas, (columns_a + columns_b) * blocks_r)
    run, splits = launch.split_evenly(m, tile.bm, parts)
    bias = do_b and d_bias is not None
    out_a, out_b, bias_out = d_a, d_b, d_bias
    stride_a, stride_b = (1, k), (rank, 1)
    if splits > 1:  # partial sums [splits, n, r], added by a second launch
        out_a = like.new_empty(splits, k, rank, dtype=torch.float32) if do_a else None
        out_b = like.new_empty(splits, n, rank, dtype=torch.float32) if do_b else None
        bias_out = like.new_empty(splits, n, dtype=torch.float32) if bias else None
        stride_a = stride_b = (rank, 1)
    ctas_a, ctas_b = columns_a * blocks_r * splits, columns_b * blocks_r * splits
    strides = [s for t in (x, g, dy, h) for s in (t.stride() if t is not None else (0, 0))]
    launch.run(
        _wgrad_kernel,
        (ctas_a + ctas_b,),
        like.device,
        (
            x, g, out_a, dy, h, out_b, bias_out, words, ctas_a, run,
            m, k, n, rank, *strides, *stride_a, *stride_b, 0 if words is None else words.shape[1],
        ),
        dict(
            BM=tile.bm, BN=tile.bn, BR=tile.br, DO_A=do_a, DO_B=do_b,
            MASK=words is not None, BIAS=bias, PRECISION=launch.input_precision(like.dtype),
        ),
        tile.warps,
        tile.stages,
    )  # fmt: skip
    if splits > 1:
        rows = 64
        blocks_a = launch.cdiv(k, rows)
        launch.run(
            _reduce_kernel,
            (blocks_a + launch.cdiv(n, rows),),
            like.device,
            (out_a, d_a, out_b, d_b, bias_out, d_bias, blocks_a, k, n, rank, splits),
            dict(BN=rows, BR=min(tile.br, 32), DO_A=do_a, DO_B=do_b, BIAS=bias),
            4,
            1,
        )
    count("wgrad", "triton")
    return d_a, d_b, d_bias
