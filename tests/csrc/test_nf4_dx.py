"""fastlora::_nf4_dx_sm90 on a GPU: dX over the codes, exact where its inputs are, against fp64, and chosen where it may be."""

import pytest
import torch

import fastlora
from fastlora import NF4Tensor, QLoRALinear, qlora_linear, reference
from fastlora.ops import Form, cuda_backend, support
from fastlora.testing.compare import assert_accurate
from tests.csrc.common import exact_weight, integers, matrix, needs_hopper, nf4_arguments

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
pytestmark = needs_hopper("nf4_dx")

TILES = [16, 32, 64, 128, 256]
# (m, n, k): every tile of rows; rows of W that end within a step, or within its first eight; columns that end within a tile
CASES = [
    (1, 64, 64),
    (1, 1, 64),
    (5, 8, 192),
    (16, 72, 320),
    (17, 1000, 128),
    (31, 200, 448),
    (64, 520, 1088),
    (65, 4104, 192),
    (128, 130, 4096),
    (200, 14336, 512),
    (300, 515, 768),
    (1000, 1027, 1024),
    (1024, 2048, 320),
]


def run(dy, q, a=None, g=None, config=None):
    return torch.ops.fastlora._nf4_dx_sm90(dy, *nf4_arguments(q, q.form.cols), a, g, config)


def truth_of(dy, q, a=None, g=None):
    dx = dy.double() @ q.dequantize(FP32).double()
    return dx if a is None else dx + g.double() @ a.double()


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize(("m", "n", "k"), CASES)
def test_integers_are_exact(m, n, k, block_size, dtype):
    """dY is padded with NaN."""
    if k % block_size:
        pytest.skip("a row is not as many blocks")
    q, dy = exact_weight(n, k, block_size), matrix(m, n, dtype, integers=True)
    assert torch.equal(run(dy, q), truth_of(dy, q).to(dtype))
    for rank, factors in ((1, FP32), (5, dtype), (16, FP32)):
        a, g = integers(rank, k, dtype=factors, limit=1), integers(m, rank, dtype=dtype)
        assert torch.equal(run(dy, q, a, g), truth_of(dy, q, a, g).to(dtype)), rank


@pytest.mark.parametrize("factors", [BF16, FP32])
@pytest.mark.parametrize("rank", [0, 1, 7, 8, 16, 17, 40, 512])
def test_every_rank(rank, factors):
    q, dy = exact_weight(300, 320), integers(140, 304)[:, :300]
    a, g = integers(rank, 320, dtype=factors, limit=1), integers(140, rank)
    for config in (None, [16, 1], [64, 3]):
        assert torch.equal(run(dy, q, a, g, config), truth_of(dy, q, a, g).to(BF16))


@pytest.mark.parametrize("splits", range(1, 9))
@pytest.mark.parametrize("rows", TILES)
def test_every_tile_and_every_cut_of_n(rows, splits):
    m, n, k, rank = 70, 2280, 320, 40
    q, dy = exact_weight(n, k), integers(m, n)
    a, g = integers(rank, k, dtype=FP32), integers(m, rank)
    dx = run(dy, q, a, g, config=[rows, splits])
    assert torch.equal(dx, truth_of(dy, q, a, g).to(BF16))


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 127, 500, 521, 600])
def test_few_rows_of_a_weight(n):
    """Fewer, as many and more steps than scales are loaded ahead, and than the ring has slots."""
    q, dy = exact_weight(n, 192), matrix(3, n, integers=True)
    for splits in range(1, min(8, -(-n // 64)) + 1):
        assert torch.equal(run(dy, q, config=[16, splits]), truth_of(dy, q).to(BF16))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("double_quant", "mean"), [(False, 0), (True, 0), (True, 1)])
@pytest.mark.parametrize(("m", "n", "k"), CASES)
def test_against_fp64(m, n, k, double_quant, mean, dtype, quant_type):
    """The weight is the formula's own, value * absmax: rounding it to ``dtype`` first is torch's error, not ours. Where dY
    has a mean the errors of code values must not add up."""
    q = NF4Tensor.quantize(torch.randn(n, k, device="cuda").to(dtype), 64, double_quant)
    q.quant_type = quant_type
    dy = matrix(m, n, dtype) + mean if n % 8 == 0 else matrix(m, n, dtype)
    a = (torch.randn(16, k, device="cuda") * k**-0.5).to(dtype)
    g = torch.randn(m, 16, device="cuda").to(dtype)
    naive = reference.gemm(dy, q.dequantize(dtype).t(), g, a.t(), None)
    assert_accurate("dX", run(dy, q, a, g), naive, truth_of(dy, q, a, g))


@pytest.mark.parametrize("block_size", [64, 128, 256, 1024])
@pytest.mark.parametrize("nested_block_size", [1, 4, 64, 256])
def test_blocks_of_every_size(block_size, nested_block_size):
    q = NF4Tensor.quantize(
        torch.randn(130, 3072, device="cuda"), block_size, nested_block_size=nested_block_size
    )
    dy = integers(20, 136)[:, :130]
    truth = truth_of(dy, q)
    for splits in (1, 2, 3):
        dx = run(dy, q, config=[32, splits])
        assert (dx - truth).norm() < 4e-3 * truth.norm()


def test_scales_that_start_anywhere():
    q, dy = exact_weight(100, 192), integers(20, 104)[:, :100]
    codes, absmax, *rest = nf4_arguments(q, 192)
    room = torch.full((absmax.numel() + 1,), torch.nan, device="cuda")
    room[1:] = absmax
    dx = torch.ops.fastlora._nf4_dx_sm90(dy, codes, room[1:], *rest, None, None, None)
    assert torch.equal(dx, truth_of(dy, q).to(BF16))


@pytest.mark.parametrize("rows", TILES)
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("n", [72, 64, 1])
def test_a_scale_of_the_last_row_stays_in_its_columns(n, bad, rows):
    """Rows past the last are zeros of dY: they must not meet its infinite scale, nor the second block of a tile the first's."""
    k = 320
    q, dy = exact_weight(n, k), matrix(20, n, integers=True)
    dy[:, -1] = torch.arange(20, device="cuda") % 2 * 2 - 1
    q.codes.view(n, -1)[-1] = 0xFF  # ones
    clean = run(dy, q, config=[rows, 1])
    for block in range(k // 64):
        codes, absmax, *rest = nf4_arguments(q, k)
        scales = absmax.clone()
        scales.view(n, -1)[-1, block] = bad
        for splits in range(1, -(-n // 64) + 1):
            config = [rows, splits]
            dx = torch.ops.fastlora._nf4_dx_sm90(dy, codes, scales, *rest, None, None, config)
            expected = clean.clone()
            expected[:, 64 * block : 64 * (block + 1)] = dy[:, -1:].float() * bad
            assert torch.equal(dx.nan_to_num(7777.0), expected.nan_to_num(7777.0)), (block, splits)


def test_nan_and_infinity_stay_in_their_rows():
    q = NF4Tensor.quantize(torch.randn(104, 256, device="cuda"))
    dy = torch.randn(20, 104, device="cuda").to(BF16)
    a, g = torch.randn(16, 256, device="cuda"), torch.randn(20, 16, device="cuda").to(BF16)
    clean = run(dy, q, a, g)
    hostile, hostile_g = dy.clone(), g.clone()
    hostile[3, 7], hostile[11, 100], hostile_g[13, 15] = torch.nan, torch.inf, torch.nan
    dx = run(hostile, q, a, hostile_g)
    bad = [3, 11, 13]
    assert not dx[bad].isfinite().any()
    good = [i for i in range(20) if i not in bad]
    assert torch.equal(dx[good], clean[good])


def test_strides_and_offsets_of_dy():
    q = NF4Tensor.quantize(torch.randn(256, 192, device="cuda"))
    room = torch.randn(40, 400, device="cuda").to(BF16)
    view = room[3:20, 8:264]
    assert torch.equal(run(view, q), run(view.contiguous(), q))
    assert torch.equal(run(room[:1, :256], q), run(room[:1, :256].contiguous(), q))
    with pytest.raises((ValueError, RuntimeError), match="16 bytes"):
        run(room[3:20, 1:257], q)


def test_two_hundred_runs_without_one_differing_bit():
    q = NF4Tensor.quantize(torch.randn(4104, 1280, device="cuda"))
    a = torch.randn(16, 1280, device="cuda")
    for m in (13, 130, 300):
        dy = torch.randn(m, 4104, device="cuda").to(BF16)
        g = torch.randn(m, 16, device="cuda").to(BF16)
        expected = run(dy, q, a, g).clone()
        for _ in range(200):
            got = run(dy, q, a, g)
            assert torch.equal(got, expected)
            got.fill_(torch.nan)


def test_a_graph_and_two_streams_without_one_differing_bit():
    problems = []
    for m, n, k in ((13, 14336, 4096), (130, 4096, 1024), (300, 1024, 2048)):
        q = NF4Tensor.quantize(torch.randn(n, k, device="cuda"))
        dy, g = (torch.randn(m, c, device="cuda").to(BF16) for c in (n, 16))
        arguments = dy, q, torch.randn(16, k, device="cuda"), g
        problems.append((arguments, run(*arguments).clone()))
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for i in range(200):
        with torch.cuda.stream(streams[i % 2]):
            arguments, expected = problems[i % 3]
            got = run(*arguments)
            assert torch.equal(got, expected), i
            got.fill_(torch.nan)
    torch.cuda.synchronize()
    (dy, *rest), _ = problems[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(dy, *rest)
    dy.copy_(torch.randn_like(dy))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, run(dy, *rest))


# ---- chosen -----------------------------------------------------------------------------------------------------


def gradients(layer, x, dy):
    layer.zero_grad()
    x = x.detach().requires_grad_()
    layer(x).backward(dy)
    return {"x": x.grad, **{k: v.grad.clone() for k, v in layer.named_parameters() if v.grad is not None}}  # fmt: skip


@pytest.mark.parametrize("factors", [BF16, FP32])
@pytest.mark.parametrize("rank", [0, 16, 64])
@pytest.mark.parametrize("rows", [4, 40, 300, 1024])
def test_a_layer_runs_it_and_nothing_else(rows, rank, factors):
    linear = torch.nn.Linear(512, 520, device="cuda", dtype=BF16)
    layer = QLoRALinear.from_linear(linear, r=rank or 8).to(factors)
    layer.enable_adapters(rank > 0)
    torch.nn.init.normal_(layer.lora_B["default"])
    x, dy = (torch.randn(rows, c, device="cuda", dtype=BF16) for c in (512, 520))
    with torch.autocast("cuda", BF16):
        text = fastlora.explain(layer, x)
        assert "nf4_dx dX = dY W" in text and "dequantize" not in text
        fastlora.reset_launches()
        got = gradients(layer, x, dy)
        ran = fastlora.launches()
        assert ran["nf4_dx", "cuda"] == 1 and not {"gemm", "dequantize"} & {op for op, _ in ran}
        with fastlora.backend("triton"):
            other = gradients(layer, x, dy)
    assert got.keys() == other.keys()
    for name, value in got.items():
        assert (value - other[name]).norm() < 1e-2 * other[name].norm(), name


def test_a_compiled_layer_is_one_graph_and_runs_it():
    layer = QLoRALinear.from_linear(torch.nn.Linear(256, 512, device="cuda", dtype=BF16), r=16)
    torch.nn.init.normal_(layer.lora_B["default"])
    x, dy = (torch.randn(40, c, device="cuda", dtype=BF16) for c in (256, 512))
    want = gradients(layer, x, dy)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    fastlora.reset_launches()
    got = gradients(compiled, x, dy)
    ran = fastlora.launches()
    assert ran["nf4_dx", "cuda"] == 1 and not any(op == "dequantize" for op, _ in ran), ran
    for value, expected in zip(got.values(), want.values(), strict=True):
        assert torch.equal(value, expected)


def test_strictly_cuda_is_cuda_throughout():
    """`down` and `wgrad` have no cuda kernels: with an update everything runs over a weight in floats, in one launch."""
    q = NF4Tensor.quantize(torch.randn(2048, 2048, device="cuda"))
    x = torch.randn(300, 2048, device="cuda", dtype=BF16, requires_grad=True)
    none = torch.empty(0, 2048, device="cuda", dtype=BF16), torch.empty(2048, 0, device="cuda", dtype=BF16)  # fmt: skip
    dy = torch.randn(300, 2048, device="cuda", dtype=BF16)
    with fastlora.backend("cuda", strict=True):
        fastlora.reset_launches()
        qlora_linear(x, q, *none).backward(dy)
        assert fastlora.launches() == {("nf4_gemm", "cuda"): 1, ("nf4_dx", "cuda"): 1}
        a, b = (torch.randn(s, device="cuda", dtype=BF16) for s in ((16, 2048), (2048, 16)))
        fastlora.reset_launches()
        qlora_linear(x, q, a, b).backward(dy)
        assert {backend for _, backend in fastlora.launches()} == {"cuda"}


@pytest.mark.parametrize(("rows", "dropout"), [(1025, 0.0), (40, 0.5)])
def test_many_rows_and_dropout_take_a_weight_in_floats(rows, dropout):
    linear = torch.nn.Linear(512, 256, device="cuda", dtype=BF16)
    layer = QLoRALinear.from_linear(linear, r=16, lora_dropout=dropout)
    x, dy = (torch.randn(rows, c, device="cuda", dtype=BF16) for c in (512, 256))
    fastlora.reset_launches()
    gradients(layer, x, dy)
    ran = fastlora.launches()
    assert not any(op == "nf4_dx" for op, _ in ran) and any(op == "dequantize" for op, _ in ran)


def test_what_it_does_not_take_is_named():
    q = NF4Tensor.quantize(torch.randn(64, 320, device="cuda"))
    dy = torch.randn(4, 64, device="cuda").to(BF16)
    a, g = torch.randn(16, 320, device="cuda"), torch.randn(4, 16, device="cuda").to(BF16)

    def fit(dy=dy, form=q.form, state=None):
        return cuda_backend.nf4_dx_fit(dy, q.codes, form, state)

    assert fit() == support.Fit()
    assert "dropout" in fit(state=torch.zeros(2, device="cuda")).miss
    assert "whole blocks" in fit(form=Form(64, 320, 32, 256, False)).miss
    assert "whole blocks" in fit(form=Form(64, 320, 128, 256, False)).miss
    assert "overlap" in fit(dy=dy.view(-1).unfold(0, 64, 8)).miss
    assert "16 bytes" in fit(dy=torch.zeros(4, 72, device="cuda", dtype=BF16)[:, 1:65]).miss
    assert "in floats" in fit(dy=torch.zeros(1025, 64, device="cuda", dtype=BF16)).slower
    wrong = [
        (dict(dy=dy.float()), "bfloat16 or float16"),
        (dict(dy=dy[0]), "must be a matrix"),
        (dict(dy=dy[:, :56]), "another weight"),
        (dict(dy=dy[:0]), "takes 1 row"),
        (dict(dy=dy[:1].expand(4, 64)), "overlap"),
        (dict(dy=dy.view(-1).unfold(0, 64, 8)), "overlap"),
        (dict(dy=dy.t().contiguous().t()), "contiguous rows"),
        (dict(a=a), "comes with g"),
        (dict(g=g), "comes with g"),
        (dict(a=a, g=g[:3].contiguous()), "g must"),
        (dict(a=a, g=g.float()), "g must"),
        (dict(a=a, g=g.t().contiguous().t()), "g must"),
        (dict(a=a[:8].contiguous(), g=g), r"g must be \[4, 8\]"),
        (dict(a=a[:, :256], g=g), "lora_A must"),
        (dict(a=a.half(), g=g), "lora_A must"),
        (dict(a=a.cpu(), g=g), "lora_A must"),
        (dict(a=torch.zeros(16 * 320 + 1, device="cuda")[1:].view(16, 320), g=g), "8 bytes"),
        (dict(config=[48, 1]), "rows of a tile"),
        (dict(config=[64, 9]), "splits up to 8"),
        (dict(config=[64, 2]), "up to 1 parts"),
        (dict(config=[64]), "config must be"),
    ]
    for arguments, message in wrong:
        with pytest.raises((ValueError, RuntimeError), match=message):
            run(**{"dy": dy, "q": q, **arguments})
    a = torch.zeros(16 * 320 + 1, device="cuda")[1:].view(16, 320)  # the backend makes it fit
    cuda_backend.nf4_dx(dy, q.codes.view(-1), list(nf4_arguments(q, 320))[1:5], q.form, g, a)
