"""scale_columns: y = rest + c * z with a factor per column, c = m / norm or m itself; and its backward in one pass.

    backward    dz = c * dY        dm = sum_m dY * z [/ norm]        sums = sum_m dY

Bound by memory: dY and z are read once for all three. A program takes BN columns of a run of rows, and leaves its part of
the sums over rows in fp32; a second launch adds the parts, the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._counters import count
from . import launch
from .gemm import load_tile


@triton.jit
def factor_of(magnitude, norm):
    """c = m / norm, zero where the norm is."""
    return tl.where(norm > 0, tl.math.div_rn(magnitude, tl.where(norm > 0, norm, 1.0)), 0.0)


@triton.jit
def _factors(m, norm, n, live, NORM: tl.constexpr):
    """c for columns n, fp32."""
    c = tl.load(m + n, mask=live, other=0.0).to(tl.float32)
    if NORM:
        c = factor_of(c, tl.load(norm + n, mask=live, other=0.0).to(tl.float32))
    return c


@triton.jit
def _scale_kernel(
    z, m, norm, rest, y, M, N, stride_zm, stride_zn, stride_rm, stride_rn,
    BM: tl.constexpr, BN: tl.constexpr, NORM: tl.constexpr, REST: tl.constexpr, EVEN: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    launch.enter_chain(CHAIN)
    blocks_n = tl.cdiv(N, BN)
    row0 = tl.program_id(0) // blocks_n * BM
    col0 = tl.program_id(0) % blocks_n * BN
    n = col0 + tl.arange(0, BN)
    z_tile = load_tile(z, row0, col0, M, N, stride_zm, stride_zn, BM, BN, EVEN)
    made = z_tile.to(tl.float32) * _factors(m, norm, n, n < N, NORM)[None, :]
    if REST:
        made += load_tile(rest, row0, col0, M, N, stride_rm, stride_rn, BM, BN, EVEN).to(tl.float32)
    rows = row0 + tl.arange(0, BM)
    to = y + rows.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(to, made.to(y.dtype.element_ty), mask=(rows < M)[:, None] & (n < N)[None, :])


@triton.jit
def _scale_backward_kernel(
    dy, z, m, norm, dz, products, sums, M, N, stride_ym, stride_yn, stride_zm, stride_zn, run,
    BM: tl.constexpr, BN: tl.constexpr, NORM: tl.constexpr, DZ: tl.constexpr, PRODUCTS: tl.constexpr, SUMS: tl.constexpr,
    EVEN: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    launch.enter_chain(CHAIN)
    blocks_n = tl.cdiv(N, BN)
    part = tl.program_id(0) // blocks_n
    col0 = tl.program_id(0) % blocks_n * BN
    n = col0 + tl.arange(0, BN)
    c = _factors(m, norm, n, n < N, NORM)[None, :]
    product = tl.zeros((BM, BN), tl.float32)
    total = tl.zeros((BM, BN), tl.float32)
    for row0 in range(part * run, tl.minimum(part * run + run, M), BM):
        dy_tile = load_tile(dy, row0, col0, M, N, stride_ym, stride_yn, BM, BN, EVEN).to(tl.float32)
        if PRODUCTS:
            z_tile = load_tile(z, row0, col0, M, N, stride_zm, stride_zn, BM, BN, EVEN)
            product += dy_tile * z_tile.to(tl.float32)
        if SUMS:
            total += dy_tile
        if DZ:
            rows = row0 + tl.arange(0, BM)
            to = dz + rows.to(tl.int64)[:, None] * N + n[None, :]
            mask = (rows < M)[:, None] & (n < N)[None, :]
            tl.store(to, (dy_tile * c).to(dz.dtype.element_ty), mask=mask)
    here = tl.cast(part, tl.int64) * N + n
    if PRODUCTS:
        tl.store(products + here, tl.sum(product, axis=0), mask=n < N)
    if SUMS:
        tl.store(sums + here, tl.sum(total, axis=0), mask=n < N)


@triton.jit
def _finish_kernel(
    parts, norm, out, N, count, BN: tl.constexpr, BC: tl.constexpr, NORM: tl.constexpr, CHAIN: tl.constexpr
):  # fmt: skip
    """out = the sum of ``count`` parts [count, N] over the norm where there is one: zero where that is zero."""
    launch.enter_chain(CHAIN)
    col0 = tl.program_id(0) * BN
    total = tl.zeros((BC, BN), tl.float32)
    for part in range(0, count, BC):
        total += load_tile(parts, part, col0, count, N, N, 1, BC, BN, False)
    summed = tl.sum(total, axis=0)
    n = col0 + tl.arange(0, BN)
    if NORM:
        summed = factor_of(summed, tl.load(norm + n, mask=n < N, other=0.0).to(tl.float32))
    tl.store(out + n, summed.to(out.dtype.element_ty), mask=n < N)


def _tile(m: int, n: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    return (16, 32) if launch.interpreting() else (32, launch.pick(n, (64, 128)))


def scale_columns(z: Tensor, magnitude: Tensor, norm: Tensor | None, rest: Tensor | None) -> Tensor:
    """``reference.scale_columns`` on Triton."""
    m, n = z.shape
    y = z.new_empty(m, n)
    count("scale_columns", "triton")
    if y.numel() == 0:
        return y
    magnitude, norm = magnitude.contiguous(), None if norm is None else norm.contiguous()
    rest_strides = (0, 0) if rest is None else (0,) * (2 - rest.ndim) + rest.stride()
    bm, bn = _tile(m, n)
    launch.run(
        _scale_kernel,
        (launch.cdiv(m, bm) * launch.cdiv(n, bn),),
        z.device,
        (z, magnitude, norm, rest, y, m, n, *z.stride(), *rest_strides),
        dict(BM=bm, BN=bn, NORM=norm is not None, REST=rest is not None, EVEN=m % bm == 0 and n % bn == 0),
        4,
        1,
    )  # fmt: skip
    return y


def scale_columns_backward(
    dy: Tensor,
    z: Tensor | None,
    magnitude: Tensor,
    norm: Tensor | None,
    need_z: bool,
    need_sums: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``reference.scale_columns_backward`` on Triton."""
    m, n = dy.shape
    count("scale_columns_backward", "triton")
    magnitude, norm = magnitude.contiguous(), None if norm is None else norm.contiguous()
    dz = dy.new_empty(m, n) if need_z else None
    d_magnitude = None if z is None else magnitude.new_empty(n)
    sums = dy.new_empty(n, dtype=torch.float32) if need_sums else None
    if dy.numel() == 0:
        for out in (d_magnitude, sums):
            if out is not None:
                out.zero_()
        return dz, d_magnitude, sums
    bm, bn = _tile(m, n)
    blocks_n = launch.cdiv(n, bn)
    run, parts = launch.split_evenly(
        m, bm, launch.cdiv(8 * launch.multiprocessors(dy.device), blocks_n)
    )
    like = dy.new_empty(2, parts, n, dtype=torch.float32)
    launch.run(
        _scale_backward_kernel,
        (parts * blocks_n,),
        dy.device,
        (
            dy, z, magnitude, norm, dz, like[0], like[1], m, n, *dy.stride(), *((0, 0) if z is None else z.stride()), run,
        ),
        dict(
            BM=bm, BN=bn, NORM=norm is not None, DZ=need_z, PRODUCTS=z is not None, SUMS=need_sums,
            EVEN=m % bm == 0 and n % bn == 0,
        ),
        4,
        2,
    )  # fmt: skip
    for i, (out, divisor) in enumerate(((d_magnitude, norm), (sums, None))):
        if out is not None:
            arguments = like[i], divisor, out, n, parts
            constants = dict(BN=32, BC=64, NORM=divisor is not None)
            launch.run(_finish_kernel, (launch.cdiv(n, 32),), dy.device, arguments, constants, 4, 1)
    return dz, d_magnitude, sums
