"""The kernels of a bottleneck against its formulas in fp64: every activation, awkward sizes and layouts, split K, NaN and
infinities. In the interpreter on the CPU, natively on a GPU."""

from __future__ import annotations

import pytest
import torch

import fastlora
from fastlora import ops, reference
from fastlora.activations import KINDS
from fastlora.ops import support
from fastlora.testing.compare import assert_accurate, assert_same_bits
from fastlora.testing.inputs import LAYOUTS, integers, with_layout

kernels = pytest.importorskip("fastlora.triton.bottleneck")
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = [F16, BF16, F32] if GPU else [F16, F32]
missing = support.miss("bottleneck_up", "triton", DEVICE, F16, 16)
pytestmark = pytest.mark.skipif(missing is not None, reason=f"not here: {missing}")
SIZES = [(1, 1, 1), (2, 40, 7), (33, 70, 16), (70, 96, 40), (17, 130, 65)]  # M, K, r


def randn(*shape, dtype=F32, std=1.0):
    return (std * torch.randn(shape, device=DEVICE)).to(dtype)


def wide(*tensors):
    return [t.double() for t in tensors]


def check_all(names, got, torchs, truth):
    for name, mine, theirs, true in zip(names, got, torchs, truth, strict=True):
        assert_accurate(name, mine, theirs, true)


@pytest.mark.parametrize(("m", "k", "r"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_down_against_fp64(m, k, r, dtype):
    x, l, bias = randn(m, k, dtype=dtype), randn(r, k, dtype=dtype, std=k**-0.5), randn(r, dtype=dtype)  # fmt: skip
    got = kernels.bottleneck_down(x, l, bias, "gelu", True)
    torchs = reference.bottleneck_down(x, l, bias, "gelu", True)
    truth = reference.bottleneck_down(*wide(x, l, bias), "gelu", True)
    check_all(("a", "p"), got, torchs, truth)
    alone, none = kernels.bottleneck_down(x, l, bias, "gelu", False)
    assert none is None
    assert torch.equal(alone, got[0])


@pytest.mark.parametrize(("m", "k", "r"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_down_backward_against_fp64(m, k, r, dtype):
    dy, up, p = randn(m, k, dtype=dtype), randn(k, r, dtype=dtype, std=k**-0.5), randn(m, r, dtype=dtype)  # fmt: skip
    got = kernels.bottleneck_down_backward(dy, up.t(), p, "silu", True)
    torchs = reference.bottleneck_down_backward(dy, up.t(), p, "silu", True)
    truth = reference.bottleneck_down_backward(*wide(dy, up.t(), p), "silu", True)
    check_all(("g", "a"), got, torchs, truth)


@pytest.mark.parametrize(("m", "n", "r"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_up_against_fp64(m, n, r, dtype):
    h, up, down = randn(m, r, dtype=dtype), randn(n, r, dtype=dtype), randn(r, n, dtype=dtype)
    bias, residual = randn(n, dtype=dtype), randn(m, n, dtype=dtype)
    for l, b, base in ((up, bias, residual), (down.t(), None, residual), (up, bias, None), (up, None, None)):  # fmt: skip
        got = kernels.bottleneck_up(h, l, b, base)
        truth = reference.bottleneck_up(*(None if t is None else t.double() for t in (h, l, b, base)))  # fmt: skip
        assert_accurate("y", got, reference.bottleneck_up(h, l, b, base), truth)


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_torchs_and_so_are_their_gradients(kind):
    """At values from tiny to huge, by a product that is one: errors of a few units in the last place of fp32."""
    steps = torch.logspace(-20, 2, 111, device=DEVICE)
    p = torch.cat([steps, -steps, torch.zeros(1, device=DEVICE), torch.linspace(-8, 8, 65, device=DEVICE)])[:, None]  # fmt: skip
    one = torch.ones(1, 1, device=DEVICE)
    a, _ = kernels.bottleneck_down(p, one, torch.zeros(1, device=DEVICE), kind, False)
    exact = KINDS[kind].forward(p.double())
    torch.testing.assert_close(a.double(), exact, rtol=4e-6, atol=5e-7)
    small = p.abs() < 1e-2  # relative there, as torch's is
    torch.testing.assert_close(a.double()[small], exact[small], rtol=4e-6, atol=0)
    dy = torch.full_like(p, 1.5)
    g, again = kernels.bottleneck_down_backward(dy, one, p, kind, True)
    leaf = p.double().requires_grad_()
    (true,) = torch.autograd.grad(KINDS[kind].forward(leaf), leaf, dy.double())
    torch.testing.assert_close(g.double(), true, rtol=4e-6, atol=1e-6)
    assert torch.equal(again, a)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinities_stand_where_torch_has_them_and_stay_in_their_rows(kind):
    x, l, bias = randn(40, 24), randn(5, 24), randn(5)
    x[3, 7], x[20, 0], x[39, 1] = torch.nan, torch.inf, -torch.inf
    a, p = kernels.bottleneck_down(x, l, bias, kind, True)
    dy = randn(40, 24)
    dy[11, 2] = torch.inf
    g, again = kernels.bottleneck_down_backward(dy, l, p, kind, True)
    true_a, true_p = reference.bottleneck_down(
        *wide(x, l, bias), kind, True
    )  # fp32 differs by device
    true_g, _ = reference.bottleneck_down_backward(*wide(dy, l, p), kind, False)
    for mine, true in ((p, true_p), (a, true_a), (again, true_a), (g, true_g)):
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-5, equal_nan=True)
    residual, up = randn(40, 33), randn(33, 5)
    residual[5, 32], up[7, 1] = torch.nan, torch.inf
    y = kernels.bottleneck_up(p, up, None, residual)
    theirs = reference.bottleneck_up(p, up, None, residual)
    torch.testing.assert_close(y, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert int(y.isfinite().sum()) > 30 * 30


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
def test_any_layout(layout, dtype):
    """Integers, whose sums are exact: not a bit may differ. Factors and biases lie strided too."""

    def of(*shape):  # fmt: skip
        return integers(*shape, dtype=dtype, device=DEVICE)

    x, l, bias = with_layout(of(37, 50), layout), with_layout(of(9, 50), layout), of(18)[::2]
    a, p = kernels.bottleneck_down(x, l, bias, "linear", True)
    true_a, true_p = reference.bottleneck_down(*wide(x, l, bias), "linear", True)
    assert_same_bits("a", a, true_a.to(dtype))
    assert_same_bits("p", p, true_p.to(dtype))
    strided = with_layout(p, layout)
    g, _ = kernels.bottleneck_down_backward(x, l, strided, "leaky_relu", False)
    true_g, _ = reference.bottleneck_down_backward(*wide(x, l, strided), "leaky_relu", False)
    torch.testing.assert_close(g.double(), true_g, rtol=torch.finfo(dtype).eps, atol=0)
    residual, h, up = with_layout(of(37, 66), layout), with_layout(of(37, 9), layout), of(9, 66).t()
    y = kernels.bottleneck_up(h, up, of(132)[::2], residual)
    assert y.is_contiguous()
    y = kernels.bottleneck_up(h, up, None, residual)
    assert_same_bits("y", y, reference.bottleneck_up(*wide(h, up), None, residual.double()).to(dtype))  # fmt: skip


@pytest.mark.parametrize(("splits", "r"), [(2, 40), (3, 16), (7, 5)])
def test_the_end_of_a_split_product_is_the_same(splits, r):
    """Uneven splits, and a width that the flat second launch has to take apart."""
    x, l, bias, p = (integers(*s, dtype=F16, device=DEVICE) for s in ((19, 300), (r, 300), (r,), (19, r)))  # fmt: skip
    plain = kernels.DownTile(32, 32, 16, warps=4, stages=2, splits=1)
    split = kernels.DownTile(16, 32, 16, warps=4, stages=2, splits=splits)
    for both in (False, True):
        for name, call, third in (
            ("forward", kernels.bottleneck_down, bias),
            ("backward", kernels.bottleneck_down_backward, p),
        ):
            one, many = (call(x, l, third, "relu", both, tile) for tile in (plain, split))
            assert_same_bits(name, many[0], one[0])
            assert (many[1] is None) == (not both)
            if both:
                assert_same_bits(f"{name}, beside", many[1], one[1])


def test_every_tile_of_up_gives_the_same():
    h, l, bias, residual = (integers(*s, dtype=F16, device=DEVICE) for s in ((70, 50), (90, 50), (90,), (70, 90)))  # fmt: skip
    truth = reference.bottleneck_up(*wide(h, l, bias, residual)).to(F16)
    for bm, bn, br, warps in ((16, 64, 16, 4), (64, 64, 64, 4), (32, 128, 32, 8)):
        tile = kernels.UpTile(bm, bn, br, warps, stages=2)
        assert_same_bits(str(tile), kernels.bottleneck_up(h, l, bias, residual, tile), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors_in_fp32_and_a_wider_residual(dtype):
    """Master weights beside rows of half precision; under autocast the residual is fp32, and so is y."""
    x, l, bias = randn(20, 48, dtype=dtype), randn(6, 48, std=0.1), randn(6)
    a, p = kernels.bottleneck_down(x, l, bias, "tanh", True)
    assert a.dtype == p.dtype == dtype
    rounded = l.to(dtype).double()
    truth = reference.bottleneck_down(x.double(), rounded, bias.double(), "tanh", True)
    check_all("ap", (a, p), reference.bottleneck_down(x, l, bias, "tanh", True), truth)
    residual, up, u = randn(20, 33), randn(33, 6), randn(33)
    y = kernels.bottleneck_up(a, up, u, residual)
    assert y.dtype == F32
    exact = residual.double() + a.double() @ up.to(dtype).double().t() + u.double()
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("m", "k", "r"), [(0, 8, 4), (5, 0, 4), (5, 8, 0), (0, 0, 0)])
def test_nothing_to_multiply(m, k, r):
    x, l, bias = randn(m, k), randn(r, k), randn(r)
    a, p = kernels.bottleneck_down(x, l, bias, "sigmoid", True)
    assert torch.allclose(p, (x @ l.t()) + bias) and torch.allclose(a, torch.sigmoid(p))
    g, _ = kernels.bottleneck_down_backward(x, l, p, "sigmoid", False)
    assert g.shape == (m, r) and (k > 0 or not g.any())
    residual = randn(m, k)
    y = kernels.bottleneck_up(a, l.t(), None, residual)
    assert torch.allclose(y, residual + a @ l)


def test_operands_are_read_alone():
    """Nothing is written but what is made: the residual may be x, whose other users see it as it was."""
    x, l, bias, up = randn(20, 24), randn(5, 24), randn(5), randn(24, 5)
    kept = [t.clone() for t in (x, l, bias, up)]
    a, p = kernels.bottleneck_down(x, l, bias, "relu", True)
    y = kernels.bottleneck_up(a, up, None, x)
    kernels.bottleneck_down_backward(x, up.t(), p, "relu", True)
    assert all(map(torch.equal, (x, l, bias, up), kept))
    assert y.data_ptr() != x.data_ptr()


def test_ops_and_their_fakes():
    x, l, bias, up = randn(12, 24), randn(5, 24), randn(5), randn(24, 5)
    with fastlora.backend("triton", strict=True):
        fastlora.reset_launches()
        a, p = ops.bottleneck_down(x, l, bias, "silu", True)
        ops.bottleneck_down_backward(x, up.t(), p, "silu", False)
        ops.bottleneck_up(a, up, None, x)
        assert fastlora.launches() == {(op, "triton"): 1 for op in support.BOTTLENECK_OPS}
    check, lib = torch.library.opcheck, torch.ops.fastlora
    for both in (False, True):
        check(lib._bottleneck_down.default, (x, l, bias, "silu", both))
        check(lib._bottleneck_down_backward.default, (x, up.t(), p, "silu", both))
    for bias, residual in ((None, None), (randn(24), x), (None, x.double())):
        check(lib._bottleneck_up.default, (a, up, bias, residual))
    for r in (5, 100):  # kernels, and torch's products
        g, dtypes = randn(12, r), (F32, F16)
        for inputs in ((x, g, x, g), (x, g, None, None), (None, None, x, g), (None, None, x, None)):
            for bias in (None, F32) if inputs[2] is not None else (None,):
                check(lib._bottleneck_wgrad.default, (*inputs, *dtypes, bias))


def test_the_same_bits_every_time():
    x, l, bias, up = randn(40, 200), randn(16, 200), randn(16), randn(200, 16)
    a, p = kernels.bottleneck_down(x, l, bias, "gelu", True)
    g, _ = kernels.bottleneck_down_backward(x, up.t(), p, "gelu", False)
    y = kernels.bottleneck_up(a, up, None, x)
    for _ in range(100 if GPU else 2):
        assert torch.equal(kernels.bottleneck_down(x, l, bias, "gelu", True)[0], a)
        assert torch.equal(kernels.bottleneck_down_backward(x, up.t(), p, "gelu", False)[0], g)
        assert torch.equal(kernels.bottleneck_up(a, up, None, x), y)
