"""``torch.ops.fastlora._quantize/_dequantize``: 4-bit weights to and from floats, by the backend that can.

A weight [N, K] is held as ``codes`` (uint8, two elements a byte), ``scales`` and a ``Form``. ``scales`` is (absmax,), or with
quantised scales (codes of absmax in uint8, nested_absmax, nested_code [256], offset [1]). Scales of fp32 may come as the
int32 with the same bits, in which layers keep them. Contracts as in reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _library, reference
from . import support
from .raw import backend_module
from .support import Form

_ops = torch.library.Library("fastlora", "FRAGMENT")
_ops.define("_quantize(Tensor weight, int block_size) -> (Tensor, Tensor)")
_ops.define(
    "_dequantize(Tensor codes, Tensor[] scales, SymInt rows, SymInt cols, int block_size, "
    "int nested_block_size, bool fp4, ScalarType dtype) -> Tensor"
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
    floats = [t.view(torch.float32) if t.dtype == torch.int32 else t for t in scales]
    name = support.choose("dequantize", codes.device, dtype, 0)
    form = Form(rows, cols, block_size, nested_block_size, fp4)
    out: Tensor = backend_module(name).dequantize(codes, floats, form, dtype)
    return out


def _fake_quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    n = weight.numel()
    codes = weight.new_empty((n + 1) // 2, dtype=torch.uint8)
    return codes, weight.new_empty(-(-n // block_size), dtype=torch.float32)


def _fake_dequantize(codes, scales, rows, cols, block_size, nested_block_size, fp4, dtype):  # type: ignore[no-untyped-def]
    return codes.new_empty(rows, cols, dtype=dtype)


for _name, _kernel, _fake in (
    ("_quantize", _quantize, _fake_quantize),
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


def quantize_scales(values: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """(codes uint8, absmax fp32 of each block) of scales less their offset; ``code`` [256] fp32, sorted."""
    if _library.load(values.device):
        return torch.ops.fastlora._nf4_quantize_scales(values.contiguous(), code, block_size)
    return reference.quantize_scales(values, code, block_size)
