"""The ``torch`` backend: reference.py on the caller's dtype, counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import reference
from .._counters import count


def _counted(op: str) -> Callable[..., Any]:
    function = getattr(reference, op)

    def run(*args: Any) -> Any:
        count(op, "torch")
        return function(*args)

    return run


mask, down, gemm, wgrad = map(_counted, ("mask", "down", "gemm", "wgrad"))
