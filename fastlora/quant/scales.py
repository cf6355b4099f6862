"""Quantised scales ("double quantisation", QLoRA section 3): absmax = code[q] * nested_absmax + offset."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import ops


@functools.cache
def dynamic_map() -> Tensor:
    """The 256 values of 8-bit scales, fp32, sorted: a sign, up to 7 bits of decimal exponent, the rest linear between
    0.1 and 1 (arXiv 1511.04561; as bitsandbytes' signed map)."""
    values = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        means = (bounds[:-1] + bounds[1:]) / 2
        sizes = (10.0 ** (exponent - 6) * means).tolist()
        values += sizes + [-size for size in sizes]
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


def quantize_scales(absmax: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """absmax fp32 -> (codes uint8, nested_absmax [ceil(n / block_size)], code [256], offset [1]), the last three fp32."""
    code = dynamic_map().to(absmax.device, copy=True)  # one of its own: it may be loaded into
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    codes, nested_absmax = ops.quantize_scales(absmax - offset, code, block_size)
    return codes, nested_absmax, code, offset.reshape(1)
