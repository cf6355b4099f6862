"""y = bias + c * z, z = x W^T + h B^T, with one factor per column (DoRA, arXiv 2402.09353), and its gradients.

    forward   c = m / norm                    h = s x A^T                    z, y as above, in one product
    backward  dz = c * dY                     dm = sum_m dY * z / norm       dbias = sum_m dY
              and dX, dA, dB of dz, as of a LoRA linear (lora_linear.py)

The norm is a constant here, as in the paper (section 4.3). Saved: what a LoRA linear saves, m and norm [N], and where m is
trained z [M, N] in the compute dtype: that is what DoRA keeps beyond LoRA. (They and dY live until its backward ends.) Where a norm is zero, c is zero: a row of zeros
has no direction to scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..rng import KEEP_ALL
from .lora_linear import (
    as_dtype,
    as_rows,
    linear_gradients,
    refuse_second_derivative,
    saved_for_linear,
    split_scaling,
)


class DoraLinearFunction(torch.autograd.Function):
    """Inputs: magnitude, norm and factor [N] (the latter two fp32 or fp64, no grad), bias [N] or None, whether to keep z (the
    magnitude wants a gradient: without grad mode ``needs_input_grad`` says so too); then x [..., K], weight
    [N, K], lora_a [r, K], lora_b [N, r], r at least 1, scaling, compute dtype; of a 4-bit weight its codes for weight, then
    its form and scales. ``functional`` has checked them."""

    @staticmethod
    def forward(
        ctx: Any,
        magnitude: Tensor,
        norm: Tensor,
        factor: Tensor,
        bias: Tensor | None,
        keep_z: bool,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float | Tensor,
        dtype: torch.dtype,
        form: ops.Form | None = None,
        *scales: Tensor,
    ) -> Tensor:
        scale, scaling_tensor = split_scaling(scaling, KEEP_ALL)
        rows = as_rows(x, dtype)
        rest = lora_a, lora_b, bias, scaling_tensor, scale, factor, keep_z
        if form is not None:
            y, h, z = ops.nf4_scaled(rows, weight, scales, form, *rest)
        else:
            y, h, z = ops.lora_scaled(rows, as_dtype(weight, dtype), *rest)
        ctx.low_rank, ctx.scale, ctx.keep = True, scale, KEEP_ALL
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(
            magnitude, norm, z if keep_z else None,
            *saved_for_linear(
                ctx, ctx.needs_input_grad[5:], x, weight, lora_a, lora_b, h, scaling_tensor, None, dtype, form, scales
            ),
        )  # fmt: skip
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("DoRA")
        magnitude, norm, z, *saved = ctx.saved_tensors
        need_magnitude, _, _, need_bias, _, *needs = ctx.needs_input_grad
        need_z = any(needs)
        dz, d_magnitude, d_bias = ops.scale_columns_backward(
            as_rows(grads[0], ctx.dtype), z, magnitude, norm, need_z, need_bias
        )
        dx = d_a = d_b = None
        if need_z:
            dx, d_a, d_b, _ = linear_gradients(ctx, needs, dz, saved, None)
        given = (
            d_magnitude if need_magnitude else None,
            None,
            None,
            d_bias.to(ctx.bias_dtype) if need_bias else None,
            *(None, dx, None, d_a, d_b),
        )
        return given + (None,) * (len(ctx.needs_input_grad) - len(given))
