"""mask: the dropout mask of ``fastlora.rng``, packed 32 columns to a word.

Making a mask is arithmetic only, so it rides on passes that wait for memory: ``down`` makes the words of the x it reads
in forward, and in backward, while it reads dY, the words that ``gemm`` and ``wgrad`` then expand. They live for the
length of one pass; what is saved for backward is the two-word state.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._counters import count
from ..rng import KEEP_ALL
from . import launch


@triton.jit
def load_mask(words, row0, col0, rows, stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Bool [ROWS, COLS] of the mask at (row0, col0), multiples of 32 columns. Past the edges: anything."""
    WORDS: tl.constexpr = COLS // 32
    m = row0 + tl.arange(0, ROWS)
    word = col0 // 32 + tl.arange(0, WORDS)
    here = words + m.to(tl.int64)[:, None] * stride + word[None, :]
    tile = tl.load(here, mask=(m < rows)[:, None] & (word < stride)[None, :], other=0)
    bits = (tile[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(bits, (ROWS, COLS)) != 0


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
def _calls(rng_state, row0, call0, ROWS: tl.constexpr, CALLS: tl.constexpr, STEP: tl.constexpr):
    """The four output words of Philox4x32-7 for rows row0.. and calls call0, call0 + STEP, ..: each [ROWS, CALLS]."""
    zero = tl.zeros((ROWS, CALLS), tl.uint32)
    seed = tl.load(rng_state).to(tl.uint64, bitcast=True)
    offset = tl.load(rng_state + 1).to(tl.uint64, bitcast=True)
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1 = zero + offset.to(tl.uint32), zero + (offset >> 32).to(tl.uint32)
    c2 = zero + (call0 + tl.arange(0, CALLS) * STEP).to(tl.uint32)[None, :]
    c3 = zero + (row0 + tl.arange(0, ROWS)).to(tl.uint32)[:, None]
    for _ in tl.static_range(7):
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, key0, key1)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _carry(output, bump):
    """Bits 15 and 31 are set where the 15-bit numbers of ``output`` reach keep: adding 32768 - keep to both halves of
    an output compares two numbers in one addition."""
    return (output & 0x7FFF7FFF) + bump.to(tl.uint32) * 0x10001


@triton.jit
def _push(bits, output, bump):
    """Shift in the keep bits of both halves: sixteen pushes leave the low halves' in 0..15, the high ones' above."""
    return (bits >> 1) | ((_carry(output, bump) & 0x80008000) ^ 0x80008000)


@triton.jit
def _swap(x, mask, shift: tl.constexpr):
    """Exchange the bits under ``mask`` with those ``shift`` above them."""
    t = (x ^ (x >> shift)) & mask
    return x ^ t ^ (t << shift)


@triton.jit
def make_words(rng_state, bump, row0, word0, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """The mask's words [ROWS, WORDS] at (row0, word0), int32. ``bump`` is 32768 - keep."""
    bits = tl.zeros((ROWS, WORDS), tl.uint32)
    for call in tl.static_range(4):
        c0, c1, c2, c3 = _calls(rng_state, row0, word0 * 4 + call, ROWS, WORDS, 4)
        bits = _push(_push(_push(_push(bits, c0, bump), c1, bump), c2, bump), c3, bump)
    # Low and high halves decide neighbouring columns: a perfect shuffle of the word's two halves.
    bits = _swap(_swap(_swap(_swap(bits, 0xFF00, 8), 0xF000F0, 4), 0xC0C0C0C, 2), 0x22222222, 1)
    return bits.to(tl.int32, bitcast=True)


@triton.jit
def make_tile(rng_state, bump, row0, col0, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Bool [ROWS, COLS] of the mask at (row0, col0), made where it is used: a thread's call decides 8 columns in a row,
    so that no bit changes threads on its way to a tile loaded 16 bytes at a time."""
    c0, c1, c2, c3 = _calls(rng_state, row0, col0 // 8, ROWS, COLS // 8, 1)
    c0, c1, c2, c3 = _carry(c0, bump), _carry(c1, bump), _carry(c2, bump), _carry(c3, bump)
    # join() appends a fastest dimension: nested so that the flattened order is word 0 low, word 0 high, word 1 low, ...
    low = tl.join(tl.join(_bit15(c0), _bit15(c2)), tl.join(_bit15(c1), _bit15(c3)))
    high = tl.join(tl.join(_bit31(c0), _bit31(c2)), tl.join(_bit31(c1), _bit31(c3)))
    return tl.reshape(tl.join(low, high), (ROWS, COLS))


@triton.jit
def _bit15(carried):
    return (carried & 0x8000) == 0


@triton.jit
def _bit31(carried):
    return (carried & 0x80000000) == 0


@triton.jit
def store_words(words, tile, row0, word0, rows, pitch, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Write a tile of words at (row0, word0), clipped to [rows, pitch]."""
    m = row0 + tl.arange(0, ROWS)
    word = word0 + tl.arange(0, WORDS)
    here = words + m.to(tl.int64)[:, None] * pitch + word[None, :]
    tl.store(here, tile, mask=(m < rows)[:, None] & (word < pitch)[None, :])


@triton.jit
def _mask_kernel(words, rng_state, bump, rows, pitch, ROWS: tl.constexpr, WORDS: tl.constexpr):
    across = tl.cdiv(pitch, WORDS)
    row0 = tl.program_id(0) // across * ROWS
    word0 = tl.program_id(0) % across * WORDS
    tile = make_words(rng_state, bump, row0, word0, ROWS, WORDS)
    store_words(words, tile, row0, word0, rows, pitch, ROWS, WORDS)


def mask(rng_state: Tensor, rows: int, cols: int, keep: int) -> Tensor:
    """``reference.mask`` on Triton."""
    pitch = launch.cdiv(cols, 32)
    words = torch.empty(rows, pitch, dtype=torch.int32, device=rng_state.device)
    if words.numel() == 0:
        return words
    row_block, word_block = 4, 64
    grid = (launch.cdiv(rows, row_block) * launch.cdiv(pitch, word_block),)
    arguments = (words, rng_state.contiguous(), KEEP_ALL - keep, rows, pitch)
    constants = dict(ROWS=row_block, WORDS=word_block)
    launch.run(_mask_kernel, grid, rng_state.device, arguments, constants, 4, 1)
    count("mask", "triton")
    return words
