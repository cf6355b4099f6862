"""How often each op ran, by backend: what a GPU test asserts, so that no fallback can pass for a kernel."""

from __future__ import annotations

import threading
from collections import Counter

_lock = threading.Lock()
_counts: Counter[tuple[str, str]] = Counter()


def count(op: str, backend: str) -> None:
    """Record one launch. Called where the kernel is launched, not where it is chosen."""
    with _lock:
        _counts[op, backend] += 1


def launches() -> dict[tuple[str, str], int]:
    """Launches since the last reset: ``{("gemm", "triton"): 2, ...}``. Process-wide."""
    with _lock:
        return dict(_counts)


def reset_launches() -> None:
    """Set every launch counter to zero."""
    with _lock:
        _counts.clear()
