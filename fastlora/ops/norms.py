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
    "Tensor? magnitude) -> Tensor"
)
_library.define(
    "_nf4_row_norms(Tensor codes, Tensor[] scales, SymInt rows, SymInt cols, int block_size, "
    "int nested_block_size, bool fp4, Tensor lora_a, Tensor lora_b, Tensor? scaling, float scale, "
    "Tensor? magnitude) -> Tensor"
)


def _row_norms(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: Tensor | None,
    scale: float,
    magnitude: Tensor | None,
) -> Tensor:
    name = support.choose("row_norms", weight.device, weight.dtype, lora_a.shape[0])
    norms: Tensor = backend_module(name).row_norms(
        weight, lora_a, lora_b, scaling, scale, magnitude
    )
    return norms


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
) -> Tensor:
    name = support.choose("nf4_row_norms", codes.device, torch.float32, lora_a.shape[0])
    form = Form(rows, cols, block_size, nested_block_size, fp4)
    norms: Tensor = backend_module(name).nf4_row_norms(
        codes, _floats(scales), form, lora_a, lora_b, scaling, scale, magnitude
    )
    return norms


def _fake(weight, lora_a, lora_b, scaling, scale, magnitude) -> Tensor:  # type: ignore[no-untyped-def]
    return weight.new_empty(weight.shape[0], dtype=torch.promote_types(weight.dtype, torch.float32))


def _nf4_fake(codes, scales, rows, *rest) -> Tensor:  # type: ignore[no-untyped-def]
    return codes.new_empty(rows, dtype=torch.float32)


for _name, _kernel, _shapes in (
    ("_row_norms", _row_norms, _fake),
    ("_nf4_row_norms", _nf4_row_norms, _nf4_fake),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlora::{_name}", _shapes, lib=_library)
_row_norms_op = torch.ops.fastlora._row_norms.default
_nf4_row_norms_op = torch.ops.fastlora._nf4_row_norms.default


def row_norms(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    magnitude: Tensor | None = None,
) -> Tensor:
    """||W_n + s B_n A|| of weight [N, K], A [r, K], B [N, r] and s, a float or a 0-d tensor: fp32 [N], fp64 over fp64. With
    ``magnitude`` [N] what it is over that, zero where that is."""
    with torch.no_grad():
        if isinstance(scaling, Tensor):
            return _row_norms_op(weight, lora_a, lora_b, scaling, 1.0, magnitude)
        return _row_norms_op(weight, lora_a, lora_b, None, scaling, magnitude)


def nf4_row_norms(
    codes: Tensor,
    scales: Sequence[Tensor],
    form: Form,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    magnitude: Tensor | None = None,
) -> Tensor:
    """``row_norms`` of a 4-bit weight: what it is of ``dequantize`` in fp32, which Triton's kernel does not make. fp32 [N]."""
    weight = codes, scales, *form
    with torch.no_grad():
        if isinstance(scaling, Tensor):
            return _nf4_row_norms_op(*weight, lora_a, lora_b, scaling, 1.0, magnitude)
        return _nf4_row_norms_op(*weight, lora_a, lora_b, None, scaling, magnitude)
