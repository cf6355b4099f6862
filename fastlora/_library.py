"""Finds and loads the compiled op library, and can say exactly why it could not.

The library is optional: without it every op runs in Triton or plain torch. It is loaded on first need, not on
import. ``FASTLORA_LIBRARY=/path/libfastlora.so`` loads that file instead of the one in the package.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import platform
import re
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .rng import mask_shape

TORCH_MINIMUM = (2, 10)


@dataclass(frozen=True)
class Status:
    """Outcome of the first load: ``reason`` is empty when ``loaded``."""

    loaded: bool
    path: Path | None
    reason: str


ABI = 9  # what the library's ops take and mean; CMakeLists.txt has the same number

_lock = threading.Lock()
_status: Status | None = None


def load(device: torch.device | None = None) -> bool:
    """Load the library if it was not tried yet; True when its ops can be called (on tensors of ``device``).

    Never raises. A library that is there but does not load warns once. Safe from any thread.
    """
    global _status
    if _status is None:
        with _lock:
            if _status is None:
                _status = _load()
                if not _status.loaded and _status.path is not None:
                    warnings.warn(
                        f"fastlora's compiled ops are not used: {_status.reason}", stacklevel=2
                    )
    if device is None or not _status.loaded:
        return _status.loaded
    return device.type == "cpu" or (device.type == "cuda" and _runs_on(torch.device(device)))


def status() -> Status:
    """Load if not tried yet, and tell what happened."""
    load()
    assert _status is not None
    return _status


def build_info() -> dict[str, Any]:
    """What was built: the library's own record, ``fastlora._core``'s under ``"core"`` (None where it is missing),
    and ``"library"`` / ``"reason"``: the path loaded, or why none was."""
    now = status()
    info: dict[str, Any] = dict(_record(now.path or _default_path()))
    info["library"] = str(now.path) if now.loaded else None
    info["reason"] = now.reason
    try:
        _core: Any = importlib.import_module("._core", __package__)
    except ImportError:
        info["core"] = None
    else:
        info["core"] = _core.build_info()
    return info


def covers(archs: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code for ``archs`` ("90a-real", "120-virtual", ...) runs on a GPU of this compute capability.

    Machine code runs on its own and later minor versions of a major one, PTX on everything later; the suffix
    ``a`` binds either to exactly that chip, ``f`` to its family.
    """
    for arch in archs:
        match = re.fullmatch(r"(\d+)(\d)([af]?)-(real|virtual)", arch)
        if match is None:
            continue
        built = int(match[1]), int(match[2])
        if match[3] == "a":
            fits = capability == built
        elif match[4] == "real" or match[3] == "f":
            fits = capability[0] == built[0] and capability >= built
        else:
            fits = capability >= built
        if fits:
            return True
    return False


@functools.lru_cache(maxsize=64)
def _runs_on(device: torch.device) -> bool:
    assert _status is not None
    if not torch.cuda.is_available():
        return False
    archs = _record(_status.path).get("archs")
    if archs is None:  # the library was carried here without its record: let a launch decide
        return True
    return covers(archs, torch.cuda.get_device_capability(device))


def _default_path() -> Path:
    return Path(__file__).with_name("libfastlora.so")


def _record(path: Path | None) -> dict[str, Any]:
    """The JSON file that the build left beside the library; empty where it is missing or unreadable."""
    try:
        return json.loads(path.with_suffix(".json").read_text()) if path else {}
    except (OSError, ValueError):
        return {}


def _load() -> Status:
    override = os.environ.get("FASTLORA_LIBRARY")
    path = Path(override) if override else _default_path()
    record = _record(path)
    if not path.is_file():
        if override:
            return Status(False, path, f"FASTLORA_LIBRARY={override}: there is no such file")
        why = record.get(
            "skipped",
            "it was not built, see CONTRIBUTING.md or run `pip install --no-build-isolation .`",
        )
        return Status(False, None, f"{path.name} is not in the package: {why}")
    if tuple(map(int, torch.__version__.split(".")[:2])) < TORCH_MINIMUM:
        need = ".".join(map(str, TORCH_MINIMUM))
        return Status(
            False, path, f"{path} needs torch {need} or newer, this is {torch.__version__}"
        )
    if record and record.get("abi") != ABI:
        return Status(False, path, f"{path} was built from other sources than these: rebuild it")
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return Status(False, path, _explained(path, record, error))
    torch.library.register_fake("fastlora::_dropout_mask", _fake_dropout_mask)
    torch.library.register_fake("fastlora::_gemm_sm90", _fake_gemm)
    torch.library.register_fake("fastlora::_down_sm90", _fake_down)
    torch.library.register_fake("fastlora::_wgrad_sm90", _fake_wgrad)
    torch.library.register_fake("fastlora::_lora_forward_sm90", _fake_lora_forward)
    torch.library.register_fake("fastlora::_lora_scaled_sm90", _fake_lora_scaled)
    torch.library.register_fake("fastlora::_lora_few_sm90", _fake_lora_few)
    torch.library.register_fake("fastlora::_lora_backward_sm90", _fake_lora_backward)
    torch.library.register_fake("fastlora::_nf4_linear_sm80", _fake_nf4_linear)
    torch.library.register_fake("fastlora::_nf4_linear_sm90", _fake_nf4_linear)
    torch.library.register_fake("fastlora::_nf4_dx_sm90", _fake_nf4_dx)
    return Status(True, path, "")


def _explained(path: Path, record: dict[str, Any], error: Exception) -> str:
    """The loader's own words, then what they mean and what to do."""
    text = " ".join(str(error.__cause__ or error).split())  # torch wraps the loader's error
    here = f"{platform.system()} {platform.machine()}"
    if "undefined symbol" in text:
        hint = f"torch {torch.__version__} lacks a function it was built for: upgrade torch, or rebuild here"
    elif "GLIBC" in text:
        hint = "it was linked on a newer system: rebuild here"
    elif "ELF" in text or text.startswith(
        f"{path}: cannot open"
    ):  # the latter: another processor's
        hint = f"it is not a library for {here}: rebuild here"
    else:
        hint = "rebuild here, or remove the file to run without it"
    built = (
        f"built on {record['platform']} with torch {record['torch']}; " if "torch" in record else ""
    )
    return f"{path} did not load: {text} ({built}{hint})"


def has_kernel(op: str) -> bool:
    """Whether the loaded library has CUDA code for ``fastlora::op`` (families are compiled for the asked GPUs only)."""
    name = f"fastlora::{op}"
    return name in _ops() and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


@functools.cache
def _ops() -> frozenset[str]:
    return frozenset(torch._C._dispatch_get_all_op_names()) if load() else frozenset()


def _fake_gemm(x: torch.Tensor, w: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape[0], w.shape[0])


def _fake_down(x, l, scaling, scale, rng_state, keep, emit_cols, cast):  # type: ignore[no-untyped-def]
    words = mask_shape(x.shape[0], emit_cols) if rng_state is not None and emit_cols else (0,)
    rounded = (0,) if cast is None else (cast.shape[0], (cast.shape[1] + 7) // 8 * 8)
    h = x.new_empty(x.shape[0], (l.shape[0] + 7) // 8 * 8)
    return h, x.new_empty(words, dtype=torch.int32), x.new_empty(rounded)


def _fake_wgrad(x, g, dy, h, words, rank, float_a, float_b, bias):  # type: ignore[no-untyped-def]
    like = x if x is not None else dy

    def grad(shape: tuple[int, ...] | None, wide: bool) -> torch.Tensor:
        return like.new_empty(shape or (0,), dtype=torch.float32 if wide and shape else like.dtype)

    n = None if dy is None else dy.shape[1]
    return (
        grad(None if x is None else (rank, x.shape[1]), float_a),
        grad(None if n is None else (n, rank), float_b),
        grad((n,) if n is not None and bias else None, False),
    )


def _fake_lora_forward(x, w, a, *_):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], w.shape[0]), x.new_empty(x.shape[0], a.shape[0])


def _fake_lora_scaled(x, w, a, b, bias, scaling, scale, columns, with_z, config):  # type: ignore[no-untyped-def]
    y, h = _fake_lora_forward(x, w, a)
    return y, h, torch.empty_like(y) if with_z else x.new_empty(0)


def _fake_lora_few(x, w, a, b, bias, scaling, scale, backward, config):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], w.shape[backward]), x.new_empty(x.shape[0], a.shape[0])


def _fake_lora_backward(dy, w, a, b, x, h, *rest):  # type: ignore[no-untyped-def]
    _, _, _, _, bias, float_bias, _ = rest  # scaling, scale, rng_state, keep first, config last
    nothing = dy.new_empty(0)
    bias_dtype = torch.float32 if float_bias else dy.dtype
    return (
        dy.new_empty(dy.shape[0], w.shape[1]),
        nothing if x is None else a.new_empty(a.shape),
        nothing if h is None else b.new_empty(b.shape),
        dy.new_empty(w.shape[0], dtype=bias_dtype) if bias else nothing,
    )


def _fake_nf4_linear(x, codes, absmax, nested_absmax, nested_code, offset, n, *rest):  # type: ignore[no-untyped-def]
    a = rest[3]  # block_size, nested_block_size, fp4 first
    h = x.new_empty(0) if a is None else x.new_empty(x.shape[0], a.shape[0])
    return x.new_empty(x.shape[0], n), h


def _fake_nf4_dx(dy, codes, absmax, nested_absmax, nested_code, offset, k, *_):  # type: ignore[no-untyped-def]
    return dy.new_empty(dy.shape[0], k)


def _fake_dropout_mask(rng_state: torch.Tensor, rows: int, cols: int, keep: int) -> torch.Tensor:
    return rng_state.new_empty(mask_shape(rows, cols), dtype=torch.int32)
