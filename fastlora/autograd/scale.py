"""y = x * l for rows x [..., N] and a vector l [N], rounded once; of x and l nothing is saved in another dtype.

forward   y = x * l            in fp32 or wider, one pass over x
backward  dX = dY * l          dl = sum_m dY * x
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.linear import is_eager


class ScaleFunction(torch.autograd.Function):
    """Inputs: x [..., N] and l [N], any float dtypes; y has x's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, l: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, l)
        return _times(x, l)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fastlora's (IA)^3 has no second derivative: backward was called with create_graph=True"
            )
        (grad,) = grads
        x, l = ctx.saved_tensors
        d_x = d_l = None
        if ctx.needs_input_grad[0]:
            d_x = _times(grad, l)
        if ctx.needs_input_grad[1]:
            wide = torch.promote_types(torch.float32, grad.dtype)
            product = grad.to(wide) * x.to(wide)
            d_l = product.reshape(product.shape[:-1].numel(), l.shape[0]).sum(0).to(l.dtype)
        return d_x, d_l


def _times(x: Tensor, l: Tensor) -> Tensor:
    """x * l in the wider dtype, rounded to x's on the way out."""
    if x.dtype == l.dtype:
        return x * l
    if not is_eager(
        x
    ):  # compilers fuse, and do not trace out= right everywhere (torch 2.11: wrong gradients)
        return (x * l).to(x.dtype)
    return torch.mul(x, l, out=torch.empty_like(x))


def scale(x: Tensor, l: Tensor) -> Tensor:
    """x [..., N] times l [N], in x's dtype."""
    y: Tensor = ScaleFunction.apply(x, l)
    return y
