"""y = R + act(x D^T + d) U^T + u, a bottleneck and what it is added to, with one pass over x, R and y.

    forward   p = x D^T + d                y  = R + act(p) U^T + u
    backward  g = (dY U) * act'(p)         dX = g D (+ dY where R is x)      dR = dY
              dD = g^T x     dd = sum_m g    dU = dY^T act(p)                du = sum_m dY

Saved: x and p [M, r]; act(p) is made again. The products are the ops that a LoRA adapter has; u rides on the second one
as a column of U beside a one in act(p), so that nothing passes over [M, N] for it alone. An r above the ops' largest
makes no skinny matrices any more: those products are torch's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from .._autocast import autocast_dtype
from ..ops.support import MAX_RANK

_PAD = 8  # columns that carry u: what keeps rows of half precision aligned to 16 bytes


class Activation(NamedTuple):
    """An elementwise function of p, and dp of (g, p)."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


_aten = torch.ops.aten
_RELU = Activation(F.relu, lambda g, p: _aten.threshold_backward(g, p, 0))
_GELU = Activation(F.gelu, lambda g, p: _aten.gelu_backward(g, p))
_GELU_TANH = Activation(
    lambda p: F.gelu(p, approximate="tanh"),
    lambda g, p: _aten.gelu_backward(g, p, approximate="tanh"),
)
_SILU = Activation(F.silu, lambda g, p: _aten.silu_backward(g, p))
_LEAKY = Activation(F.leaky_relu, lambda g, p: _aten.leaky_relu_backward(g, p, 0.01, False))
# By the names that transformers, and with it the adapters library, gives them.
ACTIVATIONS: dict[str, Activation] = {
    "relu": _RELU,
    "gelu": _GELU,
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), _GELU_TANH),
    **dict.fromkeys(("swish", "silu"), _SILU),
    **dict.fromkeys(("leakyrelu", "leaky_relu"), _LEAKY),
    "tanh": Activation(torch.tanh, lambda g, p: _aten.tanh_backward(g, torch.tanh(p))),
    "sigmoid": Activation(torch.sigmoid, lambda g, p: _aten.sigmoid_backward(g, torch.sigmoid(p))),
    "mish": Activation(F.mish, lambda g, p: _aten.mish_backward(g, p)),
    "linear": Activation(lambda p: p, lambda g, p: g),
}


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
        rows = _rows(x, dtype)
        p = _down(rows, down).add_(down_bias.to(dtype))
        a = ACTIVATIONS[activation].forward(p)
        base = rows if around else None
        if residual is not None:
            base = _rows(residual, residual.dtype)
        if base is not None and base.dtype == dtype:
            y = torch.addmm(base, *_with_bias(a, up, up_bias))
        else:
            y = torch.addmm(up_bias.to(dtype), a, up.to(dtype).t())
            y = y if base is None else base + y
        ctx.save_for_backward(x, p, down, up)
        ctx.activation, ctx.dtype, ctx.around = activation, dtype, around
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
        dy, dtype = _rows(grad, ctx.dtype), ctx.dtype
        act = ACTIVATIONS[ctx.activation]
        d_x = d_res = d_down_bias = g = None
        if need[0] or need[2] or need[3]:
            g = act.backward(_down(dy, up.t()), p)
            if need[0]:
                w = down.to(dtype)
                d_x = torch.addmm(dy, g, w) if ctx.around else g @ w
                d_x = d_x.view(x.shape).to(x.dtype)
            if need[3]:
                d_down_bias = g.sum(0, dtype=_wide(dtype)).to(ctx.dtypes[3])
        if need[1]:
            shape, kind = ctx.like
            d_res = grad.to(kind).view(shape)
        d_down, d_up, d_up_bias = _wgrad(
            _rows(x, dtype) if need[2] else None,
            g if need[2] else None,
            dy if need[4] or need[5] else None,
            act.forward(p) if need[4] else None,
            ctx.dtypes[0],
            ctx.dtypes[1],
            ctx.dtypes[2] if need[5] else None,
        )
        return d_x, d_res, d_down, d_down_bias, d_up, d_up_bias, None, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _rows(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t [..., K] as [M, K]; M is spelled out, for -1 is ambiguous where K is 0."""
    return t.to(dtype).reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _down(x: Tensor, l: Tensor) -> Tensor:
    """x [M, K] l^T -> [M, r]."""
    return ops.down(x, l)[0] if l.shape[0] <= MAX_RANK else x @ l.to(x.dtype).t()


def _wgrad(
    x: Tensor | None,
    g: Tensor | None,
    dy: Tensor | None,
    a: Tensor | None,
    dtype_down: torch.dtype,
    dtype_up: torch.dtype,
    dtype_bias: torch.dtype | None,
) -> list[Tensor | None]:
    """g^T x [r, K], dy^T a [N, r] and sum_m dy [N], each None where its inputs (or its dtype) are."""
    like, skinny = x if x is not None else dy, g if g is not None else a
    if like is None:
        return [None, None, None]
    if skinny is not None and skinny.shape[1] > MAX_RANK:
        bias = None
        if dy is not None and dtype_bias is not None:
            bias = dy.sum(0, dtype=_wide(dy.dtype)).to(dtype_bias)
        return [
            None if x is None or g is None else (g.t() @ x).to(dtype_down),
            None if dy is None or a is None else (dy.t() @ a).to(dtype_up),
            bias,
        ]
    made = ops.wgrad(x, g, dy, a, None, dtype_down, dtype_up, dtype_bias)
    given = (x is not None, a is not None, dtype_bias is not None)
    return [value if there else None for value, there in zip(made, given, strict=True)]


def _with_bias(a: Tensor, up: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(a', U') [M, r'] and [r', N] with a' U' = a up^T + bias."""
    (m, r), n, padded = a.shape, up.shape[0], -(-(a.shape[1] + 1) // _PAD) * _PAD
    wide_a, wide_up = a.new_empty(m, padded), a.new_empty(n, padded)
    wide_a[:, :r], wide_up[:, :r], wide_up[:, r] = a, up, bias
    wide_a[:, r] = 1
    wide_a[:, r + 1 :] = 0
    wide_up[:, r + 1 :] = 0
    return wide_a, wide_up.t()
