"""The error rules: accuracy against fp64 beside torch's own error, and bit-for-bit equality."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(got: Tensor, truth: Tensor) -> float:
    """|got - truth| / |truth| in the Frobenius norm, in fp64; |got| where the truth is zero."""
    truth = truth.double()
    scale = float(truth.norm()) or 1.0
    return float((got.double() - truth).norm()) / scale


def assert_accurate(
    name: str,
    got: Tensor,
    same_dtype: Tensor,
    truth: Tensor,
    factor: float = 2.0,
    noise: Tensor | None = None,
) -> None:
    """``got`` is at most ``factor`` times as far from the fp64 ``truth`` as torch's ``same_dtype`` result is.

    Checked in the norm and at the worst element; one rounding of the result (0.4 units in the last place of its
    dtype in the norm, a whole one at the worst element) and the fp32 accumulator's own noise (2^-21) are always
    allowed. So are three of ``noise``, the standard deviation that one rounding of an intermediate must leave in each
    element: where a sum of thousands of roundings is a single number, torch's own error may be small by luck. NaN and
    infinities must stand where torch has them.

    Raises:
        AssertionError: naming the tensor, both errors and the first differing index.
    """
    assert got.shape == truth.shape, (
        f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    )
    if got.numel() == 0:
        return
    finite = torch.isfinite(same_dtype)
    for what, test in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        differs = test(got) != test(same_dtype)
        assert not differs.any(), (
            f"{name}: {what} differs from torch's at {differs.nonzero()[0].tolist()}"
        )
    if not finite.any():
        return
    got64, torch64, truth = (
        got.double()[finite],
        same_dtype.double()[finite],
        truth.double()[finite],
    )
    eps = torch.finfo(got.dtype).eps
    spread = torch.zeros_like(truth) if noise is None else 3 * noise.double()[finite]
    ours, theirs = relative_error(got64, truth), relative_error(torch64, truth)
    allowed = max(factor * theirs, 0.4 * eps, 2**-21, relative_error(truth + spread, truth))
    assert ours <= allowed, f"{name}: relative error {ours:.3e}, torch's own {theirs:.3e}"
    worst = (got64 - truth).abs().max()
    most = factor * (torch64 - truth).abs().max() + eps * truth.abs().max() + spread.max()
    assert worst <= most, f"{name}: worst error {worst:.3e}, allowed {most:.3e}"


def assert_same_bits(name: str, got: Tensor, expected: Tensor) -> None:
    """Equal element for element, NaN to NaN; an all-zero pair does not count as evidence and is refused.

    Raises:
        AssertionError: naming the tensor, the first differing index and both values.
    """
    assert got.shape == expected.shape, (
        f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    )
    assert got.dtype == expected.dtype, f"{name}: {got.dtype}, expected {expected.dtype}"
    if got.numel() == 0:
        return
    assert bool((expected != 0).any()), (
        f"{name}: the expected values are all zero, which proves nothing"
    )
    differs = (got != expected) & ~(got.isnan() & expected.isnan())
    if differs.any():
        at = differs.nonzero()[0].tolist()
        where = tuple(at)
        raise AssertionError(
            f"{name}: {got[where].item()} instead of {expected[where].item()} at {at}"
        )
