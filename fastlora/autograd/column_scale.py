"""y = rest + c * z with one factor per column, and its gradients: (IA)^3's vector, and DoRA's magnitude (arXiv 2402.09353)
where z is no single product: with dropout, with several adapters, over embeddings. (Else it is in dora_linear.py.)

    forward   c  = m / norm, or m                y  = rest + c * z
    backward  dz = c * dY                        dm = sum_m dY * z [/ norm]        drest = dY, or its sum over rows

The norm is a constant here, as in the paper (section 4.3). Saved: m and norm [N], and where m is trained z [M, N] as it
came, in the compute dtype: that is what DoRA keeps beyond LoRA. Where a norm is zero, c is zero: a row of zeros has no
direction to scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .lora_linear import as_rows, refuse_second_derivative


class ColumnScaleFunction(torch.autograd.Function):
    """Inputs: z [..., N], magnitude [N], norm [N] (fp32 or fp64, no grad) or None, rest [N], of z's shape, or None."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, magnitude: Tensor, norm: Tensor | None, rest: Tensor | None
    ) -> Tensor:
        ctx.shape = z.shape
        ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, magnitude, norm)
        ctx.rest_like = None if rest is None else (rest.ndim, rest.dtype)
        more = rest if rest is None or rest.ndim == 1 else as_rows(rest, rest.dtype)
        return ops.scale_columns(as_rows(z, z.dtype), magnitude, norm, more)  # viewed outside

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("DoRA or (IA)^3")
        (dy,) = grads
        z, magnitude, norm = ctx.saved_tensors
        need_z, need_magnitude, _, need_rest = ctx.needs_input_grad
        by_row = need_rest and ctx.rest_like[0] > 1
        dz, d_magnitude, sums = ops.scale_columns_backward(
            as_rows(dy, dy.dtype), None if z is None else as_rows(z, z.dtype), magnitude, norm, need_z, need_rest and not by_row
        )  # fmt: skip
        d_rest = None
        if need_rest:
            d_rest = (dy.view(ctx.shape) if by_row else sums).to(ctx.rest_like[1])
        return (
            dz.view(ctx.shape) if need_z else None,
            d_magnitude if need_magnitude else None,
            None,
            d_rest,
        )


def scale_columns(
    z: Tensor, magnitude: Tensor, norm: Tensor | None = None, rest: Tensor | None = None
) -> Tensor:
    """rest + c * z [..., N] in z's dtype, c = magnitude / norm with the norm a constant, or magnitude; ``rest`` is [N], of
    z's shape, or None.

    Raises:
        ValueError: z is not as wide as ``magnitude``.
        RuntimeError: in backward, a second derivative is asked for.
    """
    if z.shape[-1:] != magnitude.shape:
        accepted = ", ".join(map(str, magnitude.shape))
        raise ValueError(f"x: got shape {tuple(z.shape)}; accepted is [..., {accepted}]")
    y: Tensor = ColumnScaleFunction.apply(z, magnitude, norm, rest)
    return y if z.ndim == 2 else y.view(z.shape)
