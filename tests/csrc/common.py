"""Who runs the tests of the Hopper kernels, their operands, and what a forward pass makes of them in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastlora.ops import support


def needs_hopper(op: str) -> list[pytest.MarkDecorator]:
    """Marks of a module whose tests want the cuda kernel of ``op``."""
    missing = None  # without a GPU the gpu marker skips, with its own reason
    if torch.cuda.is_available():
        missing = support.miss(op, "cuda", torch.device("cuda", 0), torch.bfloat16, 16)
    return [
        pytest.mark.gpu,
        pytest.mark.skipif(missing is not None, reason=f"not on this GPU: {missing}"),
    ]


def matrix(
    rows: int,
    cols: int,
    dtype: torch.dtype = torch.bfloat16,
    integers: bool = False,
    scale: float = 1.0,
    padded: bool = True,
) -> Tensor:
    """A matrix whose rows are 16-byte aligned; the padding is NaN and must not be read."""
    values = torch.randn(rows, cols, device="cuda") * scale
    if integers:
        values = torch.randint(-2, 3, (rows, cols), device="cuda").float()
    if not padded:
        return values.to(dtype)
    wide = torch.full((rows, (cols + 7) // 8 * 8 + 8), torch.nan, device="cuda", dtype=dtype)
    wide[:, :cols] = values.to(dtype)
    return wide[:, :cols]


def true_forward(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """y in fp64, of an h that was rounded to ``dtype``, and that h."""
    h = (scale * x.double() @ a.double().t()).to(dtype)
    y = x.double() @ w.double().t() + h.double() @ b.double().t()
    return (y if bias is None else y + bias.double()), h
