"""A one-second check of each op on one device against fp64: what ``fastlora doctor`` runs."""

from __future__ import annotations

import time

import torch

from .. import reference
from . import bottleneck, nf4, norms, raw, scale, segments, support


def _error(got: torch.Tensor, truth: torch.Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


def _mask(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    state = torch.tensor([0x123456789ABCDEF, 42])
    got = raw.mask(state.to(x.device), x.shape[0], x.shape[1], 20000).cpu()
    return float((got != reference.mask(state, x.shape[0], x.shape[1], 20000)).sum())


def _down(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    return _error(raw.down(x, a, scale=0.5)[0], reference.down(x.double(), a.double(), None, 0.5))


def _gemm(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    h = reference.down(x, a, None, 0.5)
    truth = reference.gemm(x.double(), w.double(), h.double(), b.double(), None)
    return _error(raw.gemm(x, w, h, b), truth)


def _wgrad(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    g = reference.down(x, a, None, 0.5)
    d_a, _, _ = raw.wgrad(x, g, None, None, None, torch.float32, torch.float32)
    return _error(d_a, g.double().t() @ x.double())


def _quantize(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    """How many codes differ: one in a thousand may, which lies on a bound."""
    codes, absmax = nf4.quantize(w, 64)
    true_codes, true_absmax = reference.quantize_nf4(w.cpu(), 64)
    right = torch.equal(absmax.cpu(), true_absmax)
    return float((codes.cpu() != true_codes).double().mean()) if right else torch.inf


def _dequantize(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    codes, absmax = reference.quantize_nf4(w, 64)
    n, k = w.shape
    got = nf4.dequantize(codes, (absmax,), support.Form(n, k, 64, 0, False), w.dtype)
    truth = reference.dequantize_nf4(codes, absmax, (n, k), 64, w.dtype)
    return float((got != truth).sum())


def _segments(rows: int, device: torch.device) -> torch.Tensor:
    """Two segments and rows of none before and behind them."""
    return torch.tensor([rows // 5, rows // 2, rows - 3], dtype=torch.int32, device=device)


def _segment_bounds(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    offsets = _segments(x.shape[0], x.device)
    return float((segments.segment_bounds(offsets, x.shape[0]) != offsets).sum())


def _segment_down(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    bounds, l = _segments(x.shape[0], x.device), torch.stack((a, -2 * a))
    truth = reference.segment_down(x.double(), l.double(), bounds, None, 0.5)
    return _error(segments.segment_down(x, l, bounds, scale=0.5), truth)


def _segment_up(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    bounds, l = _segments(x.shape[0], x.device), torch.stack((b, -2 * b))
    h, y = x[:, : b.shape[1]].contiguous(), x @ w.t()
    truth = reference.segment_up(h.double(), l.double(), bounds, y=y.double())
    return _error(segments.segment_up(h, l, bounds, y=y), truth)


def _segment_wgrad(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    bounds, g = _segments(x.shape[0], x.device), x[:, : a.shape[0]].contiguous()
    f64 = torch.float64
    truth, _ = reference.segment_wgrad(x.double(), g.double(), None, None, bounds, None, f64, f64)
    assert truth is not None
    got, _ = segments.segment_wgrad(x, g, None, None, bounds, None, torch.float32, torch.float32)
    return _error(got, truth)


def _row_norms(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    truth, _ = reference.row_norms(w.double(), a.double(), b.double(), None, 0.5)
    return _error(norms.row_norms(w, a, b, 0.5)[0], truth)


def _nf4_row_norms(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    codes, absmax = reference.quantize_nf4(w, 64)
    n, k = w.shape
    form = support.Form(n, k, 64, 0, False)
    wide = reference.dequantize_nf4(codes, absmax, (n, k), 64, torch.float32)
    truth, _ = reference.row_norms(wide.double(), a.double(), b.double(), None, 0.5)
    return _error(norms.nf4_row_norms(codes, (absmax,), form, a, b, 0.5)[0], truth)


def _scale_columns(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    magnitude, norm = x[0], x[1].abs().float() + 1
    truth = reference.scale_columns(x.double(), magnitude.double(), norm.double())
    return _error(scale.scale_columns(x, magnitude, norm), truth)


def _scale_columns_backward(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:  # fmt: skip
    dy, magnitude = x.flip(0), x[0].float()
    wide = dy.double(), x.double(), magnitude.double()
    _, truth, _ = reference.scale_columns_backward(*wide, None, False, False)
    assert truth is not None
    _, got, _ = scale.scale_columns_backward(dy, x, magnitude, None, False, False)
    return _error(got, truth)


def _scaled_gemm(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    h, factor = x[:, : b.shape[1]].contiguous(), b[:, 0].float()
    base, low = x.double() @ w.double().t(), h.double() @ b.double().t()
    truth = factor.double() * (base + low)
    return _error(scale.scaled_gemm(x, w, h, b, None, factor), truth)


def _bottleneck_down(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    bias = a[:, 0].contiguous()
    truth, _ = reference.bottleneck_down(x.double(), a.double(), bias.double(), "silu", False)
    return _error(bottleneck.bottleneck_down(x, a, bias, "silu", False)[0], truth)


def _bottleneck_down_backward(
    x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> float:
    p = x[:, : a.shape[0]].contiguous()
    wide = x.double(), a.double(), p.double()
    truth, _ = reference.bottleneck_down_backward(*wide, "silu", False)
    return _error(bottleneck.bottleneck_down_backward(x, a, p, "silu", False)[0], truth)


def _bottleneck_up(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    h, bias, y = x[:, : b.shape[1]].contiguous(), b[:, 0].contiguous(), x @ w.t()
    truth = reference.bottleneck_up(h.double(), b.double(), bias.double(), y.double())
    return _error(bottleneck.bottleneck_up(h, b, bias, y), truth)


_CHECKS = {
    "mask": _mask,
    "down": _down,
    "gemm": _gemm,
    "wgrad": _wgrad,
    "quantize": _quantize,
    "dequantize": _dequantize,
    "segment_bounds": _segment_bounds,
    "segment_down": _segment_down,
    "segment_up": _segment_up,
    "segment_wgrad": _segment_wgrad,
    "row_norms": _row_norms,
    "nf4_row_norms": _nf4_row_norms,
    "scale_columns": _scale_columns,
    "scale_columns_backward": _scale_columns_backward,
    "scaled_gemm": _scaled_gemm,
    "bottleneck_down": _bottleneck_down,
    "bottleneck_down_backward": _bottleneck_down_backward,
    "bottleneck_up": _bottleneck_up,
}


def run(device: torch.device) -> list[dict[str, object]]:
    """Check every op with the backend it would use on ``device``.

    Returns:
        dict(op, backend, ok, error, seconds) per op; ``error`` is the relative error against fp64, or the
        exception's text.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    limit = 1e-5 if dtype is torch.float32 else 1e-2
    gen = torch.Generator().manual_seed(0)
    m, k, n, r = 192, 160, 136, 16
    x, w, a, b = (
        torch.randn(shape, generator=gen).to(device, dtype)
        for shape in ((m, k), (n, k), (r, k), (n, r))
    )
    results: list[dict[str, object]] = []
    for op, check in _CHECKS.items():
        start = time.perf_counter()
        result: dict[str, object] = {"op": op, "backend": "none"}
        try:
            result["backend"] = support.choose(op, device, dtype, r)
            error = check(x, w, a, b)
            result |= {"ok": error < limit, "error": error}
        except Exception as failure:  # a self-test reports whatever went wrong
            result |= {"ok": False, "error": f"{type(failure).__name__}: {failure}"}
        results.append(result | {"seconds": time.perf_counter() - start})
    return results
