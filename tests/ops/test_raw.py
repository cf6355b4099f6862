"""The raw ops of every backend: schema and fake kernels, exactness, layouts, degenerate shapes, strictness."""

from __future__ import annotations

import importlib

import pytest
import torch

import fastlora
from fastlora import ops, reference, rng
from fastlora.ops import cuda_backend, raw, selftest, support
from fastlora.testing.compare import assert_same_bits
from fastlora.testing.inputs import LAYOUTS, integers, with_layout

F32 = torch.float32


def products(m, k, n, r, dtype, device):
    """Integer operands whose every product and sum is exact in fp32 and in the output dtype."""
    make = lambda *shape: integers(*shape, low=-1, high=1, dtype=dtype, device=device)  # noqa: E731
    return make(m, k), make(n, k), make(r, k), make(n, r), make(m, n)


def exact(dtype: torch.dtype, value: torch.Tensor) -> torch.Tensor:
    return value.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("m", "k", "n", "r"),
    [
        (1, 1, 1, 1),
        (16, 32, 32, 16),
        (17, 33, 31, 5),
        (70, 129, 97, 63),
        (129, 64, 72, 64),
        (33, 72, 200, 130),
        (257, 40, 64, 16),
    ],
)
class TestExactness:
    """On integers every backend equals the fp64 result bit for bit, whatever its tiles and splits."""

    def test_down(self, strict_backend, device, dtype, m, k, n, r):
        x, _, a, _, _ = products(m, k, n, r, dtype, device)
        state = torch.tensor([3, 4], device=device)
        words = reference.mask(state, m, k, 20000)
        truth = exact(dtype, reference.down(x.double(), a.double(), None, 0.5, words))
        h, none = ops.down(x, a, None, 0.5, state, 20000)
        assert_same_bits("h", h, truth)
        assert none.numel() == 0
        scaling = torch.tensor(0.25, device=device)
        assert_same_bits("h", ops.down(x, a.float(), scaling, 2.0, state, 20000)[0], truth)

    @pytest.mark.parametrize("cols", [1, 40, 700, 5000])
    def test_down_that_emits_a_mask(self, strict_backend, device, dtype, m, k, n, r, cols):
        x, _, a, _, _ = products(m, k, n, r, dtype, device)
        state = torch.tensor([3, 4], device=device)
        h, words = ops.down(x, a, None, 0.5, state, 20000, cols)
        whole = reference.down(x.double(), a.double(), None, 0.5)
        assert_same_bits("h", h, exact(dtype, whole))
        assert torch.equal(words, reference.mask(state, m, cols, 20000))

    def test_gemm(self, strict_backend, device, dtype, m, k, n, r):
        x, w, _, b, _ = products(m, k, n, r, dtype, device)
        h = integers(m, r, low=-1, high=1, dtype=dtype, device=device)
        bias = integers(n, dtype=dtype, device=device)
        words = reference.mask(torch.tensor([3, 4]), m, n, 20000).to(device)
        for wide in (w, w.t().contiguous().t()):  # K-major, and MN-major as in dX = dY W
            for mask in (None, words):
                truth = reference.gemm(
                    x.double(), wide.double(), h.double(), b.double(), bias.double(), mask
                )
                got = ops.gemm(x, wide, h, b, bias, mask)
                assert_same_bits("y", got, exact(dtype, truth))
            bare = reference.gemm(x.double(), wide.double(), None, None, None)
            assert_same_bits("y", ops.gemm(x, wide), exact(dtype, bare))

    def test_wgrad(self, strict_backend, device, dtype, m, k, n, r):
        x, _, _, _, dy = products(m, k, n, r, dtype, device)
        g, h = (integers(m, r, low=-1, high=1, dtype=dtype, device=device) for _ in range(2))
        words = reference.mask(torch.tensor([3, 4]), m, k, 20000).to(device)
        truths = reference.wgrad(
            x.double(),
            g.double(),
            dy.double(),
            h.double(),
            words,
            torch.float64,
            torch.float64,
            torch.float64,
        )
        for out_dtype in {F32, dtype}:
            got = ops.wgrad(x, g, dy, h, words, out_dtype, out_dtype, out_dtype)
            for name, ours, truth in zip(("dA", "dB", "dbias"), got, truths, strict=True):
                assert_same_bits(name, ours, exact(out_dtype, truth))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_memory_layout_gives_the_same_bits(strict_backend, device, layout):
    m, k, n, r = 40, 48, 56, 8
    x, w, a, b, dy = products(m, k, n, r, F32, device)
    g = h = integers(m, r, low=-1, high=1, dtype=F32, device=device)
    strange = {
        name: with_layout(t, layout) for name, t in dict(x=x, w=w, a=a, b=b, dy=dy, h=h).items()
    }
    plain = {name: t.clone(memory_format=torch.contiguous_format) for name, t in strange.items()}

    def run(t):
        outputs = [ops.down(t["x"], t["a"])[0], ops.gemm(t["x"], t["w"], t["h"], t["b"])]
        outputs += [
            ops.gemm(t["dy"], t["w"].t(), t["h"], t["a"].t()),
            ops.down(t["dy"], t["b"].t())[0],
        ]
        return outputs + list(ops.wgrad(t["x"], g, t["dy"], t["h"], None, F32, F32, F32))

    for i, (got, expected) in enumerate(zip(run(strange), run(plain), strict=True)):
        assert_same_bits(f"output {i}", got, expected)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (5, 31), (64, 32), (33, 257), (9, 4097)])
def test_masks_agree_bit_for_bit(strict_backend, device, rows, cols):
    state = rng.draw_state(device)
    for keep in (0, 1, 62256, 32768, 65536):
        got = ops.mask(state, rows, cols, keep)
        assert torch.equal(got.cpu(), reference.mask(state.cpu(), rows, cols, keep))


@pytest.mark.parametrize(
    ("m", "k", "n", "r"), [(0, 8, 8, 4), (4, 0, 8, 4), (4, 8, 0, 4), (4, 8, 8, 0), (0, 0, 0, 0)]
)
def test_empty_shapes(device, m, k, n, r):
    for name in ("torch", "triton"):
        if support.miss("gemm", name, device, F32, 16):
            continue
        with fastlora.backend(name, strict=True):
            x, w, a, b, dy = (
                torch.ones(s, device=device) for s in ((m, k), (n, k), (r, k), (n, r), (m, n))
            )
            h, _ = ops.down(x, a)
            assert torch.equal(h, x @ a.t())
            bias = torch.arange(n, dtype=F32, device=device)
            assert torch.equal(ops.gemm(x, w, h, b, bias), x @ w.t() + h @ b.t() + bias)
            d_a, d_b, d_bias = ops.wgrad(x, h, dy, h, None, F32, F32, F32)
            for got, expected in ((d_a, h.t() @ x), (d_b, dy.t() @ h), (d_bias, dy.sum(0))):
                assert got.shape == expected.shape and torch.equal(got, expected)


def test_wgrad_leaves_out_what_was_not_asked(strict_backend, device):
    x, _, _, _, dy = products(20, 24, 28, 4, F32, device)
    h = integers(20, 4, dtype=F32, device=device)
    d_a, d_b, d_bias = ops.wgrad(x, h, None, None, None, F32, F32)
    assert d_a.shape == (4, 24) and d_b.numel() == d_bias.numel() == 0
    d_a, d_b, d_bias = ops.wgrad(None, None, dy, h, None, F32, F32)
    assert d_b.shape == (28, 4) and d_a.numel() == d_bias.numel() == 0
    d_a, d_b, d_bias = ops.wgrad(None, None, dy, None, None, F32, F32, F32)
    assert_same_bits("dbias", d_bias, dy.sum(0))
    assert d_a.numel() == d_b.numel() == 0


def test_nan_and_infinity_stay_in_their_row(strict_backend, device):
    x, w, a, b, _ = products(40, 64, 48, 8, F32, device)
    x[3, 5], x[17, 60] = torch.nan, torch.inf
    h, _ = ops.down(x, a)
    y = ops.gemm(x, w, h, b)
    truth = reference.gemm(x.double(), w.double(), h.double(), b.double(), None)
    for row in range(40):
        assert torch.equal(torch.isnan(y[row]), torch.isnan(truth[row])), row
        assert torch.equal(torch.isinf(y[row]), torch.isinf(truth[row])), row
    assert torch.isnan(y[3]).all() and torch.isfinite(y[4]).all()


OPCHECKS = {
    "mask": lambda t: (
        torch.ops.fastlora._mask,
        (torch.tensor([1, 2], device=t["x"].device), 6, 40, 9000),
    ),
    "down": lambda t: (torch.ops.fastlora._down, (t["x"], t["a"], None, 0.5, None, 65536, 0)),
    "down_drop": lambda t: (
        torch.ops.fastlora._down,
        (t["x"], t["a"], None, 0.5, t["state"], 9000, 0),
    ),
    "down_emit": lambda t: (
        torch.ops.fastlora._down,
        (t["x"], t["a"], None, 0.5, t["state"], 9000, 70),
    ),
    "gemm": lambda t: (torch.ops.fastlora._gemm, (t["x"], t["w"], t["h"], t["b"], t["bias"], None)),
    "gemm_bare": lambda t: (torch.ops.fastlora._gemm, (t["x"], t["w"], None, None, None, None)),
    "wgrad": lambda t: (
        torch.ops.fastlora._wgrad,
        (t["x"], t["h"], t["dy"], t["h"], None, F32, F32, F32),
    ),
    "wgrad_part": lambda t: (
        torch.ops.fastlora._wgrad,
        (t["x"], t["h"], None, None, None, F32, F32, None),
    ),
}


@pytest.mark.parametrize("op", OPCHECKS)
def test_opcheck(strict_backend, device, op):
    x, w, a, b, dy = (t.float() for t in products(12, 16, 20, 4, F32, device))
    tensors = dict(
        x=x,
        w=w,
        a=a,
        b=b,
        dy=dy,
        h=x[:, :4].contiguous(),
        bias=dy[0].contiguous(),
        state=torch.tensor([1, 2], device=device),
    )
    torch.library.opcheck(*OPCHECKS[op](tensors))


class TestChoice:
    def test_strict_raises_with_the_reason(self, device):
        x, w, _, _, _ = products(4, 8, 8, 2, torch.float64, device)
        with (
            fastlora.backend("triton", strict=True),
            pytest.raises(RuntimeError, match="no triton kernel for"),
        ):
            ops.gemm(x, w)

    def test_a_preference_that_misses_moves_on(self, device):
        x, w, _, _, _ = products(4, 8, 8, 2, torch.float64, device)
        with fastlora.backend("triton"):
            ops.gemm(x, w)
        assert fastlora.launches() == {("gemm", "torch"): 1}

    def test_rank_above_the_kernels_limit_is_a_miss(self, device):
        assert "512" in (support.miss("down", "triton", torch.device("cpu"), F32, 513) or "")

    def test_unknown_backend_is_refused_with_the_known_ones(self):
        with (
            pytest.raises(ValueError, match="'cuda', 'triton', 'torch'"),
            fastlora.backend("cudnn"),
        ):
            pass

    def test_preference_is_restored_after_an_error(self):
        before = support.preference()
        with pytest.raises(KeyError), fastlora.backend("torch"):
            raise KeyError
        assert support.preference() is before

    def test_launches_counts_and_resets(self, device):
        x, w, _, _, _ = products(4, 8, 8, 2, F32, device)
        with fastlora.backend("torch"):
            ops.gemm(x, w)
            ops.gemm(x, w)
        assert fastlora.launches() == {("gemm", "torch"): 2}
        fastlora.reset_launches()
        assert fastlora.launches() == {}

    def test_selftest_and_table_speak_of_every_op(self, device):
        assert {row["op"] for row in support.table(device)} == set(support.OPS)
        results = selftest.run(device)
        assert [row["op"] for row in results] == list(support.OPS)
        assert all(row["ok"] for row in results), results

    def test_explain_names_the_kernels_and_the_reasons(self, device):
        layer = fastlora.LoRALinear(32, 24, r=4, device=device)
        text = fastlora.explain(layer, torch.randn(2, 5, 32, device=device))
        assert "M=10 K=32 N=24 r=4" in text
        for op in ("down", "gemm", "wgrad"):
            assert op in text
        with pytest.raises(TypeError, match="2-d weight"):
            fastlora.explain(torch.nn.ReLU(), torch.randn(3))


def test_explain_knows_what_is_one_launch(monkeypatch):
    """As on a Hopper GPU, for few rows: y whole, dX with g, and the gradients of A and B by themselves."""
    explanation = importlib.import_module("fastlora.layers.explanation")
    monkeypatch.setattr(
        explanation, "_why_not_whole", lambda like, rank, fit: fit().miss or fit().slower or ""
    )
    layer = fastlora.LoRALinear(64, 64, r=16, dtype=torch.bfloat16)
    text = fastlora.explain(layer, torch.randn(4, 64).bfloat16())
    assert text.count("(one launch)") == 2 and "wgrad" in text
    assert "down" not in text and "gemm" not in text and "not one launch" not in text


def test_lazily_negated_tensors_keep_their_sign(strict_backend, device):
    """``.imag`` of a conjugate is a plain tensor whose data has the other sign: only the dispatcher resolves it."""
    x, w, a, b, _ = (t.double() for t in products(20, 24, 16, 4, F32, device))
    negated = torch.complex(torch.zeros_like(x), -x).to(torch.complex64).conj().imag
    assert negated.is_neg() and torch.equal(negated.double(), x)
    h = ops.down(negated, a.float())[0]
    assert_same_bits("h", h, reference.down(x, a, None, 1.0).float())
    y = ops.gemm(negated, w.float(), h, b.float())
    assert_same_bits("y", y, reference.gemm(x, w, h.double(), b, None).float())
    d_a = ops.wgrad(negated, h, None, None, None, F32, F32)[0]
    assert_same_bits("dA", d_a, (h.double().t() @ x).float())


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: (torch.randn(64).expand(256, 64), torch.randn(32768, 64)), "x's lines overlap"),
        (lambda: (torch.randn(1024).unfold(0, 64, 8), torch.randn(32768, 64)), "x's lines overlap"),
        (lambda: (torch.randn(256, 1).expand(256, 64), torch.randn(32768, 64)), "x is not contig"),
        (lambda: (torch.randn(256, 64), torch.randn(1, 64).expand(32768, 64)), "w's lines overlap"),
        (lambda: (torch.randn(256, 64), torch.randn(32767, 64)), "N a multiple of 8"),
        (lambda: (torch.randn(256, 68)[:, 1:65], torch.randn(32768, 64)), "multiples of 16 bytes"),
        (lambda: (torch.randn(256, 64), torch.randn(32768, 64)), None),
        (lambda: (torch.randn(256, 64), torch.randn(64, 32768).t()), None),
        (lambda: (torch.randn(1, 64).expand(1, 64), torch.randn(32768, 64)), None),
    ],
)
def test_gemm_fit_refuses_what_tma_cannot_read(make, why):
    x, w = (t.to(torch.bfloat16) if t.is_contiguous() else t for t in make())
    miss = cuda_backend.gemm_fit(x, w, None, None, None).miss
    assert (miss is None) if why is None else (miss is not None and why in miss)


def test_a_broken_kernel_turns_the_checks_red(strict_backend, device, monkeypatch):
    """Halve one op of the backend that runs: the self-test and the exactness check must both notice."""
    module = raw.backend_module(strict_backend)
    honest = module.down
    monkeypatch.setattr(module, "down", lambda *args: (honest(*args)[0] * 0.5, None))
    assert not next(row for row in selftest.run(device) if row["op"] == "down")["ok"]
    x, _, a, _, _ = products(20, 24, 8, 4, F32, device)
    with pytest.raises(AssertionError, match="instead of"):
        assert_same_bits("h", ops.down(x, a)[0], x @ a.t())
