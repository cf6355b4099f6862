"""fastlora::_lora_few_sm90 on a Hopper GPU: exact on integers however K and the tiles are cut, against fp64, under stress."""

import pytest
import torch

import fastlora
from fastlora import ops, reference
from fastlora.testing.compare import assert_accurate
from tests.csrc.common import matrix, needs_hopper, true_forward

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (m, n, k, r): one element, ragged everywhere, fewer rows than a CTA of a cluster, ranks of one block and of more
SHAPES = [
    (1, 8, 8, 8),
    (1, 4096, 4096, 16),
    (7, 1000, 136, 8),
    (16, 520, 1032, 16),
    (64, 264, 520, 64),
    (65, 136, 4104, 24),
    (200, 1000, 776, 40),
    (256, 4096, 1024, 16),
    (300, 264, 512, 64),
]
CONFIGS = [
    [columns, cluster_m, splits]
    for columns in (64, 128)
    for cluster_m in (1, 2, 4)
    for splits in (1, 2, 4, 8)
    if cluster_m * splits <= 8
]


pytestmark = needs_hopper("lora")


def problem(m, n, k, r, dtype=BF16, factors=None, integers=False):
    """x, W, A, B and a bias."""
    factors = factors or dtype
    make = lambda rows, cols, scale=1.0, kind=dtype: matrix(rows, cols, kind, integers, scale)  # noqa: E731
    x, w = make(m, k), make(n, k, k**-0.5)
    a, b = make(r, k, k**-0.5, factors), make(n, r, r**-0.5, factors)
    return x, w, a, b, make(1, n)[0].contiguous()


def few(x, w, a, b, bias=None, scaling=None, scale=0.5, config=None, backward=False):
    run = torch.ops.fastlora._lora_few_sm90
    return run(x, w, a, b, bias, scaling, scale, backward, config)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_integers_are_exact(shape, wide, dtype):
    x, w, a, b, bias = problem(*shape, dtype, FP32 if wide else dtype, integers=True)
    y_true, h_true = true_forward(x, w, a, b, bias, 0.5, torch.float64)  # y is of the whole h
    h_true = h_true.to(dtype)
    for config in [None, *CONFIGS]:
        if config is not None and config[2] > -(-shape[2] // 64):
            continue
        y, h = few(x, w, a, b, bias, config=config)
        assert torch.equal(h, h_true), config
        assert torch.equal(y, y_true.to(dtype)), config
    scaling = torch.tensor(0.25, device="cuda")
    y, h = few(x, w, a, b, None, scaling, 2.0)
    assert torch.equal(h, h_true) and torch.equal(y, (y_true - bias.double()).to(dtype))


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_integers_are_exact_backward(shape, wide, dtype):
    """The same operands the other way: x [m, N], and W, A and B are what they are transposed."""
    m, n, k, r = shape
    dy = matrix(m, k, dtype, integers=True)
    _, w, a, b, _ = problem(m, k, n, r, dtype, FP32 if wide else dtype, integers=True)
    dx_true, g_true = true_forward(dy, w.t(), b.t(), a.t(), None, 0.5, torch.float64)
    scaling = torch.tensor(0.25, device="cuda")
    for config in [None, *CONFIGS]:
        if config is not None and config[2] > -(-k // 64):
            continue
        dx, g = few(dy, w, a, b, None, scaling, 2.0, config, backward=True)
        assert torch.equal(g, g_true.to(dtype)), config
        assert torch.equal(dx, dx_true.to(dtype)), config


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("shape", [*SHAPES, (256, 4096, 14336, 64)])
def test_backward_no_worse_than_twice_torchs_error(shape, dtype):
    m, n, k, r = shape
    dy, (_, w, a, b, _) = matrix(m, k, dtype), problem(m, k, n, r, dtype)
    dx_true, _ = true_forward(dy, w.t(), b.t(), a.t(), None, 0.5, torch.float64)
    g_true = 0.5 * dy.double() @ b.double()
    dx, g = few(dy, w, a, b, backward=True)
    theirs = reference.gemm(dy, w.t(), g_true.to(dtype), a.t(), None)
    assert_accurate("dX", dx, theirs, dx_true)
    assert_accurate("g", g, (0.5 * (dy @ b)).to(dtype), g_true)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 14336, 4096, 16), (256, 4096, 14336, 64)])
def test_no_worse_than_twice_torchs_error(shape, dtype):
    x, w, a, b, bias = problem(*shape, dtype)
    y_true, _ = true_forward(x, w, a, b, bias, 0.5, torch.float64)
    h_true = 0.5 * x.double() @ a.double().t()
    rounded = h_true.to(dtype)
    for config in (None, [64, 1, 1], [128, 2, 1]):
        y, h = few(x, w, a, b, bias, config=config)
        assert_accurate("y", y, reference.gemm(x, w, rounded, b, bias), y_true)
        assert_accurate("h", h, (0.5 * (x @ a.t())).to(dtype), h_true)


def test_shares_of_h_may_be_more_than_fp16_holds():
    """They cancel, or do not: y is right up to twice fp16's range, and what is stored of h is what fp16 makes of it."""
    m, n, k, r = 5, 64, 128, 8
    x = torch.ones(m, k, device="cuda", dtype=FP16)
    w = torch.zeros(n, k, device="cuda", dtype=FP16)
    b = torch.zeros(n, r, device="cuda", dtype=FP16)
    b[1:, 0], b[1:, 1] = 2.0**-10, 2.0**-12
    a = torch.zeros(r, k, device="cuda")
    a[0, :64], a[0, 64:], a[1] = 1024.0, -1023.0, 1000.0  # 65536 - 65472, and 64000 twice
    _, h_true = true_forward(x, w, a, b, None, 1.0, FP16)
    assert h_true[0].tolist() == [64.0, torch.inf] + 6 * [0.0]
    exact = (x.double() @ a.double().t()) @ b.double().t()
    for config in ([64, 1, 1], [64, 1, 2], [128, 2, 2]):
        y, h = few(x, w, a, b, scale=1.0, config=config)
        assert torch.equal(h, h_true) and torch.equal(y, exact.half()), config


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_what_is_not_finite_stays_so(dtype, value):
    x, w, a, b, _ = problem(4, 64, 256, 8, dtype)
    x, a, b = x.abs().contiguous(), a.abs().contiguous(), b.abs().contiguous()
    x[2, 100] = value
    y, h = few(x, w.abs(), a, b)
    assert y[2].isnan().all() if value != value else (y[2] == value).all()
    assert h[2].isnan().all() if value != value else (h[2] == value).all()
    assert y[[0, 1, 3]].isfinite().all() and h[[0, 1, 3]].isfinite().all()


def test_what_lies_beside_the_rows_is_never_read():
    """NaN in the padding (matrix() puts it there), and rows that are not asked for."""
    x, w, a, b, bias = problem(70, 200, 328, 24)
    y, h = few(x, w, a, b, bias)
    assert y.isfinite().all() and h.isfinite().all()
    for rows in (1, 9, 64):
        some, _ = few(x[:rows], w, a, b, bias, config=[128, 1, 2])
        all_of_it, _ = few(x, w, a, b, bias, config=[128, 1, 2])
        assert torch.equal(some, all_of_it[:rows])  # a row's bits do not depend on the others


def test_five_hundred_runs_on_two_streams_without_one_differing_bit():
    cases = [problem(*SHAPES[i]) for i in (1, 3, 6, 7)]
    expected = [few(*case) for case in cases]
    streams = [torch.cuda.Stream() for _ in range(2)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for i in range(500):
        with torch.cuda.stream(streams[i % 2]):
            which = (i // 2 + i % 2) % len(cases)
            for ours, truth in zip(few(*cases[which]), expected[which], strict=True):
                wrong += (ours != truth).any()
                ours.fill_(torch.nan)  # its memory is the next run's
    torch.cuda.synchronize()
    assert wrong.item() == 0


def test_a_graph_replays_with_new_inputs():
    x, w, a, b, bias = problem(16, 4096, 1024, 16)
    few(x, w, a, b, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = few(x, w, a, b, bias)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        for t in got:
            t.fill_(torch.nan)
        graph.replay()
        for ours, truth in zip(got, few(x, w, a, b, bias), strict=True):
            assert torch.equal(ours, truth)


@pytest.mark.parametrize("m", [1, 16, 256])
def test_the_dispatcher_chooses_it_for_few_rows(m):
    x, w, a, b, bias = problem(m, 512, 384, 16)
    y = fastlora.lora_linear(x, w, a, b, 0.5, bias)
    assert fastlora.launches() == {("lora_forward", "cuda"): 1}
    assert torch.equal(y, few(x, w, a, b, bias)[0])
    fastlora.reset_launches()
    leaves = [t.requires_grad_() for t in (x.contiguous(), a, b)]
    y = fastlora.lora_linear(leaves[0], w, leaves[1], leaves[2], 0.5)
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
    counts = {("lora_forward", "cuda"): 1, ("lora_dx", "cuda"): 1, ("wgrad", "triton"): 1}
    assert fastlora.launches() == counts
    exact = [t.detach().double().requires_grad_() for t in leaves]
    truth = reference.lora_linear(exact[0], w.double(), exact[1], exact[2], 0.5)
    for got, true in zip(grads, torch.autograd.grad(truth, exact, torch.ones_like(truth)), strict=True):  # fmt: skip
        assert (got.double() - true).norm() < 6e-3 * true.norm()
    fastlora.reset_launches()
    fastlora.lora_linear(x[:, 1:].contiguous(), w[:, 1:].contiguous(), a[:, 1:].contiguous(), b)
    assert ("lora_forward", "cuda") not in fastlora.launches()  # K is odd


def test_bad_arguments_are_refused():
    x, w, a, b, bias = problem(64, 128, 72, 16)
    few(x, w, a, b, bias)
    for wrong in (
        dict(w=w[:, :-8]),
        dict(a=a[:, :-8]),
        dict(b=b[:-8]),
        dict(x=x.float()),
        dict(x=x[0]),
        dict(x=x[:0]),
        dict(a=a.to(FP16)),
        dict(bias=bias[:-1]),
        dict(bias=bias.float()),
        dict(scaling=torch.ones(2, device="cuda")),
        dict(config=[128, 1]),
        dict(config=[96, 1, 1]),
        dict(config=[128, 3, 1]),
        dict(config=[128, 4, 4]),
        dict(config=[128, 1, 8]),  # two steps of K
        dict(x=x.t().contiguous().t()),
    ):
        with pytest.raises((ValueError, RuntimeError), match="few_sm90"):
            few(**{**dict(x=x, w=w, a=a, b=b, bias=bias), **wrong})
    wide = problem(64, 128, 72, 80)
    with pytest.raises((ValueError, RuntimeError), match="rank"):
        few(*wide)
    with (
        pytest.raises(RuntimeError, match="multiples of 8"),
        fastlora.backend("cuda", strict=True),
    ):
        ops.lora_forward(x, w, a[:5], b[:, :5], None, None, 0.5, None, 65536)
