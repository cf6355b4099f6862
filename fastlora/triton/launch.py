"""What every Triton launcher needs: the tensor's own device, its size, fp32 precision, descriptor rules."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from ..ops.support import interpreting


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """SM count; in the interpreter a small number, so that persistent loops and splits take several turns."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; the interpreter plays the newest, so that CI tests the descriptor path."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def input_precision(dtype: torch.dtype) -> str:
    """fp32 products are fp32 unless torch's own switch allows tf32; 16-bit inputs ignore it."""
    if dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return "ieee"


def describable(t: Tensor) -> bool:
    """Whether a tensor descriptor (TMA) can name this 2-d tensor: rows contiguous, base and pitch 16-byte aligned."""
    rows, cols = t.shape
    if rows == 0 or cols == 0 or t.stride(1) != 1 or t.data_ptr() % 16 != 0:
        return False
    pitch = t.stride(0) * t.element_size()
    # Extents and pitch are limited to 2^32 and 2^40 by the descriptor; a row pitch shorter than the row is a view trick.
    return pitch % 16 == 0 and t.stride(0) >= cols and max(rows, cols) < 2**31 and pitch < 2**40


def pick(value: int, ladder: tuple[int, ...]) -> int:
    """The smallest rung that holds ``value``, or the last."""
    return next((rung for rung in ladder if value <= rung), ladder[-1])


def split_evenly(length: int, block: int, parts: int) -> tuple[int, int]:
    """Cut ``length`` into at most ``parts`` runs of whole blocks: (run length, number of runs), none of them empty."""
    blocks = triton.cdiv(length, block)
    per_part = triton.cdiv(blocks, max(1, min(parts, blocks)))
    return per_part * block, triton.cdiv(blocks, per_part)


__all__ = [
    "capability",
    "describable",
    "input_precision",
    "interpreting",
    "multiprocessors",
    "on_device",
    "pick",
    "split_evenly",
]
