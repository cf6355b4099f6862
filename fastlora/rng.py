"""Dropout state: the one place that draws it, and the arithmetic every mask shares.

A mask is a pure function of ``(seed, offset, row, column)``: Philox4x32-7 (Salmon et al., SC 2011: seven rounds are
the fewest that pass BigCrush) with key = seed and counter = (offset low, offset high, column // 8, row). Output word w
gives two 15-bit numbers, its low half for column 8 c + 2 w and its high half for column 8 c + 2 w + 1; a column is kept
when its number is below the keep threshold. Masks are held 32 columns to an int32 word: bit b of word a is column
32 a + b. No tile shape enters, so forward, backward and every backend see one mask, and only the two-word state is
saved.
"""

from __future__ import annotations

import torch

KEEP_ALL = 32768


def keep_threshold(p: float) -> int:
    """Dropout probability -> keep threshold in 0..32768 (p is quantised to 1/32768).

    Raises:
        ValueError: ``p`` is not in [0, 1].
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p: got {p}; accepted are probabilities from 0 to 1")
    return round((1.0 - p) * KEEP_ALL)


def keep_scale(keep: int) -> float:
    """The factor that restores the expectation after dropout: 1 / (1 - p) with the quantised p; 0 if all drop."""
    return KEEP_ALL / keep if keep else 0.0


def draw_state(device: torch.device | str) -> torch.Tensor:
    """Draw a fresh dropout state, int64 ``[2]`` on ``device``: (seed, offset).

    Drawn from torch's own generator of that device, so ``torch.manual_seed``, CUDA-graph replay and
    activation checkpointing (``preserve_rng_state=True``, torch's default) treat it like any other random op.
    """
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device)
