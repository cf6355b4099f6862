"""y = x W^T + bias + h B_e^T with factors per segment of rows, and its gradients.

    forward   h    = s_e' drop(x) A_e^T          y  = x W^T + bias + h B_e^T
    backward  g    = s_e' dY B_e                 dX = dY W + mask * (g A_e)
              dA_e = g_e^T drop(x_e)             dB_e = dY_e^T h_e             dbias = sum_m dY

e is the segment of each row, whose rows are bounds[e]..bounds[e + 1]; s' = s / (1 - p) as in lora_linear.py. Saved: x as
it came, h, bounds and the two-word dropout state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .lora_linear import as_dtype, as_rows, split_scaling


class LoraLinearSegmentsFunction(torch.autograd.Function):
    """Inputs: x [..., K], weight [N, K] or None, lora_a [E, r, K], lora_b [E, N, r], bounds int32 [E + 1], scalings
    (float | Tensor [E]), bias [N] or None, keep threshold, rng_state int64[2] or None, compute dtype; of a 4-bit weight
    its codes for weight, then its form and scales. ``functional`` has checked them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        bounds: Tensor,
        scalings: float | Tensor,
        bias: Tensor | None,
        keep: int,
        rng_state: Tensor | None,
        dtype: torch.dtype,
        form: ops.Form | None = None,
        *scales: Tensor,
    ) -> Tensor:
        need_x, need_a, need_b = (ctx.needs_input_grad[i] for i in (0, 2, 3))
        low_rank = lora_a.shape[0] > 0 and lora_a.shape[1] > 0 and keep > 0
        scale, scalings_tensor = split_scaling(scalings, keep)
        rows = as_rows(x, dtype)

        h = None
        if low_rank and weight is not None and form is None:
            y, h = ops.segment_linear(
                rows, as_dtype(weight, dtype), lora_a, lora_b, bounds, scalings_tensor, scale, rng_state, keep, bias
            )  # fmt: skip
        else:
            if low_rank:
                h = ops.segment_down(rows, lora_a, bounds, scalings_tensor, scale, rng_state, keep)
            up = None if h is None else lora_b
            if form is not None:
                assert weight is not None
                y = ops.segment_nf4_gemm(rows, weight, scales, form, h, up, bounds, bias)
            elif weight is not None:
                y = ops.gemm(rows, as_dtype(weight, dtype), None, None, bias)
            elif h is not None:
                y = ops.segment_up(h, lora_b, bounds)
            else:
                y = rows.new_zeros(rows.shape[0], lora_b.shape[1])

        ctx.save_for_backward(
            x if need_a and low_rank else None,
            weight if need_x else None,
            lora_a if low_rank and need_x else None,
            lora_b if low_rank and (need_x or need_a) else None,
            h if need_b and low_rank else None,
            bounds,
            rng_state if low_rank else None,
            scalings_tensor,
            *(scales if need_x else ()),
        )
        ctx.form, ctx.arguments = form, 11 + len(scales)
        ctx.scale, ctx.keep, ctx.dtype, ctx.low_rank = scale, keep, dtype, low_rank
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.a_like, ctx.b_like = (lora_a.shape, lora_a.dtype), (lora_b.shape, lora_b.dtype)
        ctx.bias_dtype = bias.dtype if bias is not None else None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fastlora.lora_linear_segments has no second derivative: backward was called with create_graph=True. "
                "Call backward without it, or use fastlora.reference.lora_linear_segments where a double backward is "
                "needed"
            )
        (grad,) = grads
        x, weight, lora_a, lora_b, h, bounds, rng_state, scalings, *scales = ctx.saved_tensors
        need_x, need_a, need_b, need_bias = (ctx.needs_input_grad[i] for i in (0, 2, 3, 6))
        dtype, low_rank = ctx.dtype, ctx.low_rank
        dy = as_rows(grad, dtype)
        features = ctx.x_shape[-1]

        dx: Tensor | None = None
        g = words = None
        if low_rank and (need_x or need_a):
            down = lora_b.transpose(1, 2)
            if need_x and weight is not None and ctx.form is None and rng_state is None:
                w_t, up = as_dtype(weight, dtype).t(), lora_a.transpose(1, 2)
                dx, g = ops.segment_linear(dy, w_t, down, up, bounds, scalings, ctx.scale)
            else:
                g = ops.segment_down(dy, down, bounds, scalings, ctx.scale)
            if rng_state is not None:  # made again, not saved: for dX and dA
                words = ops.mask(rng_state, dy.shape[0], features, ctx.keep)

        if need_x and dx is None:
            up = None if g is None else lora_a.transpose(1, 2)
            if ctx.form is not None:
                dx = ops.segment_nf4_gemm(
                    dy, weight, scales, ctx.form, g, up, bounds, None, words, dx=True
                )
            elif weight is not None:
                dx = ops.segment_gemm(dy, as_dtype(weight, dtype).t(), g, up, bounds, None, words)
            elif g is not None:
                dx = ops.segment_up(g, lora_a.transpose(1, 2), bounds, words)
            else:
                dx = dy.new_zeros(dy.shape[0], features)
        if dx is not None:
            dx = as_dtype(dx.view(ctx.x_shape), ctx.x_dtype)

        d_a = d_b = d_bias = None
        if low_rank and (need_a or need_b):
            d_a, d_b = ops.segment_wgrad(
                as_rows(x, dtype) if need_a else None,
                g if need_a else None,
                dy if need_b else None,
                h,
                bounds,
                words,
                ctx.a_like[1],
                ctx.b_like[1],
            )
        if need_a and not low_rank:
            d_a = dy.new_zeros(ctx.a_like[0], dtype=ctx.a_like[1])
        if need_b and not low_rank:
            d_b = dy.new_zeros(ctx.b_like[0], dtype=ctx.b_like[1])
        if need_bias:
            d_bias = ops.wgrad(None, None, dy, None, None, dtype, dtype, ctx.bias_dtype)[2]
        given = (
            dx, None, d_a if need_a else None, d_b if need_b else None, None, None, d_bias,
        )  # fmt: skip
        return given + (None,) * (ctx.arguments - len(given))
