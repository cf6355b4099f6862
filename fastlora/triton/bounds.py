"""Bounds: which rows are whose, where runs of rows (segments) have a low-rank factor of their own.

    bounds  b = cummax(clamp(offsets, 0, M)), int32 [E + 1]: rows b[e]..b[e + 1] are segment e's

Rows before b[0] are those of segment -1, rows after b[E] those of segment E: neither has a factor.

Rows are cut into blocks of a fixed length, and blocks where segments begin: each piece is an item. There are never more
than ``count_items``, whatever the offsets hold, so grids are fixed by shapes; an item past the end, or an empty one, exits
at once. ``locate`` finds an item's rows from b alone: the pieces of segment e begin at item e + 1 + b[e] // length, for
every block edge and every bound begins one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._counters import count
from . import launch


@triton.jit
def _bounds_kernel(offsets, bounds, M, E, BE: tl.constexpr, CHAIN: tl.constexpr):
    launch.enter_chain(CHAIN)
    highest = tl.zeros((BE,), tl.int32)
    for e0 in range(0, E + 1, BE):
        e = e0 + tl.arange(0, BE)
        given = tl.load(offsets + e, mask=e <= E, other=0).to(tl.int64)
        clamped = tl.minimum(tl.maximum(given, 0), M).to(tl.int32)
        clamped = tl.maximum(tl.associative_scan(clamped, 0, _larger), highest)
        tl.store(bounds + e, clamped, mask=e <= E)
        highest = tl.zeros((BE,), tl.int32) + tl.max(clamped, axis=0)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def count_up_to(bounds, row, E, BE: tl.constexpr):
    """How many bounds are at most ``row``."""
    found = tl.zeros((BE,), tl.int32)
    for e0 in range(0, E + 1, BE):
        e = e0 + tl.arange(0, BE)
        b = tl.load(bounds + e, mask=e <= E, other=0)
        found += ((b <= row) & (e <= E)).to(tl.int32)
    return tl.sum(found, axis=0)


@triton.jit
def span(bounds, segment, M, E):
    """The rows (begin, end) of a segment; -1 and E are those without one."""
    begin = tl.load(bounds + segment, mask=segment >= 0, other=0)
    end = tl.load(bounds + segment + 1, mask=segment < E, other=M)
    return begin, end


@triton.jit
def load_bounds(bounds, E, BE: tl.constexpr):
    """All bounds at once, E < BE."""
    e = tl.arange(0, BE)
    return tl.load(bounds + e, mask=e <= E, other=2**31 - 1)


@triton.jit
def segments_met(all_bounds, row0, stop, E):
    """The first and the last segment that rows row0..``stop`` meet, given ``load_bounds`` of E < 2^15; first > last: none."""
    counts = (all_bounds <= row0).to(tl.int32) + ((all_bounds < stop).to(tl.int32) << 16)
    both = tl.sum(counts, axis=0)  # one sum across warps instead of two
    return tl.maximum((both & 0xFFFF) - 1, 0), tl.minimum((both >> 16) - 1, E - 1)


@triton.jit
def locate(bounds, item, M, E, length, BE: tl.constexpr):
    """(segment, its rows begin..end, the item's rows first..last) of an item; last <= first where it is empty."""
    passed = tl.zeros((BE,), tl.int32)
    for e0 in range(0, E + 1, BE):
        e = e0 + tl.arange(0, BE)
        b = tl.load(bounds + e, mask=e <= E, other=0)
        passed += ((e + 1 + b // length <= item) & (e <= E)).to(tl.int32)
    segment = tl.sum(passed, axis=0) - 1
    begin, end = span(bounds, segment, M, E)
    edge = tl.cast(item - segment - 1, tl.int64) * length
    first = tl.minimum(tl.maximum(edge, begin), end).to(tl.int32)
    last = tl.minimum(edge + length, end).to(tl.int32)
    return segment, begin, end, first, last


def count_items(rows: int, segments: int, length: int) -> int:
    """How many items rows cut into blocks of ``length`` can have, those of no segment included."""
    return segments + 2 + rows // length


def lookup_block(segments: int) -> int:
    """How many bounds are looked at together."""
    return min(1024, max(16, triton.next_power_of_2(segments + 1)))


def bounds(offsets: Tensor, rows: int) -> Tensor:
    """``reference.segment_bounds`` on Triton."""
    segments = offsets.shape[0] - 1
    out = torch.empty(segments + 1, dtype=torch.int32, device=offsets.device)
    arguments = offsets.contiguous(), out, rows, segments
    constants = dict(BE=lookup_block(segments))
    launch.run(_bounds_kernel, (1,), offsets.device, arguments, constants, 4, 1)
    count("segment_bounds", "triton")
    return out
