"""gemm: y = x w^T + bias + drop(h l^T), the frozen product with its K loop extended by the rank.
scaled_gemm: y = bias + factor * (x w^T + h l^T), with a factor for each column.
segment_gemm: y with an l_e of its own for the rows of each segment e (bounds.py).

Persistent: one CTA per SM walks BM x BN output tiles in groups of rows, fp32 accumulator, one rounding. On sm_90 and
newer x, w and y move through tensor descriptors (TMA), whose edges are clipped by hardware (and without a low-rank term
the pipeline runs on across tiles); elsewhere, or for tensors no descriptor can name, the same loop loads through
pointers with any strides.
w may be K-major (y = x W^T) or MN-major (dX = dY W): the tile is loaded as it lies, no transposed copy. Where
descriptors can name h and l too, the rank is simply more of K: their tiles follow those of x and w through the same
pipeline. Otherwise they come through pointers, and their product is added after the loop. With dropout the mask belongs to h l^T alone, so that
product gets an accumulator of its own after the main loop, one half of the tile at a time (a whole one would spill).

With segments so does the product by each l_e that a tile's rows meet, two on average where segments are as long as tiles
are high: all rows of h are multiplied, and of the product those of segment e are taken. (Rows of others are not zeroed in
h instead, so that an adapter that holds an infinity or NaN spoils its own rows alone.) Laid out by spread.py they are more
of K, in tiles that meet no such adapter.
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
from .bounds import count_up_to, load_bounds, lookup_block, segments_met
from .dot import dot_add, lost_bits
from .mask import expand, load_words
from .spread import Spread


@triton.jit
def load_tile(
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
def add_low_rank(
    h_tile, l_tile, acc, h, l, row0, col0, M, N, R, stride_hm, stride_hr, stride_ln, stride_lr,
    BM: tl.constexpr, COLS: tl.constexpr, BR: tl.constexpr, RP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + h[row0:] l[col0:]^T, given the first rank block's tiles."""
    lost = lost_bits(acc, h_tile.dtype)
    acc, lost = dot_add(h_tile, l_tile, acc, lost, PRECISION)
    for r0 in tl.static_range(BR, RP, BR):
        h_tile = load_tile(h, row0, r0, M, R, stride_hm, stride_hr, BM, BR, False)
        l_tile = load_tile(l, r0, col0, R, N, stride_lr, stride_ln, BR, COLS, False)
        acc, lost = dot_add(h_tile, l_tile.to(h_tile.dtype), acc, lost, PRECISION)
    return acc


@triton.jit
def _add_segments(
    acc, h, l, bounds, words, row0, col0, M, N, R, E, stride_hm, stride_hr, stride_le, stride_ln, stride_lr, pitch,
    BM: tl.constexpr, COLS: tl.constexpr, BR: tl.constexpr, RP: tl.constexpr, BE: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + drop(h[row0:] l_e[col0:]^T), in the rows of each segment e."""
    if MASK:
        words_tile = load_words(words, row0, col0, M, pitch, BM, COLS)
    h_tile = load_tile(h, row0, 0, M, R, stride_hm, stride_hr, BM, BR, False)
    m = row0 + tl.arange(0, BM)
    row = tl.maximum(row0, tl.load(bounds))
    stop = tl.minimum(row0 + BM, tl.load(bounds + E))
    while row < stop:  # a turn for every segment with rows here
        e = count_up_to(bounds, row, E, BE) - 1
        end = tl.load(bounds + e + 1)
        l_e = l + tl.cast(e, tl.int64) * stride_le
        l_tile = load_tile(l_e, 0, col0, R, N, stride_lr, stride_ln, BR, COLS, False).to(
            h_tile.dtype
        )
        low = add_low_rank(h_tile, l_tile, tl.zeros_like(acc), h, l_e, row0, col0, M, N, R, stride_hm, stride_hr, stride_ln,
                        stride_lr, BM, COLS, BR, RP, PRECISION)  # fmt: skip
        mine = ((m >= row) & (m < end))[:, None]
        if MASK:
            mine = mine & expand(words_tile, BM, COLS)
        acc += tl.where(mine, low, 0.0)
        row = end
    return acc


@triton.jit
def _finish(
    acc, low, words_tile, y, bias, factor, row0, col0, M, N, stride_ym,
    BM: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr,
    FACTOR: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The end of BM x COLS outputs: masked low-rank term, a factor per column, bias, one rounding, store."""
    if MASK:
        acc += tl.where(expand(words_tile, BM, COLS), low, 0.0)
    n = col0 + tl.arange(0, COLS)
    if FACTOR:
        acc *= tl.load(factor + n, mask=n < N, other=0.0)[None, :]
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if TMA:
        y.store([row0, col0], acc.to(DTYPE))
    else:
        m = row0 + tl.arange(0, BM)
        here = y + m.to(tl.int64)[:, None] * stride_ym + n[None, :]
        tl.store(here, acc.to(DTYPE), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _gemm_kernel(
    x, w, y, x_more, w_more, h, l, bias, factor, words, bounds, faulty,
    M, N, K, R, E, stride_xm, stride_xk, stride_wn, stride_wk, stride_ym,
    stride_hm, stride_hr, stride_le, stride_ln, stride_lr, pitch,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, RP: tl.constexpr, BE: tl.constexpr,
    SIDE: tl.constexpr, CHUNKS: tl.constexpr, FLAGS: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
    W_K_MAJOR: tl.constexpr, EVEN: tl.constexpr, EXTEND: tl.constexpr, LOW_RANK: tl.constexpr, SEGMENTS: tl.constexpr,
    MASK: tl.constexpr, BIAS: tl.constexpr, FACTOR: tl.constexpr, HALVES: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    launch.enter_chain(CHAIN)
    COLS: tl.constexpr = BN // 2 if HALVES else BN  # what is finished at once
    SPREAD: tl.constexpr = EXTEND and SEGMENTS
    ONE: tl.constexpr = LOW_RANK and not SEGMENTS  # one low-rank term for all rows,
    APART: tl.constexpr = ONE and MASK  # which needs an accumulator of its own with a mask
    LOW_COLS: tl.constexpr = COLS if APART else BN
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    group_size = GROUP * tiles_n
    steps = tl.cdiv(K, BK)
    base_steps = steps
    afterwards = True  # whether segments' terms are added after the loop
    if SPREAD:
        all_bounds = load_bounds(bounds, E, BE)
        flag = tl.arange(0, FLAGS)
        flags = tl.load(faulty + flag, mask=flag < tl.cdiv(E, SIDE) * CHUNKS, other=0)
        any_faulty = tl.max(flags, axis=0) > 0
    elif EXTEND:
        steps += tl.cdiv(R, BK)
    for tile in tl.range(
        tl.program_id(0),
        tiles_m * tiles_n,
        tl.num_programs(0),
        flatten=TMA and not (LOW_RANK or SEGMENTS),
    ):
        # Tiles in groups of GROUP block rows: what runs at once shares its operands in L2.
        first_m = tile // group_size * GROUP
        height = tl.minimum(tiles_m - first_m, GROUP)
        row0 = (first_m + tile % group_size % height) * BM
        col0 = tile % group_size // height * BN

        # The first rank block is fetched before the main loop, so that its latency hides behind it.
        h_tile, l_0, l_1, words_0, words_1, low = None, None, None, None, None, None
        col1 = col0 + COLS
        if ONE:
            h_tile = load_tile(h, row0, 0, M, R, stride_hm, stride_hr, BM, BR, False)
            l_0 = load_tile(l, 0, col0, R, N, stride_lr, stride_ln, BR, LOW_COLS, False).to(DTYPE)
        if APART:
            words_0 = load_words(words, row0, col0, M, pitch, BM, COLS)
            if HALVES:
                l_1 = load_tile(l, 0, col1, R, N, stride_lr, stride_ln, BR, COLS, False).to(DTYPE)
                words_1 = load_words(words, row0, col1, M, pitch, BM, COLS)

        group = 0
        if SPREAD:
            first, last = segments_met(all_bounds, row0, tl.minimum(row0 + BM, M), E)
            group = first // SIDE
            end = tl.where(first <= last, last // SIDE + 1, group)
            afterwards = any_faulty
            if any_faulty:
                met = (flag >= group * CHUNKS) & (flag < end * CHUNKS)
                afterwards = tl.max(tl.where(met, flags, 0), axis=0) > 0
            steps = base_steps + tl.where(afterwards, 0, end - group)

        acc = tl.zeros((BM, BN), tl.float32)
        lost = lost_bits(acc, DTYPE)
        for step in range(steps):
            k0 = step * BK
            if TMA:
                x_from, x_row, x_col = x, row0, k0
                w_from = w
                if EXTEND:
                    if step >= base_steps:  # the rank is more of K
                        k0 = (group + step - base_steps) * BK
                        x_from, x_col = x_more, k0
                        w_from = w_more
                        if SPREAD:
                            x_row, x_col = row0 + (group + step - base_steps) * BM, 0
                x_tile = x_from.load([x_row, x_col])
                w_tile = w_from.load([col0, k0]).T if W_K_MAJOR else w_from.load([k0, col0])
            else:
                x_tile = load_tile(x, row0, k0, M, K, stride_xm, stride_xk, BM, BK, EVEN)
                w_tile = load_tile(w, k0, col0, K, N, stride_wk, stride_wn, BK, BN, EVEN)
            acc, lost = dot_add(x_tile, w_tile, acc, lost, PRECISION)

        if ONE and not MASK:
            acc = add_low_rank(h_tile, l_0, acc, h, l, row0, col0, M, N, R, stride_hm, stride_hr, stride_ln, stride_lr,
                            BM, BN, BR, RP, PRECISION)  # fmt: skip
        if HALVES:  # half the registers for a masked product, half the memory to stage y in
            acc_0, acc_1 = tl.split(tl.permute(tl.reshape(acc, (BM, 2, COLS)), (0, 2, 1)))
            if APART:
                low = add_low_rank(h_tile, l_0, tl.zeros_like(acc_0), h, l, row0, col0, M, N, R, stride_hm, stride_hr,
                                stride_ln, stride_lr, BM, COLS, BR, RP, PRECISION)  # fmt: skip
            if SEGMENTS:
                if afterwards:
                    acc_0 = _add_segments(acc_0, h, l, bounds, words, row0, col0, M, N, R, E, stride_hm, stride_hr,
                                        stride_le, stride_ln, stride_lr, pitch, BM, COLS, BR, RP, BE, MASK, PRECISION)  # fmt: skip
            _finish(acc_0, low, words_0, y, bias, factor, row0, col0, M, N, stride_ym, BM, COLS, TMA, APART, BIAS,
                    FACTOR, DTYPE)  # fmt: skip
            if APART:
                low = add_low_rank(h_tile, l_1, tl.zeros_like(acc_1), h, l, row0, col1, M, N, R, stride_hm, stride_hr,
                                stride_ln, stride_lr, BM, COLS, BR, RP, PRECISION)  # fmt: skip
            if SEGMENTS:
                if afterwards:
                    acc_1 = _add_segments(acc_1, h, l, bounds, words, row0, col1, M, N, R, E, stride_hm, stride_hr,
                                        stride_le, stride_ln, stride_lr, pitch, BM, COLS, BR, RP, BE, MASK, PRECISION)  # fmt: skip
            _finish(acc_1, low, words_1, y, bias, factor, row0, col1, M, N, stride_ym, BM, COLS, TMA, APART, BIAS,
                    FACTOR, DTYPE)  # fmt: skip
        else:
            if APART:
                low = add_low_rank(h_tile, l_0, tl.zeros_like(acc), h, l, row0, col0, M, N, R, stride_hm, stride_hr,
                                stride_ln, stride_lr, BM, COLS, BR, RP, PRECISION)  # fmt: skip
            _finish(acc, low, words_0, y, bias, factor, row0, col0, M, N, stride_ym, BM, COLS, TMA, APART, BIAS,
                    FACTOR, DTYPE)  # fmt: skip


TL_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


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
    m: int,
    rank: int,
    dtype: torch.dtype,
    k_major: bool,
    masked: bool,
    convert: bool,
    segmented: bool,
    device: torch.device,
) -> GemmTile:
    """The tile for a problem, by arch, rows and the rank that is not simply more of K."""
    if launch.interpreting():
        return GemmTile(32, 64, 32, warps=4, stages=1, group=2, halves=m > 64)
    roomy = launch.shared_memory(device) > 160 * 1024
    if dtype is torch.float32:
        return GemmTile(64, 64, 32, warps=4, stages=3)
    if m <= 64:
        rows = launch.pick(m, (32, 64) if masked else (16, 32, 64))  # masks come 32 rows at a time
        return GemmTile(rows, 64, 128 if roomy else 64, warps=4, stages=4 if roomy else 3)
    hopper = roomy and launch.capability(device) >= (9, 0)
    if m <= 512:
        if hopper:
            return GemmTile(128, 128, 64, warps=8, stages=4, br=launch.pick(rank, (16, 32)))
        return GemmTile(64, 128, 64, warps=4, stages=4 if roomy else 3)
    if hopper:
        # The first rank block waits in shared memory beside three 48 KB stages and the staging of y: with more than
        # 16 ranks y is staged in halves. A mask, and an fp32 factor to convert, each take registers and memory from
        # it; of segments h alone waits there. Without a low-rank term halves were measured faster where w is K-major,
        # slower where it is not.
        ladders = (16, 32, 64), (16, 32), (16,)
        br = launch.pick(rank, ladders[0 if segmented else masked + convert])
        return GemmTile(
            128,
            256,
            64,
            warps=8,
            stages=3,
            halves=k_major if rank == 0 else br > 16 or masked,
            br=br,
        )
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
    return _run("gemm", x, w, h, l, None, bias, words, tile)


def scaled_gemm(
    x: Tensor,
    w: Tensor,
    h: Tensor,
    l: Tensor,
    bias: Tensor | None,
    factor: Tensor,
    tile: GemmTile | None = None,
) -> Tensor:
    """``reference.scaled_gemm`` on Triton. ``tile`` overrides the plan (for sweeps)."""
    return _run("scaled_gemm", x, w, h, l, None, bias, None, tile, factor=factor.contiguous())


def segment_gemm(
    x: Tensor,
    w: Tensor,
    h: Tensor,
    l: Tensor,
    bounds: Tensor,
    bias: Tensor | None,
    words: Tensor | None,
    tile: GemmTile | None = None,
    more: Spread | None = None,
) -> Tensor:
    """y = x w^T + bias + drop(h l_e^T), l [E, N, r]. ``tile`` overrides the plan (for sweeps); ``more`` are h and l as more
    of K, for ``spread_tile``'s tile and without a mask."""
    if l.shape[0] == 0 or l.shape[2] == 0:
        return _run("segment_gemm", x, w, None, None, None, bias, None, tile)
    op = "segment_gemm" if more is None else "segment_linear"
    return _run(op, x, w, h, l, bounds, bias, words, tile, more)


def spread_tile(x: Tensor, w: Tensor, l: Tensor) -> GemmTile | None:
    """The tile for x w^T with segments' terms as more of K; None where descriptors cannot name x, w or y."""
    k_major = w.stride(1) == 1
    named = launch.describable(x) and launch.describable(w if k_major else w.t())
    if launch.capability(x.device) < (9, 0) or not named or w.shape[0] * x.itemsize % 16 != 0:
        return None
    rank = min(l.shape[2], 16)  # of what few blocks add after the loop, a rank block at a time
    return tile_for(x.shape[0], rank, x.dtype, k_major, False, False, True, x.device)


def _run(
    op: str,
    x: Tensor,
    w: Tensor,
    h: Tensor | None,
    l: Tensor | None,
    bounds: Tensor | None,
    bias: Tensor | None,
    words: Tensor | None,
    tile: GemmTile | None,
    more: Spread | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """All ops: with bounds, l is [E, N, r] and neither E nor r is zero."""
    m, k = x.shape
    n = w.shape[0]
    y = x.new_empty(m, n)
    if m == 0 or n == 0:
        return y
    rank = h.shape[1] if h is not None and l is not None else 0
    masked = rank > 0 and words is not None
    segmented = bounds is not None
    segments = None if bounds is None else bounds.shape[0] - 1
    convert = l is not None and l.dtype != x.dtype
    k_major = w.stride(1) == 1
    w_rows = w if k_major else w.t()
    tma = (
        launch.capability(x.device) >= (9, 0)
        and k > 0
        and all(map(launch.describable, (x, w_rows, y)))
    )
    x_more = w_more = None
    if h is not None and l is not None and tma and not (masked or segmented or convert):
        l_rows = l if k_major else l.t()
        if launch.describable(h) and launch.describable(l_rows):
            x_more, w_more = h, l_rows
    low_width = rank if x_more is None else 0
    tile = tile or tile_for(m, low_width, x.dtype, k_major, masked, convert, segmented, x.device)
    halves = tile.halves or segmented  # what segments add, they add to half a tile
    faulty, side = None, 1
    if more is not None:
        x_more, w_more, faulty, side = more.x_more, more.w_more, more.faulty, more.side
    extend = x_more is not None
    low_rank = rank > 0 and not extend
    operands: tuple[Any, ...] = (x, w, y, x_more, w_more)
    if tma:
        x_block, y_block = [tile.bm, tile.bk], [tile.bm, tile.bn // 2 if halves else tile.bn]
        w_block = [tile.bn, tile.bk] if k_major else [tile.bk, tile.bn]
        operands = (
            TensorDescriptor.from_tensor(x, x_block),
            TensorDescriptor.from_tensor(w_rows, w_block),
            TensorDescriptor.from_tensor(y, y_block),
            None if x_more is None else TensorDescriptor.from_tensor(x_more, x_block),
            None if w_more is None else TensorDescriptor.from_tensor(w_more, w_block),
        )
    ctas = min(launch.multiprocessors(x.device), launch.cdiv(m, tile.bm) * launch.cdiv(n, tile.bn))
    launch.run(
        _gemm_kernel,
        (ctas,),
        x.device,
        (
            *operands, h, l, None if bias is None else bias.contiguous(), factor, words, bounds, faulty,
            m, n, k, rank, segments, *x.stride(), *w.stride(), y.stride(0),
            *(h.stride() if h is not None else (0, 0)), l.stride(0) if segmented and l is not None else None,
            *(l.stride()[-2:] if l is not None else (0, 0)),
            0 if words is None else words.shape[1],
        ),
        dict(
            BM=tile.bm, BN=tile.bn, BK=tile.bk, BR=tile.br, RP=launch.cdiv(low_width, tile.br) * tile.br,
            BE=0 if segments is None else lookup_block(segments), SIDE=side,
            CHUNKS=0 if faulty is None else faulty.shape[1],
            FLAGS=0 if faulty is None else triton.next_power_of_2(faulty.numel()),
            GROUP=tile.group, TMA=tma, W_K_MAJOR=k_major,
            EVEN=m % tile.bm == 0 and n % tile.bn == 0 and k % tile.bk == 0,
            EXTEND=extend, LOW_RANK=low_rank, SEGMENTS=segmented,
            MASK=masked, BIAS=bias is not None,
            FACTOR=factor is not None, HALVES=halves,
            DTYPE=TL_DTYPE[x.dtype], PRECISION=launch.input_precision(x.dtype),
        ),
        tile.warps,
        tile.stages,
    )  # fmt: skip
    count(op, "triton")
    return y
