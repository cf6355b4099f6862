"""segment_wgrad: dA_e = g_e^T drop(x_e) [E, r, K] and dB_e = dY_e^T h_e [E, N, r] over the rows of segment e, in one launch.

Both are out[e, n, r] = sum_m v[m, n] u[m, r] with a wide v and a skinny u, as in wgrad.py. A CTA owns an item of
bounds.py, whose blocks of rows are long here, and BN columns. A segment that one item holds whole, an empty one too, is
stored at once. Of one that crosses a block edge each item leaves an fp32 partial, and a second launch adds them in order of
rows: no atomics, the same bits every time, and no segment keeps a single CTA for longer than one block of rows. A block
has at most two partials, of the segment that comes in from the block before and of the one that begins here and goes on:
slots 2 t and 2 t + 1. So the workspace is [2 blocks, n, r], however many segments there are.
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
from .bounds import count_items, count_up_to, locate, lookup_block, span
from .dot import dot_add, lost_bits
from .mask import expand, load_words


@triton.jit
def _item(
    v, u, out, partial, words, bounds, item, task, length,
    M, E, N, R, stride_vm, stride_vn, stride_um, stride_ur, stride_on, stride_or, pitch,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr,
    MASK: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One (item, rank block, column block) of out[segment, n, r], or of its partial."""
    segment, begin, end, first, last = locate(bounds, item, M, E, length, BE)
    whole = (first == begin) & (last == end)
    if (segment >= 0) & (segment < E) & (whole | (first < last)):
        blocks_n = tl.cdiv(N, BN)
        col0 = task % blocks_n * BN
        n = col0 + tl.arange(0, BN)
        r = task // blocks_n * BR + tl.arange(0, BR)
        v_cols = v + n.to(tl.int64)[None, :] * stride_vn
        u_cols = u + r.to(tl.int64)[None, :] * stride_ur
        acc = tl.zeros((BN, BR), tl.float32)
        lost = lost_bits(acc, v.dtype.element_ty)
        start = first
        if MASK:
            start = first // 32 * 32  # where words begin
        for m0 in range(start, last, BM):
            m = m0 + tl.arange(0, BM)
            rows = m.to(tl.int64)[:, None]
            mine = ((m >= first) & (m < last))[:, None]
            v_tile = tl.load(v_cols + rows * stride_vm, mask=mine & (n < N)[None, :], other=0.0)
            u_tile = tl.load(u_cols + rows * stride_um, mask=mine & (r < R)[None, :], other=0.0)
            if MASK:
                kept = expand(load_words(words, m0, col0, M, pitch, BM, BN), BM, BN)
                v_tile = tl.where(kept, v_tile, 0.0)
            acc, lost = dot_add(v_tile.T, u_tile, acc, lost, PRECISION)

        inside = (n < N)[:, None] & (r < R)[None, :]
        size = tl.cast(N, tl.int64) * R
        if whole:
            here = out + segment * size
            here += n.to(tl.int64)[:, None] * stride_on + r.to(tl.int64)[None, :] * stride_or
            tl.store(here, acc.to(out.dtype.element_ty), mask=inside)
        if SPLIT:
            if not whole:
                slot = 2 * (first // length) + (first == begin).to(tl.int32)
                there = partial + slot * size + n.to(tl.int64)[:, None] * R + r[None, :]
                tl.store(there, acc, mask=inside)


@triton.jit
def _segment_wgrad_kernel(
    x, g, out_a, partial_a, dy, h, out_b, partial_b, words, bounds, length,
    M, E, K, N, R, stride_xm, stride_xk, stride_gm, stride_gr, stride_ym, stride_yn, stride_hm, stride_hr, pitch,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr,
    DO_A: tl.constexpr, DO_B: tl.constexpr, MASK: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    launch.enter_chain(CHAIN)
    blocks_r = tl.cdiv(R, BR)
    tasks_a = 0
    tasks_b = 0
    if DO_A:
        tasks_a = tl.cdiv(K, BN) * blocks_r
    if DO_B:
        tasks_b = tl.cdiv(N, BN) * blocks_r
    item = tl.program_id(0) // (tasks_a + tasks_b)
    task = tl.program_id(0) % (tasks_a + tasks_b)
    if DO_A:
        if task < tasks_a:
            _item(x, g, out_a, partial_a, words, bounds, item, task, length, M, E, K, R, stride_xm, stride_xk,
                  stride_gm, stride_gr, 1, K, pitch, BM, BN, BR, BE, MASK, SPLIT, PRECISION)  # fmt: skip
    if DO_B:
        if task >= tasks_a:
            _item(dy, h, out_b, partial_b, None, bounds, item, task - tasks_a, length, M, E, N, R, stride_ym,
                  stride_yn, stride_hm, stride_hr, R, 1, 0, BM, BN, BR, BE, False, SPLIT, PRECISION)  # fmt: skip


@triton.jit
def _sum_blocks(
    partial, out, first, last, segment, block, N, R, stride_on, stride_or, BN: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """out[segment, n, r] = the partials of row blocks first..last, in order, for BN columns."""
    n = block * BN + tl.arange(0, BN)
    size = tl.cast(N, tl.int64) * R
    for r0 in range(0, R, BR):
        r = r0 + tl.arange(0, BR)
        inside = (n < N)[:, None] & (r < R)[None, :]
        offset = n.to(tl.int64)[:, None] * R + r[None, :]
        acc = tl.load(partial + (2 * first + 1) * size + offset, mask=inside, other=0.0)
        for t in range(first + 1, last + 1):
            acc += tl.load(partial + 2 * t * size + offset, mask=inside, other=0.0)
        to = out + segment * size
        to += n.to(tl.int64)[:, None] * stride_on + r.to(tl.int64)[None, :] * stride_or
        tl.store(to, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _segment_reduce_kernel(
    partial_a, d_a, partial_b, d_b, bounds, blocks_a, blocks_b, length, M, E, K, N, R,
    BN: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr, DO_A: tl.constexpr, DO_B: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """For each row block but the last: the segment that begins in it and goes on past its end, if there is one."""
    launch.enter_chain(CHAIN)
    t = tl.program_id(0) // (blocks_a + blocks_b)
    block = tl.program_id(0) % (blocks_a + blocks_b)
    edge = (t + 1) * length
    segment = count_up_to(bounds, edge - 1, E, BE) - 1
    begin, end = span(bounds, segment, M, E)
    if (segment >= 0) & (segment < E) & (begin >= edge - length) & (end > edge):
        last = (end - 1) // length
        if DO_A:
            if block < blocks_a:
                _sum_blocks(partial_a, d_a, t, last, segment, block, K, R, 1, K, BN, BR)
        if DO_B:
            if block >= blocks_a:
                _sum_blocks(partial_b, d_b, t, last, segment, block - blocks_a, N, R, R, 1, BN, BR)


@dataclass(frozen=True)
class SegmentWgradTile:
    """Tile shape, and how many CTAs one segment of all rows should have at least (rows are cut to get there)."""

    bm: int
    bn: int
    br: int
    warps: int
    stages: int
    ctas: int


@functools.lru_cache(1024)
def tile_for(rank: int, dtype: torch.dtype, device: torch.device) -> SegmentWgradTile:
    """The tile for a rank and a dtype: short, for segments are; several CTAs an SM hide one another's beginnings."""
    br = launch.pick(rank, (16, 32, 64, 128))
    sms = launch.multiprocessors(device)
    if launch.interpreting():
        return SegmentWgradTile(bm=32, bn=64, br=min(br, 32), warps=4, stages=1, ctas=4 * sms)
    if dtype is torch.float32:
        return SegmentWgradTile(bm=32, bn=64, br=min(br, 32), warps=4, stages=3, ctas=4 * sms)
    if br == 16:
        return SegmentWgradTile(bm=32, bn=128, br=br, warps=4, stages=3, ctas=2 * sms)
    return SegmentWgradTile(bm=64, bn=128, br=br, warps=4, stages=3, ctas=4 * sms)


def wgrad(
    x: Tensor | None,
    g: Tensor | None,
    dy: Tensor | None,
    h: Tensor | None,
    bounds: Tensor,
    words: Tensor | None,
    dtype_a: torch.dtype,
    dtype_b: torch.dtype,
    tile: SegmentWgradTile | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """``reference.segment_wgrad`` on Triton. ``tile`` overrides the plan (for sweeps)."""
    segments = bounds.shape[0] - 1
    k = x.shape[1] if x is not None and g is not None else 0
    n = dy.shape[1] if dy is not None and h is not None else 0
    d_a = None if x is None or g is None else g.new_empty(segments, g.shape[1], k, dtype=dtype_a)
    d_b = None if dy is None or h is None else h.new_empty(segments, n, h.shape[1], dtype=dtype_b)
    like, skinny = (x, g) if k else (dy, h)
    m, rank = (0, 0) if skinny is None else skinny.shape
    if like is None or m == 0 or rank == 0 or k + n == 0 or segments == 0:
        for d in (d_a, d_b):
            if d is not None:
                d.zero_()
        return d_a, d_b
    do_a, do_b = k > 0, n > 0

    tile = tile or tile_for(rank, like.dtype, like.device)
    blocks_r = launch.cdiv(rank, tile.br)
    tasks = (launch.cdiv(k, tile.bn) + launch.cdiv(n, tile.bn)) * blocks_r
    length, blocks = launch.split_evenly(m, tile.bm, launch.cdiv(tile.ctas, tasks))
    partial_a = partial_b = None
    if blocks > 1:
        partial_a = like.new_empty(2 * blocks, k, rank, dtype=torch.float32) if do_a else None
        partial_b = like.new_empty(2 * blocks, n, rank, dtype=torch.float32) if do_b else None
    strides = [s for t in (x, g, dy, h) for s in (t.stride() if t is not None else (0, 0))]
    launch.run(
        _segment_wgrad_kernel,
        (count_items(m, segments, length) * tasks,),
        like.device,
        (
            x, g, d_a, partial_a, dy, h, d_b, partial_b, words, bounds, length,
            m, segments, k, n, rank, *strides, 0 if words is None else words.shape[1],
        ),
        dict(
            BM=tile.bm, BN=tile.bn, BR=tile.br, BE=lookup_block(segments), DO_A=do_a, DO_B=do_b,
            MASK=words is not None, SPLIT=blocks > 1, PRECISION=launch.input_precision(like.dtype),
        ),
        tile.warps,
        tile.stages,
    )  # fmt: skip
    if blocks > 1:
        rows = 64
        blocks_a, blocks_b = launch.cdiv(k, rows), launch.cdiv(n, rows)
        launch.run(
            _segment_reduce_kernel,
            ((blocks - 1) * (blocks_a + blocks_b),),
            like.device,
            (partial_a, d_a, partial_b, d_b, bounds, blocks_a, blocks_b, length, m, segments, k, n, rank),
            dict(BN=rows, BR=min(tile.br, 32), BE=lookup_block(segments), DO_A=do_a, DO_B=do_b),
            4,
            1,
        )  # fmt: skip
    count("segment_wgrad", "triton")
    return d_a, d_b
