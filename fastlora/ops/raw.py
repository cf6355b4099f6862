"""The raw ops ``torch.ops.fastlora._mask/_down/_gemm/_wgrad``: schema, fake kernel, call into the chosen backend.

Private: they have no autograd formula. The public path is ``fastlora.autograd``. Contracts as in reference.py;
``words`` is a dropout mask or None, and an output that was not asked for comes back with shape [0].
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from ..rng import KEEP_ALL, mask_shape
from . import cuda_backend, support

_library = torch.library.Library("fastlora", "FRAGMENT")
_library.define("_mask(Tensor rng_state, int rows, int cols, int keep) -> Tensor")
_library.define(
    "_down(Tensor x, Tensor l, Tensor? scaling, float scale, Tensor? rng_state, int keep, "
    "int emit_cols) -> (Tensor, Tensor)"
)
_library.define(
    "_gemm(Tensor x, Tensor w, Tensor? h, Tensor? l, Tensor? bias, Tensor? words) -> Tensor"
)
_library.define(
    "_wgrad(Tensor? x, Tensor? g, Tensor? dy, Tensor? h, Tensor? words, ScalarType dtype_a, "
    "ScalarType dtype_b, ScalarType? dtype_bias) -> (Tensor, Tensor, Tensor)"
)

_MODULES = {
    "cuda": "fastlora.ops.cuda_backend",
    "triton": "fastlora.triton",
    "torch": "fastlora.ops.torch_backend",
}


@functools.cache
def backend_module(name: str) -> ModuleType:
    """The module whose functions run a backend's ops; imported on first use."""
    return importlib.import_module(_MODULES[name])


def _backend(op: str, like: Tensor, rank: int) -> ModuleType:
    return backend_module(support.choose(op, like.device, like.dtype, rank))


def _mask(rng_state: Tensor, rows: int, cols: int, keep: int) -> Tensor:
    name = support.choose("mask", rng_state.device, torch.float32, 0)  # a mask fits any dtype
    return backend_module(name).mask(rng_state, rows, cols, keep)


def _down(
    x: Tensor,
    l: Tensor,
    scaling: Tensor | None,
    scale: float,
    rng_state: Tensor | None,
    keep: int,
    emit_cols: int,
) -> tuple[Tensor, Tensor]:
    module = _backend("down", x, l.shape[0])
    h, words = module.down(x, l, scaling, scale, rng_state, keep, emit_cols)
    return h, x.new_empty(0, dtype=torch.int32) if words is None else words


def _gemm(
    x: Tensor,
    w: Tensor,
    h: Tensor | None,
    l: Tensor | None,
    bias: Tensor | None,
    words: Tensor | None,
) -> Tensor:
    rank = 0 if h is None else h.shape[1]
    name = support.choose(
        "gemm", x.device, x.dtype, rank, lambda: cuda_backend.gemm_fit(x, w, h, l, words)
    )
    return backend_module(name).gemm(x, w, h, l, bias, words)


def _wgrad(
    x: Tensor | None,
    g: Tensor | None,
    dy: Tensor | None,
    h: Tensor | None,
    words: Tensor | None,
    dtype_a: torch.dtype,
    dtype_b: torch.dtype,
    dtype_bias: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    like = x if x is not None else dy
    assert like is not None
    skinny = g if g is not None else h
    module = _backend("wgrad", like, 0 if skinny is None else skinny.shape[1])
    outputs = module.wgrad(x, g, dy, h, words, dtype_a, dtype_b, dtype_bias)
    d_a, d_b, d_bias = (like.new_empty(0) if out is None else out for out in outputs)
    return d_a, d_b, d_bias


def _fake_mask(rng_state: Tensor, rows: int, cols: int, keep: int) -> Tensor:
    return rng_state.new_empty(mask_shape(rows, cols), dtype=torch.int32)


def _fake_down(
    x: Tensor,
    l: Tensor,
    scaling: Tensor | None,
    scale: float,
    rng_state: Tensor | None,
    keep: int,
    emit_cols: int,
) -> tuple[Tensor, Tensor]:
    h = x.new_empty(x.shape[0], l.shape[0])
    if rng_state is None or emit_cols == 0:
        return h, x.new_empty(0, dtype=torch.int32)
    return h, _fake_mask(rng_state, x.shape[0], emit_cols, keep)


def _fake_gemm(
    x: Tensor,
    w: Tensor,
    h: Tensor | None,
    l: Tensor | None,
    bias: Tensor | None,
    words: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[0])


def _fake_wgrad(
    x: Tensor | None,
    g: Tensor | None,
    dy: Tensor | None,
    h: Tensor | None,
    words: Tensor | None,
    dtype_a: torch.dtype,
    dtype_b: torch.dtype,
    dtype_bias: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    like = x if x is not None else dy
    assert like is not None
    d_a = d_b = d_bias = None
    if x is not None and g is not None:
        d_a = x.new_empty(g.shape[1], x.shape[1], dtype=dtype_a)
    if dy is not None and h is not None:
        d_b = dy.new_empty(dy.shape[1], h.shape[1], dtype=dtype_b)
    if dy is not None and dtype_bias is not None:
        d_bias = dy.new_empty(dy.shape[1], dtype=dtype_bias)
    d_a, d_b, d_bias = (like.new_empty(0) if out is None else out for out in (d_a, d_b, d_bias))
    return d_a, d_b, d_bias


for _name, _kernel, _fake in (
    ("_mask", _mask, _fake_mask),
    ("_down", _down, _fake_down),
    ("_gemm", _gemm, _fake_gemm),
    ("_wgrad", _wgrad, _fake_wgrad),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlora::{_name}", _fake, lib=_library)

_mask_op = torch.ops.fastlora._mask.default
_down_op = torch.ops.fastlora._down.default
_gemm_op = torch.ops.fastlora._gemm.default
_wgrad_op = torch.ops.fastlora._wgrad.default


def mask(rng_state: Tensor, rows: int, cols: int, keep: int) -> Tensor:
    """The dropout mask of ``fastlora.rng``, int32 words of ``rng.mask_shape``."""
    return _mask_op(rng_state, rows, cols, keep)


def down(
    x: Tensor,
    l: Tensor,
    scaling: Tensor | None = None,
    scale: float = 1.0,
    rng_state: Tensor | None = None,
    keep: int = KEEP_ALL,
    emit_cols: int = 0,
) -> tuple[Tensor, Tensor]:
    """h = scale * [scaling] * drop(x) l^T. x [M, K], l [r, K] (x's dtype or fp32, any strides) -> h [M, r], words.

    With a dropout state x is dropped on the way. With ``emit_cols`` too, x is taken whole, and the mask words of
    [M, emit_cols] come out beside h for the ops that follow (shape [0] otherwise): where a pass waits for memory,
    making them costs next to nothing.
    """
    h, words = _down_op(x, l, scaling, scale, rng_state, keep, emit_cols)
    return h, words


def gemm(
    x: Tensor,
    w: Tensor,
    h: Tensor | None = None,
    l: Tensor | None = None,
    bias: Tensor | None = None,
    words: Tensor | None = None,
) -> Tensor:
    """y = x w^T + bias + drop(h l^T). x [M, K], w [N, K], h [M, r], l [N, r], any strides -> [M, N]."""
    return _gemm_op(x, w, h, l, bias, words)


def wgrad(
    x: Tensor | None,
    g: Tensor | None,
    dy: Tensor | None,
    h: Tensor | None,
    words: Tensor | None,
    dtype_a: torch.dtype,
    dtype_b: torch.dtype,
    dtype_bias: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dA = g^T drop(x) [r, K], dB = dy^T h [N, r], dbias = sum_m dy [N]; shape [0] for what was not asked."""
    return _wgrad_op(x, g, dy, h, words, dtype_a, dtype_b, dtype_bias)
