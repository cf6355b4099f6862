"""The support table: which backend can run which op, in one place. A miss moves on to the next backend or raises.

``cuda`` is the op library's code for the GPUs it was built for. ``triton`` runs on GPUs of compute capability 8.0 and
newer, and on CPU tensors inside Triton's interpreter when it is asked for by name (it is a test tool there, far too slow
to be a default). ``torch`` (reference.py) runs everywhere.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .. import _library, switches

SEGMENT_OPS = ("segment_bounds", "segment_down", "segment_up", "segment_wgrad")
DORA_OPS = ("row_norms", "nf4_row_norms", "scale_columns", "scale_columns_backward", "scaled_gemm")
BOTTLENECK_OPS = ("bottleneck_down", "bottleneck_down_backward", "bottleneck_up")
OPS = (
    *("mask", "down", "gemm", "wgrad", "quantize", "dequantize"),
    *(*SEGMENT_OPS, *DORA_OPS, *BOTTLENECK_OPS),
)
BACKENDS = ("cuda", "triton", "torch")
MAX_RANK = 512


@dataclass(frozen=True)
class Row:
    """One op on one backend and the problems it takes. ``lora`` is all ops of a linear in one launch; ``nf4_few`` and
    ``nf4_gemm`` are its forward over a 4-bit weight that is read as it lies, ``nf4_dx`` is dX over one, ``segment_gemm``
    is ``gemm`` and ``segment_up`` in one launch."""

    op: str
    backend: str
    dtypes: frozenset[torch.dtype]
    min_capability: tuple[int, int] | None = None  # None: any device torch has
    kernel: str | None = None  # the library's op, which not every build has code for
    max_rank: int | None = None
    exactly: bool = False  # for that one capability (sm_90a)


_HALF_DTYPES = frozenset({torch.bfloat16, torch.float16})
_KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
ROWS = (
    *(
        Row(op, "cuda", _KERNEL_DTYPES, min_capability=(7, 5))
        for op in ("mask", "quantize", "dequantize")
    ),
    Row(
        "gemm",
        "cuda",
        _HALF_DTYPES,
        min_capability=(9, 0),
        kernel="_gemm_sm90",
        max_rank=MAX_RANK,
        exactly=True,
    ),
    Row(
        "lora",
        "cuda",
        _HALF_DTYPES,
        min_capability=(9, 0),
        kernel="_lora_forward_sm90",
        max_rank=MAX_RANK,
        exactly=True,
    ),
    Row(
        "nf4_few",
        "cuda",
        _HALF_DTYPES,
        min_capability=(8, 0),
        kernel="_nf4_linear_sm80",
        max_rank=MAX_RANK,
    ),
    Row(
        "nf4_gemm",
        "cuda",
        _HALF_DTYPES,
        min_capability=(9, 0),
        kernel="_nf4_linear_sm90",
        max_rank=MAX_RANK,
        exactly=True,
    ),
    Row(
        "nf4_dx",
        "cuda",
        _HALF_DTYPES,
        min_capability=(9, 0),
        kernel="_nf4_dx_sm90",
        max_rank=MAX_RANK,
        exactly=True,
    ),
    *(
        Row(op, "triton", _KERNEL_DTYPES, min_capability=(8, 0), max_rank=MAX_RANK)
        for op in (*OPS, "nf4_gemm", "nf4_dx", "segment_gemm")
    ),
    *(Row(op, "torch", _KERNEL_DTYPES | {torch.float64}) for op in OPS),
)


class Form(NamedTuple):
    """What the tensors of a 4-bit weight do not tell. ``nested_block_size`` is 0 where scales are fp32."""

    rows: int
    cols: int
    block_size: int
    nested_block_size: int
    fp4: bool


@functools.cache
def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter in this process (TRITON_INTERPRET was set before import)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def triton_missing() -> str | None:
    """Why Triton cannot be used at all, or None. Imports it: one that is found may still be broken."""
    try:
        importlib.import_module("triton")
    except Exception as error:  # whatever a half-installed package raises
        return f"triton cannot be imported ({type(error).__name__}: {error})"
    return None


def _device_miss(row: Row, device: torch.device, dtype: torch.dtype) -> str | None:
    if row.min_capability is None:
        return None
    if device.type == "cpu":
        if row.backend == "cuda":
            return "cuda kernels need a GPU tensor"
        if not interpreting():
            return "triton kernels need a GPU tensor (on CPU only with TRITON_INTERPRET=1)"
        if dtype is torch.bfloat16:
            return "Triton's interpreter computes bf16 dot products wrongly; use fp16 or fp32"
        return triton_missing()
    if device.type != "cuda":
        return f"no {row.backend} kernels for {device.type} tensors"
    if torch.version.hip is not None:
        return "the kernels are written and tested for NVIDIA GPUs"
    if row.backend == "triton" and (reason := triton_missing()):
        return reason
    if row.backend == "cuda" and not _library.load(device):
        return _library.status().reason or f"the op library has no code for {device}"
    capability = torch.cuda.get_device_capability(device)
    if row.kernel is not None and not _library.has_kernel(row.kernel):
        return f"the op library was built without {row.kernel[1:]}"
    if capability < row.min_capability or (row.exactly and capability != row.min_capability):
        need = ".".join(map(str, row.min_capability))
        have = ".".join(map(str, capability))
        return f"needs compute capability {need}, {device} has {have}"
    return None


_SWITCHED = {"one_launch": ("lora", "segment_gemm"), "nf4_codes": ("nf4_few", "nf4_gemm", "nf4_dx")}


@functools.lru_cache(maxsize=4096)
def miss(op: str, backend: str, device: torch.device, dtype: torch.dtype, rank: int) -> str | None:
    """Why ``backend`` cannot run ``op`` on this problem; None when it can."""
    for step, ops in _SWITCHED.items():
        if op in ops and switches.off(step):
            return f"{step} is switched off by FASTLORA_OFF"
    for row in ROWS:
        if (row.op, row.backend) != (op, backend):
            continue
        if dtype not in row.dtypes:
            return f"no {backend} kernel for {dtype}"
        if row.max_rank is not None and rank > row.max_rank:
            return f"rank {rank} is above the {backend} kernels' {row.max_rank}"
        return _device_miss(row, device, dtype)
    return f"this build has no {backend} kernel for {op}"


def table(device: torch.device) -> list[dict[str, object]]:
    """The table as seen from one device: a dict(op, backend, ok, reason) for every op and backend."""
    dtype = torch.float16 if device.type == "cpu" else torch.bfloat16
    rows: list[dict[str, object]] = []
    for op in OPS:
        for backend in BACKENDS:
            reason = miss(op, backend, device, dtype, 16)
            rows.append(
                {"op": op, "backend": backend, "ok": reason is None, "reason": reason or ""}
            )
    return rows


@dataclass(frozen=True)
class Fit:
    """How a problem suits a kernel: why it cannot run it, and whether the next backend would be faster."""

    miss: str | None = None
    slower: str | None = None


# ---- the caller's preference ---------------------------------------------------------------------------------
# Process-wide on purpose: autograd runs backward in threads of its own, which must see the same choice.


@dataclass(frozen=True)
class Preference:
    """The backend to try first; ``strict`` raises instead of moving on."""

    name: str | None = None
    strict: bool = False


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}; accepted are {', '.join(map(repr, BACKENDS))}")
    return name


def _from_environment() -> Preference:
    name = os.environ.get("FASTLORA_BACKEND")
    return Preference(_checked(name, "FASTLORA_BACKEND") if name else None)


_preference = _from_environment()


@contextmanager
def backend(name: str, strict: bool = False) -> Iterator[None]:
    """Prefer one backend inside the ``with`` block: ``"cuda"``, ``"triton"`` or ``"torch"``.

    With ``strict=True`` an op that backend cannot run raises RuntimeError with the reason instead of running
    elsewhere. The choice is process-wide (backward passes run in other threads), so wrap backward in it too.

    Raises:
        ValueError: ``name`` is unknown.
    """
    global _preference
    before, _preference = _preference, Preference(_checked(name, "backend"), strict)
    try:
        yield
    finally:
        _preference = before


def preference() -> Preference:
    """The preference in force."""
    return _preference


def choose(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    rank: int,
    fit: Callable[[], Fit] | None = None,
) -> str:
    """The backend that runs ``op`` now. ``fit`` says how the tensors suit the cuda kernel; asked only where it counts.

    Raises:
        RuntimeError: a strict preference cannot run it (the message says why), or no backend can.
    """
    wanted = _preference
    if wanted.name is not None:
        reason = miss(op, wanted.name, device, dtype, rank)
        if reason is None and wanted.name == "cuda" and fit is not None:
            reason = fit().miss
        if reason is None:
            return wanted.name
        if wanted.strict:
            raise RuntimeError(
                f"backend({wanted.name!r}, strict=True): {op} on {device} in {dtype} at rank {rank} is not "
                f"supported: {reason}. Drop strict=True to let the next backend run it"
            )
    spare = None  # a cuda kernel that Triton beats, but plain torch does not
    for name in BACKENDS:
        if name == "triton" and device.type == "cpu":
            continue
        if miss(op, name, device, dtype, rank) is not None:
            continue
        suits = fit() if name == "cuda" and fit is not None else Fit()
        if suits.miss is not None:
            continue
        if suits.slower is not None:
            spare = name
            continue
        return spare if name == "torch" and spare else name
    raise RuntimeError(f"{op}: no backend takes {dtype} on {device}; cast the input to float32")


def takes_whole(
    op: str, device: torch.device, dtype: torch.dtype, rank: int, fit: Callable[[], Fit]
) -> bool:
    """Whether the ``cuda`` backend runs all of ``op`` in one launch now, rather than being composed of other ops.

    Raises:
        RuntimeError: ``cuda`` is preferred strictly and cannot (the message says why).
    """
    wanted = _preference
    if wanted.name not in (None, "cuda"):
        return False
    reason = miss(op, "cuda", device, dtype, rank)
    suits = fit() if reason is None else Fit(reason)
    if suits.miss is None:
        return wanted.name == "cuda" or suits.slower is None
    if wanted.strict:
        raise RuntimeError(
            f"backend('cuda', strict=True): {op} on {device} in {dtype} at rank {rank} is not supported: "
            f"{suits.miss}. Drop strict=True to let the next backend run it"
        )
    return False
