"""y = x W^T + bias + h B^T and its gradients, written like the formulas of README.md.

    forward   h  = s' drop(x) A^T                y  = x W^T + bias + h B^T
    backward  g  = s' dY B                       dX = dY W + mask * (g A)
              dA = g^T drop(x)                   dB = dY^T h                 dbias = sum_m dY

with s' = s / (1 - p): the mask's scale is folded into h and g, so nothing else multiplies. Saved: x as it came (one
tensor, however many layers share it), h, and the two-word dropout state; never a mask, a cast copy or W in another form.
A 4-bit W is made floats for as long as its product takes, where no kernel multiplies by its codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..rng import keep_scale


class LoraLinearFunction(torch.autograd.Function):
    """Inputs: x [..., K], weight [N, K], lora_a [r, K], lora_b [N, r], scaling (float | 0-d Tensor), bias [N] or None,
    keep threshold, rng_state int64[2] or None, compute dtype; of a 4-bit weight its codes for weight, then its form and
    scales. ``functional`` has checked them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float | Tensor,
        bias: Tensor | None,
        keep: int,
        rng_state: Tensor | None,
        dtype: torch.dtype,
        form: ops.Form | None = None,
        *scales: Tensor,
    ) -> Tensor:
        low_rank = lora_a.shape[0] > 0 and keep > 0
        scale, scaling_tensor = split_scaling(scaling, keep)
        rows = as_rows(x, dtype)

        h = None
        factors: Any = (lora_a, lora_b) if low_rank else (None, None)
        rest: Any = (bias, scaling_tensor, scale, rng_state, keep)
        if form is not None:
            y, h = ops.nf4_linear(rows, weight, scales, form, *factors, *rest)
        elif low_rank:
            y, h = ops.lora_forward(rows, as_dtype(weight, dtype), lora_a, lora_b, *rest)
        else:
            y = ops.gemm(rows, as_dtype(weight, dtype), None, None, bias)

        ctx.low_rank, ctx.scale, ctx.keep = low_rank, scale, keep
        ctx.save_for_backward(
            *saved_for_linear(
                ctx, ctx.needs_input_grad, x, weight, lora_a, lora_b, h, scaling_tensor, rng_state, dtype, form, scales
            )
        )  # fmt: skip
        ctx.bias_dtype = bias.dtype if bias is not None else None
        return y  # [M, N]: a view made in here could not be changed in place by the caller

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(
            "fastlora.lora_linear",
            ", or use fastlora.reference.lora_linear where a double backward is needed",
        )
        need_bias = ctx.needs_input_grad[5]
        dx, d_a, d_b, d_bias = linear_gradients(
            ctx, ctx.needs_input_grad, as_rows(grads[0], ctx.dtype), ctx.saved_tensors, ctx.bias_dtype if need_bias else None
        )  # fmt: skip
        given = dx, None, d_a, d_b, None, d_bias if need_bias else None
        return given + (None,) * (len(ctx.needs_input_grad) - len(given))


def saved_for_linear(
    ctx: Any,
    needs: Sequence[bool],
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    h: Tensor | None,
    scaling: Tensor | None,
    rng_state: Tensor | None,
    dtype: torch.dtype,
    form: ops.Form | None,
    scales: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    """What ``linear_gradients`` wants to be saved; what is no tensor it leaves in ``ctx``, which has low_rank, scale and keep.
    ``needs``: which of x, weight, lora_a and lora_b want a gradient."""
    need_x, _, need_a, need_b = needs[:4]
    low_rank = ctx.low_rank
    ctx.form, ctx.dtype = form, dtype
    ctx.x_shape, ctx.x_dtype, ctx.in_features = x.shape, x.dtype, x.shape[-1]
    ctx.a_like, ctx.b_like = (lora_a.shape, lora_a.dtype), (lora_b.shape, lora_b.dtype)
    return (
        x if need_a and low_rank else None,
        weight if need_x else None,
        lora_a if low_rank and need_x else None,
        lora_b if low_rank and (need_x or need_a) else None,
        h if need_b and low_rank else None,
        rng_state if low_rank else None,
        scaling,
        *(scales if need_x else ()),
    )


def linear_gradients(
    ctx: Any,
    needs: Sequence[bool],
    dy: Tensor,
    saved: Sequence[Any],
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """(dX, dA, dB, dbias) of dY [M, N], as ``needs`` has them; dbias has shape [0] without a dtype."""
    x, weight, lora_a, lora_b, h, rng_state, scaling, *scales = saved
    need_x, _, need_a, need_b = needs[:4]
    dtype, low_rank = ctx.dtype, ctx.low_rank
    want_a, want_b = need_a and low_rank, need_b and low_rank
    update = (
        lora_a,
        lora_b,
        as_rows(x, dtype) if want_a else None,
        h if want_b else None,
        scaling,
        ctx.scale,
        rng_state,
        ctx.keep,
    )
    dtypes = ctx.a_like[1], ctx.b_like[1], bias_dtype
    if ctx.form is not None:
        rest: Any = (scales, ctx.form, *update, *dtypes)
        dx, d_a, d_b, d_bias = ops.nf4_backward(dy, weight, *rest)
    else:
        rest = (*update, ctx.in_features, *dtypes)
        w = as_dtype(weight, dtype) if need_x else None
        dx, d_a, d_b, d_bias = ops.lora_backward(dy, w, *rest)
    if need_a and not want_a:
        d_a = dy.new_zeros(ctx.a_like[0], dtype=ctx.a_like[1])
    if need_b and not want_b:
        d_b = dy.new_zeros(ctx.b_like[0], dtype=ctx.b_like[1])
    if need_x:
        dx = as_dtype(dx if len(ctx.x_shape) == 2 else dx.view(ctx.x_shape), ctx.x_dtype)
    return dx if need_x else None, d_a if need_a else None, d_b if need_b else None, d_bias


def refuse_second_derivative(name: str, instead: str = "") -> None:
    """Raises RuntimeError in a backward that is to be differentiated itself."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has no second derivative: backward was called with create_graph=True. Call backward without it{instead}"
        )


def as_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t.to(dtype), without the call where nothing is to do: on the host every call counts."""
    return t if t.dtype == dtype else t.to(dtype)


def as_rows(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t [..., K] as [M, K]; M is spelled out, for -1 is ambiguous where K is 0."""
    if t.ndim == 2 and t.dtype == dtype:
        return t
    return as_dtype(t, dtype).reshape(math.prod(t.shape[:-1]), t.shape[-1])


def split_scaling(scaling: float | Tensor, keep: int) -> tuple[float, Tensor | None]:
    """(host factor, device factor): a tensor is read on the device, so that changing it recompiles nothing."""
    if isinstance(scaling, Tensor):
        return keep_scale(keep), scaling
    return scaling * keep_scale(keep), None
