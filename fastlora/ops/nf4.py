"""``torch.ops.fastlora._quantize/_dequantize/_nf4_linear``: 4-bit weights to and from floats, and a linear over one.

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
from . import cuda_backend, raw, support
from .linear import is_eager, lora_forward
from .raw import backend_module
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
    if reader is not None and reader.op == "nf4_gemm":
        rest = a, b, bias, scaling, scale, rng_state, keep
        return _gemm(reader, x, codes, floats, form, *rest)
    if reader is not None:
        return cuda_backend.nf4_few(x, codes, floats, form, a, b, bias, scaling, scale)
    w = dequantize(codes, scales, form, x.dtype)
    if a is None or b is None:
        return raw.gemm(x, w, None, None, bias), x.new_empty(0)
    return lora_forward(x, w, a, b, bias, scaling, scale, rng_state, keep)


class Reader(NamedTuple):
    """Who multiplies by the codes, and whether it makes h too."""

    op: str
    backend: str
    makes_h: bool


# Above, a weight in floats costs less than decoding it for every 16 to 64 rows again (to be measured: benchmarks/NOTES.md).
_MOST_TRITON_ROWS = 64


def triton_codes_fit(rows: int, form: Form) -> support.Fit:
    """How a product with ``rows`` rows suits fastlora/triton/nf4_linear.py."""
    if form.cols % 2:
        return support.Fit(f"needs an even K, whose rows begin with a byte, got {form.cols}")
    if rows > _MOST_TRITON_ROWS:
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

    def runs(op: str, backend: str) -> bool:
        return (
            wish in (None, backend)
            and support.miss(op, backend, x.device, x.dtype, rank) is None
            and (backend != "triton" or wish == "triton" or x.device.type != "cpu")
        )

    if runs("nf4_gemm", "cuda"):
        fit = cuda_backend.nf4_gemm_fit(x, codes, scales, form)
        # `down` has no cuda kernel: who asks for cuda gets the linear that is cuda throughout.
        whole = a is None or b is None or cuda_backend.nf4_makes_h(x, a, b, rng_state)
        if fit == support.Fit() and (whole or wish is None):
            return Reader("nf4_gemm", "cuda", whole)
    if runs("nf4_few", "cuda") and not cuda_backend.nf4_few_miss(x, codes, form, a, b, rng_state):
        return Reader("nf4_few", "cuda", True)
    if runs("nf4_gemm", "triton") and triton_codes_fit(x.shape[0], form) == support.Fit():
        return Reader("nf4_gemm", "triton", a is None or b is None)
    return None


def _gemm(
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
        return cuda_backend.nf4_gemm(x, *weight, a, b, None, bias, scaling, scale)
    h = None
    if a is not None and b is not None:
        h, _ = raw.down(x, a, scaling, scale, rng_state, keep, 0)
    if reader.backend == "triton":
        y = backend_module("triton").nf4_linear.forward(x, *weight, h, b, bias)
    else:
        assert b is not None
        b = b.to(x.dtype) if b.dtype != torch.float32 else b
        y, _ = cuda_backend.nf4_gemm(x, *weight, None, b.contiguous(), h, bias, None, 1.0)
    return y, x.new_empty(0) if h is None else h


def _fake_quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    n = weight.numel()
    codes = weight.new_empty((n + 1) // 2, dtype=torch.uint8)
    return codes, weight.new_empty(-(-n // block_size), dtype=torch.float32)


def _fake_dequantize(codes, scales, rows, cols, block_size, nested_block_size, fp4, dtype):  # type: ignore[no-untyped-def]
    return codes.new_empty(rows, cols, dtype=dtype)


def _fake_linear(x, codes, scales, rows, cols, block_size, nested_block_size, fp4, a, *rest):  # type: ignore[no-untyped-def]
    h = x.new_empty(0) if a is None else x.new_empty(x.shape[0], a.shape[0])
    return x.new_empty(x.shape[0], rows), h


for _name, _kernel, _fake in (
    ("_quantize", _quantize, _fake_quantize),
    ("_nf4_linear", _linear, _fake_linear),
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

    Up to a thousand rows take the codes as they are, where a kernel can; others a weight in floats, made for them.
    """
    if is_eager(x):
        return _linear(x, codes, scales, *form, a, b, bias, scaling, scale, rng_state, keep)
    run = torch.ops.fastlora._nf4_linear.default
    y, h = run(x, codes, scales, *form, a, b, bias, scaling, scale, rng_state, keep)
    return y, h


def quantize_scales(values: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """(codes uint8, absmax fp32 of each block) of scales less their offset; ``code`` [256] fp32, sorted."""
    if _library.load(values.device):
        return torch.ops.fastlora._nf4_quantize_scales(values.contiguous(), code, block_size)
    return reference.quantize_scales(values, code, block_size)
