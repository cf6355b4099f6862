"""y = R + act(x D^T + d) U^T + u, a bottleneck and what it is added to, with one pass over x, R and y.

    forward   p = x D^T + d,  a = act(p)       y  = R + a U^T + u
    backward  g = (dY U) * act'(p)             dX = g D (+ dY where R is x)      dR = dY
              dD = g^T x     dd = sum_m g      dU = dY^T a                       du = sum_m dY

Saved: x where D is trained, and p [M, r]; a is made again beside g. Every line is an op of ops/bottleneck.py, which decides up to which r they are
fastlora's kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._autocast import autocast_dtype
from ..activations import ACTIVATIONS, KINDS
from .lora_linear import as_rows


def bottleneck(
    x: Tensor,
    residual: Tensor | None,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    activation: str,
) -> Tensor:
    """residual + act(x down^T + down_bias) up^T + up_bias.

    Args:
        x: [..., K] in any float dtype; autocast's, or else x's, is what is computed in.
        residual: [..., N], x itself perhaps; None: nothing is added.
        down, down_bias: [r, K] and [r], in the compute dtype or wider.
        up, up_bias: [N, r] and [N], likewise.
        activation: one of ``ACTIVATIONS``.

    Returns:
        [..., N] in residual's dtype, or without one in the compute dtype.

    Raises:
        ValueError: a shape does not fit.
        RuntimeError: in backward, a second derivative is asked for.
    """
    (r, k), n = down.shape, up.shape[0]
    if x.ndim < 1 or x.shape[-1] != k:
        raise ValueError(f"x: got shape {tuple(x.shape)}; accepted is [..., {k}]")
    shape = (*x.shape[:-1], n)
    if residual is not None and residual.shape != shape:
        raise ValueError(f"residual: got shape {tuple(residual.shape)}; accepted is {shape}")
    for name, value, wanted in (
        ("down_bias", down_bias, (r,)),
        ("up", up, (n, r)),
        ("up_bias", up_bias, (n,)),
    ):
        if tuple(value.shape) != wanted:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}; accepted is {wanted}")
    dtype = None if x.dtype == torch.float64 else autocast_dtype(x.device)
    dtype = dtype or x.dtype
    around = residual is x and x.dtype == dtype
    y: Tensor = BottleneckFunction.apply(
        x, None if around else residual, down, down_bias, up, up_bias, activation, dtype, around
    )
    return y.view(shape)


class BottleneckFunction(torch.autograd.Function):
    """Inputs as ``bottleneck``'s, then the compute dtype, and whether x is the residual (which is None then)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        down: Tensor,
        down_bias: Tensor,
        up: Tensor,
        up_bias: Tensor,
        activation: str,
        dtype: torch.dtype,
        around: bool,
    ) -> Tensor:
        rows, kind = as_rows(x, dtype), ACTIVATIONS[activation].kind
        need_x, _, need_down, need_d, need_up, *_ = ctx.needs_input_grad
        need_g = need_x or need_down or need_d
        a, p = ops.bottleneck_down(rows, down, down_bias, kind, need_g or need_up)
        base = rows if around else None
        if residual is not None:
            base = as_rows(residual, residual.dtype)
        y = ops.bottleneck_up(a, up, up_bias, base)
        ctx.save_for_backward(
            x if need_down else None,
            p if need_g or need_up else None,
            down if need_x else None,
            up if need_g else None,
        )
        ctx.kind, ctx.dtype, ctx.around = kind, dtype, around
        ctx.x_like = x.shape, x.dtype
        ctx.like = residual is not None and (residual.shape, residual.dtype)
        ctx.dtypes = down.dtype, up.dtype, up_bias.dtype, down_bias.dtype
        return y  # [M, N]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fastlora's bottleneck has no second derivative: backward was called with create_graph=True"
            )
        (grad,) = grads
        x, p, down, up = ctx.saved_tensors
        need = ctx.needs_input_grad
        dy = as_rows(grad, ctx.dtype)
        d_x = d_res = d_down_bias = g = a = None
        if need[0] or need[2] or need[3]:
            g, a = ops.bottleneck_down_backward(dy, up.t(), p, ctx.kind, need[4])
            if need[0]:
                d_x = ops.bottleneck_up(g, down.t(), None, dy if ctx.around else None)
                shape, kind = ctx.x_like
                d_x = d_x.view(shape).to(kind)
            if need[3]:
                wide = torch.promote_types(ctx.dtype, torch.float32)
                d_down_bias = g.sum(0, dtype=wide).to(ctx.dtypes[3])
        elif need[4]:
            a = KINDS[ctx.kind].forward(p)
        if need[1]:
            shape, kind = ctx.like
            d_res = grad.to(kind).view(shape)
        d_down, d_up, d_up_bias = ops.bottleneck_wgrad(
            as_rows(x, ctx.dtype) if need[2] else None,
            g if need[2] else None,
            dy if need[4] or need[5] else None,
            a if need[4] else None,
            ctx.dtypes[0],
            ctx.dtypes[1],
            ctx.dtypes[2] if need[5] else None,
        )
        return d_x, d_res, d_down, d_down_bias, d_up, d_up_bias, None, None, None
