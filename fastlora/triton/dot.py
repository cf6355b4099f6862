"""The one way tiles are multiplied: fp32 accumulators, and for fp32 inputs a sum that stays as exact as torch's."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lost_bits(acc, DTYPE: tl.constexpr):
    """The second half of an accumulator for ``dot_add``: what its sum has lost so far. Only fp32 inputs need one."""
    if tl.float32 == DTYPE:
        return tl.zeros_like(acc)
    else:
        return 0.0


@triton.jit
def dot_add(a, b, acc, lost, PRECISION: tl.constexpr):
    """(acc, lost) + a b, fp32. 16-bit products accumulate inside the tensor core.

    fp32 products are summed tile by tile with Kahan's compensation, else the roundings of a contraction of thousands
    would exceed torch's. (The last argument of dot means nothing to fp32, except that Triton then keeps the sum apart.)
    """
    if a.dtype == tl.float32:
        part = tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=1) - lost
        total = acc + part
        lost = (total - acc) - part
        acc = total
    else:
        acc = tl.dot(a, b, acc)
    return acc, lost
