"""``fastlora.explain``: which kernel each op would run for a layer and an input, and why not another."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .._autocast import autocast_dtype
from . import cuda_backend, support


def _weight_and_rank(layer: Any) -> tuple[Tensor, int]:
    """Weight [N, K] and the active adapter's rank, of a fastlora layer or a PEFT ``lora.Linear``."""
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise TypeError(
            f"layer: got {type(layer).__name__}; accepted are fastlora.LoRALinear and peft's lora.Linear, "
            "or any module with a 2-d weight"
        )
    adapters = getattr(layer, "lora_A", {})
    active = [name for name in getattr(layer, "active_adapters", adapters) if name in adapters]
    if not active:
        return weight, 0
    lora_a = adapters[active[0]]
    return weight, int(getattr(lora_a, "weight", lora_a).shape[0])


def _line(
    op: str, formula: str, like: Tensor, rank: int, fit: Callable[[], support.Fit] | None = None
) -> str:
    chosen = support.choose(op, like.device, like.dtype, rank, fit)
    passed = []
    for name in support.BACKENDS[: support.BACKENDS.index(chosen)]:
        reason = support.miss(op, name, like.device, like.dtype, rank)
        if reason is None and name == "cuda" and fit is not None:
            reason = fit().miss or fit().slower
        passed.append(f"{name}: {reason or 'another backend is preferred'}")
    return f"  {op:6} {formula:32} -> {chosen}" + (f"   ({'; '.join(passed)})" if passed else "")


def explain(layer: Any, x: Tensor) -> str:
    """What a forward and backward of ``layer`` on ``x`` would run, op by op, with the reason for each choice.

    Args:
        layer: a LoRALinear, a PEFT ``lora.Linear``, or any module with a 2-d weight.
        x: an input [..., K] of the layer; only its shape, dtype and device matter.

    Returns:
        Lines of text, one per op.

    Raises:
        TypeError: ``layer`` has no 2-d weight.
    """
    weight, rank = _weight_and_rank(layer)
    n, k = weight.shape
    rows = x.numel() // k if k else 0
    x = x.to(autocast_dtype(x.device) or x.dtype)
    wish = support.preference()
    preference = f", prefers {wish.name}{' (strict)' if wish.strict else ''}" if wish.name else ""
    lines = []
    if type(layer).__module__.startswith("peft."):
        lines.append("PEFT's own forward runs here; fastlora.accelerate would make it:")
    lines += [
        f"{type(layer).__name__}: M={rows} K={k} N={n} r={rank} {x.dtype} on {x.device}{preference}"
    ]
    if rank:
        lines.append(_line("down", "h = s drop(x) A^T,  g = s dY B", x, rank))
    formula = "y = x W^T + h B^T,  dX = dY W + g A" if rank else "y = x W^T"
    flat = x.reshape(rows, k)
    fit = functools.partial(cuda_backend.gemm_fit, flat, weight, None, None, None)
    lines.append(_line("gemm", formula, x, rank, fit))
    if rank:
        lines.append(_line("wgrad", "dA = g^T drop(x),  dB = dY^T h", x, rank))
    return "\n".join(lines)
