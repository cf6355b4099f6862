"""fastlora::_nf4_linear_few on a GPU: exact where its inputs are, against fp64, and chosen where it may be."""

import pytest
import torch

import fastlora
from fastlora import NF4Tensor, QLoRALinear, _library, reference
from fastlora.ops import Form, cuda_backend
from fastlora.testing.compare import assert_accurate

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not _library.has_kernel("_nf4_linear_few"), reason="the library has no nf4/sm80"
    ),
]
# (m, n, k): every tile of rows, features that are no multiple of 32, more and fewer blocks than warps
SHAPES = [
    (1, 32, 64),
    (5, 1, 128),
    (8, 4096, 1024),
    (9, 33, 4160),
    (16, 1000, 512),
    (17, 8200, 192),
    (32, 96, 2048),
    (33, 520, 64),
    (64, 4104, 1088),
]


def run(x, q, a=None, b=None, bias=None, scale=1.0, scaling=None):
    scales = [t.view(-1).view(FP32) if t.dtype == torch.int32 else t.view(-1) for t in q.scales]
    nested = scales[1:] or (None, None, None)
    form = q.form
    sizes = form.rows, form.block_size, form.nested_block_size or 1, form.fp4
    op = torch.ops.fastlora._nf4_linear_few
    return op(x, q.codes.view(-1), scales[0], *nested, *sizes, a, b, bias, scaling, scale)


def exact_weight(n, k, block_size=64):
    """-1, 0 and 1 times powers of two: no sum of these is rounded."""
    pick = torch.tensor([0x0, 0x7, 0xF], device="cuda")[
        torch.randint(0, 3, (n * k,), device="cuda")
    ]
    codes = (pick[0::2] * 16 + pick[1::2]).to(torch.uint8)
    absmax = 2.0 ** torch.randint(-1, 3, (n * k // block_size,), device="cuda")
    return NF4Tensor(codes, (absmax,), (n, k), BF16, block_size)


def integers(*shape, dtype=BF16, limit=3):
    return torch.randint(-limit, limit + 1, shape, device="cuda").to(dtype)


@pytest.mark.parametrize("factors", [None, BF16, FP32])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_integers_are_exact(shape, block_size, factors):
    m, n, k = shape
    if k % block_size:
        pytest.skip("a row is not whole blocks")
    q, x, bias = exact_weight(n, k, block_size), integers(m, k), integers(n)
    w = q.dequantize(FP32).double()
    if factors is None:
        y, h = run(x, q, bias=bias)
        assert h.numel() == 0
        assert torch.equal(y, (x.double() @ w.t() + bias.double()).to(BF16))
        return
    for rank in (1, 5, 16):
        a, b = integers(rank, k, dtype=factors, limit=1), integers(n, rank, dtype=factors, limit=2)
        scaling = torch.tensor(0.5, device="cuda")
        y, h = run(x, q, a, b, bias, 2.0, scaling)
        h_true = (x.double() @ a.double().t()).to(BF16)
        assert torch.equal(h, h_true)
        y_true = x.double() @ w.t() + h_true.double() @ b.double().t() + bias.double()
        assert torch.equal(y, y_true.to(BF16))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(shape, double_quant, dtype, quant_type):
    """The weight is the formula's own, value * absmax: rounding it to ``dtype`` first is torch's error, not ours."""
    m, n, k = shape
    q = NF4Tensor.quantize(torch.randn(n, k, device="cuda").to(dtype), 64, double_quant)
    q.quant_type = quant_type
    x, bias = torch.randn(m, k, device="cuda").to(dtype), torch.randn(n, device="cuda").to(dtype)
    a = (torch.randn(16, k, device="cuda") * k**-0.5).to(dtype)
    b = torch.randn(n, 16, device="cuda").to(dtype)
    y, h = run(x, q, a, b, bias, 0.5)
    leaves = [t.double() for t in (x, q.dequantize(FP32), a, b)]
    truth = reference.lora_linear(*leaves, 0.5, bias.double())
    naive = reference.gemm(x, q.dequantize(dtype), reference.down(x, a, None, 0.5), b, bias)
    assert_accurate("y", y, naive, truth)
    assert_accurate("h", h, reference.down(x, a, None, 0.5), 0.5 * leaves[0] @ leaves[2].t())


def test_nan_and_infinity_stay_in_their_rows():
    q = NF4Tensor.quantize(torch.randn(100, 256, device="cuda"))
    x = torch.randn(20, 256, device="cuda").to(BF16)
    a, b = torch.randn(16, 256, device="cuda").to(BF16), torch.randn(100, 16, device="cuda").to(BF16)  # fmt: skip
    clean, _ = run(x, q, a, b)
    hostile = x.clone()
    hostile[3, 7], hostile[11, 200] = torch.nan, torch.inf
    y, h = run(hostile, q, a, b)
    bad = [3, 11]
    assert not y[bad].isfinite().any() and not h[bad].isfinite().any()
    good = [i for i in range(20) if i not in bad]
    assert torch.equal(y[good], clean[good])


def test_strides_and_offsets_of_x():
    q = NF4Tensor.quantize(torch.randn(100, 128, device="cuda"))
    room = torch.randn(40, 400, device="cuda").to(BF16)
    view = room[3:20, 8:136]
    assert torch.equal(run(view, q)[0], run(view.contiguous(), q)[0])
    with pytest.raises((ValueError, RuntimeError), match="16 bytes"):
        run(room[3:20, 1:129], q)


def test_two_hundred_runs_without_one_differing_bit():
    q = NF4Tensor.quantize(torch.randn(4104, 1088, device="cuda"))
    x = torch.randn(13, 1088, device="cuda").to(BF16)
    a, b = torch.randn(16, 1088, device="cuda"), torch.randn(4104, 16, device="cuda")
    expected = [t.clone() for t in run(x, q, a, b)]
    for _ in range(200):
        got = run(x, q, a, b)
        assert all(map(torch.equal, got, expected))
        for t in got:
            t.fill_(torch.nan)


def test_a_layer_runs_it_and_nothing_else():
    layer = QLoRALinear.from_linear(torch.nn.Linear(256, 512, device="cuda", dtype=BF16), r=16)
    x = torch.randn(4, 8, 256, device="cuda", dtype=BF16)
    fastlora.reset_launches()
    with torch.no_grad():
        y = layer(x)
        assert fastlora.launches() == {("nf4_linear", "cuda"): 1}
        layer.enable_adapters(False)
        layer(x)
        assert fastlora.launches() == {("nf4_linear", "cuda"): 2}
        layer.enable_adapters()
        with fastlora.backend("triton"):
            other = layer(x)
    assert (y - other).norm() < 6e-3 * other.norm()
    layer(x.requires_grad_()).sum().backward()  # its h serves backward
    h = x.detach().float().view(32, 256) @ layer.lora_A["default"].t() * layer.scaling["default"]
    d_b = h.sum(0).expand(512, 16)
    assert (layer.lora_B["default"].grad - d_b).norm() < 1e-2 * d_b.norm()


def test_what_it_does_not_take_is_named():
    q = NF4Tensor.quantize(torch.randn(64, 128, device="cuda"))
    x = torch.randn(4, 128, device="cuda").to(BF16)
    a, b = torch.randn(16, 128, device="cuda"), torch.randn(64, 16, device="cuda")

    def miss(x=x, form=q.form, a=a, b=b, state=None):
        return cuda_backend.nf4_few_miss(x, q.codes, form, a, b, state)

    assert miss() is None
    assert "dropout" in miss(state=torch.zeros(2, device="cuda"))
    assert "64 rows" in miss(x=torch.zeros(65, 128, device="cuda", dtype=BF16))
    assert "whole blocks" in miss(form=Form(64, 128, 32, 256, False))
    assert "whole blocks" in miss(form=Form(64, 128, 256, 256, False))
    assert "16 ranks" in miss(a=torch.zeros(17, 128, device="cuda"))
    assert "contiguous" in miss(a=torch.zeros(128, 16, device="cuda").t())
    wrong = [
        dict(x=x.float()),
        dict(x=x[:, :64]),
        dict(x=torch.zeros(65, 128, device="cuda", dtype=BF16)),
        dict(a=a[:, :64], b=b),
        dict(a=a, b=b[:, :8]),
        dict(a=a),
        dict(a=a.half(), b=b),
        dict(a=torch.zeros(17, 128, device="cuda"), b=torch.zeros(64, 17, device="cuda")),
        dict(bias=torch.zeros(64, device="cuda")),
    ]
    for arguments in wrong:
        with pytest.raises((ValueError, RuntimeError), match="_nf4"):
            run(**{"x": x, "q": q, **arguments})
