"""_segment_bounds/_down/_up/_up_/_gemm/_nf4_gemm/_wgrad of every backend: schema, exactness, layouts, empty shapes, hostile offsets."""

from __future__ import annotations

import itertools

import pytest
import torch

import fastlora
from fastlora import ops, reference, rng
from fastlora.ops import raw, support
from fastlora.ops import segments as segment_ops
from fastlora.testing.compare import assert_same_bits
from fastlora.testing.inputs import LAYOUTS, integers, with_layout

F32, F64 = torch.float32, torch.float64
KEEP = 20000

OFFSETS = {  # of 70 rows
    "one": [0, 70],
    "uneven": [0, 1, 1, 40, 43, 70],
    "none at both ends": [5, 33, 60],
    "single rows": list(range(30, 36)),
    "all empty": [7] * 4,
    "nobody": [0],
    "empty at the edges": [0, 0, 32, 64, 70, 70],
}
CASES = [
    *((name, 16, F32) for name in OFFSETS),
    *(("uneven", r, torch.float16) for r in (1, 40)),
]


def bounds_of(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def products(m, k, n, r, count, dtype, device):
    """Integers whose every product and sum is exact in fp32 and in the output dtype."""
    shapes = (m, k), (count, r, k), (count, n, r), (m, n), (m, r)
    return [integers(*s, low=-1, high=1, dtype=dtype, device=device) for s in shapes]


def segment_of(values, m, device):
    """[M, E]: one where the row is the segment's."""
    member = torch.zeros(m, len(values) - 1, dtype=F64, device=device)
    for e, (begin, end) in enumerate(itertools.pairwise(values)):
        member[begin:end, e] = 1
    return member


@pytest.mark.parametrize(("name", "r", "dtype"), CASES)
class TestExactness:
    """On integers every backend equals an einsum over all segments in fp64, bit for bit: no loop, no bounds."""

    M, K, N = 70, 40, 66

    def operands(self, name, r, dtype, device):
        values = OFFSETS[name]
        tensors = products(self.M, self.K, self.N, r, len(values) - 1, dtype, device)
        return values, bounds_of(values, device), segment_of(values, self.M, device), tensors

    def test_down(self, strict_backend, device, dtype, name, r):
        values, bounds, member, (x, a, _, _, _) = self.operands(name, r, dtype, device)
        scalings = 2.0 ** torch.arange(len(values) - 1, device=device).remainder(3)
        state = torch.tensor([3, 4], device=device)
        kept = reference.unpack_mask(
            reference.mask(state, self.M, self.K, KEEP), self.M, self.K
        ).double()
        h = ops.segment_down(x, a, bounds, scalings, 0.5)
        scaled = member * scalings.double()
        self.same("h", h, torch.einsum("mk,erk,me->mr", x.double(), a.double(), scaled) / 2)
        h = ops.segment_down(x, a.float(), bounds, None, 0.5, state, KEEP)
        self.same("h", h, torch.einsum("mk,erk,me->mr", x.double() * kept, a.double(), member) / 2)

    def test_up(self, strict_backend, device, dtype, name, r):
        _, bounds, member, (_, _, b, y, h) = self.operands(name, r, dtype, device)
        words = reference.mask(torch.tensor([3, 4]), self.M, self.N, KEEP).to(device)
        kept = reference.unpack_mask(words, self.M, self.N).double()
        low = torch.einsum("mr,enr,me->mn", h.double(), b.double(), member)
        for mask, term in ((None, low), (words, low * kept)):
            self.same("y", ops.segment_up(h, b, bounds, mask), term)
            onto = y.clone()
            lies = b.float().transpose(1, 2).contiguous().transpose(1, 2)  # as A lies in dX
            assert ops.segment_up(h, lies, bounds, mask, onto) is onto
            self.same("y", onto, y.double() + term)

    @pytest.mark.parametrize("fused", [False, True], ids=["composed", "fused"])
    def test_gemm(self, strict_backend, device, monkeypatch, dtype, name, r, fused):
        """y, and dX with a mask; who makes them is told by ``launches``."""
        monkeypatch.setattr(segment_ops, "_FEWEST_FUSED_ROWS", 1 if fused else self.M + 1)
        monkeypatch.setattr(segment_ops, "_FEWEST_ROWS_A_SEGMENT", 1)
        dtype = torch.float16  # of every case: fp32 is composed always
        values, bounds, member, (x, a, b, dy, h) = self.operands(name, r, dtype, device)
        w = integers(self.N, self.K, low=-1, high=1, dtype=dtype, device=device)
        bias = integers(self.N, low=-1, high=1, dtype=dtype, device=device)
        words = reference.mask(torch.tensor([3, 4]), self.M, self.K, KEEP).to(device)
        kept = reference.unpack_mask(words, self.M, self.K).double()
        base = x.double() @ w.double().t() + bias.double()
        low = torch.einsum("mr,enr,me->mn", h.double(), b.double(), member)
        self.same("y", ops.segment_gemm(x, w, h, b, bounds, bias), base + low)
        low = torch.einsum("mr,erk,me->mk", h.double(), a.double(), member) * kept
        dx = ops.segment_gemm(dy, w.t(), h, a.float().transpose(1, 2), bounds, None, words)
        self.same("dX", dx, dy.double() @ w.double() + low)
        self.same("base", ops.segment_gemm(x, w, None, None, bounds, bias), base)
        if fused and strict_backend == "triton":
            assert set(fastlora.launches()) == {("segment_gemm", "triton"), ("gemm", "triton")}
            assert fastlora.launches()["segment_gemm", "triton"] == 2
        else:
            expected = {("gemm", strict_backend): 3, ("segment_up", strict_backend): 2}
            if strict_backend == "triton" and len(values) == 1:
                del expected["segment_up", strict_backend]  # no segment, no launch
            ran = {key: n for key, n in fastlora.launches().items() if key[0] != "mask"}
            assert ran == expected

    def test_wgrad(self, strict_backend, device, dtype, name, r):
        _, bounds, member, (x, _, _, dy, h) = self.operands(name, r, dtype, device)
        words = reference.mask(torch.tensor([3, 4]), self.M, self.K, KEEP).to(device)
        kept = reference.unpack_mask(words, self.M, self.K).double()
        for mask, seen in ((None, x.double()), (words, x.double() * kept)):
            out = F32 if mask is None else dtype
            d_a, d_b = ops.segment_wgrad(x, h, dy, h, bounds, mask, out, out)
            self.same("dA", d_a, torch.einsum("mr,mk,me->erk", h.double(), seen, member), out)
            truth = torch.einsum("mn,mr,me->enr", dy.double(), h.double(), member)
            self.same("dB", d_b, truth, out)

    def same(self, name, got, truth, dtype=None):
        truth = truth.to(dtype or got.dtype)
        if truth.any():
            assert_same_bits(name, got, truth)
        else:  # no segment has a row
            assert got.shape == truth.shape and got.dtype == truth.dtype and not got.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_memory_layout_gives_the_same_bits(strict_backend, device, layout):
    bounds = bounds_of([3, 20, 20, 37], device)
    x, a, b, dy, h = products(40, 48, 56, 8, 3, F32, device)

    def stacked(t):  # each adapter a view of one wider tensor
        wide = t.new_empty(t.shape[0], t.shape[1] + 1, t.shape[2] + 3)
        wide[:, 1:, 2:-1] = t
        return wide[:, 1:, 2:-1]

    def run(x, a, b, dy, h):
        made = [ops.segment_down(x, a, bounds), ops.segment_down(dy, b.transpose(1, 2), bounds)]
        made += [ops.segment_up(h, b, bounds), ops.segment_up(h, a.transpose(1, 2), bounds)]
        return [*made, *ops.segment_wgrad(x, h, dy, h, bounds, None, F32, F32)]

    views = (
        with_layout(x, layout),
        stacked(a),
        stacked(b),
        with_layout(dy, layout),
        with_layout(h, layout),
    )
    plain = [t.clone(memory_format=torch.contiguous_format) for t in views]
    for i, (got, expected) in enumerate(zip(run(*views), run(*plain), strict=True)):
        assert_same_bits(f"output {i}", got, expected)


@pytest.mark.parametrize(
    ("m", "k", "n", "r", "count"),
    [(0, 8, 8, 4, 2), (4, 0, 8, 4, 2), (4, 8, 0, 4, 2), (4, 8, 8, 0, 2), (4, 8, 8, 4, 0)],
)
def test_empty_shapes(strict_backend, device, m, k, n, r, count):
    x, a, b, dy, h = (
        torch.ones(s, device=device) for s in ((m, k), (count, r, k), (count, n, r), (m, n), (m, r))
    )
    bounds = ops.segment_bounds(torch.tensor([0] * count + [m], device=device), m)
    assert bounds.tolist() == [0] * count + [m]
    low = float(r) if count else 0.0
    hidden = ops.segment_down(x, a, bounds)
    assert hidden.shape == (m, r) and (hidden == (k if count else 0)).all()
    for y in (None, torch.ones(m, n, device=device)):
        got = ops.segment_up(h, b, bounds, y=y)
        assert got.shape == (m, n) and (got == low + (y is not None)).all()
    d_a, d_b = ops.segment_wgrad(x, h, dy, h, bounds, None, F32, F32)
    assert d_a.shape == (count, r, k) and d_b.shape == (count, n, r)
    for d in (d_a, d_b):
        assert (d[:-1] == 0).all() and (d[-1:] == m).all()


HOSTILE = {
    "too large": [0, 50, 10**6, 2**40],
    "negative": [-5, -(2**60), 20, 70],
    "decreasing": [60, 10, 30, 5],
    "extremes": [2**63 - 1, -(2**63), 2**62, 0],
    "all too large": [80] * 4,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_offsets_become_sane_bounds_and_touch_nothing_else(strict_backend, device, name):
    """Clamped to 0..M and to what came before. The rows of y lie amid others, which must stay as they are."""
    m, k, n, r = 70, 40, 48, 8
    given = torch.tensor(HOSTILE[name], device=device)
    bounds = raw.backend_module(strict_backend).segment_bounds(given, m)
    expected, highest = [], 0
    for value in HOSTILE[name]:
        highest = max(highest, min(max(value, 0), m))
        expected.append(highest)
    assert bounds.dtype == torch.int32 and bounds.tolist() == expected
    x, a, b, dy, h = products(m, k, n, r, 3, F32, device)
    amid = torch.full((m + 64, n), 7.0, device=device)
    ops.segment_up(h, b, bounds, y=amid[32:-32].fill_(0))
    assert (amid[:32] == 7).all() and (amid[-32:] == 7).all()
    assert torch.equal(amid[32:-32], reference.segment_up(h, b, bounds))
    assert torch.equal(
        ops.segment_down(x, a, bounds), reference.segment_down(x, a, bounds, None, 1.0)
    )
    got = ops.segment_wgrad(x, h, dy, h, bounds, None, F32, F32)
    truth = reference.segment_wgrad(x, h, dy, h, bounds, None, F32, F32)
    assert all(map(torch.equal, got, truth))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_offsets_on_the_cpu_raise(name):
    with pytest.raises(ValueError, match=r"offsets: got \[.* for 70 rows of x; accepted are row"):
        ops.segment_bounds(torch.tensor(HOSTILE[name]), 70)


def test_a_long_list_of_offsets_is_cut_in_the_message():
    with pytest.raises(ValueError, match=r"'\.\.\.'") as caught:
        ops.segment_bounds(torch.arange(5000), 70)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("count", [1, 15, 16, 64, 2500])
def test_bounds_of_good_offsets_are_the_offsets(strict_backend, device, dtype, count):
    offsets = torch.randint(0, 4000, (count + 1,)).sort().values.to(device, dtype)
    bounds = ops.segment_bounds(offsets, 4000)
    assert bounds.dtype == torch.int32 and torch.equal(bounds, offsets.int())


@pytest.mark.parametrize("dropped", [False, True])
def test_opcheck(dropped):
    x, a, _, dy, h = products(24, 32, 40, 8, 3, F32, "cpu")
    bounds, scalings = bounds_of([2, 9, 9, 20]), torch.tensor([0.5, 1.0, 2.0])
    state, keep = (torch.tensor([3, 4]), KEEP) if dropped else (None, rng.KEEP_ALL)
    words = reference.mask(state, 24, 32, keep) if dropped else None
    library = torch.ops.fastlora
    check = torch.library.opcheck
    check(library._segment_bounds.default, (bounds.long(), 24))
    check(library._segment_down.default, (x, a, bounds, scalings, 0.5, state, keep))
    factor = a.transpose(1, 2)
    check(library._segment_up.default, (h, factor, bounds, words))
    check(library._segment_up_.default, (x.clone(), h, factor, bounds, words))
    w = integers(40, 32, low=-1, high=1, dtype=F32, device="cpu")
    for up in ((None, None), (h, factor)):
        check(library._segment_gemm.default, (dy, w.t(), *up, bounds, None, words))
    weight = fastlora.NF4Tensor.quantize(w)
    packed = weight.codes, list(weight.scales), *weight.form
    check(library._segment_nf4_gemm.default, (dy, *packed, True, h, factor, bounds, None, words))
    for given in ((x, h, dy, h), (x, h, None, None), (None, None, dy, h)):
        check(library._segment_wgrad.default, (*given, bounds, words, F32, F32))


def test_one_launch_is_for_many_rows():
    """Where tiles are many and large. Fewer rows are another kernel's, whose y is added to."""
    for dtype in (torch.float16, torch.bfloat16):
        assert segment_ops.gemm_fit(512, 1, dtype) == support.Fit()
        assert segment_ops.gemm_fit(511, 1, dtype).slower.startswith("511 rows are for the fastest")
        assert segment_ops.gemm_fit(8192, 16, dtype) == support.Fit()
        assert (
            segment_ops.gemm_fit(8192, 17, dtype).slower
            == "17 segments of 8192 rows are for segment_up"
        )
        assert segment_ops.gemm_fit(8192, 128, dtype, 64) == support.Fit()
        assert segment_ops.gemm_fit(8192, 129, dtype, 64).slower.endswith("for segment_up")
    assert segment_ops.gemm_fit(8192, 1, F32).slower.startswith("fp32 sums need the registers")


def test_one_launch_can_be_switched_off(strict_backend, device, monkeypatch):
    if strict_backend == "torch":
        pytest.skip("torch composes always")
    monkeypatch.setattr(segment_ops, "_FEWEST_FUSED_ROWS", 1)
    monkeypatch.setattr(segment_ops, "_FEWEST_ROWS_A_SEGMENT", 1)
    monkeypatch.setattr(support.switches, "_OFF", frozenset({"one_launch"}))
    support.miss.cache_clear()
    x, _, b, _, h = products(24, 32, 40, 8, 3, torch.float16, device)
    w = torch.ones(40, 32, device=device, dtype=torch.float16)
    try:
        ops.segment_gemm(x, w, h, b, bounds_of([0, 1, 2, 3], device))
    finally:
        support.miss.cache_clear()
    assert {op for op, _ in fastlora.launches()} == {"gemm", "segment_up"}


@pytest.mark.parametrize("m", [24, 140])
@pytest.mark.parametrize("dx", [False, True])
def test_gemm_over_a_4_bit_weight(strict_backend, device, monkeypatch, m, dx):
    """Few rows take the codes as they lie, then segment_up; many a weight in floats, and one launch."""
    monkeypatch.setattr(segment_ops, "_FEWEST_FUSED_ROWS", 1)
    monkeypatch.setattr(segment_ops, "_FEWEST_ROWS_A_SEGMENT", 1)
    weight = fastlora.NF4Tensor.quantize(torch.randn(64, 64, device=device))
    x, h = (torch.randn(m, width, device=device, dtype=torch.float16) for width in (64, 8))
    l = torch.randn(3, 64, 8, device=device, dtype=torch.float16)
    bounds = bounds_of([1, 9, 9, m - 1], device)
    words = reference.mask(torch.tensor([3, 4]), m, 64, KEEP).to(device) if dx else None
    y = ops.segment_nf4_gemm(
        x, weight.codes, weight.scales, weight.form, h, l, bounds, None, words, dx
    )
    ran = {op for op, _ in fastlora.launches()} - {"mask", "quantize"}
    if strict_backend == "torch":
        assert ran == {"dequantize", "gemm", "segment_up"}
    elif m == 24:
        assert ran == {"nf4_dx" if dx else "nf4_gemm", "segment_up"}
    else:
        assert ran == {"dequantize", "segment_gemm"}
    w = weight.dequantize().double()
    base = x.double() @ (w if dx else w.t())
    true = reference.segment_up(h.double(), l.double(), bounds, words, base)
    torch.testing.assert_close(y.double(), true, rtol=4e-3, atol=4e-2)


def test_there_is_no_cuda_kernel_and_strictness_says_so():
    x, a, *_ = products(24, 32, 40, 8, 3, F32, "cpu")
    with (
        fastlora.backend("cuda", strict=True),
        pytest.raises(RuntimeError, match=r"segment_down on cpu.*no cuda kernel for segment_down"),
    ):
        ops.segment_down(x, a, bounds_of([0, 1, 2, 3]))
    assert set(support.SEGMENT_OPS) < set(support.OPS)
