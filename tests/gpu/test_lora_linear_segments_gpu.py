"""What only a GPU can show of lora_linear_segments: graphs, no synchronisation, model sizes, sizes beyond 2^31."""

from __future__ import annotations

import pytest
import torch

import fastlora
from fastlora import reference, rng
from fastlora.ops import segments as segment_ops
from fastlora.ops import support
from fastlora.testing.compare import assert_accurate, assert_same_bits, relative_error

pytestmark = [pytest.mark.gpu]
BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True, params=["segment_linear", "segment_gemm", "segment_up"])
def product(request, monkeypatch):
    """Strictly on Triton, so that no loop can pass for the kernels; y and dX in one launch, either way, and in two."""
    ways = {
        "_FEWEST_SPREAD_ROWS_A_SEGMENT": "segment_linear",
        "_FEWEST_ROWS_A_SEGMENT": "segment_gemm",
    }
    for rule, way in ways.items():
        monkeypatch.setattr(segment_ops, rule, 0 if request.param == way else 1 << 40)
    reason = support.miss("segment_down", "triton", torch.device("cuda", 0), BF16, 16)
    if reason is not None:
        pytest.skip(reason)
    with fastlora.backend("triton", strict=True):
        yield request.param
    assert {backend for _, backend in fastlora.launches()} <= {"triton"}


def operands(m=512, k=256, n=384, r=16, count=8, dtype=BF16, factors=None):
    def make(*shape, dtype=dtype):
        return (torch.randn(shape, device="cuda") / shape[-1] ** 0.5).to(dtype)

    x = torch.randn(m, k, device="cuda").to(dtype).requires_grad_()
    a, b = (make(*s, dtype=factors or dtype) for s in ((count, r, k), (count, n, r)))
    return x, make(n, k), a.requires_grad_(), b.requires_grad_()


def uneven(m, count, seed=0):
    values = torch.randint(0, m + 1, (count + 1,), generator=torch.Generator().manual_seed(seed))
    return values.sort().values.cuda()


def step(x, w, a, b, offsets, *args, dy=None, **kwargs):
    y = fastlora.lora_linear_segments(x, w, a, b, offsets, *args, **kwargs)
    return [y, *torch.autograd.grad(y, (x, a, b), torch.ones_like(y) if dy is None else dy)]


def by_formula(dtype, x, w, a, b, offsets, *args, dy=None, **kwargs):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, a, b)]
    weight = w.to(dtype or w.dtype)
    y = reference.lora_linear_segments(
        leaves[0], weight, *leaves[1:], offsets, *args, None, **kwargs
    )
    dy = torch.ones_like(y) if dy is None else dy.to(y.dtype)
    grads = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    zeros = map(torch.zeros_like, leaves)
    return [y, *(z if g is None else g for g, z in zip(grads, zeros, strict=True))]


def test_nothing_waits_for_the_device(product):
    tensors, offsets = operands(), uneven(512, 8)
    scalings = torch.rand(8, device="cuda")
    step(*tensors, offsets, scalings, dropout_p=0.1)  # whatever is compiled or loaded on first use
    fastlora.reset_launches()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*tensors, offsets, scalings, dropout_p=0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    counts = {op: count for (op, _), count in fastlora.launches().items()}
    products = {
        "segment_linear": {
            "segment_linear": 1,
            "gemm": 1,
            "segment_up": 1,
        },  # not dX, with its mask
        "segment_gemm": {"segment_gemm": 2},
        "segment_up": {"gemm": 2, "segment_up": 2},
    }[product]
    rest = {"segment_bounds": 1, "segment_down": 2, "segment_wgrad": 1, "mask": 1}
    assert counts == rest | products


def test_graph_replays_with_other_offsets_and_scalings():
    """Hostile ones too: they are clamped to 0..M and to what came before them."""
    m, count = 700, 8
    x, w, a, b = operands(m=m, count=count)
    offsets, scalings = uneven(m, count), torch.rand(count, device="cuda")
    dy = torch.randn(m, 384, device="cuda", dtype=BF16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(x, w, a, b, offsets, scalings, dy=dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(x, w, a, b, offsets, scalings, dy=dy)
    for values in (
        uneven(m, count, seed=1),
        torch.tensor([0] * count + [m]),
        torch.tensor([m, *[0] * count]),
        torch.full((count + 1,), 9),
        torch.tensor([-(2**60), 5, 2, 10**6, 2**62, -1, 3, 700, 2**63 - 1]),
    ):
        offsets.copy_(values)
        scalings.copy_(torch.rand(count))
        graph.replay()
        sane = reference.segment_bounds(offsets, m)
        truth = by_formula(torch.float64, x, w, a, b, sane, scalings.double(), dy=dy)
        for name, got, true in zip(("y", "dX", "dA", "dB"), results, truth, strict=True):
            if true.any():
                assert relative_error(got, true) < 1e-2, name
            else:
                assert not got.any(), name


def test_a_hundred_runs_give_the_same_bits():
    tensors, offsets = operands(m=3000, k=1024, n=640, count=20), uneven(3000, 20)
    first = None
    for _ in range(100):
        torch.manual_seed(1)
        got = step(*tensors, offsets, dropout_p=0.1)
        first = first or got
        for name, ours, before in zip(("y", "dX", "dA", "dB"), got, first, strict=True):
            assert_same_bits(name, ours, before)


@pytest.mark.parametrize("count", [1, 64])
@pytest.mark.parametrize(("r", "factors"), [(16, BF16), (64, F32), (200, F32)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
def test_model_sizes(count, r, factors, dropout_p):
    m, k, n = 4097, 4096, 4096
    tensors = operands(m, k, n, r, count, factors=factors)
    offsets = uneven(m, count)
    dy = torch.randn(m, n, device="cuda", dtype=BF16)
    keep = rng.keep_threshold(dropout_p)
    torch.manual_seed(3)
    mask = None
    if dropout_p:
        words = fastlora.ops.mask(rng.draw_state("cuda"), m, k, keep)
        mask = reference.unpack_mask(words, m, k)
    torch.manual_seed(3)
    ours = step(*tensors, offsets, 0.5, dropout_p=dropout_p, dy=dy)
    drop = dict(mask=mask, keep=keep) if dropout_p else {}
    same = by_formula(None, *tensors, offsets, 0.5, dy=dy, **drop)
    truth = by_formula(torch.float64, *tensors, offsets, 0.5, dy=dy, **drop)
    for name, *results in zip(("y", "dX", "dA", "dB"), ours, same, truth, strict=True):
        assert_accurate(name, *results)


def test_the_torch_backend_agrees():
    tensors, offsets = operands(dtype=F32), uneven(512, 8)
    ours = step(*tensors, offsets, 0.5)
    counted = fastlora.launches()
    with fastlora.backend("torch", strict=True):
        theirs = step(*tensors, offsets, 0.5)
    assert fastlora.launches() != counted
    fastlora.reset_launches()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.huge
@pytest.mark.parametrize(("m", "k", "n"), [(2**20 + 3, 2080, 64), (2**20 + 3, 64, 2080)])
def test_more_than_two_to_the_31_elements(m, k, n):
    """x or y above 2^31 elements: the last rows are where a 32-bit offset would wrap."""
    x, w, a, b = operands(m, k, n, 16, 3)
    offsets = torch.tensor([10, 100, m - 90, m - 5], device="cuda")
    dy = torch.randn(m, n, device="cuda", dtype=BF16)
    y, dx, da, db = step(x, w, a, b, offsets, 0.5, dy=dy)
    with torch.no_grad():
        for e, rows in ((0, slice(10, 100)), (2, slice(m - 90, m - 5))):
            x_e, dy_e, a_e, b_e = (t.double() for t in (x[rows], dy[rows], a[e], b[e]))
            truth = reference.lora_linear(x_e, w.double(), a_e, b_e, 0.5)
            assert relative_error(y[rows], truth) < 1e-2
            g = 0.5 * dy_e @ b_e
            assert relative_error(dx[rows], dy_e @ w.double() + g @ a_e) < 1e-2
            assert relative_error(da[e], g.t() @ x_e) < 1e-2
            assert relative_error(db[e], dy_e.t() @ (0.5 * x_e @ a_e.t())) < 1e-2
        assert relative_error(y[m - 5 :], x[m - 5 :].double() @ w.double().t()) < 1e-2
