"""``fastlora.explain``: which kernel each op would run for a layer and an input, and why not another."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._autocast import autocast_dtype
from ..ops import cuda_backend, support
from ..ops.nf4 import dx_reads_codes, reads_codes
from ..ops.scale import scales_in_gemm
from ..quant.bitsandbytes import obstacle, pack
from ..rng import mask_shape
from .base import LoRALayer
from .conv1d import LoRAConv1D


def _factor(layer: Any, name: str, adapter: str) -> Tensor | None:
    value = getattr(layer, name, {})[adapter] if adapter else None
    return getattr(value, "weight", value)


class _Parts(NamedTuple):
    """Of a fastlora layer or a PEFT ``lora.Linear``: the weight [N, K] (4-bit ones have a form), the active adapter's A and
    B, whether its low-rank path drops, whether it is DoRA, and whether that drops x for base and update alike."""

    weight: Any
    a: Tensor | None = None
    b: Tensor | None = None
    drops: bool = False
    dora: bool = False
    dora_drops: bool = False


def _tensors(layer: Any) -> _Parts:
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    if isinstance(base, LoRALayer) and not base.is_linear:
        raise TypeError(f"layer: got {type(base).__name__}, which is no linear")
    weight = base.weight.t() if isinstance(base, LoRAConv1D) else getattr(base, "weight", None)
    if hasattr(weight, "quant_state"):  # bitsandbytes' 4-bit weight, as accelerate takes it
        if reason := obstacle(weight, read_code=False):
            raise TypeError(f"layer: its 4-bit weight {reason}")
        weight = pack(weight)
    quantized = hasattr(weight, "form")
    if not quantized and (not isinstance(weight, Tensor) or weight.ndim != 2):
        raise TypeError(
            f"layer: got {type(layer).__name__}; accepted are fastlora.LoRALinear, QLoRALinear and peft's "
            "lora.Linear, or any module with a 2-d weight"
        )
    merged = bool(getattr(layer, "merged_adapters", ()))
    adapters = {} if merged else getattr(layer, "lora_A", {})
    active = [name for name in getattr(layer, "active_adapters", adapters) if name in adapters]
    if not active:
        return _Parts(weight)
    dropout = getattr(layer, "lora_dropout", {})
    drop = dropout[active[0]] if active[0] in dropout else 0.0  # noqa: SIM401 (PEFT's ModuleDict has no get)
    drops = getattr(drop, "p", drop if isinstance(drop, float) else 0.0) > 0 and layer.training
    factors = _factor(layer, "lora_A", active[0]), _factor(layer, "lora_B", active[0])
    if active[0] in getattr(layer, "lora_magnitude_vector", ()):
        return _Parts(weight, *factors, False, True, drops)
    return _Parts(weight, *factors, drops)


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


def _dora_lines(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, quantized: bool, apart: bool
) -> list[str]:
    rank = a.shape[0]
    norms = "torch  (from W A^T and A A^T; W read once)"
    if x.device.type == "cuda":  # elsewhere layers/dora.py has a way of its own
        op, dtype = ("nf4_row_norms", torch.float32) if quantized else ("row_norms", x.dtype)
        read = "its codes read once" if quantized else "W read once"
        norms = f"{support.choose(op, x.device, dtype, rank)}  ({read})"
    scale = support.choose("scale_columns", x.device, x.dtype, 0)
    kept = "in training z is kept where m is trained"
    fit = functools.partial(cuda_backend.scaled_fit, x, weight, a, b)
    if not apart and _why_not_whole(x, rank, fit) == "":
        scale, kept = "cuda", f"in z's own launch; {kept}"
    elif not apart and scales_in_gemm(x.shape[0], x, rank):
        kept += "; where it is not, in z's own launch"
    return [
        f"  DoRA   n = ||W + s B A|| by rows        -> {norms}",
        f"  DoRA   y = bias + (m / n) z, z below    -> {scale}  ({kept})",
    ]


def explain(layer: Any, x: Tensor) -> str:
    """What a forward and backward of ``layer`` on ``x`` would run, op by op, with the reason for each choice.

    Args:
        layer: a LoRALinear, a QLoRALinear, a PEFT ``lora.Linear`` or ``Linear4bit``, or any module with a 2-d weight.
        x: an input [..., K] of the layer; its values do not matter.

    Returns:
        Lines of text, one per op.

    Raises:
        TypeError: ``layer`` has no 2-d weight, or a 4-bit one that cannot be read as it lies.
    """
    weight, lora_a, lora_b, drops, dora, dora_drops = _tensors(layer)
    n, k = weight.shape
    rank = 0 if lora_a is None else lora_a.shape[0]
    rows = x.numel() // k if k else 0
    quantized = hasattr(weight, "form")
    told = getattr(getattr(layer, "base_layer", layer), "compute_dtype", None)  # bitsandbytes was
    x = x.to((quantized and told) or autocast_dtype(x.device) or x.dtype)
    held, weight = weight, x.new_empty(n, k) if quantized else weight.to(x.dtype)
    wish = support.preference()
    preference = f", prefers {wish.name}{' (strict)' if wish.strict else ''}" if wish.name else ""
    lines = []
    if type(layer).__module__.startswith("peft."):
        lines.append("PEFT's own forward runs here; fastlora.accelerate would make it:")
    lines += [
        f"{type(layer).__name__}: M={rows} K={k} N={n} r={rank} {x.dtype} on {x.device}{preference}"
    ]
    flat, dy = x.reshape(rows, k), x.new_empty(rows, n)
    whole: dict[str, str | None] = {"y": None, "dX": None}  # why not in one launch; "" where it is
    state = x.new_empty(2, dtype=torch.int64) if drops else None
    codes = dx_codes = None  # who multiplies by them, and the backend that does for dX
    if quantized:
        codes = reads_codes(flat, held.codes, held.scales, held.form, lora_a, lora_b, state)
        dx_codes = dx_reads_codes(dy, held.codes, held.form, lora_a, state)
    if dora and lora_a is not None and lora_b is not None:
        lines += _dora_lines(
            flat, weight, lora_a, lora_b, quantized, codes is not None or dora_drops
        )
    if quantized:
        takers = [name for name, by in (("y", codes), ("dX", dx_codes)) if by is None]
        if takers:
            lines.append(_line("dequantize", f"W, for {' and again for '.join(takers)}", x, 0))
    if codes:
        formula = "y = x W^T + h B^T" if rank else "y = x W^T"
        formula = f"h = s x A^T,  {formula}" if codes.makes_h and rank else formula
        lines.append(f"  {codes.op} {formula:32} -> {codes.backend}   (over the codes)")
    if codes and not codes.makes_h:
        lines.append(_line("down", "h = s drop(x) A^T", x, rank))
    if rank and lora_a is not None and lora_b is not None:
        saved_h = x.new_empty(rows, rank)
        for name, fit in (
            ("y", functools.partial(cuda_backend.lora_fit, flat, weight, lora_a, lora_b, state)),
            (
                "dX",
                functools.partial(
                    cuda_backend.lora_fit,
                    dy,
                    weight,
                    lora_a,
                    lora_b,
                    state,
                    backward=True,
                    h=saved_h,
                    saved_x=flat,
                ),
            ),
        ):
            over_codes = codes if name == "y" else dx_codes
            whole[name] = "" if over_codes else _why_not_whole(x, rank, fit)
    if codes:
        whole["y"] = ""
    elif whole["y"] == "":
        lines.append("  lora   h = s x A^T,  y = x W^T + h B^T  -> cuda   (one launch)")
    dx_formula = "dX = dY W + g A" if rank else "dX = dY W"
    if dx_codes:
        whole["dX"] = ""
        lines.append(f"  nf4_dx {dx_formula:32} -> {dx_codes}   (over the codes)")
    elif whole["dX"] == "":
        lines.append("  lora   g, dX, dA, dB                    -> cuda   (one launch)")
    if whole["y"] == whole["dX"] == "" and not (dx_codes and rank):
        return "\n".join(lines)

    dx_whole = False  # g and dX in one launch, the gradients of the factors in another
    if whole["dX"] and lora_a is not None and lora_b is not None:
        fit = functools.partial(cuda_backend.dx_fit, dy, weight, lora_a, lora_b, state)
        dx_whole = _why_not_whole(x, rank, fit) == ""
    if dx_whole:
        lines.append("  lora   g = s dY B,  dX = dY W + g A     -> cuda   (one launch)")
    h = x.new_empty(rows, rank) if rank else None
    made = ["h = s drop(x) A^T"] if whole["y"] != "" else []
    if dx_codes or (whole["dX"] != "" and not dx_whole):
        made.append("g = s dY B")
    if rank and made:
        lines.append(_line("down", ",  ".join(made), x, rank))
    words = x.new_empty(mask_shape(rows, k), dtype=torch.int32) if rank and drops else None
    a_t = None if lora_a is None else lora_a.t()
    forward = functools.partial(cuda_backend.gemm_fit, flat, weight, h, lora_b, None)
    backward = functools.partial(cuda_backend.gemm_fit, dy, weight.t(), h, a_t, words)
    if whole["y"] != "":
        formula = "y = x W^T + h B^T" if rank else "y = x W^T"
        lines.append(_line("gemm", formula, x, rank, forward))
    if whole["dX"] != "":
        if not dx_whole:
            lines.append(_line("gemm", dx_formula, x, rank, backward))
    if rank and (dx_codes or whole["dX"] != ""):
        lines.append(_line("wgrad", "dA = g^T drop(x),  dB = dY^T h", x, rank))
    if dx_whole:
        whole["dX"] = ""  # it is, only the gradients of A and B are not
    lines += [f"  {name} is not one launch: {why}" for name, why in whole.items() if why]
    return "\n".join(lines)


def _why_not_whole(like: Tensor, rank: int, fit: Callable[[], support.Fit]) -> str:
    if support.takes_whole("lora", like.device, like.dtype, rank, fit):
        return ""
    wish = support.preference().name
    if wish not in (None, "cuda"):
        return f"{wish} is preferred"
    reason = support.miss("lora", "cuda", like.device, like.dtype, rank)
    if reason is not None:
        return reason
    suits = fit()
    return suits.miss or suits.slower or ""
