"""``torch.ops.fastlora._segment_bounds/_down/_up/_gemm/_linear/_nf4_gemm/_wgrad``: ops of raw.py and nf4.py with factors per segment.

Segment e is the rows bounds[e]..bounds[e + 1] (int32 [E + 1], made of the caller's offsets by ``segment_bounds``); other
rows have no factors. Private, as those are; contracts as in reference.py, and an output that was not asked for comes back
with shape [0]. On Triton nothing depends on the values of bounds but what is computed: launches and workspace are fixed by
shapes, and nothing waits for the device. The torch backend loops over segments, for which a GPU has to be waited for.

With many rows the low-rank terms are more of K to Triton's GEMM, where ``segment_down`` can lay them out so, or it adds them
to the tiles of y that it has just multiplied; else whoever is the fastest makes y, and ``segment_up`` adds to it: ``gemm_fit``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..rng import KEEP_ALL
from . import nf4, raw, support
from .raw import backend_module

_library = torch.library.Library("fastlora", "FRAGMENT")
_library.define("_segment_bounds(Tensor offsets, SymInt rows) -> Tensor")
_library.define(
    "_segment_down(Tensor x, Tensor l, Tensor bounds, Tensor? scalings, float scale, Tensor? rng_state, int keep) -> Tensor"
)
_library.define("_segment_up(Tensor h, Tensor l, Tensor bounds, Tensor? words) -> Tensor")
_library.define(
    "_segment_up_(Tensor(a!) y, Tensor h, Tensor l, Tensor bounds, Tensor? words) -> ()"
)
_library.define(
    "_segment_gemm(Tensor x, Tensor w, Tensor? h, Tensor? l, Tensor bounds, Tensor? bias, Tensor? words) -> Tensor"
)
_library.define(
    "_segment_linear(Tensor x, Tensor w, Tensor a, Tensor b, Tensor bounds, Tensor? scalings, float scale, "
    "Tensor? rng_state, int keep, Tensor? bias) -> (Tensor, Tensor)"
)
_library.define(
    "_segment_nf4_gemm(Tensor x, Tensor codes, Tensor[] scales, SymInt rows, SymInt cols, int block_size, "
    "int nested_block_size, bool fp4, bool dx, Tensor? h, Tensor? l, Tensor bounds, Tensor? bias, Tensor? words) -> Tensor"
)
_library.define(
    "_segment_wgrad(Tensor? x, Tensor? g, Tensor? dy, Tensor? h, Tensor bounds, Tensor? words, "
    "ScalarType dtype_a, ScalarType dtype_b) -> (Tensor, Tensor)"
)


def _bounds(offsets: Tensor, rows: int) -> Tensor:
    if offsets.device.type == "cpu":
        _check(offsets, rows)
    name = support.choose("segment_bounds", offsets.device, torch.float32, 0)  # for any dtype
    made: Tensor = backend_module(name).segment_bounds(offsets, rows)
    return made


def _check(offsets: Tensor, rows: int) -> None:
    """On the CPU wrong values can be told at once; on a GPU that would have to be waited for, and they are clamped."""
    values = offsets.tolist()
    if values[0] < 0 or values[-1] > rows or any(a > b for a, b in itertools.pairwise(values)):
        raise ValueError(
            f"offsets: got {values if len(values) <= 16 else [*values[:8], '...', *values[-8:]]} for {rows} rows of x; "
            f"accepted are row numbers from 0 to {rows} that never decrease, rows offsets[e] to offsets[e + 1] being "
            "those of adapter e"
        )


def _down(
    x: Tensor,
    l: Tensor,
    bounds: Tensor,
    scalings: Tensor | None,
    scale: float,
    rng_state: Tensor | None,
    keep: int,
) -> Tensor:
    name = support.choose("segment_down", x.device, x.dtype, l.shape[1])
    h: Tensor = backend_module(name).segment_down(x, l, bounds, scalings, scale, rng_state, keep)
    return h


def _up(h: Tensor, l: Tensor, bounds: Tensor, words: Tensor | None) -> Tensor:
    return _onto(None, h, l, bounds, words)


def _up_(y: Tensor, h: Tensor, l: Tensor, bounds: Tensor, words: Tensor | None) -> None:
    _onto(y, h, l, bounds, words)


def _onto(y: Tensor | None, h: Tensor, l: Tensor, bounds: Tensor, words: Tensor | None) -> Tensor:
    name = support.choose("segment_up", h.device, h.dtype, h.shape[1])
    made: Tensor = backend_module(name).segment_up(h, l, bounds, words, y)
    return made


_FEWEST_FUSED_ROWS = 512  # below, tiles are small, and other kernels or more CTAs make y
# Rows a segment, on average, below which y is better made first and added to; measured on an H100: benchmarks/NOTES.md. Terms
# that are added to a tile wait for the factors of every segment it meets. Terms that are more of K do not, but multiply
# by zeros, the more of them the more segments a tile meets.
_FEWEST_ROWS_A_SEGMENT = 512
_FEWEST_SPREAD_ROWS_A_SEGMENT = 64  # of up to 32 ranks; of more, twice as many


def gemm_fit(
    rows: int, segments: int, dtype: torch.dtype, fewest: int | None = None
) -> support.Fit:
    """How a product with ``rows`` rows in ``segments`` suits triton/gemm.py's, of ``fewest`` rows a segment."""
    fewest = _FEWEST_ROWS_A_SEGMENT if fewest is None else fewest
    if dtype == torch.float32:
        return support.Fit(None, "fp32 sums need the registers that the low-rank terms would")
    if rows < _FEWEST_FUSED_ROWS:
        return support.Fit(None, f"{rows} rows are for the fastest gemm, and segment_up")
    if rows < fewest * segments:
        return support.Fit(None, f"{segments} segments of {rows} rows are for segment_up")
    return support.Fit()


def _fuses(x: Tensor, l: Tensor, fewest: int | None = None) -> bool:
    wish = support.preference().name
    return (
        (wish == "triton" or (wish is None and x.device.type != "cpu"))
        and support.miss("segment_gemm", "triton", x.device, x.dtype, l.shape[2]) is None
        and gemm_fit(x.shape[0], l.shape[0], x.dtype, fewest) == support.Fit()
    )


def _linear(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bounds: Tensor,
    scalings: Tensor | None,
    scale: float,
    rng_state: Tensor | None,
    keep: int,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if _fuses(x, b, _FEWEST_SPREAD_ROWS_A_SEGMENT * (1 if b.shape[2] <= 32 else 2)):
        made: tuple[Tensor, Tensor] | None = backend_module("triton").segment_linear(
            x, w, a, b, bounds, scalings, scale, rng_state, keep, bias
        )
        if made is not None:
            return made
    h = _down(x, a, bounds, scalings, scale, rng_state, keep)
    return _gemm(x, w, h, b, bounds, bias, None), h


def _gemm(
    x: Tensor,
    w: Tensor,
    h: Tensor | None,
    l: Tensor | None,
    bounds: Tensor,
    bias: Tensor | None,
    words: Tensor | None,
) -> Tensor:
    if h is None or l is None:
        return raw.gemm(x, w, None, None, bias)
    if _fuses(x, l):
        y: Tensor = backend_module("triton").segment_gemm(x, w, h, l, bounds, bias, words)
        return y
    return _onto(raw.gemm(x, w, None, None, bias), h, l, bounds, words)


def _nf4_gemm(
    x: Tensor,
    codes: Tensor,
    scales: Sequence[Tensor],
    rows: int,
    cols: int,
    block_size: int,
    nested_block_size: int,
    fp4: bool,
    dx: bool,
    h: Tensor | None,
    l: Tensor | None,
    bounds: Tensor,
    bias: Tensor | None,
    words: Tensor | None,
) -> Tensor:
    form = support.Form(rows, cols, block_size, nested_block_size, fp4)
    if not nf4.takes_codes(x, codes, scales, form, dx):
        w = nf4.dequantize(codes, scales, form, x.dtype)
        return _gemm(x, w.t() if dx else w, h, l, bounds, bias, words)
    y = nf4.product(x, codes, scales, form, bias, dx)
    return y if h is None or l is None else _onto(y, h, l, bounds, words)


def _wgrad(
    x: Tensor | None,
    g: Tensor | None,
    dy: Tensor | None,
    h: Tensor | None,
    bounds: Tensor,
    words: Tensor | None,
    dtype_a: torch.dtype,
    dtype_b: torch.dtype,
) -> tuple[Tensor, Tensor]:
    like, skinny = (x, g) if x is not None else (dy, h)
    assert like is not None and skinny is not None
    name = support.choose("segment_wgrad", like.device, like.dtype, skinny.shape[1])
    outputs = backend_module(name).segment_wgrad(x, g, dy, h, bounds, words, dtype_a, dtype_b)
    d_a, d_b = (like.new_empty(0) if out is None else out for out in outputs)
    return d_a, d_b


def _fake_bounds(offsets: Tensor, rows: int) -> Tensor:
    return offsets.new_empty(offsets.shape, dtype=torch.int32)


def _fake_down(  # type: ignore[no-untyped-def]
    x, l, bounds, scalings, scale, rng_state, keep
) -> Tensor:
    return x.new_empty(x.shape[0], l.shape[1])


def _fake_up(h: Tensor, l: Tensor, bounds: Tensor, words: Tensor | None) -> Tensor:
    return h.new_empty(h.shape[0], l.shape[1])


def _fake_up_(y: Tensor, h: Tensor, l: Tensor, bounds: Tensor, words: Tensor | None) -> None:
    return None


def _fake_gemm(x, w, h, l, bounds, bias, words) -> Tensor:  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], w.shape[0])


def _fake_linear(  # type: ignore[no-untyped-def]
    x, w, a, b, bounds, scalings, scale, rng_state, keep, bias
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], w.shape[0]), x.new_empty(x.shape[0], a.shape[1])


def _fake_nf4_gemm(  # type: ignore[no-untyped-def]
    x, codes, scales, rows, cols, block_size, nested_block_size, fp4, dx, h, l, bounds, bias, words
) -> Tensor:
    return x.new_empty(x.shape[0], cols if dx else rows)


def _fake_wgrad(  # type: ignore[no-untyped-def]
    x, g, dy, h, bounds, words, dtype_a, dtype_b
) -> tuple[Tensor, Tensor]:
    count = bounds.shape[0] - 1
    nothing = bounds.new_empty(0, dtype=(x if x is not None else dy).dtype)
    return (
        nothing if x is None else x.new_empty(count, g.shape[1], x.shape[1], dtype=dtype_a),
        nothing if dy is None else dy.new_empty(count, dy.shape[1], h.shape[1], dtype=dtype_b),
    )


for _name, _kernel, _fake in (
    ("_segment_bounds", _bounds, _fake_bounds),
    ("_segment_down", _down, _fake_down),
    ("_segment_up", _up, _fake_up),
    ("_segment_up_", _up_, _fake_up_),
    ("_segment_gemm", _gemm, _fake_gemm),
    ("_segment_linear", _linear, _fake_linear),
    ("_segment_nf4_gemm", _nf4_gemm, _fake_nf4_gemm),
    ("_segment_wgrad", _wgrad, _fake_wgrad),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlora::{_name}", _fake, lib=_library)

_bounds_op = torch.ops.fastlora._segment_bounds.default
_down_op = torch.ops.fastlora._segment_down.default
_up_op = torch.ops.fastlora._segment_up.default
_up_inplace_op = torch.ops.fastlora._segment_up_.default
_gemm_op = torch.ops.fastlora._segment_gemm.default
_linear_op = torch.ops.fastlora._segment_linear.default
_nf4_gemm_op = torch.ops.fastlora._segment_nf4_gemm.default
_wgrad_op = torch.ops.fastlora._segment_wgrad.default


def segment_bounds(offsets: Tensor, rows: int) -> Tensor:
    """Offsets [E + 1] of any integer dtype as bounds int32 [E + 1], clamped to 0..rows and never decreasing.

    Raises:
        ValueError: offsets lie on the CPU and would have had to be changed.
    """
    return _bounds_op(offsets, rows)


def segment_down(
    x: Tensor,
    l: Tensor,
    bounds: Tensor,
    scalings: Tensor | None = None,
    scale: float = 1.0,
    rng_state: Tensor | None = None,
    keep: int = KEEP_ALL,
) -> Tensor:
    """h = scale * [scalings[e]] * drop(x) l[e]^T: x [M, K], l [E, r, K] (x's dtype or fp32), scalings [E] -> [M, r].

    Rows of no segment get zeros.
    """
    return _down_op(x, l, bounds, scalings, scale, rng_state, keep)


def segment_up(
    h: Tensor,
    l: Tensor,
    bounds: Tensor,
    words: Tensor | None = None,
    y: Tensor | None = None,
) -> Tensor:
    """y += drop(h l[e]^T) in place, for h [M, r], l [E, N, r] and y [M, N], contiguous; without y the term alone."""
    if y is None:
        return _up_op(h, l, bounds, words)
    _up_inplace_op(y, h, l, bounds, words)
    return y


def segment_gemm(
    x: Tensor,
    w: Tensor,
    h: Tensor | None,
    l: Tensor | None,
    bounds: Tensor,
    bias: Tensor | None = None,
    words: Tensor | None = None,
) -> Tensor:
    """y = x w^T + bias + drop(h l[e]^T): x [M, K], w [N, K] of any strides, h [M, r], l [E, N, r] -> [M, N].

    Rows of no segment get x w^T + bias, and so do all without h and l.
    """
    return _gemm_op(x, w, h, l, bounds, bias, words)


def segment_linear(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bounds: Tensor,
    scalings: Tensor | None = None,
    scale: float = 1.0,
    rng_state: Tensor | None = None,
    keep: int = KEEP_ALL,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, h) of ``segment_down`` with a [E, r, K] and of ``segment_gemm`` with its h and b [E, N, r], without a mask."""
    y, h = _linear_op(x, w, a, b, bounds, scalings, scale, rng_state, keep, bias)
    return y, h


def segment_nf4_gemm(
    x: Tensor,
    codes: Tensor,
    scales: Sequence[Tensor],
    form: support.Form,
    h: Tensor | None,
    l: Tensor | None,
    bounds: Tensor,
    bias: Tensor | None = None,
    words: Tensor | None = None,
    dx: bool = False,
) -> Tensor:
    """``segment_gemm`` over a 4-bit weight W [N, K]: w is W, or with ``dx`` W^T."""
    return _nf4_gemm_op(x, codes, scales, *form, dx, h, l, bounds, bias, words)


def segment_wgrad(
    x: Tensor | None,
    g: Tensor | None,
    dy: Tensor | None,
    h: Tensor | None,
    bounds: Tensor,
    words: Tensor | None,
    dtype_a: torch.dtype,
    dtype_b: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """dA[e] = g^T drop(x) [E, r, K] and dB[e] = dy^T h [E, N, r] over segment e; shape [0] for what was not asked.

    x and g come together, dy and h too. A segment of no rows gets zeros.
    """
    d_a, d_b = _wgrad_op(x, g, dy, h, bounds, words, dtype_a, dtype_b)
    return d_a, d_b
