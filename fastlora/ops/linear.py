"""``torch.ops.fastlora._lora_forward/_lora_backward``: a linear with everything low-rank around it, one op a direction.

    forward   h  = s drop(x) A^T             y  = x W^T + bias + h B^T
    backward  g  = s dY B                    dX = dY W + mask * (g A)
              dA = g^T drop(x)               dB = dY^T h                 dbias = sum_m dY

``_lora_scaled``: the forward without dropout and with a factor for every column, DoRA's: y = bias + c * z, z = x W^T + h B^T.

Where csrc/lora or csrc/few suits the problem it is one launch; else it is composed of the ops of raw.py. Private, as those are: the
public path is ``fastlora.autograd``. An output that was not asked for comes back with shape [0].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..rng import KEEP_ALL
from . import cuda_backend, raw, support
from .scale import scale_columns, scaled_gemm, scales_in_gemm

_library = torch.library.Library("fastlora", "FRAGMENT")
_library.define(
    "_lora_forward(Tensor x, Tensor w, Tensor a, Tensor b, Tensor? bias, Tensor? scaling, float scale, "
    "Tensor? rng_state, int keep) -> (Tensor, Tensor)"
)
_library.define(
    "_lora_scaled(Tensor x, Tensor w, Tensor a, Tensor b, Tensor? bias, Tensor? scaling, float scale, "
    "Tensor factor, bool with_z) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "_lora_backward(Tensor dy, Tensor? w, Tensor? a, Tensor? b, Tensor? x, Tensor? h, Tensor? scaling, "
    "float scale, Tensor? rng_state, int keep, SymInt in_features, ScalarType dtype_a, ScalarType dtype_b, "
    "ScalarType? dtype_bias) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _fuses(like: Tensor, rank: int, fit: Callable[[], support.Fit]) -> bool:
    return support.takes_whole("lora", like.device, like.dtype, rank, fit)


def is_eager(x: Tensor) -> bool:
    """Whether the choice can be made before the op is called, which saves a way through Python: x has data.

    On the meta device it has none: the op's fake gives the shapes, and nothing is made that a kernel would not make.
    """
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and not x.is_meta
        and not torch.compiler.is_compiling()
    )


def _makes_dx(
    dy: Tensor, w: Tensor | None, a: Tensor | None, b: Tensor | None, rng_state: Tensor | None
) -> bool:
    """Whether dX and g are one launch, though the gradients of the factors are another."""
    if w is None or a is None or b is None:
        return False
    return _fuses(dy, a.shape[0], lambda: cuda_backend.dx_fit(dy, w, a, b, rng_state))


def _forward(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scaling: Tensor | None,
    scale: float,
    rng_state: Tensor | None,
    keep: int,
) -> tuple[Tensor, Tensor]:
    if _fuses(x, a.shape[0], lambda: cuda_backend.lora_fit(x, w, a, b, rng_state)):
        return cuda_backend.lora_forward(x, w, a, b, bias, scaling, scale, rng_state, keep)
    h, _ = raw.down(x, a, scaling, scale, rng_state, keep, 0)
    return raw.gemm(x, w, h, b, bias), h


def _scaled(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scaling: Tensor | None,
    scale: float,
    factor: Tensor,
    with_z: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rank = a.shape[0]
    if _fuses(x, rank, lambda: cuda_backend.scaled_fit(x, w, a, b)):
        return cuda_backend.lora_scaled(x, w, a, b, bias, scaling, scale, factor, with_z)
    nothing = x.new_empty(0)
    if not with_z and scales_in_gemm(x.shape[0], x, rank):
        h, _ = raw.down(x, a, scaling, scale)
        return scaled_gemm(x, w, h, b, bias, factor), h, nothing
    z, h = lora_forward(x, w, a, b, None, scaling, scale, None, KEEP_ALL)
    return scale_columns(z, factor, None, bias), h, z if with_z else nothing


def _backward(
    dy: Tensor,
    w: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    x: Tensor | None,
    h: Tensor | None,
    scaling: Tensor | None,
    scale: float,
    rng_state: Tensor | None,
    keep: int,
    in_features: int,
    dtype_a: torch.dtype,
    dtype_b: torch.dtype,
    dtype_bias: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if w is not None and a is not None and b is not None:

        def fit() -> support.Fit:
            if h is None and dtype_bias is not None:
                return support.Fit("the bias' gradient rides on dB, which is not asked for")
            return cuda_backend.lora_fit(dy, w, a, b, rng_state, backward=True, h=h, saved_x=x)

        if _fuses(dy, a.shape[0], fit):
            return cuda_backend.lora_backward(
                dy, w, a, b, x, h, scaling, scale, dtype_bias, rng_state, keep
            )

    nothing = dy.new_empty(0)
    dx, g, words = nothing, None, None
    if _makes_dx(dy, w, a, b, rng_state):
        dx, g = cuda_backend.lora_dx(dy, w, a, b, scaling, scale)  # type: ignore[arg-type]
    else:
        if b is not None and (w is not None or x is not None):
            # The mask is made again, not saved: its words come with g, for dX and dA below.
            emit = in_features if rng_state is not None else 0
            g, made = raw.down(dy, b.t(), scaling, scale, rng_state, keep, emit)
            words = made if emit else None
        if w is not None:
            dx = raw.gemm(dy, w.t(), g, None if a is None else a.t(), None, words)
    d_a = d_b = d_bias = nothing
    if x is not None or h is not None or dtype_bias is not None:
        d_a, d_b, d_bias = raw.wgrad(
            x,
            None if x is None else g,
            dy if h is not None or dtype_bias is not None else None,
            h,
            words,
            dtype_a,
            dtype_b,
            dtype_bias,
        )
    return dx, d_a, d_b, d_bias


def _fake_forward(x, w, a, b, bias, scaling, scale, rng_state, keep):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], w.shape[0]), x.new_empty(x.shape[0], a.shape[0])


def _fake_scaled(x, w, a, b, bias, scaling, scale, factor, with_z):  # type: ignore[no-untyped-def]
    y, h = _fake_forward(x, w, a, b, bias, scaling, scale, None, KEEP_ALL)
    return y, h, torch.empty_like(y) if with_z else x.new_empty(0)


def _fake_backward(  # type: ignore[no-untyped-def]
    dy, w, a, b, x, h, scaling, scale, rng_state, keep, in_features, dtype_a, dtype_b, dtype_bias
):
    n = dy.shape[1]
    nothing = dy.new_empty(0)
    return (
        nothing if w is None else dy.new_empty(dy.shape[0], in_features),
        nothing if x is None else dy.new_empty(b.shape[1], in_features, dtype=dtype_a),
        nothing if h is None else dy.new_empty(n, h.shape[1], dtype=dtype_b),
        nothing if dtype_bias is None else dy.new_empty(n, dtype=dtype_bias),
    )


for _name, _kernel, _fake in (
    ("_lora_forward", _forward, _fake_forward),
    ("_lora_scaled", _scaled, _fake_scaled),
    ("_lora_backward", _backward, _fake_backward),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlora::{_name}", _fake, lib=_library)

_forward_op = torch.ops.fastlora._lora_forward.default
_scaled_op = torch.ops.fastlora._lora_scaled.default
_backward_op = torch.ops.fastlora._lora_backward.default


def lora_forward(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scaling: Tensor | None,
    scale: float,
    rng_state: Tensor | None,
    keep: int,
) -> tuple[Tensor, Tensor]:
    """(y [M, N], h [M, r]) of x [M, K], w [N, K], a [r, K], b [N, r] (these in x's dtype or fp32), bias [N]."""
    if is_eager(x):
        return _forward(x, w, a, b, bias, scaling, scale, rng_state, keep)
    y, h = _forward_op(x, w, a, b, bias, scaling, scale, rng_state, keep)
    return y, h


def lora_scaled(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scaling: Tensor | None,
    scale: float,
    factor: Tensor,
    with_z: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y = bias + factor * z [M, N], h [M, r], z = x w^T + h b^T [M, N]) as ``lora_forward`` without dropout; ``factor`` fp32 or
    fp64 [N]; z has shape [0] where it is not asked for."""
    run = _scaled if is_eager(x) else _scaled_op
    y, h, z = run(x, w, a, b, bias, scaling, scale, factor, with_z)
    return y, h, z


def lora_backward(
    dy: Tensor,
    w: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    x: Tensor | None,
    h: Tensor | None,
    scaling: Tensor | None,
    scale: float,
    rng_state: Tensor | None,
    keep: int,
    in_features: int,
    dtype_a: torch.dtype,
    dtype_b: torch.dtype,
    dtype_bias: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dX where w is given, dA where x is, dB where h is, dbias where it has a dtype), shape [0] for the others.

    dX takes a and b, dA takes b; without them there is no low-rank part.
    """
    if is_eager(dy):
        return _backward(
            dy, w, a, b, x, h, scaling, scale, rng_state, keep, in_features, dtype_a, dtype_b, dtype_bias
        )  # fmt: skip
    dx, d_a, d_b, d_bias = _backward_op(
        dy, w, a, b, x, h, scaling, scale, rng_state, keep, in_features, dtype_a, dtype_b, dtype_bias
    )  # fmt: skip
    return dx, d_a, d_b, d_bias
