"""``torch.ops.fastlora._row_norms``: the lengths of the rows of W + s B A, which DoRA divides by; no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from . import support
from .raw import backend_module

_library = torch.library.Library("fastlora", "FRAGMENT")
_library.define(
    "_row_norms(Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? scaling, float scale, "
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
    backend = backend_module(name)
    norms, factors = backend.row_norms(weight, lora_a, lora_b, scaling, scale, magnitude)
    return norms, norms.new_empty(0) if factors is None else factors


def _fake(weight, lora_a, lora_b, scaling, scale, magnitude):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    norms = weight.new_empty(weight.shape[0], dtype=dtype)
    return norms, norms.new_empty(0) if magnitude is None else torch.empty_like(norms)


_library.impl("_row_norms", _row_norms, "CompositeExplicitAutograd")
torch.library.register_fake("fastlora::_row_norms", _fake, lib=_library)
_row_norms_op = torch.ops.fastlora._row_norms.default


def row_norms(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float | Tensor) -> Tensor:
    """||W_n + s B_n A|| of weight [N, K], A [r, K], B [N, r] and s, a float or a 0-d tensor: fp32 [N], fp64 over fp64."""
    return _run(weight, lora_a, lora_b, scaling, None)[0]


def column_factors(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float | Tensor, magnitude: Tensor
) -> tuple[Tensor, Tensor]:
    """``row_norms``, and what ``magnitude`` [N] is over them: zero where a norm is."""
    return _run(weight, lora_a, lora_b, scaling, magnitude)


def _run(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    magnitude: Tensor | None,
) -> tuple[Tensor, Tensor]:
    scale, on_device = (1.0, scaling) if isinstance(scaling, Tensor) else (scaling, None)
    with torch.no_grad():
        norms, factors = _row_norms_op(weight, lora_a, lora_b, on_device, scale, magnitude)
    return norms, factors
