"""forward and dx of fastlora/triton/nf4_linear.py: exact where their inputs are, against fp64, for every shape a 4-bit weight
may have. In Triton's interpreter where there is no GPU."""

import math

import pytest
import torch

import fastlora
from fastlora import NF4Tensor, reference
from fastlora.ops import support
from fastlora.testing.compare import assert_accurate, assert_same_bits
from fastlora.testing.inputs import integers

nf4_linear = pytest.importorskip("fastlora.triton.nf4_linear")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GPU = torch.cuda.is_available()
DTYPES = [FP32, FP16, BF16] if GPU else [FP32, FP16]
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
missing = support.miss("nf4_gemm", "triton", DEVICE, FP16, 16)
pytestmark = pytest.mark.skipif(missing is not None, reason=f"not here: {missing}")

# (m, n, k, block_size): blocks of every kind beside rows of whole ones, of a part of one, and rows that end amid one
SHAPES = [
    (1, 64, 128, 64),
    (3, 1, 32, 32),
    (17, 70, 200, 64),
    (5, 33, 72, 32),
    (40, 130, 256, 128),
    (2, 3, 2, 32),
    (9, 66, 130, 4096),
    (2, 8, 2048, 2048),
]
EXACT = [
    *((shape, 16, False) for shape in SHAPES),
    *((SHAPES[2], rank, rank == 5) for rank in (0, 1, 5, 40)),  # with 5 FP4
]


def weight_of(q):
    scales = [t.view(-1).view(FP32) if t.dtype == torch.int32 else t.view(-1) for t in q.scales]
    return q.codes.view(-1), scales, q.form


def exact_weight(n, k, block_size, fp4=False):
    """-1, 0 and 1 times powers of two: no sum of these is rounded."""
    kinds = torch.tensor([0x3, 0x0, 0xB] if fp4 else [0x0, 0x7, 0xF])
    pick = kinds[torch.randint(0, 3, (n * k,))]
    codes = (pick[0::2] * 16 + pick[1::2]).to(torch.uint8)
    absmax = 2.0 ** torch.randint(-1, 3, (-(-n * k // block_size),))
    kind = "fp4" if fp4 else "nf4"
    return NF4Tensor(codes, (absmax,), (n, k), FP16, block_size, quant_type=kind).to(DEVICE)


def small(*shape, dtype, limit=2):
    return integers(*shape, low=-limit, high=limit, dtype=dtype, device=DEVICE)


def problem(m, n, k, block_size, rank, dtype, factors=None, double_quant=True, fp4=False):
    q = NF4Tensor.quantize(torch.randn(n, k, device=DEVICE), block_size, double_quant)
    q.quant_type = "fp4" if fp4 else "nf4"
    made = (torch.randn(s, device=DEVICE) for s in ((m, k), (m, n), (m, rank), (n, rank), (rank, k), (n,)))  # fmt: skip
    x, dy, h, b, a, bias = made
    factors = factors or dtype
    return q, x.to(dtype), dy.to(dtype), h.to(dtype), b.to(factors), a.to(factors), bias.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "rank", "fp4"), EXACT, ids=str)
def test_integers_are_exact(shape, rank, fp4, dtype):
    """Equal to the fp64 result, and to dequantise-then-multiply; with factors in fp32 too."""
    m, n, k, block_size = shape
    q = exact_weight(n, k, block_size, fp4)
    x, dy, bias = (small(*s, dtype=dtype) for s in ((m, k), (m, n), (n,)))
    h, b, a = (small(*s, dtype=dtype, limit=1) for s in ((m, rank), (n, rank), (rank, k)))
    w = q.dequantize(dtype)
    y_true = x.double() @ w.double().t() + h.double() @ b.double().t() + bias.double()
    dx_true = dy.double() @ w.double() + h.double() @ a.double()
    for factors in {dtype, FP32}:
        y = nf4_linear.forward(x, *weight_of(q), h, b.to(factors), bias)
        dx = nf4_linear.dx(dy, *weight_of(q), h, a.to(factors))
        assert_same_bits("y", y, y_true.to(dtype))
        assert_same_bits("dX", dx, dx_true.to(dtype))
        if dtype != BF16:  # whose reference rounds products before it adds them
            assert torch.equal(y, reference.gemm(x, w, h, b, bias))
            assert torch.equal(dx, reference.gemm(dy, w.t(), h, a.t(), None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("double_quant", "fp4"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("shape", SHAPES[1:6], ids=str)
def test_against_fp64(shape, double_quant, fp4, dtype):
    """The weight is value * absmax, rounded once to ``dtype``: that rounding is torch's error too. Of three or four results
    that error may be small by luck (fp16: in one draw of fifty), so narrow ones get rows."""
    m, n, k, block_size = shape
    m = max(m, 256 // min(n, k)) if min(n, k) < 4 else m
    parts = problem(m, n, k, block_size, 16, dtype, FP32, double_quant, fp4)
    q, x, dy, h, b, a, bias = parts
    y = nf4_linear.forward(x, *weight_of(q), h, b, bias)
    dx = nf4_linear.dx(dy, *weight_of(q), h, a)
    w, wide = q.dequantize(dtype), q.dequantize(FP32).double()
    y_true = x.double() @ wide.t() + h.double() @ b.double().t() + bias.double()
    assert_accurate("y", y, reference.gemm(x, w, h, b, bias), y_true)
    assert_accurate("dX", dx, reference.gemm(dy, w.t(), h, a.t(), None), dy.double() @ wide + h.double() @ a.double())  # fmt: skip


@pytest.mark.parametrize("fp4", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_what_is_multiplied_is_the_dequantised_weight(double_quant, dtype, fp4):
    """By the identity both products give it back, bit for bit: value * scale is rounded once."""
    q = NF4Tensor.quantize(torch.randn(70, 136, device=DEVICE), 32, double_quant)
    q.quant_type = "fp4" if fp4 else "nf4"
    one = torch.eye(136, device=DEVICE, dtype=dtype)
    assert_same_bits("W^T", nf4_linear.forward(one, *weight_of(q), None, None, None), q.dequantize(dtype).t())  # fmt: skip
    one = torch.eye(70, device=DEVICE, dtype=dtype)
    assert_same_bits("W", nf4_linear.dx(one, *weight_of(q), None, None), q.dequantize(dtype))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("tile", [(16, 32, 64), (32, 64, 32), (64, 128, 64)], ids=str)
def test_every_tile_and_every_cut_of_the_contraction(tile, splits):
    m, n, k, rank = 33, 136, 192, 40
    plan = nf4_linear.CodesTile(*tile, warps=4, stages=2, splits=splits)
    q, x, dy = exact_weight(n, k, 64), small(m, k, dtype=FP16), small(m, n, dtype=FP16)
    h, b, a = (small(*s, dtype=FP16, limit=1) for s in ((m, rank), (n, rank), (rank, k)))
    bias = small(n, dtype=FP16)
    w = q.dequantize(FP32).double()
    y_true = x.double() @ w.t() + h.double() @ b.double().t() + bias.double()
    dx_true = dy.double() @ w + h.double() @ a.double()
    y = nf4_linear.forward(x, *weight_of(q), h, b, bias, plan)
    assert_same_bits("y", y, y_true.to(FP16))
    assert_same_bits("dX", nf4_linear.dx(dy, *weight_of(q), h, a, plan), dx_true.to(FP16))


def test_the_most_ranks():
    q, x, dy = exact_weight(70, 64, 64), small(3, 64, dtype=FP32), small(3, 70, dtype=FP32)
    h, b, a = (small(*s, dtype=FP32, limit=1) for s in ((3, 512), (70, 512), (512, 64)))
    w = q.dequantize(FP32)
    assert_same_bits("y", nf4_linear.forward(x, *weight_of(q), h, b, None), x @ w.t() + h @ b.t())
    assert_same_bits("dX", nf4_linear.dx(dy, *weight_of(q), h, a), dy @ w + h @ a)


def test_nan_and_infinity_stay_in_their_rows():
    q, x, dy, h, b, a, bias = problem(20, 70, 128, 64, 5, FP16)
    for t, run in (
        (x, lambda t: nf4_linear.forward(t, *weight_of(q), h, b, bias)),
        (dy, lambda t: nf4_linear.dx(t, *weight_of(q), h, a)),
    ):
        clean, hostile = run(t), t.clone()
        hostile[3, 7], hostile[11, 60] = torch.nan, torch.inf
        got = run(hostile)
        assert not got[[3, 11]].isfinite().any()
        good = [i for i in range(20) if i not in (3, 11)]
        assert torch.equal(got[good], clean[good])


def test_a_scale_that_is_not_finite_stays_in_its_block():
    """Nothing past the edges of a tile is multiplied by it."""
    form = support.Form(70, 192, 64, 0, False)
    halves = torch.randint(0, 2, (2, 70 * 96), dtype=torch.uint8) * 15  # -1 and 1
    codes = (halves[0] * 16 + halves[1]).to(DEVICE)
    absmax = torch.ones(210, device=DEVICE)
    absmax[3 * 69], absmax[3 * 5 + 1] = torch.inf, torch.nan
    x, dy = torch.ones(2, 192, device=DEVICE), torch.ones(2, 70, device=DEVICE)
    w = reference.dequantize_nf4(codes, absmax, (70, 192), 64, FP32)
    for got, truth in (
        (nf4_linear.forward(x, codes, [absmax], form, None, None, None), x @ w.t()),
        (nf4_linear.dx(dy, codes, [absmax], form, None, None), dy @ w),
    ):
        assert torch.equal(got.isnan(), truth.isnan()) and torch.equal(got.isinf(), truth.isinf())
        assert 0 < int(got.isfinite().sum()) < got.numel()
        assert torch.equal(got[got.isfinite()], truth[truth.isfinite()])


def test_strides_and_offsets():
    q, x, dy, h, b, a, bias = problem(17, 70, 128, 64, 5, FP16)

    def strange(t, kind):
        room = t.new_full((2 * t.shape[0] + 3, 2 * t.shape[1] + 5), torch.nan)
        view = {
            "offset": room[3 : 3 + t.shape[0], 1 : 1 + t.shape[1]],
            "apart": room[: 2 * t.shape[0] : 2, : 2 * t.shape[1] : 2],
        }.get(kind, t.new_empty(t.shape[1], t.shape[0]).t())
        return view.copy_(t)

    y = nf4_linear.forward(x, *weight_of(q), h, b, bias)
    dx = nf4_linear.dx(dy, *weight_of(q), h, a)
    for kind in ("offset", "apart", "transposed"):
        vx, vdy, vh, vb, va = (strange(t, kind) for t in (x, dy, h, b, a))
        vbias = strange(bias[None], kind)[0]
        assert torch.equal(nf4_linear.forward(vx, *weight_of(q), vh, vb, vbias), y), kind
        assert torch.equal(nf4_linear.dx(vdy, *weight_of(q), vh, va), dx), kind


@pytest.mark.parametrize(("m", "n", "k"), [(0, 64, 64), (3, 0, 64), (3, 64, 0), (0, 0, 0)])
def test_nothing_to_multiply(m, n, k):
    """No rows, no features, and a contraction of nothing, of which bias and update remain."""
    q, x, dy, h, b, a, bias = problem(m, n, k, 64, 4, FP32, double_quant=False)
    w = torch.zeros(n, k, device=DEVICE)
    if n == 0 or k == 0:
        weight = q.codes.view(-1), [torch.zeros(0, device=DEVICE)], q.form
    else:
        w, weight = q.dequantize(FP32), weight_of(q)
    y = nf4_linear.forward(x, *weight, h, b, bias)
    dx = nf4_linear.dx(dy, *weight, h, a)
    torch.testing.assert_close(y, x @ w.t() + h @ b.t() + bias)
    torch.testing.assert_close(dx, dy @ w + h @ a)


def test_launches_are_counted():
    q, x, dy, h, b, a, _ = problem(3, 64, 64, 64, 4, FP16)
    fastlora.reset_launches()
    nf4_linear.forward(x, *weight_of(q), h, b, None)
    assert fastlora.launches() == {("nf4_gemm", "triton"): 1}
    nf4_linear.dx(dy, *weight_of(q), h, a)
    assert fastlora.launches()["nf4_dx", "triton"] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (1, 4096, 14336), (16, 1000, 4160), (64, 4104, 1088), (300, 515, 768),
        (64, 130, 1090), (200, 514, 1100),  # scales shared by 2 and by 4 neighbours, where wgmma multiplies
    ],
)  # fmt: skip
def test_the_tiles_of_a_gpu(m, n, k, dtype):
    """Exact, and one hundred runs without one differing bit."""
    q, x, dy = exact_weight(n, k, 64), small(m, k, dtype=dtype), small(m, n, dtype=dtype)
    h, b, a = (small(*s, dtype=dtype, limit=1) for s in ((m, 24), (n, 24), (24, k)))
    w = q.dequantize(FP32).double()
    y = nf4_linear.forward(x, *weight_of(q), h, b, None)
    dx = nf4_linear.dx(dy, *weight_of(q), h, a)
    assert_same_bits("y", y, (x.double() @ w.t() + h.double() @ b.double().t()).to(dtype))
    assert_same_bits("dX", dx, (dy.double() @ w + h.double() @ a.double()).to(dtype))
    q, x, dy, h, b, a, bias = problem(m, n, k, 64, 24, dtype)
    y, dx = nf4_linear.forward(x, *weight_of(q), h, b, bias), nf4_linear.dx(dy, *weight_of(q), h, a)
    for _ in range(100):
        assert torch.equal(nf4_linear.forward(x, *weight_of(q), h, b, bias), y)
        assert torch.equal(nf4_linear.dx(dy, *weight_of(q), h, a), dx)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    n, k, m = 2**16 + 72, 2**15 + 64, 3
    assert n * k > 2**31
    codes = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, device=DEVICE)
    absmax = torch.rand(n * k // 64, device=DEVICE)
    form = support.Form(n, k, 64, 0, False)
    x, dy = torch.randn(m, k, device=DEVICE).to(FP16), torch.randn(m, n, device=DEVICE).to(FP16)
    y = nf4_linear.forward(x, codes, [absmax], form, None, None, None)
    last = 2**31 // k - 40  # rows around the 2^31st element
    tail = reference.dequantize_nf4(codes[last * k // 2 :], absmax[last * k // 64 :], (n - last, k), 64, FP16)  # fmt: skip
    y_true = x.double() @ tail.double().t()
    assert (y[:, last:] - y_true).norm() < 2e-3 * y_true.norm()
    dy[:, :last] = 0
    dx_true = dy[:, last:].double() @ tail.double()
    dx = nf4_linear.dx(dy, codes, [absmax], form, None, None)
    assert (dx - dx_true).norm() < 2e-3 * dx_true.norm()


def test_groups_of_elements_that_share_a_scale():
    """What the kernel takes for granted: a group as long as the greatest common divisor never straddles blocks."""
    for k in (2, 64, 72, 130, 200, 4096, 14336):
        for block_size in (32, 64, 4096):
            group = math.gcd(k, block_size)
            starts = torch.arange(0, 8 * k, group)
            assert torch.equal(starts // block_size, (starts + group - 1) // block_size)
