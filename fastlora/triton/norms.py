"""row_norms, nf4_row_norms: ||W_n + s B_n A|| for every row n [N], fp32, DoRA's, of W in floats or in 4 bits.

A program takes BN rows and a run of columns. It reads them once, BK columns at a time, makes the same columns of s B A beside
them in registers, and sums the squares of what both are together: nothing of size [N, K] is written, and rows where the two
cancel lose no digits, as sums of |W|^2, W . BA and |BA|^2 would. Products are exact to fp32 (of 16-bit factors as they are,
else of fp32 ones in three TF32 parts), squares in fp64, which no scaling overflows. Rows alone are too few programs to hide the
latencies of one another, so a second launch adds the runs' squares. W's codes are made the fp32 of the dequantised weight,
bit for bit, in registers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._counters import count
from ..ops.support import Form
from . import launch
from .gemm import load_tile
from .nf4 import load_codes, load_scales, scale_of, values
from .scale import factor_of

_PROGRAMS_A_MULTIPROCESSOR = 16


class _Tile(NamedTuple):
    """Rows and columns of W that a program has in registers at once, and its warps."""

    bn: int
    bk: int
    warps: int

    def of(self, rank: int) -> _Tile:
        """More than 32 ranks are several products, whose tiles of A and B would fill the registers."""
        return self if rank <= 32 else self._replace(bn=16)


_FLOATS = _Tile(32, 128, 4)
_CODES = _Tile(32, 128, 4)
# Where a scale is for a few elements: the addresses of so many would fill the registers.
_CODES_OF_MANY_SCALES = _Tile(16, 64, 4)


@triton.jit
def _squares(w, update, scale):
    """(w + scale * update)^2 in fp64. The sum is a named fma, so that no other is made of it that leaves w unrounded."""
    both = tl.fma(update, scale, w).to(tl.float64)
    return both * both


@triton.jit
def _look_up(table, code, ROWS: tl.constexpr, COLS: tl.constexpr):
    return tl.reshape(tl.gather(table, tl.reshape(code, (ROWS * COLS,)), 0), (ROWS, COLS))


@triton.jit
def _decode_halves(
    packed, scales, table, ROWS: tl.constexpr, COLS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """The even columns of a tile of W, which are the high halves of its bytes, and the odd ones: [ROWS, COLS / 2]."""
    HALF: tl.constexpr = COLS // 2
    if GROUP == 1:
        of_high, of_low = tl.split(tl.reshape(scales, (ROWS, HALF, 2)))
    else:
        shared = tl.broadcast_to(scales[:, :, None], (ROWS, GROUPS, GROUP // 2))
        of_high = tl.reshape(shared, (ROWS, HALF))
        of_low = of_high
    code = packed.to(tl.int32)
    high = _look_up(table, code >> 4, ROWS, HALF) * of_high
    return high, _look_up(table, code & 15, ROWS, HALF) * of_low


@triton.jit
def _row_norms_kernel(
    w, values, absmax, nested_absmax, nested_code, offset, a, b, scaling, squares,
    N, K, R, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, scale, run,
    BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, RP: tl.constexpr, BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr,
    NESTED: tl.constexpr, SCALING: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr, ROUND: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    """Of a weight in floats BLOCK_SIZE is zero. Of one in 4 bits w is its codes, and GROUP neighbours in a row share a scale,
    wherever its blocks begin; what a tile's scales are held as is loaded a step early."""
    launch.enter_chain(CHAIN)
    row0 = tl.program_id(0) * BN
    if SCALING:
        scale = scale * tl.load(scaling).to(tl.float32)
    total = tl.zeros((BN,), tl.float64)
    k_start = tl.program_id(1) * run
    if BLOCK_SIZE > 0:
        GROUPS: tl.constexpr = BK // GROUP
        table = tl.load(values + tl.arange(0, 16))
        held, outer = load_scales(absmax, nested_absmax, row0, k_start, N, K,
                                  BN, GROUPS, GROUP, BLOCK_SIZE, NESTED)  # fmt: skip
    for k0 in range(k_start, tl.minimum(k_start + run, K), BK):
        update = tl.zeros((BN, BK), tl.float32)
        for r0 in tl.static_range(0, RP, BR):
            b_tile = load_tile(b, row0, r0, N, R, stride_bn, stride_br, BN, BR, False)
            a_tile = load_tile(a, r0, k0, R, K, stride_ar, stride_ak, BR, BK, False)
            if WIDEN or b_tile.dtype != a_tile.dtype:
                b_tile, a_tile = b_tile.to(tl.float32), a_tile.to(tl.float32)
            update = tl.dot(b_tile, a_tile, update, input_precision="tf32x3")
        if BLOCK_SIZE > 0:
            packed = load_codes(w, row0, k0, N, stride_wn, BN, BK, GROUP == 1, EVEN)
            scales = scale_of(held, outer, nested_code, offset, NESTED, ROUND)
            if not EVEN:  # zero past K, where quantised scales would be their offset
                col = k0 + tl.arange(0, GROUPS) * GROUP
                scales = tl.where((col < K)[None, :], scales, 0.0)
            held, outer = load_scales(absmax, nested_absmax, row0, k0 + BK, N, K,
                                      BN, GROUPS, GROUP, BLOCK_SIZE, NESTED)  # fmt: skip
            high, low = _decode_halves(packed, scales, table, BN, BK, GROUPS, GROUP)
            # Added up in any order, so that columns need not be put in theirs again.
            of_high, of_low = tl.split(tl.reshape(update, (BN, BK // 2, 2)))
            both = _squares(high, of_high, scale) + _squares(low, of_low, scale)
        else:
            w_tile = load_tile(w, row0, k0, N, K, stride_wn, stride_wk, BN, BK, EVEN).to(tl.float32)
            both = _squares(w_tile, update, scale)
        total += tl.sum(both, axis=1)
    n = row0 + tl.arange(0, BN)
    tl.store(squares + tl.program_id(1) * N + n, total, mask=n < N)


@triton.jit
def _root_kernel(
    squares,
    magnitude,
    norms,
    factors,
    N,
    runs,
    BN: tl.constexpr,
    BC: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    CHAIN: tl.constexpr,
):
    launch.enter_chain(CHAIN)
    col0 = tl.program_id(0) * BN
    total = tl.zeros((BC, BN), tl.float64)
    for first in range(0, runs, BC):
        total += load_tile(squares, first, col0, runs, N, N, 1, BC, BN, False)
    n = col0 + tl.arange(0, BN)
    norm = tl.sqrt(tl.sum(total, axis=0)).to(tl.float32)
    tl.store(norms + n, norm, mask=n < N)
    if MAGNITUDE:
        factor = factor_of(tl.load(magnitude + n, mask=n < N, other=0.0).to(tl.float32), norm)
        tl.store(factors + n, factor, mask=n < N)


def row_norms(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: Tensor | None,
    scale: float,
    magnitude: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``reference.row_norms`` on Triton: weight [N, K] of any strides, A [r, K], B [N, r] -> fp32 [N], twice."""
    count("row_norms", "triton")
    held = weight, *(None,) * 5
    read = dict(BLOCK_SIZE=0, GROUP=0, NESTED=0)
    tile = _FLOATS.of(lora_a.shape[0])
    return _run(held, weight.stride(), read, tile, lora_a, lora_b, scaling, scale, magnitude)


def nf4_row_norms(
    codes: Tensor,
    scales: Sequence[Tensor],
    form: Form,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: Tensor | None,
    scale: float,
    magnitude: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``row_norms`` of a 4-bit weight [N, K], which is read as it lies."""
    count("nf4_row_norms", "triton")
    held = codes, values(codes.device, form.fp4), scales[0], *(scales[1:] or (None,) * 3)
    group = math.gcd(form.cols, form.block_size)
    tile = (_CODES if group >= 16 else _CODES_OF_MANY_SCALES).of(lora_a.shape[0])
    read = dict(
        BLOCK_SIZE=form.block_size, GROUP=min(tile.bk, group), NESTED=form.nested_block_size
    )
    strides = form.cols // 2, 1
    return _run(held, strides, read, tile, lora_a, lora_b, scaling, scale, magnitude)


def _run(
    held: tuple[Tensor | None, ...],
    strides: tuple[int, ...],
    read: dict[str, int],
    tile: _Tile,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: Tensor | None,
    scale: float,
    magnitude: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Both launches over a weight that is ``held`` and ``read`` one way or the other."""
    rank, k = lora_a.shape
    n, device = lora_b.shape[0], lora_b.device
    norms = torch.empty(n, dtype=torch.float32, device=device)
    factors = None if magnitude is None else torch.empty_like(norms)
    if n == 0 or k == 0:
        return norms.zero_(), None if factors is None else factors.zero_()
    bn, bk, br = tile.bn, tile.bk, launch.pick(rank, (16, 32))
    wanted = launch.cdiv(
        _PROGRAMS_A_MULTIPROCESSOR * launch.multiprocessors(device), launch.cdiv(n, bn)
    )
    run, runs = launch.split_evenly(k, bk, wanted)
    squares = torch.empty(runs, n, dtype=torch.float64, device=device)
    launch.run(
        _row_norms_kernel,
        (launch.cdiv(n, bn), runs),
        device,
        (
            *held, lora_a, lora_b, scaling, squares,
            n, k, rank, *strides, *lora_a.stride(), *lora_b.stride(), float(scale), run,
        ),
        dict(
            BN=bn, BK=bk, BR=br, RP=launch.cdiv(rank, br) * br, **read, SCALING=scaling is not None,
            EVEN=n % bn == 0 and k % bk == 0,
            # The interpreter's bf16 products are wrong, and fp64 ones have no sums in fp32.
            WIDEN=launch.interpreting() or torch.float64 in (lora_a.dtype, lora_b.dtype),
            ROUND=not launch.interpreting(),
        ),
        tile.warps,
        3 if rank <= 64 else 1,  # what is loaded ahead is as long as the rank
    )  # fmt: skip
    lengths = None if magnitude is None else magnitude.contiguous()
    arguments = squares, lengths, norms, factors, n, runs
    constants = dict(BN=32, BC=16, MAGNITUDE=magnitude is not None)
    launch.run(_root_kernel, (launch.cdiv(n, 32),), device, arguments, constants, 2, 1)
    return norms, factors
