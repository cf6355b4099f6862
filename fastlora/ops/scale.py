"""``torch.ops.fastlora._scale_columns/_scale_columns_backward``: y = rest + c * z with a factor per column, DoRA's and (IA)^3's.
``_scaled_gemm``: the same of a product's own tiles, y = bias + c * (x w^T + h l^T), which leaves no z for a backward.

Contracts as in reference.py; private, as the ops of raw.py are. An output that was not asked for comes back with shape [0].
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import switches
from . import support
from .raw import backend_module

_library = torch.library.Library("fastlora", "FRAGMENT")
_library.define("_scale_columns(Tensor z, Tensor magnitude, Tensor? norm, Tensor? rest) -> Tensor")
_library.define(
    "_scale_columns_backward(Tensor dy, Tensor? z, Tensor magnitude, Tensor? norm, bool need_z, bool need_sums) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(
    "_scaled_gemm(Tensor x, Tensor w, Tensor h, Tensor l, Tensor? bias, Tensor factor) -> Tensor"
)

# Below, a launch for the scale costs no more than Triton's product loses to the library's one-launch linear: as many rows the
# same, within 3 %; 8192 rows 5 % faster in one (H100, benchmarks/NOTES.md).
_FEWEST_SCALED_ROWS = 4096


def _forward(z: Tensor, magnitude: Tensor, norm: Tensor | None, rest: Tensor | None) -> Tensor:
    name = support.choose("scale_columns", z.device, z.dtype, 0)
    y: Tensor = backend_module(name).scale_columns(z, magnitude, norm, rest)
    return y


def _backward(
    dy: Tensor,
    z: Tensor | None,
    magnitude: Tensor,
    norm: Tensor | None,
    need_z: bool,
    need_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    name = support.choose("scale_columns_backward", dy.device, dy.dtype, 0)
    backend = backend_module(name)
    outputs = backend.scale_columns_backward(dy, z, magnitude, norm, need_z, need_sums)
    dz, d_magnitude, sums = (dy.new_empty(0) if out is None else out for out in outputs)
    return dz, d_magnitude, sums


def _scaled(
    x: Tensor, w: Tensor, h: Tensor, l: Tensor, bias: Tensor | None, factor: Tensor
) -> Tensor:
    name = support.choose("scaled_gemm", x.device, x.dtype, h.shape[1])
    y: Tensor = backend_module(name).scaled_gemm(x, w, h, l, bias, factor)
    return y


def scales_in_gemm(rows: int, like: Tensor, rank: int) -> bool:
    """Whether ``scaled_gemm`` is the fastest way to y, for ``rows`` rows of x's dtype and device."""
    wish = support.preference().name
    return (
        wish in (None, "triton")
        and not switches.off("one_launch")
        and like.dtype in (torch.bfloat16, torch.float16)
        and rows >= _FEWEST_SCALED_ROWS
        and (like.device.type == "cuda" or wish == "triton")
        and support.miss("scaled_gemm", "triton", like.device, like.dtype, rank) is None
    )


def _fake_forward(z, magnitude, norm, rest) -> Tensor:  # type: ignore[no-untyped-def]
    return z.new_empty(z.shape)


def _fake_backward(  # type: ignore[no-untyped-def]
    dy, z, magnitude, norm, need_z, need_sums
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(dy.dtype, torch.float32)
    return (
        dy.new_empty(dy.shape if need_z else 0),
        dy.new_empty(0) if z is None else magnitude.new_empty(dy.shape[1]),
        dy.new_empty(dy.shape[1], dtype=wide) if need_sums else dy.new_empty(0),
    )


def _fake_scaled(x, w, h, l, bias, factor) -> Tensor:  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], w.shape[0])


for _name, _kernel, _fake in (
    ("_scale_columns", _forward, _fake_forward),
    ("_scale_columns_backward", _backward, _fake_backward),
    ("_scaled_gemm", _scaled, _fake_scaled),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlora::{_name}", _fake, lib=_library)

_forward_op = torch.ops.fastlora._scale_columns.default
_scaled_op = torch.ops.fastlora._scaled_gemm.default
_backward_op = torch.ops.fastlora._scale_columns_backward.default


def scale_columns(
    z: Tensor, magnitude: Tensor, norm: Tensor | None = None, rest: Tensor | None = None
) -> Tensor:
    """y = rest + c * z [M, N] in z's dtype, rounded once: c = magnitude / norm, zero where the norm is, or without a norm
    magnitude [N]; rest [N] or [M, N]."""
    return _forward_op(z, magnitude, norm, rest)


def scale_columns_backward(
    dy: Tensor,
    z: Tensor | None,
    magnitude: Tensor,
    norm: Tensor | None,
    need_z: bool,
    need_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(c * dY [M, N], the gradient of ``magnitude`` [N], the sums of dY over rows [N], fp32 or fp64): of shape [0] what was
    not asked for, the second without z."""
    dz, d_magnitude, sums = _backward_op(dy, z, magnitude, norm, need_z, need_sums)
    return dz, d_magnitude, sums


def scaled_gemm(
    x: Tensor, w: Tensor, h: Tensor, l: Tensor, bias: Tensor | None, factor: Tensor
) -> Tensor:
    """y = bias + factor * (x w^T + h l^T): x [M, K], w [N, K] of any strides, h [M, r], l [N, r], bias [N], factor fp32 [N]."""
    return _scaled_op(x, w, h, l, bias, factor)
