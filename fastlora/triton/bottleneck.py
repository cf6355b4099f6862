"""bottleneck_down: a = act(x l^T + bias) [M, r], and from it in backward g = (dY l^T) * act'(p) with a again;
bottleneck_up: y = residual + h l^T + bias [M, N]. Memory-bound both: x (dY) and the residual are read once, y is written once.

``down`` is down.py's product with another end, in its tiles; where K is split the end is that of the second launch. Forward p is kept
for backward if asked for, which makes a again while it has p at hand. Both are rounded to x's dtype before anything is made
of them, so that a is the same bits in both directions.

``up`` walks its columns from the last to the first: the last ones are what the launch before it, which read the same x (dY) from the
first column on, has left in L2.
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
from .activations import activate, activate_backward
from .dot import dot_add, lost_bits
from .down import DownTile, skinny_product
from .down import tile_for as down_tile_for
from .gemm import load_tile


@triton.jit
def _finish(
    acc, out, other, bias, p, at, r, inside, KIND: tl.constexpr, BACK: tl.constexpr, BOTH: tl.constexpr
):  # fmt: skip
    """act(acc + bias[r]) into out and with BOTH p into other; or BACK: acc * act'(p), and act(p). At offsets ``at``."""
    dtype = out.dtype.element_ty
    if BACK:
        pre = tl.load(p + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, activate_backward(acc, pre, KIND).to(dtype), mask=inside)
        if BOTH:
            tl.store(other + at, activate(pre, KIND).to(dtype), mask=inside)
    else:
        pre = (acc + tl.load(bias + r, mask=inside, other=0.0).to(tl.float32)).to(dtype)
        if BOTH:
            tl.store(other + at, pre, mask=inside)
        tl.store(out + at, activate(pre.to(tl.float32), KIND).to(dtype), mask=inside)


@triton.jit
def _bottleneck_down_kernel(
    x, l, out, other, bias, p, partial,
    M, K, R, stride_xm, stride_xk, stride_lr, stride_lk, run,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, EVEN_K: tl.constexpr, SPLIT: tl.constexpr,
    KIND: tl.constexpr, BACK: tl.constexpr, BOTH: tl.constexpr, PRECISION: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    launch.enter_chain(CHAIN)
    blocks_r = tl.cdiv(R, BR)  # side by side, so that x is read from memory once
    row0 = tl.program_id(0) // blocks_r * BM
    rank0 = tl.program_id(0) % blocks_r * BR
    split = tl.program_id(1)
    begin = split * run
    end = begin + tl.minimum(run, K - begin)
    acc = skinny_product(x, l, None, None, row0, rank0, begin, end, M, R, stride_xm, stride_xk, stride_lr, stride_lk, 0, 0,
                        BM, BK, BR, EVEN_K, False, 0, 0, PRECISION)  # fmt: skip
    m = row0 + tl.arange(0, BM)[:, None]
    r = rank0 + tl.arange(0, BR)[None, :]
    inside = (m < M) & (r < R)
    at = m.to(tl.int64) * R + r
    if SPLIT:
        tl.store(partial + tl.cast(split, tl.int64) * M * R + at, acc, mask=inside)
    else:
        _finish(acc, out, other, bias, p, at, r, inside, KIND, BACK, BOTH)


@triton.jit
def _bottleneck_sum_kernel(
    partial, out, other, bias, p, numel, R, splits,
    BLOCK: tl.constexpr, KIND: tl.constexpr, BACK: tl.constexpr, BOTH: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """The end over the sum of ``partial`` [splits, M, R], in order."""
    launch.enter_chain(CHAIN)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    here = partial + at
    for _ in range(splits):
        acc += tl.load(here, mask=at < numel, other=0.0)
        here += numel
    _finish(acc, out, other, bias, p, at, at % R, at < numel, KIND, BACK, BOTH)


def bottleneck_down(
    x: Tensor, l: Tensor, bias: Tensor, kind: str, both: bool, tile: DownTile | None = None
) -> tuple[Tensor, Tensor | None]:
    """``reference.bottleneck_down`` on Triton. ``tile`` overrides the plan (for sweeps)."""
    count("bottleneck_down", "triton")
    return _down(x, l, bias.contiguous(), None, kind, both, tile)


def bottleneck_down_backward(
    dy: Tensor, l: Tensor, p: Tensor, kind: str, both: bool, tile: DownTile | None = None
) -> tuple[Tensor, Tensor | None]:
    """``reference.bottleneck_down_backward`` on Triton. ``tile`` overrides the plan (for sweeps)."""
    count("bottleneck_down_backward", "triton")
    return _down(dy, l, None, p.contiguous(), kind, both, tile)


def _down(
    x: Tensor,
    l: Tensor,
    bias: Tensor | None,
    p: Tensor | None,
    kind: str,
    both: bool,
    tile: DownTile | None,
) -> tuple[Tensor, Tensor | None]:
    m, k = x.shape
    rank = l.shape[0]
    out = x.new_empty(m, rank)
    other = torch.empty_like(out) if both else None
    if out.numel() == 0:
        return out, other
    tile = tile or down_tile_for(m, k, rank, (x.dtype, l.dtype), False, False, x.device)
    run, splits = launch.split_evenly(max(k, 1), tile.bk, tile.splits)
    partial = x.new_empty(splits, m, rank, dtype=torch.float32) if splits > 1 else None
    end = dict(KIND=kind, BACK=p is not None, BOTH=both)
    launch.run(
        _bottleneck_down_kernel,
        (launch.cdiv(m, tile.bm) * launch.cdiv(rank, tile.br), splits),
        x.device,
        (x, l, out, other, bias, p, partial, m, k, rank, *x.stride(), *l.stride(), run),
        dict(
            BM=tile.bm, BK=tile.bk, BR=tile.br, EVEN_K=k % tile.bk == 0, SPLIT=splits > 1,
            **end, PRECISION=launch.input_precision(x.dtype),
        ),
        tile.warps,
        tile.stages,
    )  # fmt: skip
    if partial is not None:
        arguments = partial, out, other, bias, p, out.numel(), rank, splits
        grid, block = (launch.cdiv(out.numel(), 1024),), dict(BLOCK=1024)
        launch.run(_bottleneck_sum_kernel, grid, x.device, arguments, block | end, 4, 1)
    return out, other


@triton.jit
def _bottleneck_up_kernel(
    h, l, bias, residual, y,
    M, N, R, stride_hm, stride_hr, stride_ln, stride_lr, stride_om, stride_on,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    launch.enter_chain(CHAIN)
    blocks_m = tl.cdiv(M, BM)
    row0 = tl.program_id(0) % blocks_m * BM
    col0 = (tl.cdiv(N, BN) - 1 - tl.program_id(0) // blocks_m) * BN
    n = col0 + tl.arange(0, BN)
    if RESIDUAL:  # on its way before the product, which is short
        base = load_tile(residual, row0, col0, M, N, stride_om, stride_on, BM, BN, EVEN)
    acc = tl.zeros((BM, BN), tl.float32)
    lost = lost_bits(acc, h.dtype.element_ty)
    for r0 in range(0, R, BR):
        h_tile = load_tile(h, row0, r0, M, R, stride_hm, stride_hr, BM, BR, False)
        l_tile = load_tile(l, r0, col0, R, N, stride_lr, stride_ln, BR, BN, False)
        acc, lost = dot_add(h_tile, l_tile.to(h_tile.dtype), acc, lost, PRECISION)
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        acc += base.to(tl.float32)
    m = row0 + tl.arange(0, BM)
    here = y + m.to(tl.int64)[:, None] * N + n[None, :]
    if EVEN:
        tl.store(here, acc.to(y.dtype.element_ty))
    else:
        tl.store(here, acc.to(y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@dataclass(frozen=True)
class UpTile:
    """Tile shape of ``up``, and its pipeline over ranks."""

    bm: int
    bn: int
    br: int
    warps: int
    stages: int


@functools.lru_cache(1024)
def up_tile_for(
    m: int, n: int, rank: int, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device
) -> UpTile:
    """The tile for a problem (``dtypes`` of h and l): many small ones, whose loads of the residual hide one another."""
    if launch.interpreting():
        return UpTile(32, 32, 16, warps=4, stages=1)
    if dtypes[0] is torch.float32:
        return UpTile(64, 64, launch.pick(rank, (16, 32)), warps=4, stages=2)
    bm, br = launch.pick(m, (16, 32, 64)), launch.pick(rank, (16, 32, 64))
    bn = 128 if launch.cdiv(m, bm) * launch.cdiv(n, 128) >= launch.multiprocessors(device) else 64
    step = br * (bm * dtypes[0].itemsize + bn * dtypes[1].itemsize)
    stages = 1 if rank <= br else launch.stages_that_fit(3, step, device)
    return UpTile(bm, bn, br, warps=4, stages=stages)


def bottleneck_up(
    h: Tensor,
    l: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    tile: UpTile | None = None,
) -> Tensor:
    """``reference.bottleneck_up`` on Triton. ``tile`` overrides the plan (for sweeps)."""
    (m, rank), n = h.shape, l.shape[0]
    y = h.new_empty(m, n, dtype=None if residual is None else residual.dtype)
    count("bottleneck_up", "triton")
    if y.numel() == 0:
        return y
    tile = tile or up_tile_for(m, n, rank, (h.dtype, l.dtype), h.device)
    launch.run(
        _bottleneck_up_kernel,
        (launch.cdiv(m, tile.bm) * launch.cdiv(n, tile.bn),),
        h.device,
        (
            h, l, None if bias is None else bias.contiguous(), residual, y,
            m, n, rank, *h.stride(), *l.stride(), *((0, 0) if residual is None else residual.stride()),
        ),
        dict(
            BM=tile.bm, BN=tile.bn, BR=tile.br, EVEN=m % tile.bm == 0 and n % tile.bn == 0,
            BIAS=bias is not None, RESIDUAL=residual is not None, PRECISION=launch.input_precision(h.dtype),
        ),
        tile.warps,
        tile.stages,
    )  # fmt: skip
    return y
