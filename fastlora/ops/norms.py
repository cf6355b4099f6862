"""``torch.ops.fastlora._row_norms/_nf4_row_norms``: the lengths of the rows of W + s B A, which DoRA divides by; no gradient.

W is in floats, or in 4 bits as in nf4.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import support
from .nf4 import _floats
from .raw import backend_module
from .support import Form

_library = torch.library.Library("fastlora", "FRAGMENT")
_library.define(
    "_row_norms(Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? scaling, float scale, "
    "Tensor? magnitude) -> (Tensor, Tensor)"
)
_library.define(
    "_nf4_row_norms(Tensor codes, Tensor[] scales, SymInt rows, SymInt cols, int block_size, "
    "int nested_block_size, bool fp4, Tensor lora_a, Tensor lora_b, Tensor? scaling, float scale, "
    "Tensor? magnitude) -> (Tensor, Tensor)"
)


def _row_norms(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: Tensor | None,
    scale: float,
    magnitude: Tensor | None,
) -> tuple[Tensor, Tensor]:
    name = support.choose("row_norms", weight.device, weight.dtype, lora_a.shape[0])
    rest = lora_a, lora_b, scaling, scale, magnitude
    norms, factors = backend_module(name).row_norms(weight, *rest)
    return norms, norms.new_empty(0) if factors is None else factors


def _nf4_row_norms(
    codes: Tensor,
    scales: Sequence[Tensor],
    rows: int,
    cols: int,
    block_size: int,
    nested_block_size: int,
    fp4: bool,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: Tensor | None,
    scale: float,
    magnitude: Tensor | None,
) -> tuple[Tensor, Tensor]:
    name = support.choose("nf4_row_norms", codes.device, torch.float32, lora_a.shape[0])
    form = Form(rows, cols, block_size, nested_block_size, fp4)
    rest = lora_a, lora_b, scaling, scale, magnitude
    norms, factors = backend_module(name).nf4_row_norms(codes, _floats(scales), form, *rest)
    return norms, norms.new_empty(0) if factors is None else factors


def _fake(weight, lora_a, lora_b, scaling, scale, magnitude):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    norms = weight.new_empty(weight.shape[0], dtype=dtype)
    return norms, norms.new_empty(0) if magnitude is None else torch.empty_like(norms)


def _nf4_fake(codes, scales, rows, *rest):  # type: ignore[no-untyped-def]
    norms = codes.new_empty(rows, dtype=torch.float32)
    return norms, norms.new_empty(0) if rest[-1] is None else torch.empty_like(norms)


for _name, _kernel, _shapes in (
    ("_row_norms", _row_norms, _fake),
    ("_nf4_row_norms", _nf4_row_norms, _nf4_fake),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlora::{_name}", _shapes, lib=_library)


def row_norms(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    magnitude: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """||W_n + s B_n A|| of weight [N, K], A [r, K], B [N, r] and s, a float or a 0-d tensor: fp32 [N], fp64 over fp64. And
    what ``magnitude`` [N] is over them, zero where they are; without one of shape [0]."""
    _check(weight.shape, lora_a, lora_b, magnitude)
    op = torch.ops.fastlora._row_norms.default
    with torch.no_grad():
        norms, factors = op(weight, lora_a, lora_b, *_split(scaling), magnitude)
    return norms, factors


def nf4_row_norms(
    codes: Tensor,
    scales: Sequence[Tensor],
    form: Form,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    magnitude: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``row_norms`` of a 4-bit weight: what they are of ``dequantize`` in fp32, which Triton's kernel does not make."""
    _check(form[:2], lora_a, lora_b, magnitude)
    op = torch.ops.fastlora._nf4_row_norms.default
    with torch.no_grad():
        norms, factors = op(codes, scales, *form, lora_a, lora_b, *_split(scaling), magnitude)
    return norms, factors


def _split(scaling: float | Tensor) -> tuple[Tensor | None, float]:
    return (scaling, 1.0) if isinstance(scaling, Tensor) else (None, scaling)


def _check(weight: Sequence[int], lora_a: Tensor, lora_b: Tensor, magnitude: Tensor | None) -> None:
    """Kernels would read what lies behind the factors."""
    n, k = weight
    for name, tensor, shape in (
        ("lora_a", lora_a, (lora_a.shape[0], k)),
        ("lora_b", lora_b, (n, lora_a.shape[0])),
        ("magnitude", magnitude, (n,)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}; accepted is {list(shape)} beside a weight [{n}, {k}]"
            )
