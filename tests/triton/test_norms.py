"""row_norms: the lengths of the rows of W + s B A, where the two cancel too. In the interpreter on the CPU, natively on a GPU."""

from __future__ import annotations

import pytest
import torch

import fastlora
from fastlora import ops, reference
from fastlora.ops import support

norms = pytest.importorskip("fastlora.triton.norms")
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
missing = support.miss("row_norms", "triton", DEVICE, F32, 16)
pytestmark = pytest.mark.skipif(missing is not None, reason=f"not here: {missing}")


def operands(n, k, r, dtype=F32, factors=F32):
    w = torch.randn(n, k, device=DEVICE).to(dtype)
    return w, torch.randn(r, k, device=DEVICE).to(factors), torch.randn(n, r, device=DEVICE).to(factors)  # fmt: skip


def check(w, a, b, scaling=None, scale=0.5, tolerance=3e-7):
    got, none = norms.row_norms(w, a, b, scaling, scale)
    true, _ = reference.row_norms(w.to(F64), a.to(F64), b.to(F64), scaling, scale)
    assert none is None and got.dtype == F32 and got.shape == true.shape
    torch.testing.assert_close(got.double(), true, rtol=tolerance, atol=1e-30)


@pytest.mark.parametrize(("n", "k", "r"), [(1, 1, 1), (16, 128, 16), (33, 200, 7), (50, 384, 40), (5, 72, 130)])  # fmt: skip
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_against_fp64(n, k, r, dtype):
    check(*operands(n, k, r, dtype))
    check(*operands(n, k, r, dtype, F32 if dtype == F32 else dtype))


def test_scaling_is_read_on_the_device():
    w, a, b = operands(20, 96, 4)
    check(w, a, b, torch.tensor(1.7, device=DEVICE), 0.5)


def test_any_strides():
    w, a, b = operands(40, 60, 6)
    check(w[::2, 3:], a[:, 3:], b[::2])
    check(w.t().contiguous().t(), a.t().contiguous().t(), b.t().contiguous().t())


def test_rows_that_cancel_lose_no_digits_of_what_is_left():
    """B A nearly -W: what is left is a thousandth of either, and its error that of W's own rounding."""
    a, b = operands(48, 256, 8)[1:]
    left = 1e-3 * torch.randn(48, 256, device=DEVICE)
    w = left - 0.5 * (b @ a)
    true, _ = reference.row_norms(w.double(), a.double(), b.double(), None, 0.5)
    got, _ = norms.row_norms(w, a, b, None, 0.5)
    torch.testing.assert_close(got.double(), true, rtol=2e-4, atol=0)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e18])
def test_extreme_scalings(scale):
    check(*operands(10, 64, 3), scale=scale, tolerance=1e-6)


def test_nan_and_infinity_stay_in_their_rows():
    w, a, b = operands(20, 64, 3)
    w[3, 5], w[17, 0] = float("nan"), float("inf")
    got, _ = norms.row_norms(w, a, b, None, 1.0)
    assert bool(got[3].isnan()) and bool(got[17].isinf())
    assert int(got.isfinite().sum()) == 18


def test_no_rows_and_no_columns():
    w, a, b = operands(0, 8, 2)
    assert norms.row_norms(w, a, b, None, 1.0)[0].shape == (0,)
    w, a, b = operands(3, 0, 2)
    assert not any(t.any() for t in norms.row_norms(w, a, b, None, 1.0, b[:, 0].float()))


@pytest.mark.parametrize("dtype", [F32, torch.float16])
def test_with_a_magnitude_the_factor_of_each_row(dtype):
    w, a, b = (t.to(dtype) for t in operands(40, 70, 3))
    w[:5] = 0
    b[:5] = 0
    magnitude = torch.randn(80, device=DEVICE)[::2]
    length, got = norms.row_norms(w, a, b, None, 0.5, magnitude)
    exact, _ = reference.row_norms(w.double(), a.double(), b.double(), None, 0.5)
    torch.testing.assert_close(length.double(), exact, rtol=1e-6, atol=0)
    true = magnitude.double() / exact
    assert not got[:5].any()
    torch.testing.assert_close(got[5:].double(), true[5:], rtol=1e-6, atol=0)


def test_op_and_its_fake():
    w, a, b = operands(24, 40, 3)
    with fastlora.backend("triton", strict=True):
        fastlora.reset_launches()
        ops.row_norms(w, a, b, 0.5)
        assert fastlora.launches() == {("row_norms", "triton"): 1}
    for scaling in (None, torch.tensor(2.0, device=DEVICE)):
        torch.library.opcheck(torch.ops.fastlora._row_norms.default, (w, a, b, scaling, 0.5, None))
    for backend in ("triton", "torch"):
        with fastlora.backend(backend):  # a magnitude in fp64 beside a weight in fp32
            args = w, a, b, None, 0.5, torch.ones(24, device=DEVICE).double()
            torch.library.opcheck(torch.ops.fastlora._row_norms.default, args)
    exact = ops.row_norms(w.double(), a.double(), b.double(), 0.5)
    assert exact.dtype == F64


def test_the_same_bits_every_time():
    w, a, b = operands(100, 300, 16)
    first, _ = norms.row_norms(w, a, b, None, 2.0)
    for _ in range(100 if GPU else 3):
        assert torch.equal(norms.row_norms(w, a, b, None, 2.0)[0], first)
