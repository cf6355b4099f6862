"""Segments: runs of rows with a low-rank factor of their own (bounds.py). down and up; wgrad is in segment_wgrad.py.

    down    h = scale * [scalings[e]] * drop(x) l_e^T        [M, r], zero where a row has no segment
    up      y += drop(h l_e^T), in place, or y = drop(h l_e^T)  [M, N]

gemm.py does what ``up`` does to tiles of y that it has just multiplied; ``up`` is for a y that something else made.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._counters import count
from ..rng import philox_calls
from . import launch
from .bounds import count_items, locate, lookup_block
from .dot import dot_add, lost_bits
from .down import DownTile, sum_splits
from .gemm import add_low_rank, load_tile, segment_gemm, spread_tile
from .mask import expand, load_words, make_words
from .spread import FACTOR_ROWS, Spread, prepare, spread_factor, spread_rows, spreads


@triton.jit(do_not_specialize=["keep"])
def _segment_down_kernel(
    x, l, out, bounds, scalings, rng_state, l_up, x_more, w_more, faulty,
    M, E, K, R, stride_xm, stride_xk, stride_le, stride_lr, stride_lk, stride_os,
    scale, run, keep, items, N, stride_ue, stride_un, stride_ur, stride_wn, stride_wc, l_run, chunks,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr,
    SPREAD: tl.constexpr, SIDE: tl.constexpr, RP: tl.constexpr, TILE: tl.constexpr, BN: tl.constexpr, COPY: tl.constexpr,
    EVEN_K: tl.constexpr, DROP: tl.constexpr, CALLS: tl.constexpr, SCALINGS: tl.constexpr, PRECISION: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    launch.enter_chain(CHAIN)
    if SPREAD:
        if tl.program_id(0) >= items:
            spread_factor(l_up, w_more, faulty, tl.program_id(0) - items, N, R, E, stride_ue, stride_un, stride_ur,
                          stride_wn, stride_wc, l_run, chunks, BN, SIDE, RP, COPY)  # fmt: skip
            return
    segment, _, _, first, last = locate(bounds, tl.program_id(0), M, E, BM, BE)
    if first >= last:
        return
    rank0 = tl.program_id(1) * BR
    split = tl.program_id(2)
    row0 = first // BM * BM
    m = row0 + tl.arange(0, BM)
    r = rank0 + tl.arange(0, BR)
    k = tl.arange(0, BK)
    begin = split * run
    end = begin + tl.minimum(run, K - begin)
    if (segment < 0) | (segment >= E):
        end = begin  # nothing to read: the rows get zeros

    mine = ((m >= first) & (m < last))[:, None]
    live = (r < R)[None, :]
    x_rows = x + m.to(tl.int64)[:, None] * stride_xm
    l_rows = l + tl.cast(segment, tl.int64) * stride_le + r.to(tl.int64)[None, :] * stride_lr
    acc = tl.zeros((BM, BR), tl.float32)
    lost = lost_bits(acc, x.dtype.element_ty)
    for k0 in range(begin, end, BK):
        cols = (k0 + k).to(tl.int64)
        if EVEN_K:
            x_tile = tl.load(x_rows + cols[None, :] * stride_xk, mask=mine, other=0.0)
            l_tile = tl.load(l_rows + cols[:, None] * stride_lk, mask=live, other=0.0)
        else:
            inside = cols < end
            x_tile = tl.load(
                x_rows + cols[None, :] * stride_xk, mask=mine & inside[None, :], other=0.0
            )
            l_tile = tl.load(
                l_rows + cols[:, None] * stride_lk, mask=live & inside[:, None], other=0.0
            )
        if DROP:
            kept = expand(make_words(rng_state, keep, row0, k0, BM, BK, CALLS), BM, BK)
            x_tile = tl.where(kept, x_tile, 0.0)
        acc, lost = dot_add(x_tile, l_tile.to(x_tile.dtype), acc, lost, PRECISION)

    if SCALINGS:
        scale = scale * tl.load(
            scalings + segment, mask=(segment >= 0) & (segment < E), other=0.0
        ).to(tl.float32)
    here = out + split.to(tl.int64) * stride_os + m.to(tl.int64)[:, None] * R + r[None, :]
    h_tile = (acc * scale).to(out.dtype.element_ty)
    tl.store(here, h_tile, mask=mine & live)
    if SPREAD:
        spread_rows(
            h_tile, x_more, bounds, segment, row0, mine, M, E, R, BM, BR, BE, SIDE, RP, TILE
        )


@triton.jit
def _segment_up_kernel(
    y, h, l, bounds, words,
    M, E, N, R, stride_ym, stride_hm, stride_hr, stride_le, stride_ln, stride_lr, pitch,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, RP: tl.constexpr, BE: tl.constexpr,
    ADD: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    launch.enter_chain(CHAIN)
    # The last rows come first: of a y that was just written they are the likeliest to lie in L2 still.
    blocks_n = tl.cdiv(N, BN)
    task = tl.num_programs(0) - 1 - tl.program_id(0)
    col0 = task % blocks_n * BN
    segment, _, _, first, last = locate(bounds, task // blocks_n, M, E, BM, BE)
    if first >= last:
        return
    has_factor = (segment >= 0) & (segment < E)
    if ADD & (not has_factor):
        return
    row0 = first // BM * BM
    m = row0 + tl.arange(0, BM)
    n = col0 + tl.arange(0, BN)
    mine = ((m >= first) & (m < last))[:, None] & (n < N)[None, :]
    here = y + m.to(tl.int64)[:, None] * stride_ym + n.to(tl.int64)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    before = acc
    if ADD:  # on its way while the factors come and are multiplied
        before = tl.load(here, mask=mine, other=0.0)
    if has_factor:  # rows of other segments are multiplied too, and not stored
        factor = l + tl.cast(segment, tl.int64) * stride_le
        h_tile = load_tile(h, row0, 0, M, R, stride_hm, stride_hr, BM, BR, False)
        l_tile = load_tile(factor, 0, col0, R, N, stride_lr, stride_ln, BR, BN, False)
        acc = add_low_rank(h_tile, l_tile.to(h_tile.dtype), acc, h, factor, row0, col0, M, N, R, stride_hm, stride_hr,
                           stride_ln, stride_lr, BM, BN, BR, RP, PRECISION)  # fmt: skip
    if MASK:
        acc = tl.where(expand(load_words(words, row0, col0, M, pitch, BM, BN), BM, BN), acc, 0.0)
    if ADD:
        acc += before.to(tl.float32)
    tl.store(here, acc.to(y.dtype.element_ty), mask=mine)


@functools.lru_cache(1024)
def down_tile(
    m: int,
    k: int,
    rank: int,
    segments: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    drop: bool,
    device: torch.device,
) -> DownTile:
    """The tile for a problem (``dtypes`` of x and l), after down.py's. Masks are made 32 rows at a time."""
    br = launch.pick(rank, (16, 32, 64, 128))
    if launch.interpreting():
        bm, bk, br, warps, stages = 32, 32, min(br, 32), 4, 1
    elif dtypes[0] is torch.float32:
        bm, bk, br, warps, stages = 32, 32, min(br, 32), 4, 3
    elif drop:
        bm, bk, warps, stages = 32, 256 if br < 64 else 128, 4, 4
    else:
        bm, bk, warps, stages = 64 if m > 32 else 32, 128, 4, 5
    if not launch.interpreting():
        step = bk * (bm * dtypes[0].itemsize + br * dtypes[1].itemsize)
        stages = launch.stages_that_fit(stages, step, device)
    # Of M rows at least so many items are not empty, and at most E + 1 more.
    ctas = (launch.cdiv(m, bm) + min(segments, m)) * launch.cdiv(rank, br)
    splits = launch.multiprocessors(device) // max(ctas, 1)
    if not launch.interpreting():
        splits = min(splits, k // (4 * bk), 32)
    return DownTile(bm, bk, br, warps, stages, max(1, splits))


def down(
    x: Tensor,
    l: Tensor,
    bounds: Tensor,
    scalings: Tensor | None,
    scale: float,
    rng_state: Tensor | None,
    keep: int,
    tile: DownTile | None = None,
    more: Spread | None = None,
) -> Tensor:
    """``reference.segment_down`` on Triton. ``tile`` overrides the plan (for sweeps); ``more`` is filled, which takes a tile
    of one run of K and all ranks."""
    m, k = x.shape
    segments, rank, _ = l.shape
    if m == 0 or rank == 0 or k == 0 or segments == 0:
        return x.new_zeros(m, rank)
    drop = rng_state is not None
    tile = tile or down_tile(m, k, rank, segments, (x.dtype, l.dtype), drop, x.device)
    run, splits = launch.split_evenly(k, tile.bk, tile.splits)
    h = x.new_empty(m, rank)
    target = h if splits == 1 else x.new_empty(splits, m, rank, dtype=torch.float32)
    items = count_items(m, segments, tile.bm)
    beside: tuple[Tensor | None, ...] = (None,) * 4
    spreading: tuple[int, ...] = (items,) + (0,) * 8
    if more is not None:
        beside = more.l, more.x_more, more.w_more, more.faulty
        spreading = (
            items,
            more.l.shape[1],
            *more.l.stride(),
            *more.w_strides,
            more.run,
            more.faulty.shape[1],
        )
    launch.run(
        _segment_down_kernel,
        (items + (0 if more is None else more.tasks), launch.cdiv(rank, tile.br), splits),
        x.device,
        (
            x, l, target, bounds, None if scalings is None else scalings.contiguous(),
            None if rng_state is None else rng_state.contiguous(), *beside,
            m, segments, k, rank, *x.stride(), *l.stride(), m * rank,
            scale, run, keep, *spreading,
        ),
        dict(
            BM=tile.bm, BK=tile.bk, BR=tile.br, BE=lookup_block(segments), SPREAD=more is not None,
            SIDE=0 if more is None else more.side, RP=0 if more is None else more.rank,
            TILE=0 if more is None else more.bm, BN=FACTOR_ROWS, COPY=more is not None and more.copies,
            EVEN_K=k % tile.bk == 0, DROP=drop,
            CALLS=philox_calls(keep), SCALINGS=scalings is not None, PRECISION=launch.input_precision(x.dtype),
        ),
        tile.warps,
        tile.stages,
    )  # fmt: skip
    if splits > 1:
        sum_splits(target, h)
    count("segment_down", "triton")
    return h


def linear(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bounds: Tensor,
    scalings: Tensor | None,
    scale: float,
    rng_state: Tensor | None,
    keep: int,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """(y, h) of ``down`` and ``segment_gemm``, with h and b spread so that they are more of K; None where other ways suit."""
    tile = spread_tile(x, w, b)
    if tile is None or not spreads(b, tile.bk):
        return None
    segments, rank, k = a.shape
    drop = rng_state is not None
    wide = down_tile(x.shape[0], k, rank, segments, (x.dtype, a.dtype), drop, x.device)
    if wide.splits > 1 or wide.br < rank or tile.bm % wide.bm != 0:
        return None
    more = prepare(x.shape[0], b, x.dtype, w.stride(1) == 1, tile.bm, tile.bk)
    h = down(x, a, bounds, scalings, scale, rng_state, keep, wide, more)
    return segment_gemm(x, w, h, b, bounds, bias, None, tile, more), h


@dataclass(frozen=True)
class SegmentUpTile:
    """Tile shape of one launch."""

    bm: int
    bn: int
    br: int
    warps: int


@functools.lru_cache(1024)
def up_tile(m: int, rank: int, dtype: torch.dtype) -> SegmentUpTile:
    """The tile for a problem: y is read and written once, and little else happens. Masks come 32 rows at a time."""
    if launch.interpreting():
        return SegmentUpTile(32, 64, 16, warps=4)
    br = launch.pick(rank, (16, 32))
    if dtype is torch.float32:
        return SegmentUpTile(32, 64, br, warps=4)
    return SegmentUpTile(32, 128, br, warps=4)


def up(
    h: Tensor,
    l: Tensor,
    bounds: Tensor,
    words: Tensor | None,
    y: Tensor | None,
    tile: SegmentUpTile | None = None,
) -> Tensor:
    """``reference.segment_up`` on Triton. ``tile`` overrides the plan (for sweeps)."""
    m, rank = h.shape
    segments, n, _ = l.shape
    if m == 0 or n == 0 or rank == 0 or segments == 0:
        return h.new_zeros(m, n) if y is None else y
    out = h.new_empty(m, n) if y is None else y
    tile = tile or up_tile(m, rank, h.dtype)
    launch.run(
        _segment_up_kernel,
        (count_items(m, segments, tile.bm) * launch.cdiv(n, tile.bn),),
        h.device,
        (
            out, h, l, bounds, words,
            m, segments, n, rank, out.stride(0), *h.stride(), *l.stride(), 0 if words is None else words.shape[1],
        ),
        dict(
            BM=tile.bm, BN=tile.bn, BR=tile.br, RP=launch.cdiv(rank, tile.br) * tile.br, BE=lookup_block(segments),
            ADD=y is not None, MASK=words is not None, PRECISION=launch.input_precision(h.dtype),
        ),
        tile.warps,
        1,
    )  # fmt: skip
    count("segment_up", "triton")
    return out
