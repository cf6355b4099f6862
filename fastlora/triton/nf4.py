"""quantize: NF4 codes and absmax of a weight. dequantize: a 4-bit weight in floats, quantised scales resolved on the way.

    quantize    absmax = max |w| of a block,  code = how many bounds w / absmax exceeds
    dequantize  w = round(value[code] * absmax)

Both are bound by memory: a program takes a run of elements, whatever the weight's shape. The 16 values and 15 bounds are
read through the L1 cache.

Kernels that need W by tiles (nf4_linear.py, norms.py) decode them themselves: a byte's halves are neighbours in a row, and
their values come from 16 in shared memory (all in banks of their own, so that no lookup waits for another; pairs would).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .._counters import count
from ..ops.support import Form
from . import launch

_ELEMENTS = 2048  # of a program


@triton.jit
def _product(a, b, ROUND: tl.constexpr):
    """a * b, rounded before anything is added to it. (The interpreter has no assembly, and no fma either.)"""
    if ROUND:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    return a * b


@triton.jit
def scale_of(held, outer, nested_code, offset, NESTED: tl.constexpr, ROUND: tl.constexpr):
    """The fp32 scales of blocks from what is held for them: themselves, or codes and the scales of those."""
    if NESTED > 0:
        scale = tl.load(nested_code + held.to(tl.int32))
        return _product(scale, outer, ROUND) + tl.load(offset)
    else:
        return held


@triton.jit
def _dequantize_kernel(
    out, codes, values, absmax, nested_absmax, nested_code, offset, n, BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr, BYTES: tl.constexpr, ROUND: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    launch.enter_chain(CHAIN)
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    there = byte * 2 < n
    packed = tl.load(codes + byte, mask=there, other=0).to(tl.int32)
    block = byte * 2 // BLOCK_SIZE
    held = tl.load(absmax + block, mask=there, other=0)
    outer = tl.load(nested_absmax + block // NESTED, mask=there, other=0) if NESTED > 0 else held
    scale = scale_of(held, outer, nested_code, offset, NESTED, ROUND)
    high = tl.load(values + (packed >> 4)) * scale
    low = tl.load(values + (packed & 15)) * scale
    element = tl.program_id(0).to(tl.int64) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    made = tl.interleave(high, low).to(out.dtype.element_ty)
    tl.store(out + element, made, mask=element < n)


@triton.jit
def load_codes(
    codes, row0, col0, N, pitch,
    ROWS: tl.constexpr, COLS: tl.constexpr, ODD: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The bytes of a [ROWS, COLS] tile of W, whose rows are 2 * pitch elements long, and one more if ODD: every other row then
    begins with the low half of a byte, and a byte of the tile is made of the halves of two."""
    n = row0 + tl.arange(0, ROWS)
    byte = col0 // 2 + tl.arange(0, COLS // 2)
    here = codes + n.to(tl.int64)[:, None] * pitch + byte[None, :]
    if EVEN:
        return tl.load(here)
    there = (n < N)[:, None] & (byte < pitch)[None, :]
    if ODD:
        here += (n // 2)[:, None]
        first = tl.load(here, mask=(n < N)[:, None] & (byte <= pitch)[None, :], other=0)
        split = (n % 2 == 1)[:, None]
        second = tl.load(here + 1, mask=there & split, other=0)
        return tl.where(split, (first << 4) | (second >> 4), first)
    return tl.load(here, mask=there, other=0)


@triton.jit
def load_scales(
    absmax, nested_absmax, row0, col0, N, K,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """What is held for the scales of a tile's groups, zero past the edges: codes and their blocks' scales if NESTED."""
    n = row0 + tl.arange(0, ROWS)
    col = col0 + tl.arange(0, GROUPS) * GROUP
    block = (n.to(tl.int64)[:, None] * K + col[None, :]) // BLOCK_SIZE
    there = (n < N)[:, None] & (col < K)[None, :]
    held = tl.load(absmax + block, mask=there, other=0)
    if NESTED > 0:
        return held, tl.load(nested_absmax + block // NESTED, mask=there, other=0)
    else:
        return held, held


@triton.jit
def _quantize_kernel(
    codes, absmax, weight, bounds, n, BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    launch.enter_chain(CHAIN)
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    w = tl.load(weight + element, mask=element < n, other=0).to(tl.float32)
    largest = tl.max(tl.where(w != w, 0.0, tl.abs(w)), axis=1)  # NaN takes no part
    tl.store(absmax + block, largest, mask=block * BLOCK_SIZE < n)
    divisor = tl.maximum(largest, 1e-38).to(tl.float32)
    inverse = tl.math.div_rn(tl.full((BLOCKS,), 1.0, tl.float32), divisor)
    scaled = w * inverse[:, None]
    code = tl.zeros((BLOCKS, BLOCK_SIZE), tl.int32)
    for i in tl.static_range(15):
        code += (scaled > tl.load(bounds + i)).to(tl.int32)
    high, low = tl.split(tl.reshape(code, (BLOCKS, BLOCK_SIZE // 2, 2)))
    byte = block[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    tl.store(codes + byte, (high * 16 + low).to(tl.uint8), mask=byte * 2 < n)


@functools.cache
def values(device: torch.device, fp4: bool) -> Tensor:
    """The values of the 16 codes, fp32, on ``device``."""
    return reference.code_values(fp4).to(device)


@functools.cache
def _bounds(device: torch.device) -> Tensor:
    return torch.tensor(reference.NF4_THRESHOLD, dtype=torch.float32, device=device)


def quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """``reference.quantize_nf4`` on Triton; ``weight`` is contiguous."""
    n = weight.numel()
    codes = torch.empty(launch.cdiv(n, 2), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(launch.cdiv(n, block_size), dtype=torch.float32, device=weight.device)
    count("quantize", "triton")
    if n == 0:
        return codes, absmax
    blocks = max(1, _ELEMENTS // block_size)
    grid = (launch.cdiv(absmax.numel(), blocks),)
    arguments = (codes, absmax, weight, _bounds(weight.device), n)
    constants = dict(BLOCK_SIZE=block_size, BLOCKS=blocks)
    launch.run(_quantize_kernel, grid, weight.device, arguments, constants, 4, 1)
    return codes, absmax


def dequantize(codes: Tensor, scales: Sequence[Tensor], form: Form, dtype: torch.dtype) -> Tensor:
    """``reference.dequantize_nf4`` on Triton."""
    out = torch.empty(form.rows, form.cols, dtype=dtype, device=codes.device)
    count("dequantize", "triton")
    if out.numel() == 0:
        return out
    absmax, nested = scales[0], scales[1:] or (scales[0],) * 3  # not read
    grid = (launch.cdiv(out.numel(), _ELEMENTS),)
    arguments = (
        out,
        codes,
        values(codes.device, form.fp4),
        absmax,
        *nested,
        out.numel(),
    )
    constants = dict(
        BLOCK_SIZE=form.block_size,
        NESTED=form.nested_block_size,
        BYTES=_ELEMENTS // 2,
        ROUND=not launch.interpreting(),
    )
    launch.run(_dequantize_kernel, grid, codes.device, arguments, constants, 4, 1)
    return out
