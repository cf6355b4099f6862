"""``torch.ops.fastlora._segment_bounds/_segment_down/_segment_up/_segment_wgrad``: ops of raw.py with factors per segment.

Segment e is the rows bounds[e]..bounds[e + 1] (int32 [E + 1], made of the caller's offsets by ``segment_bounds``); other
rows have no factors. Private, as those are; contracts as in reference.py, and an output that was not asked for comes back
with shape [0]. On Triton nothing depends on the values of bounds but what is computed: launches and workspace are fixed by
shapes, and nothing waits for the device. The torch backend loops over segments, for which a GPU has to be waited for.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..rng import KEEP_ALL
from . import support
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
    ("_segment_wgrad", _wgrad, _fake_wgrad),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlora::{_name}", _fake, lib=_library)

_bounds_op = torch.ops.fastlora._segment_bounds.default
_down_op = torch.ops.fastlora._segment_down.default
_up_op = torch.ops.fastlora._segment_up.default
_up_inplace_op = torch.ops.fastlora._segment_up_.default
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
