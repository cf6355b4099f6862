"""DoRA (arXiv 2402.09353): W' = m * (W + s B A) / ||W + s B A||, a magnitude m [N] and a direction by rows.

On CUDA the norms are one kernel's (``ops.row_norms``, of a 4-bit W ``ops.nf4_row_norms``), which makes each tile of s B A where it
adds it to W's. Elsewhere the norm of row n comes from the factors,

    ||W_n + s B_n A||^2 = ||W_n||^2 + 2 s (W A^T)_n . B_n + s^2 B_n (A A^T) B_n^T

with W A^T [N, r] and A A^T [r, r]. W is read by slabs, in fp32 (an fp64 base in fp64; TF32 where it is allowed); what is
summed after that is small, and in fp64, which no scaling overflows. A row whose terms cancel so far that digits are lost is done
again from W_n + s B_n A itself. Either way no [N, K] delta is made.

It is computed at every forward and kept by nobody. A and B change with every step, and what says so is not to be relied
on: version counters do not see writes through ``.data``, and FSDP keeps them as they were when it gathers new values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops

_SLAB = 1 << 22  # elements of W that are read at once
# A row is done again where its squared norm is less than this share of what rounding may have put into it.
_SHARE = 1 / 8
# Rows done again where asking how many there are would stall a stream and end a CUDA graph.
_ROWS = 256


class BaseRows(NamedTuple):
    """A base weight [N, K] to be read by rows: ``reader()`` is a function of a slice or of indices that gives floats in
    ``dtype``; ``norms(A, B, s, m)`` is the op that reads all of it at once, for ||W_n + s B_n A|| and what m is over them [N]."""

    shape: tuple[int, int]
    dtype: torch.dtype
    reader: Callable[[], Callable[[slice | Tensor], Tensor]]
    norms: Callable[[Tensor, Tensor, float | Tensor, Tensor | None], tuple[Tensor, Tensor]]

    def slabs(self) -> list[slice]:
        n, k = self.shape
        height = max(1, _SLAB // max(1, k))
        return [slice(start, min(start + height, n)) for start in range(0, n, height)]


def rows_of(weight: Tensor) -> BaseRows:
    """A float weight [N, K], of any strides."""
    weight = weight.detach()
    dtype = torch.promote_types(weight.dtype, torch.float32)
    n, k = weight.shape
    norms = partial(ops.row_norms, weight)
    return BaseRows((n, k), dtype, lambda: lambda rows: weight[rows].to(dtype), norms)


def row_norms(base: BaseRows, a: Tensor, b: Tensor, scaling: float | Tensor) -> Tensor:
    """||W_n + s B_n A|| for every row: [N] in the base's ``dtype``, without gradient.

    Args:
        base: W [N, K].
        a, b: A [r, K] and B [N, r], of any float dtype.
        scaling: s, a float or a 0-d tensor.
    """
    a, b = a.detach(), b.detach()
    # One kernel, which makes each tile of s B A where it adds it to W's; meta, which has shapes alone, does as CUDA.
    if a.device.type in ("cuda", "meta"):
        with torch.no_grad():
            return base.norms(a, b, scaling, None)[0]
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        read = base.reader()
        squares, products = _read_once(base, read, a)
        scaled = b.double() * scaling
        exact_a = a.double()
        cross = (products * scaled).sum(1)
        update = (scaled @ (exact_a @ exact_a.t()) * scaled).sum(1)
        total = squares + 2 * cross + update

        # What each term may be off by, in units of the rounding of W A^T: |B_n| |A| bounds what B_n A cancels in itself.
        reach = scaled.abs() @ torch.linalg.vector_norm(exact_a, dim=1)
        finer = torch.finfo(torch.float64).eps / torch.finfo(base.dtype).eps
        doubt = squares + 2 * squares.sqrt() * reach + finer * reach.square()
        for rows in _doubtful(total, doubt):
            total[rows] = _whole_norms(read(rows), scaled[rows], exact_a).square()
        return total.clamp_min(0).sqrt().to(base.dtype)


def column_factors(
    base: BaseRows, a: Tensor, b: Tensor, scaling: float | Tensor, magnitude: Tensor
) -> tuple[Tensor, Tensor]:
    """``row_norms``, and what ``magnitude`` [N] is over them, zero where they are: two [N] without gradient."""
    magnitude = magnitude.detach()
    if a.device.type in ("cuda", "meta"):
        with torch.no_grad():
            return base.norms(a.detach(), b.detach(), scaling, magnitude)
    norms = row_norms(base, a, b, scaling)
    return norms, torch.where(norms > 0, magnitude.to(norms.dtype) / norms, 0)


def exact_row_norms(base: BaseRows, a: Tensor, b: Tensor, scaling: float | Tensor) -> Tensor:
    """``row_norms`` in fp64 and from W + s B A itself, slab by slab; TF32 does not touch it."""
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        read, scaled, exact_a = base.reader(), b.detach().double() * scaling, a.detach().double()
        slabs = [_whole_norms(read(rows), scaled[rows], exact_a) for rows in base.slabs()]
        return torch.cat([scaled.new_empty(0), *slabs])


def _whole_norms(rows: Tensor, scaled_b: Tensor, a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows.double() + scaled_b @ a, dim=1)


def _read_once(
    base: BaseRows, read: Callable[[slice | Tensor], Tensor], a: Tensor
) -> tuple[Tensor, Tensor]:
    """||W_n||^2 [N] and W A^T [N, r], in fp64, from one pass over W."""
    a_t = a.to(base.dtype).t()
    squares, products = [], []
    for rows in base.slabs():
        w = read(rows)
        squares.append(torch.linalg.vector_norm(w, dim=1).double().square())
        products.append((w @ a_t).double())
    if not squares:
        return a.new_zeros(0, dtype=torch.float64), a.new_zeros(0, a.shape[0], dtype=torch.float64)
    return torch.cat(squares), torch.cat(products)


def _doubtful(total: Tensor, doubt: Tensor) -> list[Tensor]:
    """The indices of rows to do again, in portions."""
    if total.device.type == "cpu" and not torch.compiler.is_compiling():
        rows = (total < _SHARE * doubt).nonzero().flatten()
        return list(rows.split(_ROWS)) if rows.numel() else []
    worst = (doubt / total.clamp_min(torch.finfo(torch.float64).tiny)).nan_to_num(0.0)
    return [worst.topk(min(_ROWS, worst.numel())).indices]
