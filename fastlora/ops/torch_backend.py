"""The ``torch`` backend: reference.py on the caller's dtype, counted. The op library makes masks where it is built."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import _library, reference
from .._autocast import autocast_dtype
from .._counters import count
from .cuda_backend import library_dequantize
from .support import Form


def mask(rng_state: Tensor, rows: int, cols: int, keep: int) -> Tensor:
    """``reference.mask``, two orders of magnitude faster where the op library is built for the device."""
    count("mask", "torch")
    if _library.load(rng_state.device):
        return torch.ops.fastlora._dropout_mask(rng_state, rows, cols, keep)
    return reference.mask(rng_state, rows, cols, keep)


def _autocast_off(like: Tensor) -> AbstractContextManager[object]:
    """The ops choose their own dtypes: an autocast around them must not cast reference.py's fp32 products."""
    if autocast_dtype(like.device) is None:
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)


def down(
    x: Tensor,
    l: Tensor,
    scaling: Tensor | None,
    scale: float,
    rng_state: Tensor | None,
    keep: int,
    emit_cols: int,
) -> tuple[Tensor, Tensor | None]:
    """``reference.down`` with the mask it needs, or beside the mask it is asked for."""
    words = None
    if rng_state is not None:
        words = mask(rng_state, x.shape[0], emit_cols or x.shape[1], keep)
    count("down", "torch")
    with _autocast_off(x):
        if emit_cols:
            return reference.down(x, l, scaling, scale), words
        return reference.down(x, l, scaling, scale, words), None


def gemm(x: Tensor, *rest: Any) -> Tensor:
    """``reference.gemm``."""
    count("gemm", "torch")
    with _autocast_off(x):
        return reference.gemm(x, *rest)


def wgrad(
    x: Tensor | None, g: Tensor | None, dy: Tensor | None, h: Tensor | None, *rest: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``reference.wgrad``."""
    count("wgrad", "torch")
    like = x if x is not None else dy
    assert like is not None
    with _autocast_off(like):
        return reference.wgrad(x, g, dy, h, *rest)


def segment_bounds(offsets: Tensor, rows: int) -> Tensor:
    """``reference.segment_bounds``."""
    count("segment_bounds", "torch")
    return reference.segment_bounds(offsets, rows)


def segment_down(
    x: Tensor,
    l: Tensor,
    bounds: Tensor,
    scalings: Tensor | None,
    scale: float,
    rng_state: Tensor | None,
    keep: int,
) -> Tensor:
    """``reference.segment_down`` with the mask it needs."""
    words = None if rng_state is None else mask(rng_state, x.shape[0], x.shape[1], keep)
    count("segment_down", "torch")
    with _autocast_off(x):
        return reference.segment_down(x, l, bounds, scalings, scale, words)


def segment_up(h: Tensor, *rest: Any) -> Tensor:
    """``reference.segment_up``."""
    count("segment_up", "torch")
    with _autocast_off(h):
        return reference.segment_up(h, *rest)


def segment_wgrad(*arguments: Any) -> tuple[Tensor | None, Tensor | None]:
    """``reference.segment_wgrad``."""
    count("segment_wgrad", "torch")
    with _autocast_off(arguments[4]):  # bounds, which are always given
        return reference.segment_wgrad(*arguments)


def quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """``reference.quantize_nf4``, by the op library where it is built for the device."""
    count("quantize", "torch")
    if _in_library(weight.device, weight.dtype):
        return torch.ops.fastlora._nf4_quantize(weight, block_size)
    return reference.quantize_nf4(weight, block_size)


def dequantize(codes: Tensor, scales: Sequence[Tensor], form: Form, dtype: torch.dtype) -> Tensor:
    """``reference.dequantize_nf4``, likewise."""
    count("dequantize", "torch")
    if _in_library(codes.device, dtype):
        return library_dequantize(codes, scales, form, dtype)
    absmax = scales[0]
    if form.nested_block_size:
        nested_absmax, code, offset = scales[1:]
        absmax = reference.dequantize_scales(
            absmax, nested_absmax, code, offset, form.nested_block_size
        )
    shape = form.rows, form.cols
    return reference.dequantize_nf4(codes, absmax, shape, form.block_size, dtype, form.fp4)


def _in_library(device: torch.device, dtype: torch.dtype) -> bool:
    return dtype != torch.float64 and _library.load(device)


def row_norms(weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
    """``reference.row_norms``."""
    count("row_norms", "torch")
    with _autocast_off(weight):
        return reference.row_norms(weight, *rest)


def nf4_row_norms(
    codes: Tensor, scales: Sequence[Tensor], form: Form, *rest: Any
) -> tuple[Tensor, Tensor | None]:
    """``reference.row_norms`` of the weight in fp32."""
    count("nf4_row_norms", "torch")
    with _autocast_off(codes):
        return reference.row_norms(dequantize(codes, scales, form, torch.float32), *rest)


def scaled_gemm(x: Tensor, *rest: Any) -> Tensor:
    """``reference.scaled_gemm``."""
    count("scaled_gemm", "torch")
    with _autocast_off(x), torch.no_grad():
        return reference.scaled_gemm(x, *rest)


def scale_columns(z: Tensor, *rest: Any) -> Tensor:
    """``reference.scale_columns``."""
    count("scale_columns", "torch")
    with _autocast_off(z), torch.no_grad():  # out= takes none, and an exported program keeps it on
        return reference.scale_columns(z, *rest)


def scale_columns_backward(dy: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    """``reference.scale_columns_backward``."""
    count("scale_columns_backward", "torch")
    with _autocast_off(dy):
        return reference.scale_columns_backward(dy, *rest)


def bottleneck_down(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
    """``reference.bottleneck_down``."""
    count("bottleneck_down", "torch")
    with _autocast_off(x):
        return reference.bottleneck_down(x, *rest)


def bottleneck_down_backward(dy: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
    """``reference.bottleneck_down_backward``."""
    count("bottleneck_down_backward", "torch")
    with _autocast_off(dy):
        return reference.bottleneck_down_backward(dy, *rest)


def bottleneck_up(h: Tensor, *rest: Any) -> Tensor:
    """``reference.bottleneck_up``."""
    count("bottleneck_up", "torch")
    with _autocast_off(h):
        return reference.bottleneck_up(h, *rest)


def bottleneck_wgrad(
    x: Tensor | None,
    g: Tensor | None,
    dy: Tensor | None,
    a: Tensor | None,
    dtype_down: torch.dtype,
    dtype_up: torch.dtype,
    dtype_bias: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``wgrad`` where g and a are no skinny matrices: products in the inputs' own dtype, as autograd has them."""
    count("wgrad", "torch")
    like = x if x is not None else dy
    assert like is not None
    d_down = d_up = d_bias = None
    with _autocast_off(like):
        if x is not None and g is not None:
            d_down = (g.t() @ x).to(dtype_down)
        if dy is not None and a is not None:
            d_up = (dy.t() @ a).to(dtype_up)
        if dy is not None and dtype_bias is not None:
            wide = torch.promote_types(dy.dtype, torch.float32)
            d_bias = dy.sum(0, dtype=wide).to(dtype_bias)
    return d_down, d_up, d_bias
