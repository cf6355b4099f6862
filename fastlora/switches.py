"""Steps of the fast path that can be switched off while looking for a fault: ``FASTLORA_OFF=one_read,beside``.

Results stay within rounding of one another; only who makes them, and when, changes. csrc/host/switches.h reads the
same variable.
"""

from __future__ import annotations

import os

STEPS = {  # what becomes of each
    "one_launch": "a linear and its update are not one launch (csrc/lora, csrc/few, triton/gemm with segments or DoRA's scale) but its ops one by one",
    "one_read": "in csrc/lora g and dB each have their own read of dY",
    "beside": "in csrc/lora all clusters begin with h (g), then come tiles, then the gradients of A and B",
    "nf4_codes": "a 4-bit weight is always dequantised first, never multiplied by its codes: y and dX are those of a matmul, exactly",
    "dependent_launch": "a Triton kernel is launched when the one before it has ended",
}


def _parsed(text: str) -> frozenset[str]:
    names = frozenset(filter(None, map(str.strip, text.split(","))))
    if unknown := sorted(names - STEPS.keys()):
        raise ValueError(
            f"FASTLORA_OFF: got {', '.join(unknown)}; accepted are {', '.join(STEPS)}, separated by commas"
        )
    return names


_OFF = _parsed(os.environ.get("FASTLORA_OFF", ""))


def off(step: str) -> bool:
    """Whether ``step`` was switched off when fastlora was imported."""
    return step in _OFF
