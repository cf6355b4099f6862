"""Dropout state: the one place that draws it, and the arithmetic every mask shares.

A mask is a pure function of ``(seed, offset, row, column)``. It is made in units of 32 elements: 8 neighbouring columns
(8 c + j) of the 4 rows 32 R + 8 i + s, element b = 8 i + j. Four calls of Philox4x32-7 (Salmon et al., SC 2011: seven
rounds are the fewest that pass BigCrush) with key = seed and counter = (offset low, offset high, 4 c + q, 8 R + s),
q = 0..3, give a unit's sixteen bit planes: output w of call q is plane k = 4 q + w. Bit b of plane k is bit k of element
b's 16-bit number, and the element is kept when number + keep threshold carries out of sixteen bits (number >= 65536 -
threshold). No tile shape enters, so forward, backward and every backend see one mask, and only the two-word state is
saved. Between kernels a mask travels as int32 words, one a unit: [8 ceil(rows / 32), ceil(cols / 8)], word (8 R + s, c).

Why units: planes turn 32 additions into one instruction a bit, a full adder's carry = majority(plane, carry, threshold
bit), from the lowest plane up, and planes below the threshold's lowest set bit need not be drawn. And 8 columns in each
of 4 rows is what one thread holds of a tile that was loaded 16 bytes at a time.
"""

from __future__ import annotations

import torch

KEEP_ALL = 65536


def keep_threshold(p: float) -> int:
    """Dropout probability -> keep threshold in 0..65536, a multiple of 65536 / 2^bits.

    The fewest bits of 4, 8, 12 and 16 that give p and 1 - p to one part in 512 (0.05 -> 205 / 4096, 0.5 -> 8 / 16);
    below 1 / 256 or so p is simply rounded to 1 / 65536.

    Raises:
        ValueError: ``p`` is not in [0, 1].
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p: got {p}; accepted are probabilities from 0 to 1")
    drop = 0
    for bits in (4, 8, 12, 16):
        drop = round(p * 2**bits) * (KEEP_ALL >> bits)
        if abs(drop - p * KEEP_ALL) * 512 <= min(p, 1.0 - p) * KEEP_ALL:
            break
    return KEEP_ALL - drop


def philox_calls(keep: int) -> int:
    """How many of a unit's four Philox calls decide anything: the last ones, 1 to 4."""
    fraction = keep % KEEP_ALL
    lowest = (fraction & -fraction).bit_length() - 1 if fraction else 15
    return 4 - lowest // 4


def mask_shape(rows: int, cols: int) -> tuple[int, int]:
    """The shape of the words of a mask."""
    return (rows + 31) // 32 * 8, (cols + 7) // 8


def keep_scale(keep: int) -> float:
    """The factor that restores the expectation after dropout: 1 / (1 - p) with the quantised p; 0 if all drop."""
    return KEEP_ALL / keep if keep else 0.0


def draw_state(device: torch.device | str) -> torch.Tensor:
    """Draw a fresh dropout state, int64 ``[2]`` on ``device``: (seed, offset).

    Drawn from torch's own generator of that device, so ``torch.manual_seed``, CUDA-graph replay and
    activation checkpointing (``preserve_rng_state=True``, torch's default) treat it like any other random op.
    """
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device)
