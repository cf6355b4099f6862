"""``torch.ops.fastlora._quantize/_dequantize/_nf4_linear/_nf4_backward``: 4-bit weights to and from floats, and a linear over one.

A weight [N, K] is held as ``codes`` (uint8, two elements a byte), ``scales`` and a ``Form``. ``scales`` is (absmax,), or with
quantised scales (codes of absmax in uint8, nested_absmax, nested_code [256], offset [1]). Scales of fp32 may come as the
int32 with the same bits, in which layers keep them. Contracts as in reference.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _library, reference
from ..rng import KEEP_ALL
from . import cuda_backend, raw, support
from .linear import _fake_backward as _fake_lora_backward
from .linear import is_eager, lora_backward, lora_forward, lora_scaled
from .raw import backend_module
from .scale import scale_columns
from .support import Form

_ops = torch.library.Library("fastlora", "FRAGMENT")
_ops.define("_quantize(Tensor weight, int block_size) -> (Tensor, Tensor)")
_ops.define(
    "_dequantize(Tensor codes, Tensor[] scales, SymInt rows, SymInt cols, int block_size, "
    "int nested_block_size, bool fp4, ScalarType dtype) -> Tensor"
)
_ops.define(
    "_nf4_linear(Tensor x, Tensor codes, Tensor[] scales, SymInt rows, SymInt cols, int block_size, "
    "int nested_block_size, bool fp4, Tensor? a, Tensor? b, Tensor? bias, Tensor? scaling, float scale, "
    "Tensor? rng_state, int keep) -> (Tensor, Tensor)"
)
_ops.define(
    "_nf4_scaled(Tensor x, Tensor codes, Tensor[] scales, SymInt rows, SymInt cols, int block_size, "
    "int nested_block_size, bool fp4, Tensor a, Tensor b, Tensor? bias, Tensor? scaling, float scale, Tensor factor, "
    "bool with_z) -> (Tensor, Tensor, Tensor)"
)
_ops.define(
    "_nf4_backward(Tensor dy, Tensor? codes, Tensor[] scales, SymInt rows, SymInt cols, int block_size, "
    "int nested_block_size, bool fp4, Tensor? a, Tensor? b, Tensor? x, Tensor? h, Tensor? scaling, float scale, "
    "Tensor? rng_state, int keep, ScalarType dtype_a, ScalarType dtype_b, ScalarType? dtype_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def _quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    name = support.choose("quantize", weight.device, weight.dtype, 0)
    codes, absmax = backend_module(name).quantize(weight.contiguous(), block_size)
    return codes, absmax


def _dequantize(
    codes: Tensor,
    scales: Sequence[Tensor],
    rows: int,
    cols: int,
    block_size: int,
    nested_block_size: int,
    fp4: bool,
    dtype: torch.dtype,
) -> Tensor:
    floats = _floats(scales)
    name = support.choose("dequantize", codes.device, dtype, 0)
    form = Form(rows, cols, block_size, nested_block_size, fp4)
    out: Tensor = backend_module(name).dequantize(codes, floats, form, dtype)
    return out


def _floats(scales: Sequence[Tensor]) -> list[Tensor]:
    return [t.view(torch.float32) if t.dtype == torch.int32 else t for t in scales]


def _linear(
    x: Tensor,
    codes: Tensor,
    scales: Sequence[Tensor],
    rows: int,
    cols: int,
    block_size: int,
    nested_block_size: int,
    fp4: bool,
    a: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None,
    scaling: Tensor | None,
    scale: float,
    rng_state: Tensor | None,
    keep: int,
) -> tuple[Tensor, Tensor]:
    form = Form(rows, cols, block_size, nested_block_size, fp4)
    floats = _floats(scales)
    reader = reads_codes(x, codes, floats, form, a, b, rng_state)
    if reader is not None:
        rest = a, b, bias, scaling, scale, rng_state, keep
        return _over_codes(reader, x, codes, floats, form, *rest)
    w = dequantize(codes, scales, form, x.dtype)
    if a is None or b is None:
        return raw.gemm(x, w, None, None, bias), x.new_empty(0)
    return lora_forward(x, w, a, b, bias, scaling, scale, rng_state, keep)


def _scaled(
    x: Tensor,
    codes: Tensor,
    scales: Sequence[Tensor],
    rows: int,
    cols: int,
    block_size: int,
    nested_block_size: int,
    fp4: bool,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scaling: Tensor | None,
    scale: float,
    factor: Tensor,
    with_z: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    form = Form(rows, cols, block_size, nested_block_size, fp4)
    floats = _floats(scales)
    reader = reads_codes(x, codes, floats, form, a, b, None)
    if reader is None:
        w = dequantize(codes, scales, form, x.dtype)
        return lora_scaled(x, w, a, b, bias, scaling, scale, factor, with_z)
    rest = a, b, None, scaling, scale, None, KEEP_ALL
    z, h = _over_codes(reader, x, codes, floats, form, *rest)
    return scale_columns(z, factor, None, bias), h, z if with_z else x.new_empty(0)


class Reader(NamedTuple):
    """Who multiplies by the codes, and whether it makes h too."""

    op: str
    backend: str
    makes_h: bool


# Above, a weight in floats costs as much as decoding it again for every 64 rows, or 128 (benchmarks/NOTES.md).
_MOST_TRITON_ROWS = {"nf4_gemm": 128, "nf4_dx": 64}


def triton_codes_fit(op: str, rows: int, form: Form) -> support.Fit:
    """How a product with ``rows`` rows suits fastlora/triton/nf4_linear.py."""
    if form.cols % 2:
        return support.Fit(f"needs an even K, whose rows begin with a byte, got {form.cols}")
    if rows > _MOST_TRITON_ROWS[op]:
        return support.Fit(None, f"{rows} rows are for a weight in floats")
    group = math.gcd(form.cols, form.block_size)
    if group < 32:
        return support.Fit(None, f"every {group} elements another scale: for a weight in floats")
    return support.Fit()


def reads_codes(
    x: Tensor,
    codes: Tensor,
    scales: Sequence[Tensor],
    form: Form,
    a: Tensor | None,
    b: Tensor | None,
    rng_state: Tensor | None,
) -> Reader | None:
    """Who multiplies by the codes as they lie; None where a weight in floats is made for forward."""
    wish = support.preference().name
    rank = 0 if a is None else a.shape[0]

    # `down` has no cuda kernel: who asks for cuda gets the linear that is cuda throughout.
    whole = a is None or b is None or cuda_backend.nf4_makes_h(x, a, b, rng_state)
    spare = None
    for op, fit in (
        ("nf4_few", lambda: cuda_backend.nf4_few_fit(x, codes, form)),
        ("nf4_gemm", lambda: cuda_backend.nf4_gemm_fit(x, codes, scales, form)),
    ):
        if wish not in (None, "cuda") or not (whole or wish is None):
            break
        if support.miss(op, "cuda", x.device, x.dtype, rank) is not None:
            continue
        suits = fit()
        if suits == support.Fit():
            return Reader(op, "cuda", whole)
        if suits.miss is None and op == "nf4_few":
            spare = Reader(op, "cuda", whole)  # slower than another kernel, not than floats
    if spare is None and _triton_reads("nf4_gemm", x, form, rank):
        return Reader("nf4_gemm", "triton", a is None or b is None)
    return spare


def _triton_reads(op: str, x: Tensor, form: Form, rank: int) -> bool:
    """Whether fastlora/triton/nf4_linear.py multiplies by the codes now."""
    wish = support.preference().name
    return (
        (wish == "triton" or (wish is None and x.device.type != "cpu"))
        and support.miss(op, "triton", x.device, x.dtype, rank) is None
        and triton_codes_fit(op, x.shape[0], form) == support.Fit()
    )


def _over_codes(
    reader: Reader,
    x: Tensor,
    codes: Tensor,
    scales: list[Tensor],
    form: Form,
    a: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None,
    scaling: Tensor | None,
    scale: float,
    rng_state: Tensor | None,
    keep: int,
) -> tuple[Tensor, Tensor]:
    weight = codes, scales, form
    if reader.backend == "cuda" and reader.makes_h:
        return cuda_backend.nf4_linear(reader.op, x, *weight, a, b, None, bias, scaling, scale)
    h = None
    if a is not None and b is not None:
        h, _ = raw.down(x, a, scaling, scale, rng_state, keep, 0)
    if reader.backend == "triton":
        y = backend_module("triton").nf4_linear.forward(x, *weight, h, b, bias)
    else:
        assert b is not None
        b = b.to(x.dtype) if b.dtype != torch.float32 else b
        y, _ = cuda_backend.nf4_linear(reader.op, x, *weight, None, b.contiguous(), h, bias, None, 1.0)  # fmt: skip
    return y, x.new_empty(0) if h is None else h


def _backward(
    dy: Tensor,
    codes: Tensor | None,
    scales: Sequence[Tensor],
    rows: int,
    cols: int,
    block_size: int,
    nested_block_size: int,
    fp4: bool,
    a: Tensor | None,
    b: Tensor | None,
    x: Tensor | None,
    h: Tensor | None,
    scaling: Tensor | None,
    scale: float,
    rng_state: Tensor | None,
    keep: int,
    dtype_a: torch.dtype,
    dtype_b: torch.dtype,
    dtype_bias: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    form = Form(rows, cols, block_size, nested_block_size, fp4)
    backend = None if codes is None else dx_reads_codes(dy, codes, form, a, rng_state)
    if codes is None or backend is None:
        w = None if codes is None else dequantize(codes, scales, form, dy.dtype)
        return lora_backward(
            dy, w, a, b, x, h, scaling, scale, rng_state, keep, cols, dtype_a, dtype_b, dtype_bias
        )
    g = None
    if a is not None and b is not None:
        g, _ = raw.down(dy, b.t(), scaling, scale)
    dx = backend_module(backend).nf4_dx(dy, codes, _floats(scales), form, g, a)
    if x is None and h is None and dtype_bias is None:
        nothing = dy.new_empty(0)
        return dx, nothing, nothing, nothing
    for_b = dy if h is not None or dtype_bias is not None else None
    for_a = None if x is None else g
    return dx, *raw.wgrad(x, for_a, for_b, h, None, dtype_a, dtype_b, dtype_bias)


def dx_reads_codes(
    dy: Tensor, codes: Tensor, form: Form, a: Tensor | None, rng_state: Tensor | None
) -> str | None:
    """The backend whose ``nf4_dx`` multiplies by the codes as they lie; None where a weight in floats is made for dX."""
    wish = support.preference().name
    rank = 0 if a is None else a.shape[0]
    if wish in (None, "cuda") and not support.miss("nf4_dx", "cuda", dy.device, dy.dtype, rank):
        # g, dA and dB have no cuda kernels: who asks for cuda gets backward that is cuda throughout.
        throughout = wish is None or a is None
        if throughout and cuda_backend.nf4_dx_fit(dy, codes, form, rng_state) == support.Fit():
            return "cuda"
    if rng_state is None and _triton_reads("nf4_dx", dy, form, rank):
        return "triton"
    return None


def takes_codes(x: Tensor, codes: Tensor, scales: Sequence[Tensor], form: Form, dx: bool) -> bool:
    """Whether ``product`` would multiply by the codes as they lie now, and make no weight in floats."""
    if dx:
        return dx_reads_codes(x, codes, form, None, None) is not None
    return reads_codes(x, codes, _floats(scales), form, None, None, None) is not None


def product(
    x: Tensor, codes: Tensor, scales: Sequence[Tensor], form: Form, bias: Tensor | None, dx: bool
) -> Tensor:
    """x W^T + bias, or with ``dx`` x W: a 4-bit weight without an update."""
    if dx:
        rest = None, None, None, None, None, 1.0, None, KEEP_ALL, x.dtype, x.dtype, None
        return nf4_backward(x, codes, scales, form, *rest)[0]
    return nf4_linear(x, codes, scales, form, None, None, bias, None, 1.0, None, KEEP_ALL)[0]


def _fake_quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    n = weight.numel()
    codes = weight.new_empty((n + 1) // 2, dtype=torch.uint8)
    return codes, weight.new_empty(-(-n // block_size), dtype=torch.float32)


def _fake_dequantize(codes, scales, rows, cols, block_size, nested_block_size, fp4, dtype):  # type: ignore[no-untyped-def]
    return codes.new_empty(rows, cols, dtype=dtype)


def _fake_linear(x, codes, scales, rows, cols, block_size, nested_block_size, fp4, a, *rest):  # type: ignore[no-untyped-def]
    h = x.new_empty(0) if a is None else x.new_empty(x.shape[0], a.shape[0])
    return x.new_empty(x.shape[0], rows), h


def _fake_scaled(x, codes, scales, rows, cols, block_size, nested_block_size, fp4, a, *rest):  # type: ignore[no-untyped-def]
    y, h = x.new_empty(x.shape[0], rows), x.new_empty(x.shape[0], a.shape[0])
    return y, h, torch.empty_like(y) if rest[-1] else x.new_empty(0)


def _fake_backward(  # type: ignore[no-untyped-def]
    dy, codes, scales, rows, cols, block_size, nested_block_size, fp4, a, b, x, h, scaling, scale, rng_state, keep, *dtypes
):  # fmt: skip
    return _fake_lora_backward(
        dy, codes, a, b, x, h, scaling, scale, rng_state, keep, cols, *dtypes
    )


for _name, _kernel, _fake in (
    ("_quantize", _quantize, _fake_quantize),
    ("_nf4_linear", _linear, _fake_linear),
    ("_nf4_scaled", _scaled, _fake_scaled),
    ("_nf4_backward", _backward, _fake_backward),
    ("_dequantize", _dequantize, _fake_dequantize),
):
    _ops.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlora::{_name}", _fake, lib=_ops)


def quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """NF4 codes uint8 [ceil(N K / 2)] and absmax fp32 [ceil(N K / block_size)] of a weight [N, K]."""
    return torch.ops.fastlora._quantize.default(weight, block_size)


def dequantize(codes: Tensor, scales: Sequence[Tensor], form: Form, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in ``dtype``: value[code] * absmax in fp32, rounded once."""
    return torch.ops.fastlora._dequantize.default(codes, scales, *form, dtype)


def nf4_linear(
    x: Tensor,
    codes: Tensor,
    scales: Sequence[Tensor],
    form: Form,
    a: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None,
    scaling: Tensor | None,
    scale: float,
    rng_state: Tensor | None,
    keep: int,
) -> tuple[Tensor, Tensor]:
    """``lora_forward`` over a 4-bit weight: (y [M, N], h [M, r]); without factors h has shape [0].

    Up to one or two thousand rows take the codes as they are, where a kernel can; others a weight in floats, made for them.
    """
    if is_eager(x):
        return _linear(x, codes, scales, *form, a, b, bias, scaling, scale, rng_state, keep)
    run = torch.ops.fastlora._nf4_linear.default
    y, h = run(x, codes, scales, *form, a, b, bias, scaling, scale, rng_state, keep)
    return y, h


def nf4_scaled(
    x: Tensor,
    codes: Tensor,
    scales: Sequence[Tensor],
    form: Form,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scaling: Tensor | None,
    scale: float,
    factor: Tensor,
    with_z: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``lora_scaled`` over a 4-bit weight: (y, h, z). Where kernels multiply by the codes the scale is a pass of its own."""
    run = _scaled if is_eager(x) else torch.ops.fastlora._nf4_scaled.default
    y, h, z = run(x, codes, scales, *form, a, b, bias, scaling, scale, factor, with_z)
    return y, h, z


def nf4_backward(
    dy: Tensor,
    codes: Tensor | None,
    scales: Sequence[Tensor],
    form: Form,
    a: Tensor | None,
    b: Tensor | None,
    x: Tensor | None,
    h: Tensor | None,
    scaling: Tensor | None,
    scale: float,
    rng_state: Tensor | None,
    keep: int,
    dtype_a: torch.dtype,
    dtype_b: torch.dtype,
    dtype_bias: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``lora_backward`` over a 4-bit weight: dX where codes are given, which takes a and b or neither.

    dX of up to a thousand rows without dropout takes the codes as they are, where a kernel can; else a weight in floats.
    """
    if is_eager(dy):
        return _backward(
            dy, codes, scales, *form, a, b, x, h, scaling, scale, rng_state, keep, dtype_a, dtype_b, dtype_bias
        )  # fmt: skip
    run = torch.ops.fastlora._nf4_backward.default
    dx, d_a, d_b, d_bias = run(
        dy, codes, scales, *form, a, b, x, h, scaling, scale, rng_state, keep, dtype_a, dtype_b, dtype_bias
    )  # fmt: skip
    return dx, d_a, d_b, d_bias


def quantize_scales(values: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """(codes uint8, absmax fp32 of each block) of scales less their offset; ``code`` [256] fp32, sorted."""
    if _library.load(values.device):
        return torch.ops.fastlora._nf4_quantize_scales(values.contiguous(), code, block_size)
    return reference.quantize_scales(values, code, block_size)
