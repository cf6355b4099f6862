"""``torch.ops.fastlora._bottleneck_*``: the products of a bottleneck adapter with what is elementwise around them.

    _bottleneck_down            p = x l^T + bias,  a = act(p)
    _bottleneck_down_backward   g = (dY l^T) * act'(p),  a = act(p)
    _bottleneck_up              y = residual + h l^T + bias
    _bottleneck_wgrad           dDown = g^T x,  dUp = dY^T a,  du = sum_m dY

Private, as those of raw.py are; contracts as in reference.py. An output that was not asked for comes back with shape [0].
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import raw, support, torch_backend
from .linear import is_eager

# Widths up to which the kernels are taken where nobody asks for a backend; above, products are torch's own. The kernels of ``down``
# and ``wgrad`` hold tiles of up to 128 columns: with more, x (dY) passes through L2 once for each 128, where torch's tiles are
# larger and feed tensor cores better. What ``up`` saves, a pass over [M, N] that adds the residual, does not shrink with the width.
# Measured on an H200 by benchmarks/sweep_bottleneck.py: benchmarks/NOTES.md.
WIDEST = {"down": 128, "up": support.MAX_RANK, "wgrad": 256}

_library = torch.library.Library("fastlora", "FRAGMENT")
_library.define(
    "_bottleneck_down(Tensor x, Tensor l, Tensor bias, str kind, bool both) -> (Tensor, Tensor)"
)
_library.define(
    "_bottleneck_down_backward(Tensor dy, Tensor l, Tensor p, str kind, bool both) -> (Tensor, Tensor)"
)
_library.define("_bottleneck_up(Tensor h, Tensor l, Tensor? bias, Tensor? residual) -> Tensor")
_library.define(
    "_bottleneck_wgrad(Tensor? x, Tensor? g, Tensor? dy, Tensor? a, ScalarType dtype_down, ScalarType dtype_up, "
    "ScalarType? dtype_bias) -> (Tensor, Tensor, Tensor)"
)


def _takes_kernels(part: str, width: int) -> bool:
    return width <= WIDEST[part] or support.preference().name is not None


def _backend(op: str, part: str, like: Tensor, dtype: torch.dtype, width: int) -> ModuleType:
    if not _takes_kernels(part, width):
        return torch_backend
    return raw.backend_module(support.choose(op, like.device, dtype, width))


def _down(x: Tensor, l: Tensor, bias: Tensor, kind: str, both: bool) -> tuple[Tensor, Tensor]:
    module = _backend("bottleneck_down", "down", x, x.dtype, l.shape[0])
    a, p = module.bottleneck_down(x, l, bias, kind, both)
    return a, x.new_empty(0) if p is None else p


def _down_backward(dy: Tensor, l: Tensor, p: Tensor, kind: str, both: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    module = _backend("bottleneck_down_backward", "down", dy, dy.dtype, l.shape[0])
    g, a = module.bottleneck_down_backward(dy, l, p, kind, both)
    return g, dy.new_empty(0) if a is None else a


def _up(h: Tensor, l: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    dtype = h.dtype if residual is None else torch.promote_types(h.dtype, residual.dtype)
    y: Tensor = _backend("bottleneck_up", "up", h, dtype, h.shape[1]).bottleneck_up(h, l, bias, residual)  # fmt: skip
    return y


def _wgrad(
    x: Tensor | None,
    g: Tensor | None,
    dy: Tensor | None,
    a: Tensor | None,
    dtype_down: torch.dtype,
    dtype_up: torch.dtype,
    dtype_bias: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    like, skinny = x if x is not None else dy, g if g is not None else a
    assert like is not None
    width = 0 if skinny is None else skinny.shape[1]
    if width <= support.MAX_RANK and _takes_kernels("wgrad", width):
        return raw.wgrad(x, g, dy, a, None, dtype_down, dtype_up, dtype_bias)
    outputs = torch_backend.bottleneck_wgrad(x, g, dy, a, dtype_down, dtype_up, dtype_bias)
    d_down, d_up, d_bias = (like.new_empty(0) if out is None else out for out in outputs)
    return d_down, d_up, d_bias


def _fake_down(x: Tensor, l: Tensor, bias_or_p: Tensor, kind: str, both: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = x.shape[0], l.shape[0]
    return x.new_empty(shape), x.new_empty(shape if both else 0)


def _fake_up(h: Tensor, l: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    return h.new_empty(h.shape[0], l.shape[0], dtype=None if residual is None else residual.dtype)


def _fake_wgrad(x, g, dy, a, dtype_down, dtype_up, dtype_bias):  # type: ignore[no-untyped-def]
    like = x if x is not None else dy
    return (
        like.new_empty(0) if x is None else x.new_empty(g.shape[1], x.shape[1], dtype=dtype_down),
        like.new_empty(0) if a is None else dy.new_empty(dy.shape[1], a.shape[1], dtype=dtype_up),
        like.new_empty(0) if dtype_bias is None else dy.new_empty(dy.shape[1], dtype=dtype_bias),
    )


for _name, _kernel, _fake in (
    ("_bottleneck_wgrad", _wgrad, _fake_wgrad),
    ("_bottleneck_down", _down, _fake_down),
    ("_bottleneck_down_backward", _down_backward, _fake_down),
    ("_bottleneck_up", _up, _fake_up),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlora::{_name}", _fake, lib=_library)

_wgrad_op = torch.ops.fastlora._bottleneck_wgrad.default
_down_op = torch.ops.fastlora._bottleneck_down.default
_down_backward_op = torch.ops.fastlora._bottleneck_down_backward.default
_up_op = torch.ops.fastlora._bottleneck_up.default


def bottleneck_down(
    x: Tensor, l: Tensor, bias: Tensor, kind: str, both: bool
) -> tuple[Tensor, Tensor]:
    """(act(p), p) of p = x l^T + bias. x [M, K], l [r, K] and bias [r] (x's dtype or fp32, any strides); p with ``both`` alone.

    ``kind`` is one of ``activations.KINDS``.
    """
    a, p = (_down if is_eager(x) else _down_op)(x, l, bias, kind, both)
    return a, p


def bottleneck_down_backward(
    dy: Tensor, l: Tensor, p: Tensor, kind: str, both: bool
) -> tuple[Tensor, Tensor]:
    """((dy l^T) * act'(p), act(p)). dy [M, N], l [r, N] (dy's dtype or fp32, any strides), p [M, r]; act(p) with ``both`` alone."""
    g, a = (_down_backward if is_eager(dy) else _down_backward_op)(dy, l, p, kind, both)
    return g, a


def bottleneck_up(h: Tensor, l: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """residual + h l^T + bias [M, N] in residual's dtype, without one in h's. h [M, r], l [N, r], bias [N], any strides."""
    y: Tensor = (_up if is_eager(h) else _up_op)(h, l, bias, residual)
    return y


def bottleneck_wgrad(
    x: Tensor | None,
    g: Tensor | None,
    dy: Tensor | None,
    a: Tensor | None,
    dtype_down: torch.dtype,
    dtype_up: torch.dtype,
    dtype_bias: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """g^T x [r, K], dy^T a [N, r] and sum_m dy [N], each None where its inputs (or its dtype) are."""
    if x is None and dy is None:
        return None, None, None
    made = _wgrad if is_eager(x if x is not None else dy) else _wgrad_op  # type: ignore[arg-type]
    d_down, d_up, d_bias = made(x, g, dy, a, dtype_down, dtype_up, dtype_bias)
    return (
        None if x is None else d_down,
        None if a is None else d_up,
        None if dtype_bias is None else d_bias,
    )
