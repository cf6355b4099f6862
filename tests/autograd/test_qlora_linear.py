"""qlora_linear: lora_linear over the dequantised weight, which exists only while a product takes it."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import NF4Tensor, reference, rng, switches
from fastlora.ops import support
from fastlora.testing.compare import assert_accurate
from tests.faults import common

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [(1, 64, 32, 4), (33, 128, 96, 16), (7, 72, 40, 5), (0, 64, 32, 4), (130, 256, 136, 64)]


def problem(m=12, k=128, n=96, r=8, dtype=FP32, factors=None, device="cpu", double_quant=True):
    factors = factors or dtype
    q = NF4Tensor.quantize(torch.randn(n, k, device=device) * k**-0.5, double_quant=double_quant)
    x, a, b, bias, dy = (
        torch.randn(shape, device=device).to(kind)
        for shape, kind in (
            ((m, k), dtype),
            ((r, k), factors),
            ((n, r), factors),
            ((n,), dtype),
            ((m, n), dtype),
        )
    )
    return x, q, a * k**-0.5, b * r**-0.5, bias, dy


def gradients(run, leaves, dy):
    leaves = [t.detach().requires_grad_() for t in leaves]
    y = run(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, dy))


def dtypes(device):
    return (FP32, BF16, FP16) if device.type == "cuda" else (FP32, BF16)


@pytest.mark.parametrize("factors", ["same", FP32])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_lora_linear_over_the_dequantised_weight(shape, factors, device):
    """Against the formula in fp64, by the error of torch's own; and equal to lora_linear over that weight, but where
    codes are multiplied as they lie: these kernels sum in another order, and csrc/nf4 rounds in other places."""
    for dtype in dtypes(device):
        kind = dtype if factors == "same" else factors
        x, q, a, b, bias, dy = problem(*shape, dtype, kind, device)
        w, unrounded = q.dequantize(dtype), q.dequantize(FP32)

        def ours(x, a, b, bias, q=q):
            return fastlora.qlora_linear(x, q, a, b, 0.5, bias)

        def same(x, a, b, bias, w=w):
            return fastlora.lora_linear(x, w, a, b, 0.5, bias)

        def plain(x, a, b, bias, w=w, unrounded=unrounded):
            weight = unrounded.double() if x.dtype == torch.float64 else w
            return reference.lora_linear(x, weight, a, b, 0.5, bias)

        leaves = (x, a, b, bias)
        fastlora.reset_launches()
        got = gradients(ours, leaves, dy)
        few = {"nf4_few", "nf4_gemm", "nf4_dx"} & {op for op, _ in fastlora.launches()}
        alike = gradients(same, leaves, dy)
        naive = gradients(plain, leaves, dy)
        true = gradients(plain, [t.double() for t in leaves], dy.double())
        for name, value, other, theirs, truth in zip(
            ("y", "dX", "dA", "dB", "dbias"), got, alike, naive, true, strict=True
        ):
            assert few or torch.equal(value, other), (name, dtype)
            if value.numel() and shape[0]:
                assert_accurate(name, value, theirs, truth)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_whole_of_it_on_one_backend(backend):
    x, q, a, b, bias, dy = problem(2048, 1024, 512, 16, BF16, device="cuda")
    w = q.dequantize()
    fastlora.reset_launches()
    with fastlora.backend(backend, strict=True):
        got = gradients(
            lambda x, a, b, bias: fastlora.qlora_linear(x, q, a, b, 0.5, bias),
            (x, a, b, bias),
            dy,
        )
    ran = fastlora.launches()
    assert ran["dequantize", backend] == 2
    assert {name for _, name in ran} == {backend}
    leaves = [t.double() for t in (x, a, b, bias)]
    true = gradients(
        lambda x, a, b, bias: reference.lora_linear(x, w.double(), a, b, 0.5, bias),
        leaves,
        dy.double(),
    )
    for value, truth in zip(got, true, strict=True):
        assert (value.double() - truth).norm() < 6e-3 * truth.norm()


def forward_launches(x, q, a, b, bias, **options):
    """y without gradients, and what was launched for it."""
    fastlora.reset_launches()
    with torch.no_grad():
        y = fastlora.qlora_linear(x, q, a, b, 0.5, bias, **options)
    return y, fastlora.launches()


CODES = {("down", "triton"): 1, ("nf4_gemm", "triton"): 1}
FLOATS = {("dequantize", "triton"): 1, ("down", "triton"): 1, ("gemm", "triton"): 1}


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("factors", [FP16, FP32])
def test_few_rows_are_multiplied_by_the_codes_on_triton(factors, double_quant, device):
    """Up to 128 rows, with dropout and without factors too; and the result is that of a weight in floats."""
    if support.miss("nf4_gemm", "triton", device, FP16, 8):
        pytest.skip("Triton does not run here")
    x, q, a, b, bias, _ = problem(129, 128, 96, 8, FP16, factors, device, double_quant)
    with fastlora.backend("triton", strict=True):
        y, ran = forward_launches(x[:128], q, a, b, bias)
        assert ran == CODES
        floats, ran = forward_launches(x, q, a, b, bias)
        assert ran == FLOATS
        torch.testing.assert_close(y, floats[:128], rtol=2e-3, atol=2e-3)
        none, ran = forward_launches(x[:3], q, a[:0], b[:, :0], bias)
        assert ran == {("nf4_gemm", "triton"): 1}
        frozen = torch.nn.functional.linear(x[:3], q.dequantize(FP16), bias)
        torch.testing.assert_close(none, frozen, rtol=2e-3, atol=2e-3)
        torch.manual_seed(1)
        dropped, ran = forward_launches(x[:128], q, a, b, bias, dropout_p=0.5)
        assert ran == CODES
    torch.manual_seed(1)
    with fastlora.backend("torch"):
        same, _ = forward_launches(x[:128], q, a, b, bias, dropout_p=0.5)
    assert not torch.equal(dropped, y)
    torch.testing.assert_close(dropped, same, rtol=2e-3, atol=2e-3)


def test_what_the_codes_are_not_read_for_on_triton(device, monkeypatch):
    """Rows that begin amid a byte, or far from a block's begin, and where it is switched off: a weight in floats, on Triton
    all the same."""
    if support.miss("nf4_gemm", "triton", device, FP16, 8):
        pytest.skip("Triton does not run here")
    odd = problem(3, 33, 20, 4, FP16, device=device)[:-1]
    amid = problem(3, 72, 20, 4, FP16, device=device)[:-1]
    even = problem(3, 96, 20, 4, FP16, device=device)[:-1]
    with fastlora.backend("triton", strict=True):
        assert forward_launches(*odd)[1] == forward_launches(*amid)[1] == FLOATS
        assert forward_launches(*even)[1] == CODES
        monkeypatch.setattr(switches, "_OFF", frozenset({"nf4_codes"}))
        support.miss.cache_clear()
        try:
            assert forward_launches(*even)[1] == FLOATS
        finally:
            support.miss.cache_clear()
    if device.type == "cpu":  # the interpreter is no default
        monkeypatch.undo()
        assert {name for _, name in forward_launches(*even)[1]} == {"torch"}


def test_explain_knows_that_triton_reads_the_codes(device):
    layer = fastlora.QLoRALinear.from_linear(torch.nn.Linear(128, 96, device=device), r=8)
    x = torch.randn(5, 128, device=device)
    with fastlora.backend("triton"):
        if support.miss("nf4_gemm", "triton", device, FP32, 8):
            pytest.skip("Triton does not run here")
        text = fastlora.explain(layer, x)
        line = next(line for line in text.splitlines() if "nf4_gemm" in line)
        assert "-> triton   (over the codes)" in line and "y = x W^T + h B^T" in line
        assert "h = s" not in line and "down   h = s drop(x) A^T" in text
        assert "nf4_dx dX = dY W + g A" in text and "W, for" not in text
        many = fastlora.explain(layer, torch.randn(129, 128, device=device))
        assert "nf4_gemm" not in many and "y and again for dX" in many


@pytest.fixture
def exact_mode(monkeypatch):
    """FASTLORA_OFF=nf4_codes."""
    monkeypatch.setattr(switches, "_OFF", frozenset({"nf4_codes"}))
    support.miss.cache_clear()
    yield
    support.miss.cache_clear()


@pytest.mark.parametrize("factors", ["same", FP32])
@pytest.mark.parametrize("m", [1, 64, 300])
def test_exact_mode_is_lora_linear(m, factors, device, exact_mode):
    """No weight is multiplied as codes: every bit is that of lora_linear over the weight in floats."""
    for dtype in dtypes(device):
        kind = dtype if factors == "same" else factors
        x, q, a, b, bias, dy = problem(m, 256, 128, 16, dtype, kind, device)
        leaves, w = (x, a, b, bias), q.dequantize(dtype)
        fastlora.reset_launches()
        got = gradients(lambda x, a, b, bias, q=q: fastlora.qlora_linear(x, q, a, b, 0.5, bias), leaves, dy)  # fmt: skip
        ran = {op for op, _ in fastlora.launches()}
        assert "dequantize" in ran and not ran & {"nf4_few", "nf4_gemm"}, ran
        same = gradients(lambda x, a, b, bias, w=w: fastlora.lora_linear(x, w, a, b, 0.5, bias), leaves, dy)  # fmt: skip
        for name, value, other in zip(("y", "dX", "dA", "dB", "dbias"), got, same, strict=True):
            assert torch.equal(value, other), (name, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 64, 300])
def test_without_exact_mode_codes_are_multiplied(m):
    """So that the test above is about something."""
    op = "nf4_few" if m <= 64 else "nf4_gemm"
    if reason := support.miss(op, "cuda", torch.device("cuda", 0), BF16, 16):
        pytest.skip(reason)
    x, q, a, b, bias, _ = problem(m, 256, 128, 16, BF16, device="cuda")
    fastlora.qlora_linear(x, q, a, b, 0.5, bias)
    assert {("nf4_few", "cuda"), ("nf4_gemm", "cuda")} & fastlora.launches().keys()


ROWS = [40, 300, pytest.param(2048, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("k", [256, 200])  # a row of whole blocks, and not
@pytest.mark.parametrize("m", ROWS)
def test_dropout_of_a_known_mask(m, k, double_quant, device):
    """Forward and backward drop what the state says, on the low-rank path alone."""
    p = 0.3
    for dtype in dtypes(device):
        x, q, a, b, bias, dy = problem(m, k, 128, 16, dtype, FP32, device, double_quant)
        torch.manual_seed(7)
        state, keep = rng.draw_state(device), rng.keep_threshold(p)
        mask = reference.unpack_mask(reference.mask(state.cpu(), m, k, keep), m, k).to(device)
        assert 0.65 < mask.float().mean() < 0.75
        torch.manual_seed(7)
        fastlora.reset_launches()
        got = gradients(
            lambda x, a, b, bias, q=q: fastlora.qlora_linear(x, q, a, b, 0.5, bias, dropout_p=p),
            (x, a, b, bias),
            dy,
        )
        assert device.type == "cpu" or {by for _, by in fastlora.launches()} <= {"cuda", "triton"}
        weight = common.weight64(q).to(device)
        exact = common.truth(x, weight, a, b, dy, 0.5, bias, mask=mask, keep=keep)
        common.assert_close(got, exact, 2 * common.ROUNDING[dtype])


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("m", ROWS)
def test_fifty_runs_without_one_differing_bit(m, dropout_p, device):
    dtype, k, n = (BF16, 1024, 512) if device.type == "cuda" else (FP32, 128, 64)
    x, q, a, b, bias, dy = problem(m, k, n, 16, dtype, FP32, device)
    leaves = (x, a, b, bias)

    def run(x, a, b, bias):
        return fastlora.qlora_linear(x, q, a, b, 0.5, bias, dropout_p=dropout_p)

    torch.manual_seed(3)
    expected = [t.clone() for t in gradients(run, leaves, dy)]
    assert all(t.abs().max() > 0 for t in expected)
    for i in range(50):
        torch.manual_seed(3)
        got = gradients(run, leaves, dy)
        assert all(map(torch.equal, got, expected)), i
        for t in got:
            t.fill_(torch.nan)  # what lies there next must be written, not found
    assert device.type == "cpu" or {by for _, by in fastlora.launches()} <= {"cuda", "triton"}


def test_the_float_weight_is_not_saved(device):
    x, q, a, b, bias, dy = problem(device=device)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        leaves = [t.requires_grad_() for t in (x, a, b)]
        y = fastlora.qlora_linear(x, q, a, b, 0.5, bias)
    assert not any(t.is_floating_point() and t.numel() == q.shape.numel() for t in seen)
    assert {t.data_ptr() for t in q.parameters()} <= {t.data_ptr() for t in seen}
    torch.autograd.grad(y, leaves, dy)
    seen.clear()
    frozen = x.detach()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        fastlora.qlora_linear(frozen, q, a, b, 0.5, bias)  # no dX: no weight at all
    assert not {t.data_ptr() for t in q.parameters()} & {t.data_ptr() for t in seen}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_reads_the_codes_once_a_pass(reentrant, device):
    x, q, a, b, bias, dy = problem(device=device)
    leaves = [t.requires_grad_() for t in (x, a, b)]

    def run(x):
        return fastlora.qlora_linear(x, q, a, b, 0.5, bias, dropout_p=0.3)

    torch.manual_seed(3)
    expected = torch.autograd.grad(run(x), leaves, dy)
    torch.manual_seed(3)
    fastlora.reset_launches()
    y = checkpoint(run, x, use_reentrant=reentrant)
    y.backward(dy)
    reading = ("dequantize", "nf4_gemm")
    assert sum(n for (op, _), n in fastlora.launches().items() if op in reading) == 3
    for leaf, want in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, want)


def test_no_rank_and_three_dimensions(device):
    x, q, _, _, bias, _ = problem(device=device)
    nothing = x.new_empty(0, 128), x.new_empty(96, 0)
    y = fastlora.qlora_linear(x.view(3, 4, 128), q, *nothing, bias=bias)
    expected = torch.nn.functional.linear(x, q.dequantize(FP32), bias)
    assert y.shape == (3, 4, 96)
    torch.testing.assert_close(y.view(12, 96), expected)


def test_autocast_decides_the_dtype(device):
    x, q, a, b, bias, _ = problem(device=device)
    with torch.autocast(device.type, BF16):
        y = fastlora.qlora_linear(x, q, a, b, 0.5, bias)
        same = fastlora.lora_linear(x, q.dequantize(BF16), a, b, 0.5, bias)
    assert y.dtype == BF16
    assert (y - same).norm() < 6e-3 * same.norm()


def test_compiled_whole(device):
    x, q, a, b, bias, dy = problem(device=device)
    leaves = (x, a, b)

    def run(x, a, b):
        return fastlora.qlora_linear(x, q, a, b, 0.5, bias)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(compiled, leaves, dy), gradients(run, leaves, dy), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.gpu
def test_a_graph_replays_with_new_inputs():
    x, q, a, b, bias, dy = problem(256, 512, 384, 16, BF16, device="cuda")
    leaves = [t.requires_grad_() for t in (x, a, b)]

    def step():
        y = fastlora.qlora_linear(x, q, a, b, 0.5, bias)
        return (y, *torch.autograd.grad(y, leaves, dy))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for _ in range(2):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        for ours, truth in zip(got, step(), strict=True):
            assert torch.equal(ours, truth)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(q=torch.zeros(96, 128)), TypeError, "qweight: got Tensor"),
        (dict(x=[1.0]), TypeError, "x: got list"),
        (dict(x=torch.zeros(12, 128, dtype=torch.float64)), ValueError, "x: got torch.float64"),
        (dict(x=torch.zeros(12, 64)), ValueError, r"x: got shape \(12, 64\)"),
        (dict(a=torch.zeros(8, 64)), ValueError, "lora_a: got shape"),
        (dict(b=torch.zeros(96, 7)), ValueError, "lora_b: got shape"),
        (dict(bias=torch.zeros(5)), ValueError, "bias: got shape"),
        (dict(a=torch.zeros(8, 128, dtype=FP16)), ValueError, "lora_a: got torch.float16"),
        (dict(scaling="much"), TypeError, "scaling: got str"),
        (dict(dropout_p=1.5), ValueError, "dropout_p"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    x, q, a, b, bias, _ = problem()
    given = {"x": x, "q": q, "a": a, "b": b, "scaling": 0.5, "bias": bias, "dropout_p": 0.0}
    with pytest.raises(error, match=message):
        fastlora.qlora_linear(*(given | change).values())


def test_a_second_derivative_is_refused():
    x, q, a, b, _, _ = problem()
    x.requires_grad_()
    y = fastlora.qlora_linear(x, q, a, b)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
