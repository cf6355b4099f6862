"""row_norms: ||W_n + s B_n A|| for every row n [N], fp32, DoRA's.

A program takes BN rows and a run of columns. It reads them once, BK columns at a time, makes the same columns of s B A beside
them in registers, and sums the squares of what both are together: nothing of size [N, K] is written, and rows where the two
cancel lose no digits, as sums of |W|^2, W . BA and |BA|^2 would. Products are exact to fp32 (of 16-bit factors as they are,
else of fp32 ones in three TF32 parts), squares in fp64, which no scaling overflows. Rows alone are too few programs to hide the
latencies of one another, so a second launch adds the runs' squares.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._counters import count
from . import launch
from .gemm import load_tile
from .scale import factor_of

_PROGRAMS_A_MULTIPROCESSOR = 8


@triton.jit
def _row_norms_kernel(
    w, a, b, scaling, squares,
    N, K, R, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, scale, run,
    BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, RP: tl.constexpr, SCALING: tl.constexpr, EVEN: tl.constexpr,
    WIDEN: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    launch.enter_chain(CHAIN)
    row0 = tl.program_id(0) * BN
    if SCALING:
        scale = scale * tl.load(scaling).to(tl.float32)
    total = tl.zeros((BN,), tl.float64)
    k_start = tl.program_id(1) * run
    for k0 in range(k_start, tl.minimum(k_start + run, K), BK):
        update = tl.zeros((BN, BK), tl.float32)
        for r0 in tl.static_range(0, RP, BR):
            b_tile = load_tile(b, row0, r0, N, R, stride_bn, stride_br, BN, BR, False)
            a_tile = load_tile(a, r0, k0, R, K, stride_ar, stride_ak, BR, BK, False)
            if WIDEN or b_tile.dtype != a_tile.dtype:
                b_tile, a_tile = b_tile.to(tl.float32), a_tile.to(tl.float32)
            update = tl.dot(b_tile, a_tile, update, input_precision="tf32x3")
        w_tile = load_tile(w, row0, k0, N, K, stride_wn, stride_wk, BN, BK, EVEN).to(tl.float32)
        both = (w_tile + update * scale).to(tl.float64)
        total += tl.sum(both * both, axis=1)
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
    n, k = weight.shape
    norms = torch.empty(n, dtype=torch.float32, device=weight.device)
    factors = None if magnitude is None else torch.empty_like(norms)
    count("row_norms", "triton")
    if n == 0 or k == 0:
        return norms.zero_(), None if factors is None else factors.zero_()
    rank = lora_a.shape[0]
    bn, bk, br = 16, 128, launch.pick(rank, (16, 32))
    wanted = launch.cdiv(
        _PROGRAMS_A_MULTIPROCESSOR * launch.multiprocessors(weight.device), launch.cdiv(n, bn)
    )
    run, runs = launch.split_evenly(k, bk, wanted)
    squares = torch.empty(runs, n, dtype=torch.float64, device=weight.device)
    launch.run(
        _row_norms_kernel,
        (launch.cdiv(n, bn), runs),
        weight.device,
        (
            weight, lora_a, lora_b, scaling, squares,
            n, k, rank, *weight.stride(), *lora_a.stride(), *lora_b.stride(), float(scale), run,
        ),
        dict(
            BN=bn, BK=bk, BR=br, RP=launch.cdiv(rank, br) * br, SCALING=scaling is not None,
            EVEN=n % bn == 0 and k % bk == 0,
            # The interpreter's bf16 products are wrong, and fp64 ones have no sums in fp32.
            WIDEN=launch.interpreting() or torch.float64 in (lora_a.dtype, lora_b.dtype),
        ),
        4,
        3 if rank <= 64 else 1,  # what is loaded ahead is as long as the rank
    )  # fmt: skip
    held = None if magnitude is None else magnitude.contiguous()
    arguments = squares, held, norms, factors, n, runs
    constants = dict(BN=32, BC=16, MAGNITUDE=magnitude is not None)
    launch.run(_root_kernel, (launch.cdiv(n, 32),), weight.device, arguments, constants, 2, 1)
    return norms, factors
