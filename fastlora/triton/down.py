"""down: h = scale * drop(x) l^T, [M, K] x [r, K] -> [M, r]; memory-bound, x is read once.

Tile BM x BR over K in steps of BK; one CTA walks all of K for its rows, or a run of it when there are too few row
blocks to fill the GPU: then fp32 partials [splits, M, r] are summed in order by a second kernel. Any strides.

Dropout's arithmetic hides behind the memory traffic. DROP: the mask of each x tile is made where it is dropped
(forward). EMIT: x is taken whole, and each step leaves words for EMIT columns of another mask for the kernels that follow
(backward, where x is dY and the mask is that of the layer's input).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._counters import count
from ..rng import mask_shape, philox_calls
from . import launch
from .dot import dot_add, lost_bits
from .mask import expand, make_words, mask, store_words


@triton.jit
def skinny_product(
    x, l, rng_state, words, row0, rank0, begin, end, M, R, stride_xm, stride_xk, stride_lr, stride_lk, keep, pitch,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    EVEN_K: tl.constexpr, DROP: tl.constexpr, EMIT: tl.constexpr, CALLS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """drop(x[row0:, begin:end]) l[rank0:, begin:end]^T, fp32 [BM, BR]."""
    m = row0 + tl.arange(0, BM)
    r = rank0 + tl.arange(0, BR)
    k = tl.arange(0, BK)

    # Rows past the end are clamped, not masked: they compute values nobody stores.
    x_rows = x + tl.minimum(m, M - 1).to(tl.int64)[:, None] * stride_xm
    l_rows = l + r.to(tl.int64)[None, :] * stride_lr
    live = (r < R)[None, :]
    acc = tl.zeros((BM, BR), tl.float32)
    lost = lost_bits(acc, x.dtype.element_ty)
    for k0 in range(begin, end, BK):
        cols = (k0 + k).to(tl.int64)
        if EVEN_K:
            x_tile = tl.load(x_rows + cols[None, :] * stride_xk)
            l_tile = tl.load(l_rows + cols[:, None] * stride_lk, mask=live, other=0.0)
        else:
            x_tile = tl.load(
                x_rows + cols[None, :] * stride_xk, mask=(cols < end)[None, :], other=0.0
            )
            l_tile = tl.load(
                l_rows + cols[:, None] * stride_lk, mask=live & (cols < end)[:, None], other=0.0
            )
        if DROP:
            kept = expand(make_words(rng_state, keep, row0, k0, BM, BK, CALLS), BM, BK)
            x_tile = tl.where(kept, x_tile, 0.0)
        if EMIT:
            col0 = k0 // BK * EMIT
            emitted = make_words(rng_state, keep, row0, col0, BM, EMIT, CALLS)
            store_words(words, emitted, row0, col0, M, pitch, BM, EMIT)
        acc, lost = dot_add(x_tile, l_tile.to(x_tile.dtype), acc, lost, PRECISION)
    return acc


@triton.jit(do_not_specialize=["keep"])
def _down_kernel(
    x, l, out, scaling, rng_state, words,
    M, K, R, stride_xm, stride_xk, stride_lr, stride_lk, stride_os, stride_om,
    scale, run, keep, pitch,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    EVEN_K: tl.constexpr, DROP: tl.constexpr, EMIT: tl.constexpr, CALLS: tl.constexpr, SCALING: tl.constexpr, PRECISION: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    launch.enter_chain(CHAIN)
    row0 = tl.program_id(0) * BM
    rank0 = tl.program_id(1) * BR
    split = tl.program_id(2)
    begin = split * run
    end = begin + tl.minimum(run, K - begin)
    acc = skinny_product(x, l, rng_state, words, row0, rank0, begin, end, M, R, stride_xm, stride_xk, stride_lr, stride_lk, keep,
                        pitch, BM, BK, BR, EVEN_K, DROP, EMIT, CALLS, PRECISION)  # fmt: skip
    m = row0 + tl.arange(0, BM)
    r = rank0 + tl.arange(0, BR)
    if SCALING:
        scale = scale * tl.load(scaling).to(tl.float32)
    here = out + split.to(tl.int64) * stride_os + m.to(tl.int64)[:, None] * stride_om + r[None, :]
    tl.store(here, (acc * scale).to(out.dtype.element_ty), mask=(m < M)[:, None] & (r < R)[None, :])


@triton.jit
def _sum_kernel(partial, out, numel, splits, BLOCK: tl.constexpr, CHAIN: tl.constexpr):
    launch.enter_chain(CHAIN)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    here = partial + i
    for _ in range(splits):
        acc += tl.load(here, mask=i < numel, other=0.0)
        here += numel
    tl.store(out + i, acc.to(out.dtype.element_ty), mask=i < numel)


def sum_splits(partial: Tensor, out: Tensor) -> None:
    """out = the sum of fp32 ``partial`` [splits, *out.shape] in order, rounded once."""
    numel = out.numel()
    arguments = partial, out, numel, partial.shape[0]
    grid = (launch.cdiv(numel, 1024),)
    launch.run(_sum_kernel, grid, out.device, arguments, dict(BLOCK=1024), 4, 1)


_MOST_EMITTED_A_STEP = 65536  # elements of the mask


@dataclass(frozen=True)
class DownTile:
    """Tile shape, and into how many runs K is cut."""

    bm: int
    bk: int
    br: int
    warps: int
    stages: int
    splits: int


@functools.lru_cache(1024)
def tile_for(
    m: int,
    k: int,
    rank: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    drop: bool,
    emit: bool,
    device: torch.device,
) -> DownTile:
    """The tile for a problem (``dtypes`` of x and l): CTAs to fill the GPU, bytes in flight to saturate memory."""
    br = launch.pick(rank, (16, 32, 64, 128))
    if launch.interpreting():
        bm, bk, br, warps, stages = 32 if drop or emit else 16, 32, min(br, 32), 4, 1
    elif dtypes[0] is torch.float32:
        bm, bk, br, warps, stages = 32, 32, min(br, 32), 4, 3
    elif emit:  # long steps: more words are made while a step's bytes are on their way
        bm, bk, warps, stages = 64, 256 if br < 64 else 128, 8, 3
    elif drop:  # as many elements a thread and step as its registers hold: more mask while bytes are on their way
        bm, bk, warps, stages = 32, 256 if br < 64 else 128, 4, 4
    else:
        bm, bk, warps, stages = 64, 128, 4, 5
    if m <= 16:
        bm = 32 if drop or emit else 16  # masks are made 32 rows at a time
    if not launch.interpreting():
        step = bk * (bm * dtypes[0].itemsize + br * dtypes[1].itemsize)
        stages = launch.stages_that_fit(stages, step, device)
    ctas = launch.cdiv(m, bm) * launch.cdiv(rank, br)
    splits = launch.multiprocessors(device) // max(ctas, 1)
    if not launch.interpreting():  # a run of K shorter than four steps is not worth a second launch
        splits = min(splits, k // (4 * bk), 32)
    return DownTile(bm, bk, br, warps, stages, max(1, splits))


def down(
    x: Tensor,
    l: Tensor,
    scaling: Tensor | None,
    scale: float,
    rng_state: Tensor | None,
    keep: int,
    emit_cols: int,
    tile: DownTile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``ops.down`` on Triton. ``tile`` overrides the plan (for sweeps)."""
    m, k = x.shape
    rank = l.shape[0]
    drop = rng_state is not None and emit_cols == 0
    if m == 0 or rank == 0 or k == 0:
        words = mask(rng_state, m, emit_cols, keep) if rng_state is not None and emit_cols else None
        return x.new_zeros(m, rank), words
    tile = tile or tile_for(m, k, rank, (x.dtype, l.dtype), drop, emit_cols > 0, x.device)
    run, splits = launch.split_evenly(k, tile.bk, tile.splits)
    h = x.new_empty(m, rank)
    target = h if splits == 1 else x.new_empty(splits, m, rank, dtype=torch.float32)

    words, pitch, emit = None, 0, 0
    if rng_state is not None and emit_cols:
        emit = max(8, triton.next_power_of_2(launch.cdiv(emit_cols, launch.cdiv(k, tile.bk))))
        if (
            emit * tile.bm > _MOST_EMITTED_A_STEP
        ):  # a short dY beside a wide x: too few steps to hide behind
            words, emit = mask(rng_state, m, emit_cols, keep), 0
        else:
            words = torch.empty(mask_shape(m, emit_cols), dtype=torch.int32, device=x.device)
            pitch = words.shape[1]
    launch.run(
        _down_kernel,
        (launch.cdiv(m, tile.bm), launch.cdiv(rank, tile.br), splits),
        x.device,
        (
            x, l, target, scaling, None if rng_state is None else rng_state.contiguous(), words,
            m, k, rank, *x.stride(), *l.stride(), m * rank, rank,
            scale, run, keep, pitch,
        ),
        dict(
            BM=tile.bm, BK=tile.bk, BR=tile.br,
            EVEN_K=k % tile.bk == 0, DROP=drop, EMIT=emit, CALLS=philox_calls(keep), SCALING=scaling is not None,
            PRECISION=launch.input_precision(x.dtype),
        ),
        tile.warps,
        tile.stages,
    )  # fmt: skip
    if splits > 1:
        sum_splits(target, h)
    count("down", "triton")
    return h, words
