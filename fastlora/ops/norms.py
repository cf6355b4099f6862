"""``torch.ops.fastlora._row_norms``: the lengths of the rows of W + s B A, which DoRA divides by; no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from . import support
from .raw import backend_module

_library = torch.library.Library("fastlora", "FRAGMENT")
_library.define(
    "_row_norms(Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? scaling, float scale, "
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


def _fake(weight, lora_a, lora_b, scaling, scale, magnitude) -> Tensor:  # type: ignore[no-untyped-def]
    return weight.new_empty(weight.shape[0], dtype=torch.promote_types(weight.dtype, torch.float32))


_library.impl("_row_norms", _row_norms, "CompositeExplicitAutograd")
torch.library.register_fake("fastlora::_row_norms", _fake, lib=_library)
_row_norms_op = torch.ops.fastlora._row_norms.default


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
