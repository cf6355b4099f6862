"""row_norms, nf4_row_norms: the lengths of the rows of W + s B A, where the two cancel too, of W in floats and in 4 bits. In the
interpreter on the CPU, natively on a GPU."""

from __future__ import annotations

import pytest
import torch

import fastlora
from fastlora import NF4Tensor, ops, reference
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
    exact, _ = ops.row_norms(w.double(), a.double(), b.double(), 0.5)
    assert exact.dtype == F64


def test_the_same_bits_every_time():
    w, a, b = operands(100, 300, 16)
    first, _ = norms.row_norms(w, a, b, None, 2.0)
    for _ in range(100 if GPU else 3):
        assert torch.equal(norms.row_norms(w, a, b, None, 2.0)[0], first)


# ---- in 4 bits ----------------------------------------------------------------------------------------------

# (n, k, block_size): rows of whole blocks and of a part of one, rows that end amid one, rows of odd lengths
SHAPES = [
    (16, 256, 64),
    (33, 200, 32),
    (5, 72, 128),
    (19, 130, 64),
    (7, 254, 4096),
    (40, 255, 64),
    (6, 7, 32),
    (3, 1, 32),
    (1, 1, 64),
    (2, 2048, 2048),
]
FORMS = [(False, False), (True, False), (False, True), (True, True)]


def in_four_bits(w, block_size=64, double_quant=True, fp4=False, nested_block_size=4):
    q = NF4Tensor.quantize(w, block_size, double_quant, nested_block_size)
    q.quant_type = "fp4" if fp4 else "nf4"
    return q


def four_bit_norms(q, *update):
    scales = [t.view(-1).view(F32) if t.dtype == torch.int32 else t.view(-1) for t in q.scales]
    return norms.nf4_row_norms(q.codes.view(-1), scales, q.form, *update)


def check_four_bits(q, a, b, scaling=None, scale=0.5, tolerance=3e-7):
    got, _ = four_bit_norms(q, a, b, scaling, scale)
    true, _ = reference.row_norms(
        q.dequantize(F32).double(), a.double(), b.double(), scaling, scale
    )
    assert got.dtype == F32 and got.shape == true.shape
    torch.testing.assert_close(got.double(), true, rtol=tolerance, atol=1e-30)


@pytest.mark.parametrize(("double_quant", "fp4"), FORMS)
@pytest.mark.parametrize(("n", "k", "block_size"), SHAPES)
def test_four_bits_against_fp64(n, k, block_size, double_quant, fp4):
    w, a, b = operands(n, k, 5)
    # Off zero, and so is the offset of quantised scales: past the edges it is no part of a norm.
    q = in_four_bits(w + 3, block_size, double_quant, fp4)
    check_four_bits(q, a / 4, b)
    check_four_bits(q, a.half() / 4, b.half(), torch.tensor(1.7, device=DEVICE))


@pytest.mark.parametrize(("k", "rank"), [(192, 1), (97, 40), (192, 130)])
def test_four_bits_at_any_rank_and_strides(k, rank):
    q = in_four_bits(torch.randn(20, k, device=DEVICE))
    _, a, b = operands(40, 2 * k, rank)
    check_four_bits(q, a[:, k:], b[::2])
    check_four_bits(q, a[:, ::2], b[:20].t().contiguous().t())


@pytest.mark.parametrize("k", [1, 2, 64, 131, 256])
@pytest.mark.parametrize(("double_quant", "fp4"), FORMS)
def test_what_is_measured_is_the_dequantised_weight(k, double_quant, fp4):
    """Of one element in a row that is not zero the norm is its size, bit for bit."""
    n, zero = 150, 0 if fp4 else 7
    at = torch.arange(k) == torch.arange(n)[:, None] % k
    flat = torch.where(at, torch.randint(0, 16, (n, k)), zero).flatten()
    flat = torch.cat((flat, torch.zeros(n * k % 2, dtype=torch.int64)))
    q = in_four_bits(torch.randn(n, k), 32, double_quant, fp4)
    q.codes.view(-1).copy_((flat[0::2] * 16 + flat[1::2]).to(torch.uint8))
    q = q.to(DEVICE)
    got, _ = four_bit_norms(q, *operands(n, k, 2)[1:], None, 0.0)
    assert torch.equal(got, q.dequantize(F32).abs().amax(1)) and bool(got.any())


@pytest.mark.parametrize("k", [256, 129])
def test_four_bit_rows_that_cancel_lose_no_digits_of_what_is_left(k):
    """B A nearly -W, whose codes are -1 and 1."""
    signs = torch.randint(0, 2, (k,), device=DEVICE) * 2.0 - 1
    q = in_four_bits(signs.expand(48, k) * 0.7, 32, False)
    b = 1e-3 * torch.randn(48, 4, device=DEVICE)
    b[:, 0] = -0.7
    a = torch.cat((signs[None], torch.randn(3, k, device=DEVICE)))
    true, _ = reference.row_norms(q.dequantize(F32).double(), a.double(), b.double(), None, 1.0)
    assert true.max() < 0.01 * reference.row_norms(q.dequantize(F32), a, b, None, 0.0)[0].min()
    got, _ = four_bit_norms(q, a, b, None, 1.0)
    torch.testing.assert_close(got.double(), true, rtol=2e-4, atol=0)


@pytest.mark.parametrize("k", [192, 193])
def test_a_scale_that_is_not_finite_stays_in_its_block(k):
    absmax = torch.ones(-(-20 * k // 32), device=DEVICE)
    absmax[9], absmax[80] = torch.nan, torch.inf
    codes = torch.full((-(-20 * k // 2),), 0xFF, dtype=torch.uint8, device=DEVICE)
    w = reference.dequantize_nf4(codes, absmax, (20, k), 32, F32)
    a, b = operands(20, k, 3)[1:]
    got, _ = norms.nf4_row_norms(codes, [absmax], ops.Form(20, k, 32, 0, False), a, b, None, 0.5)
    true, _ = reference.row_norms(w, a, b, None, 0.5)
    assert 2 <= int(true.isfinite().logical_not().sum()) <= 4
    torch.testing.assert_close(got, true, rtol=1e-6, atol=0, equal_nan=True)


def test_no_four_bit_rows_and_no_columns():
    nothing = torch.empty(0, dtype=torch.uint8, device=DEVICE)
    for n, k in ((0, 8), (3, 0), (0, 0)):
        a, b = operands(n, k, 2)[1:]
        form = ops.Form(n, k, 64, 0, False)
        for run in (norms.nf4_row_norms, ops.nf4_row_norms):
            rest = (a, b, None, 1.0) if run is norms.nf4_row_norms else (a, b, 1.0)
            got, _ = run(nothing, [torch.empty(0, device=DEVICE)], form, *rest)
            assert got.shape == (n,) and got.dtype == F32 and not got.any()


def test_four_bits_with_a_magnitude_the_factor_of_each_row():
    w, a, b = operands(40, 70, 3)
    w[:6], b[:6] = 0, 0
    q = in_four_bits(w, 32, False)
    magnitude = torch.randn(80, device=DEVICE)[::2]
    length, got = four_bit_norms(q, a, b, None, 0.5, magnitude)
    exact, _ = reference.row_norms(q.dequantize(F32).double(), a.double(), b.double(), None, 0.5)
    torch.testing.assert_close(length.double(), exact, rtol=1e-6, atol=0)
    true = magnitude.double() / exact
    assert not got[:5].any()
    torch.testing.assert_close(got[6:].double(), true[6:], rtol=1e-6, atol=0)


@pytest.mark.parametrize("double_quant", [False, True])
def test_four_bit_op_and_its_fake(double_quant):
    _, a, b = operands(24, 41, 3)
    q = in_four_bits(torch.randn(24, 41, device=DEVICE), 32, double_quant)
    held = q.codes, q.scales, q.form
    with fastlora.backend("triton", strict=True):
        fastlora.reset_launches()
        got, _ = ops.nf4_row_norms(*held, a, b, 0.5)
        assert fastlora.launches() == {("nf4_row_norms", "triton"): 1}
    with fastlora.backend("torch"):
        torch.testing.assert_close(got, ops.nf4_row_norms(*held, a, b, 0.5)[0], rtol=3e-7, atol=0)
    run, flat = torch.ops.fastlora._nf4_row_norms.default, (q.codes, list(q.scales), *q.form)
    for backend in ("triton", "torch"):
        with fastlora.backend(backend):
            for scaling in (None, torch.tensor(2.0, device=DEVICE)):
                torch.library.opcheck(run, (*flat, a, b, scaling, 0.5, None))
            magnitude = torch.ones(24, device=DEVICE).double()
            torch.library.opcheck(run, (*flat, a, b, None, 0.5, magnitude))


def test_the_same_bits_every_time_of_four_bits():
    _, a, b = operands(100, 300, 16)
    q = in_four_bits(torch.randn(100, 300, device=DEVICE))
    first, _ = four_bit_norms(q, a, b, None, 2.0)
    for _ in range(100 if GPU else 3):
        assert torch.equal(four_bit_norms(q, a, b, None, 2.0)[0], first)


@pytest.mark.parametrize("wrong", ["lora_a", "lora_b", "magnitude"])
def test_factors_of_wrong_shapes_are_refused(wrong):
    """Kernels would read what lies behind them."""
    w, a, b = operands(24, 64, 3)
    m = torch.ones(24, device=DEVICE)
    if wrong == "lora_a":
        a = a[:, :40]
    elif wrong == "lora_b":
        b = b[:10]
    else:
        m = m[:1]
    q = in_four_bits(w)
    for run, weight in ((ops.row_norms, (w,)), (ops.nf4_row_norms, (q.codes, q.scales, q.form))):
        with pytest.raises(ValueError, match=rf"{wrong}: got shape .* beside a weight \[24, 64\]"):
            run(*weight, a, b, 0.5, m)
