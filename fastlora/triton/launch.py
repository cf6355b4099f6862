"""What every Triton launcher needs: the launch itself, the device and its size, fp32 precision, descriptor rules."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from ..ops.support import interpreting
from ..switches import off


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


@triton.jit
def enter_chain(CHAIN: tl.constexpr):
    """First statement of every kernel. From sm_90 on a kernel is launched while the one before it ends (programmatic
    dependent launch), and waits here for that one's results. (Letting it in earlier still was measured slower.)"""
    if CHAIN:
        cuda.gdc_wait()


_compiled: dict[tuple[object, ...], Any] = {}


def _kind(argument: object) -> object:
    """What Triton specialises a kernel on: an argument's type, and whether 16 divides it or it is one."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument < 2**31
    return type(argument)


def run(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    warps: int,
    stages: int,
) -> None:
    """Launch on ``device``'s current stream. ``constants`` name the kernel's constexprs, in its order, at its end;
    the last one, CHAIN, is added here.

    Triton binds and specialises its arguments in Python at every launch, which takes as long as a small kernel. So the
    compiled kernel of a specialisation is kept and launched directly.
    """
    chain = not interpreting() and capability(device) >= (9, 0) and not off("dependent_launch")
    constants = {**constants, "CHAIN": chain}
    with _on_device(device):
        if interpreting():
            kernel[grid](*arguments, **constants)
            return
        key = (kernel, device.index, warps, stages, *constants.values(), *map(_kind, arguments))
        compiled = _compiled.get(key)
        if compiled is None:
            _compiled[key] = kernel[grid](
                *arguments, **constants, num_warps=warps, num_stages=stages, launch_pdl=chain
            )
        else:
            compiled[(*grid, 1, 1)[:3]](*arguments, *constants.values())


def _on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory a CTA may take: 163 KB on sm_80, 227 KB on sm_90 and sm_100, 99 KB on the others."""
    kilobytes = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
    return 1024 * kilobytes.get(capability(device), 99)


def stages_that_fit(wanted: int, bytes_per_stage: int, device: torch.device) -> int:
    """Pipeline depth: ``wanted``, or what shared memory holds beside 8 KB of scratch; at least two."""
    return max(2, min(wanted, (shared_memory(device) - 8192) // bytes_per_stage))


def input_precision(dtype: torch.dtype) -> str:
    """fp32 products are fp32 unless torch's own switch allows tf32; 16-bit inputs ignore it."""
    if dtype is torch.float32 and _tf32_allowed():
        return "tf32"
    return "ieee"


def _tf32_allowed() -> bool:
    """Torch has two switches, and refuses to read the old one after the new one was set."""
    try:
        return torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def describable(t: Tensor) -> bool:
    """Whether a tensor descriptor (TMA) can name this 2-d tensor: rows contiguous, base and pitch 16-byte aligned."""
    rows, cols = t.shape
    if rows == 0 or cols == 0 or t.stride(1) != 1 or t.data_ptr() % 16 != 0:
        return False
    pitch = t.stride(0) * t.element_size()
    # Extents and pitch are limited to 2^32 and 2^40 by the descriptor; a row pitch shorter than the row is a view trick.
    return pitch % 16 == 0 and t.stride(0) >= cols and max(rows, cols) < 2**31 and pitch < 2**40


def cdiv(a: int, b: int) -> int:
    """ceil(a / b). triton.cdiv is made for kernels and costs microseconds on the host."""
    return -(-a // b)


def pick(value: int, ladder: tuple[int, ...]) -> int:
    """The smallest rung that holds ``value``, or the last."""
    return next((rung for rung in ladder if value <= rung), ladder[-1])


def split_evenly(length: int, block: int, parts: int) -> tuple[int, int]:
    """Cut ``length`` into at most ``parts`` runs of whole blocks: (run length, number of runs), none of them empty."""
    blocks = cdiv(length, block)
    per_part = cdiv(blocks, max(1, min(parts, blocks)))
    return per_part * block, cdiv(blocks, per_part)


__all__ = [
    "capability",
    "cdiv",
    "describable",
    "enter_chain",
    "input_precision",
    "interpreting",
    "multiprocessors",
    "pick",
    "run",
    "shared_memory",
    "split_evenly",
    "stages_that_fit",
]
