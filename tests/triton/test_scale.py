"""scale_columns and its backward against fp64: odd and strided shapes, zero norms, infinities. In the interpreter on the CPU."""

import pytest
import torch

import fastlora
from fastlora import ops, reference
from fastlora.ops import support
from fastlora.testing.compare import assert_accurate
from fastlora.testing.inputs import integers

scale = pytest.importorskip("fastlora.triton.scale")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
GPU = torch.cuda.is_available()
DTYPES = [FP32, FP16, BF16] if GPU else [FP32, FP16]
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
missing = support.miss("scale_columns", "triton", DEVICE, FP16, 0)
pytestmark = pytest.mark.skipif(missing is not None, reason=f"not here: {missing}")
SHAPES = [(1, 1), (16, 64), (33, 70), (7, 300), (0, 5), (5, 0), (130, 65)]


def wide(*tensors):
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("rest", ["none", "bias", "whole", "strided"])
@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_forward_within_the_rule(m, n, dtype, with_norm, rest):
    z = torch.randn(m, n, device=DEVICE).to(dtype)
    magnitude = torch.randn(n, device=DEVICE)
    norm = torch.rand(n, device=DEVICE) + 0.1 if with_norm else None
    if norm is not None:
        norm[: n // 3] = 0
    whole = torch.randn(2 * m, n, device=DEVICE).to(dtype)
    more = {"none": None, "bias": whole[:1].flatten()[:n] if m else None, "whole": whole[:m], "strided": whole[::2]}[rest]  # fmt: skip
    got = scale.scale_columns(z, magnitude, norm, more)
    same = reference.scale_columns(z, magnitude, norm, more)
    assert_accurate("y", got, same, reference.scale_columns(*wide(z, magnitude, norm, more)))


@pytest.mark.parametrize("layout", ["plain", "transposed", "expanded"])
@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_backward_is_exact_on_integers(m, n, dtype, with_norm, layout):
    """Powers of two for norms: every product and every sum is exact."""
    dy, z = (integers(m, n, low=-2, high=2, dtype=dtype, device=DEVICE) for _ in range(2))
    if layout == "transposed":
        dy, z = dy.t().contiguous().t(), z.t().contiguous().t()
    if layout == "expanded":
        dy = dy[:, :1].expand(m, n) if n else dy
    magnitude = integers(n, low=-2, high=2, dtype=FP32, device=DEVICE)
    norm = 2.0 ** torch.randint(-1, 2, (n,), device=DEVICE).float() if with_norm else None
    if norm is not None:
        norm[::5] = 0
    got = scale.scale_columns_backward(dy, z, magnitude, norm, True, True)
    true = reference.scale_columns_backward(*wide(dy, z, magnitude, norm), True, True)
    for name, ours, exact in zip(("dz", "dm", "sums"), got, true, strict=True):
        assert torch.equal(ours, exact.to(ours.dtype)), name
    for name, ours in zip(
        ("dz", "dm", "sums"),
        scale.scale_columns_backward(dy, None, magnitude, norm, False, False),
        strict=True,
    ):
        assert ours is None, name


def test_factors_of_any_stride():
    z, factors, rest = torch.randn(20, 40, device=DEVICE), torch.rand(40, 3, device=DEVICE) + 0.1, torch.randn(80, device=DEVICE)[::2]  # fmt: skip
    magnitude, norm = factors[:, 0], factors[:, 1]
    y = scale.scale_columns(z, magnitude, norm, rest)
    torch.testing.assert_close(y, rest + magnitude / norm * z)
    got = scale.scale_columns_backward(z, z, magnitude, norm, True, False)
    torch.testing.assert_close(got[0], magnitude / norm * z)
    torch.testing.assert_close(got[1], (z * z).sum(0) / norm)
    one = factors[:1, 0].expand(40)
    torch.testing.assert_close(scale.scale_columns(z, one, None, None), z * one)


def test_many_rows_are_summed_in_fp32():
    m, n = (100_000, 40) if GPU else (1000, 40)
    z = (torch.rand(m, n, device=DEVICE) + 0.5).to(FP16)
    dy, magnitude = torch.ones_like(z), torch.ones(n, device=DEVICE)
    _, got, sums = scale.scale_columns_backward(dy, z, magnitude, None, False, True)
    torch.testing.assert_close(got.double(), z.double().sum(0), rtol=1e-6, atol=0)
    assert torch.equal(sums, torch.full_like(sums, m))


def test_infinities_stay_in_their_columns():
    z = torch.ones(40, 80, device=DEVICE, dtype=FP16)
    z[3, 5], z[4, 6] = float("inf"), float("nan")
    magnitude, norm = torch.ones(80, device=DEVICE), torch.ones(80, device=DEVICE)
    norm[7] = float("inf")
    y = scale.scale_columns(z, magnitude, norm, None)
    assert torch.equal(y.isfinite(), z.isfinite())
    assert not y[:, 7].any()
    _, dm, _ = scale.scale_columns_backward(z, z, magnitude, norm, False, False)
    assert dm.isfinite().logical_not().nonzero().flatten().tolist() == [5, 6]


def test_the_op_is_counted_and_traceable():
    z, m = torch.randn(4, 6, device=DEVICE), torch.randn(6, device=DEVICE)
    norm = torch.rand(6, device=DEVICE)
    with fastlora.backend("triton", strict=True):
        fastlora.reset_launches()
        ops.scale_columns(z, m, norm, z)
        ops.scale_columns_backward(z, z, m, norm, True, True)
        assert fastlora.launches() == {
            ("scale_columns", "triton"): 1,
            ("scale_columns_backward", "triton"): 1,
        }
        check = torch.library.opcheck
        check(torch.ops.fastlora._scale_columns.default, (z, m, norm, z))
        check(torch.ops.fastlora._scale_columns_backward.default, (z, z, m, norm, True, True))
        check(torch.ops.fastlora._scale_columns_backward.default, (z, None, m, None, False, False))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("m", "k", "n", "r"), [(1, 8, 8, 1), (70, 40, 72, 16), (33, 7, 9, 40), (130, 64, 66, 8)])  # fmt: skip
def test_a_product_that_scales_its_own_tiles(m, k, n, r, with_bias):
    """Exact on integers and powers of two, through descriptors and pointers; a factor of zero gives the bias."""
    x, w, h, l, bias = (
        integers(*shape, low=-1, high=1, dtype=FP16, device=DEVICE)
        for shape in ((m, k), (n, k), (m, r), (n, r), (n,))
    )
    factor = 2.0 ** torch.randint(-1, 2, (n,), device=DEVICE).float()
    factor[::5] = 0
    more = bias if with_bias else None
    with fastlora.backend("triton", strict=True):
        fastlora.reset_launches()
        y = ops.scaled_gemm(x, w, h, l, more, factor)
        assert fastlora.launches() == {("scaled_gemm", "triton"): 1}
    exact = (x.double() @ w.double().t() + h.double() @ l.double().t()) * factor.double()
    exact = exact if more is None else exact + more.double()
    assert torch.equal(y, exact.to(FP16))
    torch.library.opcheck(torch.ops.fastlora._scaled_gemm.default, (x, w, h, l, more, factor))
