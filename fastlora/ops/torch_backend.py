"""The ``torch`` backend: reference.py on the caller's dtype, counted. The op library makes masks where it is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _library, reference
from .._counters import count


def mask(rng_state: Tensor, rows: int, cols: int, keep: int) -> Tensor:
    """``reference.mask``, two orders of magnitude faster on a CPU where the library is built."""
    count("mask", "torch")
    if rng_state.device.type == "cpu" and _library.load(rng_state.device):
        return torch.ops.fastlora._dropout_mask(rng_state, rows, cols, keep)
    return reference.mask(rng_state, rows, cols, keep)


def _counted(op: str) -> Callable[..., Any]:
    function = getattr(reference, op)

    def run(*args: Any) -> Any:
        count(op, "torch")
        return function(*args)

    return run


down, gemm, wgrad = map(_counted, ("down", "gemm", "wgrad"))
