"""mask: the dropout mask of ``fastlora.rng``, as words of 32 elements (8 columns of each of 4 rows).

Making a mask is arithmetic only, so it rides on passes that wait for memory: ``down`` makes the mask of the x it reads
in forward, and in backward, while it reads dY, the words that ``gemm`` and ``wgrad`` then expand. They live for the
length of one pass; what is saved for backward is the two-word state.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._counters import count
from ..rng import mask_shape, philox_calls
from . import launch


@triton.jit
def load_words(words, row0, col0, rows, pitch, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The words [ROWS / 4, COLS / 8] of the mask at (row0, col0), multiples of 32 and 8. Past the edges: zeros."""
    m = row0 // 4 + tl.arange(0, ROWS // 4)
    c = col0 // 8 + tl.arange(0, COLS // 8)
    here = words + m.to(tl.int64)[:, None] * pitch + c[None, :]
    return tl.load(here, mask=(m < tl.cdiv(rows, 32) * 8)[:, None] & (c < pitch)[None, :], other=0)


@triton.jit
def expand(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Bool [ROWS, COLS] of a tile of words."""
    tile = tl.reshape(tile, (ROWS // 32, 1, 8, COLS // 8, 1))
    element = tl.arange(0, 4)[:, None, None, None] * 8 + tl.arange(0, 8)[None, None, None, :]
    # One bit of a word per element: shifting the word instead would cost an instruction more each.
    return tl.reshape(tile & (1 << element)[None, :, :, :, :], (ROWS, COLS)) != 0


@triton.jit
def _round(c0, c1, c2, c3, key0, key1):
    """One Philox4x32 round; the 64-bit products become single wide multiplies."""
    p0 = c0.to(tl.uint64) * 0xD2511F53
    p1 = c2.to(tl.uint64) * 0xCD9E8D57
    return (
        (p1 >> 32).to(tl.uint32) ^ c1 ^ key0,
        p1.to(tl.uint32),
        (p0 >> 32).to(tl.uint32) ^ c3 ^ key1,
        p0.to(tl.uint32),
    )


@triton.jit
def _planes(
    rng_state, row0, col0, call: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Four bit planes of the words at (row0, col0): each [ROWS, COLS]."""
    zero = tl.zeros((ROWS, COLS), tl.uint32)
    seed = tl.load(rng_state).to(tl.uint64, bitcast=True)
    offset = tl.load(rng_state + 1).to(tl.uint64, bitcast=True)
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1 = zero + offset.to(tl.uint32), zero + (offset >> 32).to(tl.uint32)
    c2 = zero + ((col0 + tl.arange(0, COLS)) * 4 + call).to(tl.uint32)[None, :]
    c3 = zero + (row0 + tl.arange(0, ROWS)).to(tl.uint32)[:, None]
    for _ in tl.static_range(7):
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, key0, key1)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _carry(plane, carry, keep, i: tl.constexpr):
    """Bit i of 32 additions number + keep: the carry is the majority of three."""
    bit = (0 - ((keep >> i) & 1)).to(tl.uint32)
    return (plane & carry) | (bit & (plane | carry))


@triton.jit
def make_words(
    rng_state, keep, row0, col0, ROWS: tl.constexpr, COLS: tl.constexpr, CALLS: tl.constexpr
):  # fmt: skip
    """The words [ROWS / 4, COLS / 8] of the mask at (row0, col0). ``CALLS`` is ``rng.philox_calls(keep)``."""
    carry = tl.zeros((ROWS // 4, COLS // 8), tl.uint32)
    for call in tl.static_range(4 - CALLS, 4):
        p0, p1, p2, p3 = _planes(rng_state, row0 // 4, col0 // 8, call, ROWS // 4, COLS // 8)
        carry = _carry(p0, carry, keep, 4 * call)
        carry = _carry(p1, carry, keep, 4 * call + 1)
        carry = _carry(p2, carry, keep, 4 * call + 2)
        carry = _carry(p3, carry, keep, 4 * call + 3)
    return (carry | (0 - (keep >> 16)).to(tl.uint32)).to(tl.int32, bitcast=True)


@triton.jit
def store_words(words, tile, row0, col0, rows, pitch, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Write the words of ROWS x COLS elements at (row0, col0)."""
    m = row0 // 4 + tl.arange(0, ROWS // 4)
    c = col0 // 8 + tl.arange(0, COLS // 8)
    here = words + m.to(tl.int64)[:, None] * pitch + c[None, :]
    tl.store(here, tile, mask=(m < tl.cdiv(rows, 32) * 8)[:, None] & (c < pitch)[None, :])


@triton.jit(do_not_specialize=["keep"])
def _mask_kernel(
    words, rng_state, keep, rows, pitch, ROWS: tl.constexpr, COLS: tl.constexpr, CALLS: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    launch.enter_chain(CHAIN)
    across = tl.cdiv(pitch, COLS // 8)
    row0 = tl.program_id(0) // across * ROWS
    col0 = tl.program_id(0) % across * COLS
    tile = make_words(rng_state, keep, row0, col0, ROWS, COLS, CALLS)
    store_words(words, tile, row0, col0, rows, pitch, ROWS, COLS)


def mask(rng_state: Tensor, rows: int, cols: int, keep: int) -> Tensor:
    """``reference.mask`` on Triton."""
    shape = mask_shape(rows, cols)
    words = torch.empty(shape, dtype=torch.int32, device=rng_state.device)
    if words.numel() == 0:
        return words
    row_block, col_block = 32, 512
    grid = (launch.cdiv(rows, row_block) * launch.cdiv(cols, col_block),)
    arguments = (words, rng_state.contiguous(), keep, rows, shape[1])
    constants = dict(ROWS=row_block, COLS=col_block, CALLS=philox_calls(keep))
    launch.run(_mask_kernel, grid, rng_state.device, arguments, constants, 4, 1)
    count("mask", "triton")
    return words
