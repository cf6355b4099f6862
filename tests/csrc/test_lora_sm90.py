"""fastlora::_lora_forward_sm90, _lora_scaled_sm90 and _lora_backward_sm90 on a Hopper GPU: exact on integers, against fp64, under stress."""

from pathlib import Path

import pytest
import torch

import fastlora
from fastlora import _library, ops, reference, switches
from fastlora.ops import cuda_backend, support
from fastlora.testing.compare import assert_accurate
from tests.compute_sanitizer import output_under
from tests.csrc.common import matrix, needs_hopper, true_forward

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KEEP = 62256  # 0.95 of 65536, in 12 bits
PROGRAM = Path(__file__).with_name("sanitized_ops.py")
# (m, n, k, r): one element, ragged everywhere, several units of rows, more than one block of ranks
SHAPES = [
    (1, 8, 8, 8),
    (128, 256, 128, 16),
    (77, 1000, 136, 24),
    (300, 520, 1032, 16),
    (1513, 264, 520, 80),
    (257, 136, 4104, 512),
    (2048, 4096, 1024, 64),
    (2100, 1160, 384, 8),
]
CONFIGS = [None, (128, 256, 3, 2, 1, 1, 3), (256, 128, 3, 1, 2, 1, 8)]


pytestmark = needs_hopper("lora")


def problem(m, n, k, r, dtype=BF16, factors=None, integers=False):
    """x, w, A, B, bias, dY and an h of its own."""
    factors = factors or dtype
    make = lambda rows, cols, scale=1.0, kind=dtype: matrix(  # noqa: E731
        rows, cols, kind, integers, scale, padded=kind != FP32
    )
    x, w, dy, h = make(m, k), make(n, k, k**-0.5), make(m, n), make(m, r)
    a, b = make(r, k, k**-0.5, factors), make(n, r, r**-0.5, factors)
    return x, w, a, b, make(1, n)[0].contiguous(), dy, h


def forward(x, w, a, b, bias=None, scaling=None, scale=0.5, config=None, state=None, keep=KEEP):
    config = None if config is None else list(config)
    run = torch.ops.fastlora._lora_forward_sm90
    return run(x, w, a, b, bias, scaling, scale, state, keep, config)


def backward(
    dy, w, a, b, x, h, scaling=None, scale=0.5, bias=0, config=None, state=None, keep=KEEP
):
    config = None if config is None else list(config)
    run = torch.ops.fastlora._lora_backward_sm90
    return run(dy, w, a, b, x, h, scaling, scale, state, keep, bias > 0, bias > 1, config)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("factors", [BF16, FP32])
@pytest.mark.parametrize("shape", SHAPES)
def test_integers_are_exact(shape, factors, config):
    x, w, a, b, bias, dy, h = problem(*shape, factors=factors, integers=True)
    y, h_made = forward(x, w, a, b, bias, config=config)
    y_true, h_true = true_forward(x, w, a, b, bias, 0.5, BF16)
    assert torch.equal(h_made, h_true)
    assert torch.equal(y, y_true.to(BF16))

    scaling = torch.tensor(0.5, device="cuda")
    dx, d_a, d_b, d_bias = backward(dy, w, a, b, x, h, scaling, 1.0, bias=2, config=config)
    g = (0.5 * dy.double() @ b.double()).to(BF16)
    assert torch.equal(dx, (dy.double() @ w.double() + g.double() @ a.double()).to(BF16))
    assert torch.equal(d_a, (g.double().t() @ x.double()).to(factors))
    assert torch.equal(d_b, (dy.double().t() @ h.double()).to(factors))
    assert torch.equal(d_bias, dy.double().sum(0).float())


@pytest.mark.parametrize("keep", [KEEP, 32768, 65535, 1])
@pytest.mark.parametrize("factors", [BF16, FP32])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[3] <= 64])
def test_dropped_integers_are_exact(shape, factors, keep):
    """The mask is the reference's, element by element: in h, dX and dA; what is dropped is not even looked at."""
    m, _, k, _ = shape
    x, w, a, b, bias, dy, h = problem(*shape, factors=factors, integers=True)
    state = torch.tensor([11, 2**40 + 3], device="cuda")
    kept = reference.unpack_mask(reference.mask(state, m, k, keep), m, k)
    y, h_made = forward(x, w, a, b, bias, state=state, keep=keep)
    dropped = torch.where(kept, x, 0)
    h_true = (0.5 * dropped.double() @ a.double().t()).to(BF16)
    assert torch.equal(h_made, h_true)
    y_true = x.double() @ w.double().t() + h_true.double() @ b.double().t() + bias.double()
    assert torch.equal(y, y_true.to(BF16))

    hostile = torch.where(kept, x, torch.inf)  # dA takes the dropped x for zero
    hostile = matrix(m, k).copy_(hostile)
    dx, d_a, d_b, d_bias = backward(dy, w, a, b, hostile, h, bias=1, state=state, keep=keep)
    g = (0.5 * dy.double() @ b.double()).to(BF16)
    low = torch.where(kept, g.double() @ a.double(), 0)
    assert torch.equal(dx, (dy.double() @ w.double() + low).to(BF16))
    assert torch.equal(d_a, (g.double().t() @ dropped.double()).to(factors))
    assert torch.equal(d_b, (dy.double().t() @ h.double()).to(factors))
    assert torch.equal(d_bias, dy.double().sum(0).to(BF16))


def scaled(x, w, a, b, bias, columns, with_z=True, config=None, scaling=None, scale=0.5):
    config = None if config is None else list(config)
    run = torch.ops.fastlora._lora_scaled_sm90
    return run(x, w, a, b, bias, scaling, scale, columns, with_z, config)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("factors", [BF16, FP32])
@pytest.mark.parametrize("shape", SHAPES)
def test_scaled_integers_are_exact(shape, factors, config):
    x, w, a, b, bias, *_ = problem(*shape, factors=factors, integers=True)
    columns = torch.randint(-4, 5, (shape[1],), device="cuda").float()
    z_true, h_true = true_forward(x, w, a, b, None, 0.5, BF16)
    for more in (bias, None):
        y_true = z_true * columns.double() + (0 if more is None else more.double())
        y, h, z = scaled(x, w, a, b, more, columns, config=config)
        assert torch.equal(h, h_true) and torch.equal(z, z_true.to(BF16))
        assert torch.equal(y, y_true.to(BF16))
        alone, _, nothing = scaled(x, w, a, b, more, columns, with_z=False, config=config)
        assert torch.equal(alone, y) and nothing.shape == (0,)


def test_a_scaled_column_of_infinities_stays_alone():
    x, w, a, b, bias, *_ = problem(300, 520, 264, 16, integers=True)
    columns = torch.ones(520, device="cuda")
    usual, _, _ = scaled(x, w, a, b, bias, columns)
    columns[77], columns[519] = torch.inf, torch.nan
    y, _, z = scaled(x, w, a, b, bias, columns)
    others = torch.ones(520, dtype=torch.bool, device="cuda")
    others[77] = others[519] = False
    assert torch.equal(y[:, others], usual[:, others]) and bool(z.isfinite().all())
    assert not y[:, ~others].isfinite().any()


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("shape", [SHAPES[4], (8192, 4096, 4096, 16)])
def test_scaled_no_worse_than_twice_torchs_error(shape, dtype):
    x, w, a, b, bias, *_ = problem(*shape, dtype=dtype)
    columns = torch.rand(shape[1], device="cuda") + 0.5
    y, h, z = scaled(x, w, a, b, bias, columns)
    for _ in range(20):
        assert all(map(torch.equal, scaled(x, w, a, b, bias, columns), (y, h, z)))
    z_true, _ = true_forward(x, w, a, b, None, 0.5, torch.float64)
    torchs = reference.gemm(x, w, h, b, None)
    assert_accurate("z", z, torchs, z_true)
    y_true = z_true * columns.double() + bias.double()
    assert_accurate("y", y, reference.scale_columns(torchs, columns, None, bias), y_true)


def test_bad_factors_of_columns_are_refused():
    x, w, a, b, bias, *_ = problem(64, 128, 72, 16)
    good = torch.ones(128, device="cuda")
    scaled(x, w, a, b, bias, good)
    for wrong in (good[:-8], good.half(), good[None], good.cpu(), torch.ones(256, device="cuda")[::2]):  # fmt: skip
        with pytest.raises((ValueError, RuntimeError), match="columns must be"):
            scaled(x, w, a, b, bias, wrong)
    odd = torch.ones(129, device="cuda")[1:]
    with pytest.raises((ValueError, RuntimeError), match="multiple of 8 bytes"):
        scaled(x, w, a, b, bias, odd)


@pytest.mark.parametrize("step", ["one_read", "beside", "beside, one_read"])
@pytest.mark.parametrize("shape", [SHAPES[3], (2048, 4096, 1024, 16)])
def test_steps_can_be_switched_off(shape, step, monkeypatch):
    x, w, a, b, bias, dy, h = problem(*shape, integers=True)
    whole = (*forward(x, w, a, b, bias), *backward(dy, w, a, b, x, h, bias=1))
    real = problem(*shape, factors=FP32)
    usual = backward(real[5], *real[1:4], real[0], real[6])[2]
    monkeypatch.setenv("FASTLORA_OFF", step)
    without = (*forward(x, w, a, b, bias), *backward(dy, w, a, b, x, h, bias=1))
    assert all(map(torch.equal, without, whole))
    if "one_read" in step:  # other parts of the sum: other roundings
        assert not torch.equal(backward(real[5], *real[1:4], real[0], real[6])[2], usual)


def test_only_what_is_asked_for():
    x, w, a, b, _, dy, h = problem(300, 520, 264, 16, integers=True)
    whole = backward(dy, w, a, b, x, h, bias=1)
    for with_x in (False, True):
        for with_h in (False, True):
            some = backward(dy, w, a, b, x if with_x else None, h if with_h else None)
            assert torch.equal(some[0], whole[0]) and some[3].numel() == 0
            for got, all_of_it, asked in ((some[1], whole[1], with_x), (some[2], whole[2], with_h)):
                assert torch.equal(got, all_of_it) if asked else got.numel() == 0


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("shape", [*SHAPES, (8192, 4096, 4096, 16), (4097, 1024, 14336, 64)])
def test_no_worse_than_twice_torchs_error(shape, dtype):
    x, w, a, b, bias, dy, h = problem(*shape, dtype=dtype)
    y, h_made = forward(x, w, a, b, bias)
    y_true, _ = true_forward(x, w, a, b, bias, 0.5, torch.float64)
    assert_accurate("y", y, reference.gemm(x, w, h_made, b, bias), y_true)
    exact = 0.5 * dy.double() @ b.double()
    dx, d_a, d_b, _ = backward(dy, w, a, b, x, h)
    g = exact.to(dtype)
    assert_accurate(
        "dX",
        dx,
        reference.gemm(dy, w.t(), g, a.t(), None),
        dy.double() @ w.double() + exact @ a.double(),
    )
    assert_accurate("dA", d_a, g.t() @ x, exact.t() @ x.double())
    assert_accurate("dB", d_b, dy.t() @ h, dy.double().t() @ h.double())


def test_a_thousand_runs_on_two_streams_without_one_differing_bit():
    """Mixed shapes, so that flags, counters and workspaces change hands; every buffer is poisoned by what ran before."""
    cases = [problem(*shape) for shape in (SHAPES[3], SHAPES[4], SHAPES[6], (1024, 1024, 1024, 16))]

    state = torch.tensor([5, 6], device="cuda")

    def step(x, w, a, b, bias, dy, h):
        drop = state if a.shape[0] == 16 else None
        made = forward(x, w, a, b, bias, state=drop)
        return (*made, *backward(dy, w, a, b, x, h, bias=1, state=drop))

    expected = [step(*case) for case in cases]
    streams = [torch.cuda.Stream() for _ in range(2)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for i in range(1000):
        with torch.cuda.stream(streams[i % 2]):
            which = (i // 2 + i % 2) % len(cases)
            got = step(*cases[which])
            for ours, truth in zip(got, expected[which], strict=True):
                wrong += (ours != truth).any()
                ours.fill_(torch.nan)  # its memory is the next run's
    torch.cuda.synchronize()
    assert wrong.item() == 0


def test_the_mask_may_be_done_at_any_moment_of_a_tile():
    """Warps that wait for the mask drift apart: one once took the item after next, and its tile was never written."""
    x, w, a, b, _, dy, h = problem(2**18, 16, 512, 16)
    state = torch.tensor([5, 6], device="cuda")
    expected = backward(dy, w, a, b, x, h, state=state)
    for _ in range(150):
        for ours, truth in zip(backward(dy, w, a, b, x, h, state=state), expected, strict=True):
            assert torch.equal(ours, truth)


@pytest.mark.parametrize(("m", "n", "k"), [(2**17, 128, 256), (2**16, 128, 1024), (8292, 2688, 256)])  # fmt: skip
def test_a_warpgroup_may_be_an_item_ahead_of_the_other(m, n, k):
    """The ring holds all of an item of 4 slots or fewer: g waits for both warpgroups all the same."""
    _, w, a, b, _, dy, h = problem(m, n, k, 16, integers=True)
    g = (0.5 * dy.double() @ b.double()).to(BF16)
    dx_true = (dy.double() @ w.double() + g.double() @ a.double()).to(BF16)
    d_b_true = (dy.double().t() @ h.double()).to(BF16)
    for _ in range(100):
        torch.full((m * 16,), torch.nan, device="cuda")  # where the parts of g will be
        dx, _, d_b, _ = backward(dy, w, a, b, None, h)
        assert torch.equal(dx, dx_true)
        assert torch.equal(d_b, d_b_true)
        dx.fill_(torch.nan)


def test_a_refused_launch_leaves_the_counters_right():
    x, w, a, b, bias, *_ = problem(1000, 520, 1032, 16)
    expected = forward(x, w, a, b, bias)
    for refused in range(4):
        for _ in range(refused):
            with pytest.raises((ValueError, RuntimeError), match="no kernel has the tile"):
                forward(x, w, a, b, bias, config=(128, 128, 3, 2, 1, 1, 16))
        for _ in range(3):
            assert all(map(torch.equal, forward(x, w, a, b, bias), expected))


def test_a_graph_replays_with_new_inputs_beside_eager_calls():
    x, w, a, b, bias, dy, h = problem(1000, 520, 1032, 16)
    state = torch.tensor([5, 6], device="cuda")

    def step():
        made = forward(x, w, a, b, bias, state=state)
        return (*made, *backward(dy, w, a, b, x, h, state=state))

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for _ in range(3):
        for t in (x, dy):
            t.copy_(torch.randn_like(t))
        state.add_(1)
        graph.replay()
        for ours, truth in zip(got, step(), strict=True):
            assert torch.equal(ours, truth)


def test_a_layer_runs_it_and_nothing_else(monkeypatch):
    x, w, a, b, bias, dy, _ = problem(4096, 2048, 512, 16, factors=FP32)
    leaves = [t.requires_grad_() for t in (x.contiguous(), a, b, bias)]
    with fastlora.backend("cuda", strict=True):
        y = fastlora.lora_linear(leaves[0], w, leaves[1], leaves[2], 0.5, leaves[3])
        grads = torch.autograd.grad(y, leaves, dy.contiguous())
    assert fastlora.launches() == {("lora_forward", "cuda"): 1, ("lora_backward", "cuda"): 1}
    exact = [t.detach().double().requires_grad_() for t in leaves]
    truth = reference.lora_linear(exact[0], w.double(), *exact[1:3], 0.5, exact[3])
    for got, true in zip((y, *grads), (truth, *torch.autograd.grad(truth, exact, dy.double())), strict=True):  # fmt: skip
        assert (got.double() - true).norm() < 6e-3 * true.norm()
    fastlora.reset_launches()
    fastlora.lora_linear(leaves[0], w, leaves[1], leaves[2], 0.5)  # the dispatcher's own choice
    assert fastlora.launches() == {("lora_forward", "cuda"): 1}
    fastlora.reset_launches()
    support.miss.cache_clear()
    monkeypatch.setattr(switches, "_OFF", frozenset({"one_launch"}))
    fastlora.lora_linear(leaves[0], w, leaves[1], leaves[2], 0.5)
    support.miss.cache_clear()
    assert {op for op, _ in fastlora.launches()} == {"down", "gemm"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, w, a, b: (x[:, 1:], w[:, 1:], a[:, 1:], b), "multiples of 8"),
        (lambda x, w, a, b: (x.t().contiguous().t(), w, a, b), "not contiguous"),
        (lambda x, w, a, b: (x, w, a[:5], b[:, :5]), "multiples of 8"),
        (lambda x, w, a, b: (x, w, a.float().t().contiguous().t(), b), "must be contiguous"),
        (lambda x, w, a, b: (x[:0], w, a, b), "needs rows"),
    ],
)
def test_what_it_does_not_take_goes_elsewhere_or_is_named(change, reason):
    x, w, a, b, *_ = problem(1024, 512, 256, 16)
    changed = change(x, w, a, b)
    with fastlora.backend("cuda", strict=True), pytest.raises(RuntimeError, match=reason):
        ops.lora_forward(*changed, None, None, 0.5, None, 65536)
    y, _ = ops.lora_forward(*changed, None, None, 0.5, None, 65536)
    assert ("lora_forward", "cuda") not in fastlora.launches()
    truth, _ = true_forward(*changed, None, 0.5, torch.float64)
    assert (y.double() - truth).norm() <= 6e-3 * truth.norm()


@pytest.mark.parametrize("call", ["forward", "backward"])
def test_bad_arguments_are_refused(call):
    x, w, a, b, _, dy, h = problem(64, 128, 72, 16)

    def run(x=x, w=w, a=a, b=b, h=h, **more):
        if call == "forward":
            return forward(x, w, a, b, **more)
        return backward(dy, w, a, b, x, h, **more)

    run()
    for wrong in (
        dict(w=w[:, :-8]),
        dict(a=a[:, :-8]),
        dict(b=b[:-8]),
        dict(x=x.float()),
        dict(a=a.to(FP16)),
        dict(config=(128, 256, 3, 1, 1, 1, 16)),
        dict(config=(128, 128, 3, 2, 1, 1, 16)),
        dict(state=torch.zeros(3, dtype=torch.int64, device="cuda")),
        dict(state=torch.zeros(2, device="cuda")),
        dict(state=torch.zeros(2, dtype=torch.int64, device="cuda"), keep=65537),
        dict(x=x[:-1]) if call == "backward" else dict(x=x[0]),
        dict(h=h[:, :-8]) if call == "backward" else dict(b=b[:, :-8]),
    ):
        with pytest.raises((ValueError, RuntimeError), match="_sm90"):
            run(**wrong)
    assert cuda_backend.lora_fit(x, w, a, b, None).miss is None
    assert _library.has_kernel(f"_lora_{call}_sm90")


@pytest.mark.parametrize("tool", ["memcheck", "synccheck", "initcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    output_under(tool, PROGRAM)
