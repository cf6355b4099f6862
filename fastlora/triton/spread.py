"""Spread: h and the factors of segments laid out so that they are more of K to gemm.py, whose pipeline then hides them.

Segments whose ranks, padded to RP = 8, 16, 32 or 64, fill one step of K are a group; a block of BM rows meets some groups.

    x_more  [(blocks + groups) BM, step]  rows of block t for group g begin at (t + g) BM, which no other pair has: h[m] in
                                          the columns of its segment, zeros in those of the group's others
    w_more  [N, groups step]              l[e, n, j] in column e RP + j; where w lies so, its transpose
    faulty  int32 [groups, chunks]        whether a group holds an infinity or NaN. Zeros in x_more would not keep them from
                                          the rows of its other segments: gemm.py leaves blocks that meet it to another way.

segments.py's ``down`` makes x_more where it makes h, and w_more and ``faulty`` in programs of their own beside that. Where l
lies as w_more does already (A, of a rank that is RP) it is read for ``faulty`` alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .bounds import load_bounds, segments_met

_MOST = 512  # bounds that a program of gemm.py looks at together
FACTOR_ROWS = 128  # of l that a program of its own copies at once


class Spread(NamedTuple):
    """Tensors to be filled, and what their shapes do not tell."""

    x_more: Tensor
    w_more: Tensor
    faulty: Tensor
    l: Tensor  # [E, N, r]
    copies: bool  # whether w_more is not l itself
    k_major: bool
    rank: int  # RP
    side: int  # segments a group
    bm: int
    run: int  # rows of l a chunk

    @property
    def tasks(self) -> int:
        """Programs that w_more and ``faulty`` take."""
        return self.faulty.numel()

    @property
    def w_strides(self) -> tuple[int, ...]:
        strides = self.w_more.stride()
        return strides if self.k_major else strides[::-1]


def spreads(l: Tensor, step: int) -> bool:
    """Whether factors [E, N, r] can be spread for steps of K that are so long."""
    return 0 < l.shape[2] <= step and 0 < l.shape[0] < _MOST


def prepare(m: int, l: Tensor, dtype: torch.dtype, k_major: bool, bm: int, step: int) -> Spread:
    """Room for what extends x [m, K] and w, for tiles of ``bm`` rows and steps of K that ``spreads`` accepts."""
    segments, n, rank = l.shape
    padded = launch.pick(rank, (8, 16, 32, step))
    side = step // padded
    groups = launch.cdiv(segments, side)
    x_more = l.new_empty((launch.cdiv(m, bm) + groups) * bm, step, dtype=dtype)
    w_more = _as_it_lies(l, padded, k_major, dtype)
    copies = w_more is None
    if w_more is None:
        shape = (n, groups * step) if k_major else (groups * step, n)
        w_more = l.new_empty(shape, dtype=dtype)
    # About a program an SM: more would wait for those that make h, in whose shared memory they are.
    run, chunks = launch.split_evenly(n, FACTOR_ROWS, launch.multiprocessors(l.device) // groups)
    faulty = torch.empty(groups, chunks, dtype=torch.int32, device=l.device)
    return Spread(x_more, w_more, faulty, l, copies, k_major, padded, side, bm, run)


def _as_it_lies(l: Tensor, padded: int, k_major: bool, dtype: torch.dtype) -> Tensor | None:
    """l [E, N, r] seen as w_more, where it lies that way."""
    segments, n, rank = l.shape
    if rank != padded or l.dtype != dtype:
        return None
    side_by_side = l.permute(1, 0, 2) if k_major else l.permute(0, 2, 1)
    flat = (n, segments * rank) if k_major else (segments * rank, n)
    try:
        view = side_by_side.view(flat)
    except RuntimeError:  # strides that no view has
        return None
    return view if launch.describable(view) else None


@triton.jit
def spread_rows(
    h_tile, x_more, bounds, segment, row0, mine, M, E, R,
    BM: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr, SIDE: tl.constexpr, RP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """BM rows of h from ``row0``, of which those of ``segment`` are ``mine``, into every group that their TILE rows meet.

    Zeros stand beyond R, where h_tile has NaN for rows of x with an infinity."""
    m = row0 + tl.arange(0, BM)
    r = tl.arange(0, BR)
    top = row0 // TILE * TILE
    first, last = segments_met(load_bounds(bounds, E, BE), top, tl.minimum(top + TILE, M), E)
    for g in range(first // SIDE, (last + SIDE) // SIDE):
        rows = x_more + (tl.cast(g, tl.int64) * TILE + m)[:, None] * (SIDE * RP) + r[None, :]
        for side in tl.static_range(SIDE):
            own = (segment == g * SIDE + side) & (r < R)[None, :]
            tl.store(rows + side * RP, tl.where(own, h_tile, 0.0), mask=mine & (r < RP)[None, :])


@triton.jit
def spread_factor(
    l, w_more, faulty, task, N, R, E, stride_le, stride_ln, stride_lr, stride_wn, stride_wc, run, chunks,
    BN: tl.constexpr, SIDE: tl.constexpr, RP: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """A chunk of rows of one group's factors."""
    group = task // chunks
    chunk = task % chunks
    c = tl.arange(0, SIDE * RP)
    segment = group * SIDE + c // RP
    j = c % RP
    live = (segment < E) & (j < R)
    columns = l + segment.to(tl.int64) * stride_le + j * stride_lr
    bad = tl.zeros((BN, SIDE * RP), tl.int32)
    for n0 in range(chunk * run, tl.minimum(chunk * run + run, N), BN):
        n = n0 + tl.arange(0, BN)
        here = columns[None, :] + n.to(tl.int64)[:, None] * stride_ln
        tile = tl.load(here, mask=(n < N)[:, None] & live[None, :], other=0.0)
        rounded = tile.to(w_more.dtype.element_ty)
        bad |= (rounded - rounded != 0).to(tl.int32)
        if COPY:
            to = w_more + n.to(tl.int64)[:, None] * stride_wn
            to += (tl.cast(group, tl.int64) * (SIDE * RP) + c)[None, :] * stride_wc
            tl.store(to, rounded, mask=(n < N)[:, None])
    tl.store(faulty + task, tl.max(tl.max(bad, axis=1), axis=0))
