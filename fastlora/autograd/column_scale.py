"""y = rest + c * z with one factor c = m / norm per column, and its gradients: DoRA's magnitude (arXiv 2402.09353).

    forward   c  = m / norm                      y  = rest + c * z
    backward  dz = c * dY                        dm = sum_m dY * z / norm          drest = dY, or its sum over rows

The norm is a constant here, as in the paper (section 4.3). Saved: c and norm [N], and where m is trained z [M, N] as it
came, in the compute dtype: that is what DoRA keeps beyond LoRA. Where a norm is zero, c is zero: a row of zeros has no
direction to scale.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.linear import is_eager

_SLAB = 1 << 22  # elements of dY * z that exist at once


class ColumnScaleFunction(torch.autograd.Function):
    """Inputs: z [..., N], magnitude [N], norm [N] (fp32 or fp64, no grad), rest [N], of z's shape, or None."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, magnitude: Tensor, norm: Tensor, rest: Tensor | None
    ) -> Tensor:
        factor = torch.where(norm > 0, magnitude.to(norm.dtype) / norm, 0)
        y = _scaled(z, factor, rest)
        ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, factor, norm)
        ctx.magnitude_dtype = magnitude.dtype
        ctx.rest_like = None if rest is None else (rest.ndim, rest.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, factor, norm = ctx.saved_tensors
        need_z, need_magnitude, _, need_rest = ctx.needs_input_grad
        dz = d_magnitude = d_rest = None
        if need_z:
            dz = _scaled(dy, factor, None)
        if need_magnitude:
            total = _column_dots(dy, z, norm.dtype)
            d_magnitude = torch.where(norm > 0, total / norm, 0).to(ctx.magnitude_dtype)
        if need_rest:
            ndim, dtype = ctx.rest_like
            summed = dy if ndim > 1 else _rows(dy).sum(0, dtype=norm.dtype)
            d_rest = summed.to(dtype)
        return dz, d_magnitude, None, d_rest


def _scaled(z: Tensor, factor: Tensor, rest: Tensor | None) -> Tensor:
    """rest + factor * z in z's dtype, rounded once, with nothing of z's size made in the factor's."""
    if not is_eager(
        z
    ):  # a compiler fuses, and does not trace out= right everywhere (torch 2.11: wrong gradients)
        y = z * factor if rest is None else torch.addcmul(rest, z, factor)
        return y.to(z.dtype)
    y = torch.empty_like(z)
    return torch.mul(z, factor, out=y) if rest is None else torch.addcmul(rest, z, factor, out=y)


def _rows(t: Tensor) -> Tensor:
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _column_dots(one: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over rows of one * other [..., N] -> [N] in ``dtype``, slab by slab."""
    total = torch.zeros(one.shape[-1], dtype=dtype, device=one.device)
    height = max(1, _SLAB // max(1, one.shape[-1]))
    for left, right in zip(_rows(one).split(height), _rows(other).split(height), strict=True):
        total += (left.to(dtype) * right).sum(0)
    return total
