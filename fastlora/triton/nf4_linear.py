"""nf4_gemm, nf4_dx: products with a 4-bit weight that is read as it lies, whichever way it is contracted.

    forward  y  = x W^T + bias + h B^T
    dx       dX = dY W + g A

A program makes BM x BN of the result. On each of its steps along the contraction it decodes a tile of W, and rounds value *
scale once. So what is multiplied is the dequantised weight, bit for bit. Few rows leave SMs idle: then the contraction is
cut into runs, whose fp32 partial results are summed in order by a second kernel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._counters import count
from ..ops.support import Form
from . import launch
from .dot import dot_add, lost_bits
from .down import sum_splits
from .gemm import TL_DTYPE, add_low_rank, load_tile
from .nf4 import load_codes, load_scales, scale_of, values


@triton.jit
def _decode(
    packed, scale, table,
    ROWS: tl.constexpr, COLS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """round(value * scale) of a tile: [ROWS, COLS]."""
    code = tl.join(packed >> 4, packed & 15).to(tl.int32)
    value = tl.gather(table, tl.reshape(code, (ROWS * COLS,)), 0)
    w = tl.reshape(value, (ROWS, GROUPS, GROUP)) * scale[:, :, None]
    if (
        GROUP == 2
    ):  # Triton 3.6 cannot put [ROWS, GROUPS, 2] where wgmma reads it: a cast keeps the reshape from there
        return tl.reshape(w, (ROWS, COLS)).to(DTYPE)
    return tl.reshape(w.to(DTYPE), (ROWS, COLS))


@triton.jit
def _linear_kernel(
    x, codes, values, absmax, nested_absmax, nested_code, offset, h, l, bias, out,
    M, N, K, R, pitch, stride_xm, stride_xk, stride_hm, stride_hr, stride_ln, stride_lr, run,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, RP: tl.constexpr,
    OVER_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, NESTED: tl.constexpr,
    EVEN: tl.constexpr, BIAS: tl.constexpr, ROUND: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """OVER_ROWS: the contraction runs over W's rows (dX), not its columns (y). GROUP neighbours in a row share a scale,
    wherever its blocks begin. What a tile's scales are held as is loaded a step early."""
    launch.enter_chain(CHAIN)
    ROWS: tl.constexpr = BK if OVER_ROWS else BN  # of a tile of W
    COLS: tl.constexpr = BN if OVER_ROWS else BK
    GROUPS: tl.constexpr = COLS // GROUP
    DOWN: tl.constexpr = BK if OVER_ROWS else 0  # from one to the next
    RIGHT: tl.constexpr = 0 if OVER_ROWS else BK
    long = N if OVER_ROWS else K
    wide = K if OVER_ROWS else N
    tiles_m = tl.cdiv(M, BM)
    row0 = tl.program_id(0) % tiles_m * BM  # neighbours share their tiles of W
    col0 = tl.program_id(0) // tiles_m * BN
    split = tl.program_id(1)
    begin = split * run  # in steps
    end = tl.minimum(begin + run, tl.cdiv(long, BK))
    top = 0 if OVER_ROWS else col0
    left = col0 if OVER_ROWS else 0

    table = tl.load(values + tl.arange(0, 16))
    rank = tl.where(split == 0, R, 0)
    if RP > 0:
        h_tile = load_tile(h, row0, 0, M, rank, stride_hm, stride_hr, BM, BR, False)
        l_tile = load_tile(l, 0, col0, rank, wide, stride_lr, stride_ln, BR, BN, False).to(DTYPE)
    held, outer = load_scales(absmax, nested_absmax, top + begin * DOWN, left + begin * RIGHT, N, K,
                              ROWS, GROUPS, GROUP, BLOCK_SIZE, NESTED)  # fmt: skip
    scale = scale_of(held, outer, nested_code, offset, NESTED, ROUND)
    acc = tl.zeros((BM, BN), tl.float32)
    lost = lost_bits(acc, DTYPE)
    for step in range(begin, end):
        x_tile = load_tile(x, row0, step * BK, M, long, stride_xm, stride_xk, BM, BK, False)
        packed = load_codes(
            codes, top + step * DOWN, left + step * RIGHT, N, pitch, ROWS, COLS, False, EVEN
        )
        held, outer = load_scales(absmax, nested_absmax, top + (step + 1) * DOWN, left + (step + 1) * RIGHT, N, K,
                                  ROWS, GROUPS, GROUP, BLOCK_SIZE, NESTED)  # fmt: skip
        w_tile = _decode(packed, scale, table, ROWS, COLS, GROUPS, GROUP, DTYPE)
        if not OVER_ROWS:
            w_tile = w_tile.T
        acc, lost = dot_add(x_tile, w_tile, acc, lost, PRECISION)
        scale = scale_of(held, outer, nested_code, offset, NESTED, ROUND)
    if RP > 0:
        acc = add_low_rank(h_tile, l_tile, acc, h, l, row0, col0, M, wide, rank, stride_hm, stride_hr, stride_ln,
                           stride_lr, BM, BN, BR, RP, PRECISION)  # fmt: skip
    m = row0 + tl.arange(0, BM)
    c = col0 + tl.arange(0, BN)
    if BIAS:
        acc += tl.load(bias + c, mask=(c < wide) & (split == 0), other=0.0).to(tl.float32)[None, :]
    here = out + (split.to(tl.int64) * M + m)[:, None] * wide + c[None, :]
    tl.store(here, acc.to(out.dtype.element_ty), mask=(m < M)[:, None] & (c < wide)[None, :])


@dataclass(frozen=True)
class CodesTile:
    """Tile shape (``bk`` along the contraction), and into how many runs the contraction is cut."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    splits: int
    br: int = 16


@functools.lru_cache(1024)
def tile_for(
    m: int,
    wide: int,
    long: int,
    rank: int,
    dtype: torch.dtype,
    over_rows: bool,
    device: torch.device,
) -> CodesTile:
    """The tile for a result [m, wide] of a contraction of ``long``: 64 bytes of a row of codes where there is room, and
    two CTAs an SM. Swept on an H100: benchmarks/NOTES.md."""
    br = launch.pick(rank, (16, 32))
    if launch.interpreting():
        bm, bn, bk, warps, stages = 16, 64, 64, 4, 1
    elif dtype is torch.float32:
        bm, bn, bk, warps, stages, br = launch.pick(m, (16, 32)), 64, 32, 4, 2, 16
    else:
        roomy = launch.shared_memory(device) > 160 * 1024
        bm = launch.pick(m, (16, 32, 64, 128) if roomy and over_rows else (16, 32, 64))
        few = bm <= 32
        bn, bk = (128, 64) if over_rows and not few else (64, 128 if roomy else 64)
        warps, stages = 4 if few else 8, 4 if roomy and not (over_rows and few) else 3
    tiles = launch.cdiv(m, bm) * launch.cdiv(wide, bn)
    splits = 2 * launch.multiprocessors(device) // max(tiles, 1)
    if not launch.interpreting():  # a run shorter than four steps is not worth a second launch
        splits = min(splits, long // (4 * bk), 16)
    return CodesTile(bm, bn, bk, warps, stages, max(1, splits), br)


def _run(
    name: str,
    x: Tensor,
    codes: Tensor,
    scales: Sequence[Tensor],
    form: Form,
    h: Tensor | None,
    l: Tensor | None,
    bias: Tensor | None,
    over_rows: bool,
    tile: CodesTile | None,
) -> Tensor:
    """x [M, long] times W, contracted over W's columns or rows, + bias + h l^T: [M, wide]."""
    m, n, k = x.shape[0], form.rows, form.cols
    long, wide = (n, k) if over_rows else (k, n)
    out = x.new_empty(m, wide)
    count(name, "triton")
    if out.numel() == 0:
        return out
    if h is None or l is None or h.shape[1] == 0:
        h = l = None
    rank = 0 if h is None else h.shape[1]
    tile = tile or tile_for(m, wide, long, rank, x.dtype, over_rows, x.device)
    run, splits = launch.split_evenly(max(1, launch.cdiv(long, tile.bk)), 1, tile.splits)
    target = out if splits == 1 else out.new_empty(splits, m, wide, dtype=torch.float32)
    rows, cols = (tile.bk, tile.bn) if over_rows else (tile.bn, tile.bk)
    launch.run(
        _linear_kernel,
        (launch.cdiv(m, tile.bm) * launch.cdiv(wide, tile.bn), splits),
        x.device,
        (
            x, codes, values(x.device, form.fp4), scales[0], *(scales[1:] or (None,) * 3), h, l,
            None if bias is None else bias.contiguous(), target,
            m, n, k, rank, k // 2, *x.stride(), *(h.stride() if h is not None else (0, 0)),
            *(l.stride() if l is not None else (0, 0)), run,
        ),
        dict(
            BM=tile.bm, BN=tile.bn, BK=tile.bk, BR=tile.br, RP=launch.cdiv(rank, tile.br) * tile.br,
            OVER_ROWS=over_rows, BLOCK_SIZE=form.block_size, GROUP=min(cols, math.gcd(k, form.block_size)),
            NESTED=form.nested_block_size, EVEN=n % rows == 0 and k % cols == 0, BIAS=bias is not None,
            ROUND=not launch.interpreting(), DTYPE=TL_DTYPE[x.dtype], PRECISION=launch.input_precision(x.dtype),
        ),
        tile.warps,
        tile.stages,
    )  # fmt: skip
    if splits > 1:
        sum_splits(target, out)
    return out


def forward(
    x: Tensor,
    codes: Tensor,
    scales: Sequence[Tensor],
    form: Form,
    h: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None,
    tile: CodesTile | None = None,
) -> Tensor:
    """y [M, N] = x W^T + bias + h b^T of x [M, K], h [M, r], b [N, r]. ``tile`` overrides the plan (for sweeps)."""
    return _run("nf4_gemm", x, codes, scales, form, h, b, bias, False, tile)


def dx(
    dy: Tensor,
    codes: Tensor,
    scales: Sequence[Tensor],
    form: Form,
    g: Tensor | None,
    a: Tensor | None,
    tile: CodesTile | None = None,
) -> Tensor:
    """dX [M, K] = dY W + g a of dY [M, N], g [M, r], a [r, K]. ``tile`` as in ``forward``."""
    a_t = None if a is None else a.t()
    return _run("nf4_dx", dy, codes, scales, form, g, a_t, None, True, tile)
