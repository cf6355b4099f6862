"""fastlora::_nf4_linear_sm80 and _nf4_linear_sm90 on a GPU: exact where their inputs are, against fp64, and chosen where they
may be."""

import pytest
import torch

import fastlora
from fastlora import NF4Tensor, QLoRALinear, reference
from fastlora.ops import Form, cuda_backend, support
from fastlora.testing.compare import assert_accurate
from tests.csrc.common import exact_weight, integers, nf4_arguments

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
pytestmark = pytest.mark.gpu


DEVICE = torch.device("cuda", 0)


def has(op):
    """The library's code for it, on this GPU."""
    missing = support.miss(op, "cuda", DEVICE, BF16, 16) if torch.cuda.is_available() else None
    return pytest.mark.skipif(missing is not None, reason=f"not on this GPU: {missing}")


# (m, n, k): every tile of rows, features that are no multiple of a tile, more and fewer blocks than warps
FEW = [
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
MANY = [
    (1, 33, 256),
    (16, 1001, 512),
    (31, 8200, 256),
    (64, 4104, 1280),
    (65, 130, 4096),
    (128, 4096, 2304),
    (200, 515, 14336),
    (300, 2050, 768),
    (1024, 1026, 1024),
]
CASES = [
    *(pytest.param("few", *shape, marks=has("nf4_few"), id=f"few-{shape}") for shape in FEW),
    *(pytest.param("gemm", *shape, marks=has("nf4_gemm"), id=f"gemm-{shape}") for shape in MANY),
]
KINDS = [
    pytest.param("few", marks=has("nf4_few")),
    pytest.param("gemm", marks=has("nf4_gemm")),
]


def run(kind, x, q, a=None, b=None, bias=None, scale=1.0, scaling=None, h=None, config=None):
    weight = nf4_arguments(q, q.form.rows)
    if kind == "few":
        return torch.ops.fastlora._nf4_linear_sm80(
            x, *weight, a, b, h, bias, scaling, scale, config
        )
    op = torch.ops.fastlora._nf4_linear_sm90
    return op(x, *weight, a, b, h, bias, scaling, scale, config)


@pytest.mark.parametrize("factors", [None, BF16, FP32])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize(("kind", "m", "n", "k"), CASES)
def test_integers_are_exact(kind, m, n, k, block_size, factors):
    if k % (block_size if kind == "few" else 4 * block_size):
        pytest.skip("a row is not as many blocks")
    q, x, bias = exact_weight(n, k, block_size), integers(m, k), integers(n)
    w = q.dequantize(FP32).double()
    if factors is None:
        y, h = run(kind, x, q, bias=bias)
        assert h.numel() == 0
        assert torch.equal(y, (x.double() @ w.t() + bias.double()).to(BF16))
        return
    for rank in (1, 5, 16):
        a, b = integers(rank, k, dtype=factors, limit=1), integers(n, rank, dtype=factors, limit=2)
        scaling = torch.tensor(0.5, device="cuda")
        y, h = run(kind, x, q, a, b, bias, 2.0, scaling)
        h_true = (x.double() @ a.double().t()).to(BF16)
        assert torch.equal(h, h_true)
        y_true = x.double() @ w.t() + h_true.double() @ b.double().t() + bias.double()
        assert torch.equal(y, y_true.to(BF16))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("double_quant", "mean"), [(False, 0), (True, 0), (True, 1)])
@pytest.mark.parametrize(("kind", "m", "n", "k"), CASES)
def test_against_fp64(kind, m, n, k, double_quant, mean, dtype, quant_type):
    """The weight is the formula's own, value * absmax: rounding it to ``dtype`` first is torch's error, not ours. Where x
    has a mean the errors of code values must not add up."""
    q = NF4Tensor.quantize(torch.randn(n, k, device="cuda").to(dtype), 64, double_quant)
    q.quant_type = quant_type
    x = (torch.randn(m, k, device="cuda") + mean).to(dtype)
    bias = torch.randn(n, device="cuda").to(dtype)
    a = (torch.randn(16, k, device="cuda") * k**-0.5).to(dtype)
    b = torch.randn(n, 16, device="cuda").to(dtype)
    y, h = run(kind, x, q, a, b, bias, 0.5)
    leaves = [t.double() for t in (x, q.dequantize(FP32), a, b)]
    truth = reference.lora_linear(*leaves, 0.5, bias.double())
    naive = reference.gemm(x, q.dequantize(dtype), reference.down(x, a, None, 0.5), b, bias)
    assert_accurate("y", y, naive, truth)
    assert_accurate("h", h, reference.down(x, a, None, 0.5), 0.5 * leaves[0] @ leaves[2].t())


@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_stay_in_their_rows(kind):
    q = NF4Tensor.quantize(torch.randn(100, 256, device="cuda"))
    x = torch.randn(20, 256, device="cuda").to(BF16)
    a, b = torch.randn(16, 256, device="cuda").to(BF16), torch.randn(100, 16, device="cuda").to(BF16)  # fmt: skip
    clean, _ = run(kind, x, q, a, b)
    hostile = x.clone()
    hostile[3, 7], hostile[11, 200] = torch.nan, torch.inf
    y, h = run(kind, hostile, q, a, b)
    bad = [3, 11]
    assert not y[bad].isfinite().any() and not h[bad].isfinite().any()
    good = [i for i in range(20) if i not in bad]
    assert torch.equal(y[good], clean[good])


@pytest.mark.parametrize("kind", KINDS)
def test_strides_and_offsets_of_x(kind):
    q = NF4Tensor.quantize(torch.randn(100, 256, device="cuda"))
    room = torch.randn(40, 400, device="cuda").to(BF16)
    view = room[3:20, 8:264]
    assert torch.equal(run(kind, view, q)[0], run(kind, view.contiguous(), q)[0])
    with pytest.raises((ValueError, RuntimeError), match="16 bytes"):
        run(kind, room[3:20, 1:257], q)


@pytest.mark.huge
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("kind", "m"),
    [
        pytest.param("few", 40, marks=has("nf4_few")),
        *(pytest.param("gemm", m, marks=has("nf4_gemm")) for m in (40, 300)),
    ],
)
def test_a_weight_of_more_than_two_to_the_31_elements(kind, m, nested):
    """Its first rows, those on both sides of 2^31 elements and the last, against a weight of those rows alone, exactly."""
    n, k = 2**16 + 72, 2**15
    blocks = k // 64
    high, low = torch.randint(0, 3, (2, n, k // 2), dtype=torch.uint8, device="cuda")
    codes = (high * 7 + (high == 2)) * 16 + low * 7 + (low == 2)  # 0, 7 or 15: -1, 0 or 1
    codes = codes.to(torch.uint8)
    if nested:
        code = torch.full((256,), torch.nan, device="cuda")
        code[:4] = 2.0 ** torch.arange(-1, 3)
        scales = (
            torch.randint(0, 4, (n, blocks), dtype=torch.uint8, device="cuda"),
            2.0 ** torch.randint(0, 2, (n, blocks // 256), device="cuda"),
            code,
            torch.zeros(1, device="cuda"),
        )
    else:
        scales = (2.0 ** torch.randint(-1, 3, (n, blocks), device="cuda"),)
    q = NF4Tensor(codes, scales, (n, k), BF16, 64, 256 if nested else 0)
    x, bias = integers(m, k, limit=1), integers(n)
    a, b = integers(16, k, limit=1), integers(n, 16, limit=2)
    y, h = run(kind, x, q, a, b, bias, 0.5)
    wide = x.double()
    h_true = (0.5 * wide @ a.double().t()).to(BF16)
    assert torch.equal(h, h_true)
    for begin in (0, 2**15 - 64, 2**16 - 64, n - 72):
        rows = slice(begin, begin + 72 if begin else 64)
        absmax = scales[0][rows]
        if nested:
            absmax = reference.dequantize_scales(absmax, scales[1][rows].flatten(), *scales[2:], 256)  # fmt: skip
        shape = len(codes[rows]), k
        w = reference.dequantize_nf4(codes[rows], absmax, shape, 64, FP32).double()
        y_true = wide @ w.t() + h_true.double() @ b[rows].double().t() + bias[rows].double()
        assert torch.equal(y[:, rows], y_true.to(BF16)), begin


@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_runs_without_one_differing_bit(kind):
    q = NF4Tensor.quantize(torch.randn(4104, 1280, device="cuda"))
    x = torch.randn(13, 1280, device="cuda").to(BF16)
    a, b = torch.randn(16, 1280, device="cuda"), torch.randn(4104, 16, device="cuda")
    expected = [t.clone() for t in run(kind, x, q, a, b)]
    for _ in range(200):
        got = run(kind, x, q, a, b)
        assert all(map(torch.equal, got, expected))
        for t in got:
            t.fill_(torch.nan)


@has("nf4_gemm")
@pytest.mark.parametrize("splits", range(1, 9))
@pytest.mark.parametrize("rows", [16, 32, 64, 128, 256])
def test_every_tile_and_every_cut_of_k(rows, splits):
    m, n, k, rank = 70, 300, 2304, 40
    q, x, bias = exact_weight(n, k), integers(m, k), integers(n)
    h, b = integers(m, rank), integers(n, rank, dtype=FP32)
    y, none = run("gemm", x, q, None, b, bias, h=h, config=[rows, splits])
    truth = x.double() @ q.dequantize(FP32).double().t() + h.double() @ b.double().t()
    assert none.numel() == 0 and torch.equal(y, (truth + bias.double()).to(BF16))


@has("nf4_few")
@pytest.mark.parametrize("shared_kib", [99, 163])
@pytest.mark.parametrize(("m", "n", "k"), [shape for shape in FEW if shape[2] <= 4160])
def test_what_smaller_gpus_run(m, n, k, shared_kib):
    """GPUs of 8.0 (163 KiB of shared memory a CTA), 8.6, 8.9 and 12.0 (99 KiB)."""
    bias, rank = integers(n), 16
    q, x = exact_weight(n, k), integers(m, k)
    a, b = integers(rank, k, limit=1), integers(n, rank, limit=2)
    y, h = run("few", x, q, a, b, bias, config=shared_kib * 1024)
    h_true = (x.double() @ a.double().t()).to(BF16)
    y_true = x.double() @ q.dequantize(FP32).double().t() + h_true.double() @ b.double().t()
    assert torch.equal(h, h_true) and torch.equal(y, (y_true + bias.double()).to(BF16))
    with pytest.raises((ValueError, RuntimeError), match="99 KiB"):
        run("few", x, q, config=64 * 1024)


@has("nf4_few")
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(3, 28672, 8192), (8, 8192, 28672), (11, 20000, 8192)])
def test_scales_are_made_again_for_later_passes(m, n, k, double_quant):
    """A CTA has more features than shared memory has room for, of their sums and of their scales."""
    q = exact_weight(n, k) if not double_quant else NF4Tensor.quantize(torch.randn(n, k, device="cuda"))  # fmt: skip
    x = integers(m, k)
    y, _ = run("few", x, q)
    truth = torch.cat([x.float() @ w.t() for w in q.dequantize(FP32).split(4096)], 1)
    if not double_quant:
        assert torch.equal(y, truth.to(BF16))
    for part, of in zip(y.split(128, 1), truth.split(128, 1), strict=True):
        assert (part - of).norm() < 4e-3 * of.norm()


@has("nf4_few")
def test_scales_that_find_no_room_are_left_to_others():
    """The dispatcher's arithmetic is the kernel's."""
    most = cuda_backend._most_few_blocks(DEVICE)
    for blocks in (most, most + 1):
        q = exact_weight(16, blocks * 64)
        x = integers(2, blocks * 64)
        fit = cuda_backend.nf4_few_fit(x, q.codes, q.form)
        assert (fit == support.Fit()) == (blocks == most)
        if blocks == most:
            truth = x.double() @ q.dequantize(FP32).double().t()
            assert torch.equal(run("few", x, q)[0], truth.to(BF16))
            continue
        assert "blocks in a row" in fit.miss
        with pytest.raises((ValueError, RuntimeError), match="blocks in a row"):
            run("few", x, q)
    y = fastlora.qlora_linear(x, q, integers(16, blocks * 64), integers(16, 16))  # somebody does
    assert y.shape == (2, 16)


@has("nf4_gemm")
@pytest.mark.parametrize("n", [1, 2, 127, 129])
def test_few_features(n):
    q, x, bias = exact_weight(n, 512), integers(3, 512), integers(n)
    truth = x.double() @ q.dequantize(FP32).double().t() + bias.double()
    for splits in (1, 2, 7):
        y, _ = run("gemm", x, q, bias=bias, config=[16, splits])
        assert torch.equal(y, truth.to(BF16))


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("rank", [0, 1, 7, 8, 17, 64, 512])
@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        pytest.param("few", 3, marks=has("nf4_few")),
        pytest.param("few", 13, marks=has("nf4_few")),
        pytest.param("few", 40, marks=has("nf4_few")),
        pytest.param("gemm", 140, marks=has("nf4_gemm")),
    ],
)
def test_an_h_that_is_given(kind, rows, rank, dtype):
    q, x = exact_weight(200, 512), integers(rows, 512, dtype=dtype)
    h, b = integers(rows, rank, dtype=dtype), integers(200, rank, dtype=dtype, limit=1)
    y, _ = run(kind, x, q, None, b, h=h)
    truth = x.double() @ q.dequantize(FP32).double().t() + h.double() @ b.double().t()
    assert torch.equal(y, truth.to(dtype))


@has("nf4_gemm")
@pytest.mark.parametrize("block_size", [64, 128, 256, 1024])
@pytest.mark.parametrize("nested_block_size", [4, 64, 256])
def test_blocks_of_every_size(block_size, nested_block_size):
    w = torch.randn(130, 4096, device="cuda")
    q = NF4Tensor.quantize(w, block_size, nested_block_size=nested_block_size)
    x = torch.randn(20, 4096, device="cuda").to(BF16)
    truth = x.double() @ q.dequantize(FP32).double().t()
    for splits in (1, 3, 8):
        y, _ = run("gemm", x, q, config=[32, splits])
        assert (y - truth).norm() < 4e-3 * truth.norm()


@has("nf4_gemm")
def test_a_graph_and_two_streams_without_one_differing_bit():
    """Runs of different shapes beside each other: h must be there before it is read, and nobody reads another's."""
    problems = []
    for m, n, k in ((13, 4096, 14336), (130, 1024, 4096), (300, 2048, 1024)):
        q = NF4Tensor.quantize(torch.randn(n, k, device="cuda"))
        x = torch.randn(m, k, device="cuda").to(BF16)
        a, b = torch.randn(16, k, device="cuda") * k**-0.5, torch.randn(n, 16, device="cuda")
        problems.append(((x, q, a, b), [t.clone() for t in run("gemm", x, q, a, b)]))
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for i in range(200):
        with torch.cuda.stream(streams[i % 2]):
            arguments, expected = problems[i % 3]
            got = run("gemm", *arguments)
            assert all(map(torch.equal, got, expected)), i
            for t in got:
                t.fill_(torch.nan)
    torch.cuda.synchronize()
    (x, *rest), _ = problems[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run("gemm", x, *rest)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, run("gemm", x, *rest)))


@has("nf4_few")
def test_a_layer_runs_it_and_nothing_else():
    kind = "nf4_few" if support.miss("nf4_gemm", "cuda", DEVICE, BF16, 16) else "nf4_gemm"
    layer = QLoRALinear.from_linear(torch.nn.Linear(256, 512, device="cuda", dtype=BF16), r=16)
    x = torch.randn(4, 8, 256, device="cuda", dtype=BF16)
    fastlora.reset_launches()
    with torch.no_grad():
        y = layer(x)
        assert fastlora.launches() == {(kind, "cuda"): 1}
        layer.enable_adapters(False)
        layer(x)
        assert fastlora.launches() == {(kind, "cuda"): 2}
        layer.enable_adapters()
        with fastlora.backend("triton"):
            other = layer(x)
    assert (y - other).norm() < 6e-3 * other.norm()
    layer(x.requires_grad_()).sum().backward()  # its h serves backward
    h = x.detach().float().view(32, 256) @ layer.lora_A["default"].t() * layer.scaling["default"]
    d_b = h.sum(0).expand(512, 16)
    assert (layer.lora_B["default"].grad - d_b).norm() < 1e-2 * d_b.norm()


@has("nf4_gemm")
@pytest.mark.parametrize(("rank", "dropout"), [(64, 0.0), (16, 0.5)])
def test_strictly_cuda_is_cuda_throughout(rank, dropout):
    """`down` has no cuda kernel: what would need it runs over a weight in floats."""
    linear = torch.nn.Linear(2048, 2048, device="cuda", dtype=BF16)
    layer = QLoRALinear.from_linear(linear, r=rank, lora_dropout=dropout)
    x = torch.randn(300, 2048, device="cuda", dtype=BF16)
    fastlora.reset_launches()
    with fastlora.backend("cuda", strict=True):
        fastlora.explain(layer, x)
        layer(x)
    assert {backend for _, backend in fastlora.launches()} == {"cuda"}


@has("nf4_gemm")
@pytest.mark.parametrize(
    ("rank", "dropout", "rows", "op"),
    [
        (64, 0.0, 5, "nf4_few"),
        (16, 0.5, 8, "nf4_few"),
        (64, 0.0, 40, "nf4_gemm"),
        (16, 0.5, 40, "nf4_gemm"),
        (16, 0.5, 300, "nf4_gemm"),
    ],
)
def test_more_ranks_and_dropout_take_an_h_from_outside(rank, dropout, rows, op):
    linear = torch.nn.Linear(512, 256, device="cuda", dtype=BF16)
    layer = QLoRALinear.from_linear(linear, r=rank, lora_dropout=dropout)
    torch.nn.init.normal_(layer.lora_B["default"])
    x = torch.randn(rows, 512, device="cuda", dtype=BF16)
    fastlora.reset_launches()
    torch.manual_seed(1)
    state = torch.cuda.get_rng_state()
    y = layer(x)
    ran = fastlora.launches()
    assert ran[(op, "cuda")] == 1 and not any(name == "dequantize" for name, _ in ran), ran
    torch.cuda.set_rng_state(state)
    with fastlora.backend("triton"):
        other = layer(x)
    assert (y - other).norm() < 6e-3 * other.norm()


@has("nf4_few")
def test_what_it_does_not_take_is_named():
    q = NF4Tensor.quantize(torch.randn(64, 128, device="cuda"))
    x = torch.randn(4, 128, device="cuda").to(BF16)
    a, b = torch.randn(16, 128, device="cuda"), torch.randn(64, 16, device="cuda")
    h = torch.randn(4, 16, device="cuda").to(BF16)

    def fit(x=x, form=q.form):
        return cuda_backend.nf4_few_fit(x, q.codes, form)

    assert fit() == support.Fit()
    assert "faster" in fit(x=torch.zeros(9, 128, device="cuda", dtype=BF16)).slower
    assert "64 rows" in fit(x=torch.zeros(65, 128, device="cuda", dtype=BF16)).miss
    assert "whole blocks" in fit(form=Form(64, 128, 32, 256, False)).miss
    assert "whole blocks" in fit(form=Form(64, 128, 256, 256, False)).miss
    for odd in (dict(a=torch.zeros(17, 128, device="cuda")), dict(a=a.half()),
                dict(a=torch.zeros(128, 16, device="cuda").t()), dict(state=torch.zeros(2))):  # fmt: skip
        assert not cuda_backend.nf4_makes_h(x, odd.get("a", a), b, odd.get("state"))
    assert cuda_backend.nf4_makes_h(x, a, b, None)
    wrong = [
        dict(x=x.float()),
        dict(x=x[:, :64]),
        dict(x=torch.zeros(65, 128, device="cuda", dtype=BF16)),
        dict(a=a[:, :64], b=b),
        dict(a=a, b=b[:, :8]),
        dict(a=a),
        dict(a=a, b=b, h=h),
        dict(b=b),
        dict(b=b, h=h[:3].contiguous()),
        dict(b=b, h=h.float()),
        dict(a=a.half(), b=b),
        dict(a=torch.zeros(17, 128, device="cuda"), b=torch.zeros(64, 17, device="cuda")),
        dict(bias=torch.zeros(64, device="cuda")),
    ]
    for arguments in wrong:
        with pytest.raises((ValueError, RuntimeError), match="_nf4"):
            run(**{"kind": "few", "x": x, "q": q, **arguments})


@has("nf4_gemm")
def test_what_the_gemm_does_not_take_is_named():
    q = NF4Tensor.quantize(torch.randn(64, 256, device="cuda"))
    x = torch.randn(4, 256, device="cuda").to(BF16)
    b, h = torch.randn(64, 16, device="cuda"), torch.randn(4, 16, device="cuda").to(BF16)

    def fit(x=x, form=q.form):
        return cuda_backend.nf4_gemm_fit(x, q.codes, q.scales, form)

    assert fit() == support.Fit()
    assert "four blocks" in fit(x=x[:, :128].contiguous(), form=Form(64, 128, 64, 256, False)).miss
    assert "four blocks" in fit(form=Form(64, 256, 64, 2, False)).miss
    assert "whole blocks" in fit(form=Form(64, 256, 32, 256, False)).miss
    assert "overlap" in fit(x=x[:1].expand(4, 256)).miss
    assert "16 bytes" in fit(x=torch.zeros(4, 264, device="cuda", dtype=BF16)[:, 1:257]).miss
    assert "in floats" in fit(x=torch.zeros(1025, 256, device="cuda", dtype=BF16)).slower
    full = Form(128 * 33, 256, 64, 256, False)  # 2048 rows fill the SMs twice
    assert fit(x=torch.zeros(2048, 256, device="cuda", dtype=BF16), form=full) == support.Fit()
    assert "in floats" in fit(x=torch.zeros(2049, 256, device="cuda", dtype=BF16), form=full).slower
    wrong = [
        dict(x=x.float()),
        dict(x=x[:, :128]),
        dict(x=x[:1].expand(4, 256)),
        dict(x=x.view(-1).unfold(0, 256, 8)),
        dict(b=b),
        dict(h=h),
        dict(b=b, h=h[:3].contiguous()),
        dict(b=b, h=h.float()),
        dict(b=b[:, :8].contiguous(), h=h),
        dict(a=torch.zeros(16, 256, device="cuda"), b=b, h=h),
        dict(a=torch.zeros(17, 256, device="cuda"), b=torch.zeros(64, 17, device="cuda")),
        dict(config=[48, 1]),
        dict(config=[64, 9]),
        dict(config=[64, -1]),
        dict(config=[64]),
        dict(bias=torch.zeros(64, device="cuda")),
    ]
    for arguments in wrong:
        with pytest.raises((ValueError, RuntimeError), match="nf4"):
            run(**{"kind": "gemm", "x": x, "q": q, **arguments})
