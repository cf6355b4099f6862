"""Who runs the tests of the Hopper kernels, their operands, and what a forward pass makes of them in fp64; 4-bit weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastlora import NF4Tensor
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


def exact_weight(n: int, k: int, block_size: int = 64) -> NF4Tensor:
    """-1, 0 and 1 times powers of two: no sum of these is rounded."""
    pick = torch.tensor([0x0, 0x7, 0xF], device="cuda")[
        torch.randint(0, 3, (n * k,), device="cuda")
    ]
    codes = (pick[0::2] * 16 + pick[1::2]).to(torch.uint8)
    absmax = 2.0 ** torch.randint(-1, 3, (n * k // block_size,), device="cuda")
    return NF4Tensor(codes, (absmax,), (n, k), torch.bfloat16, block_size)


def integers(*shape: int, dtype: torch.dtype = torch.bfloat16, limit: int = 3) -> Tensor:
    """Of -limit .. limit."""
    return torch.randint(-limit, limit + 1, shape, device="cuda").to(dtype)


def nf4_arguments(q: NF4Tensor, columns: int) -> tuple[object, ...]:
    """A 4-bit weight as the library's ops take it, whose result has ``columns``."""
    scales = [
        t.view(-1).view(torch.float32) if t.dtype == torch.int32 else t.view(-1) for t in q.scales
    ]
    nested = scales[1:] or (None, None, None)
    form = q.form
    sizes = columns, form.block_size, form.nested_block_size or 1, form.fp4
    return q.codes.view(-1), scales[0], *nested, *sizes
