"""_nf4_backward: sound as a torch op, lora_backward over the dequantised weight, and the same composed over the codes."""

import importlib
import itertools

import pytest
import torch

import fastlora
from fastlora import NF4Tensor, QLoRALinear, ops, reference, rng
from fastlora.ops import cuda_backend, support, torch_backend

nf4 = importlib.import_module("fastlora.ops.nf4")
explanation = importlib.import_module("fastlora.layers.explanation")
M, N, K, R = 24, 40, 128, 8
BF16, F32 = torch.bfloat16, torch.float32


def problem(double_quant=True):
    q = NF4Tensor.quantize(torch.randn(N, K), double_quant=double_quant)
    shapes = dict(dy=(M, N), a=(R, K), b=(N, R), x=(M, K), h=(M, R))
    return q, {name: torch.randn(shape) for name, shape in shapes.items()}


def asked(q, t, x=True, a=True, b=True, bias=True, drop=None, scaling=None):
    """The arguments of nf4_backward, and of lora_backward over the dequantised weight."""
    keep = 40000 if drop is not None else rng.KEEP_ALL
    update = (
        t["a"] if x else None,
        t["b"] if x or a else None,
        t["x"] if a else None,
        t["h"] if b else None,
        scaling,
        0.5,
        drop,
        keep,
    )
    dtypes = F32, F32, F32 if bias else None
    weight = (q.codes if x else None, q.scales if x else [], q.form)
    w = q.dequantize(F32) if x else None
    return (t["dy"], *weight, *update, *dtypes), (t["dy"], w, *update, K, *dtypes)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
def test_opcheck(double_quant, dropped):
    q, t = problem(double_quant)
    drop = torch.tensor([3, 4]) if dropped else None
    for wanted in ({}, {"x": False}, {"a": False}, {"b": False}, {"bias": False}):
        (dy, codes, scales, form, *rest), _ = asked(q, t, drop=drop, **wanted)
        arguments = (dy, codes, list(scales), *form, *rest)
        torch.library.opcheck(torch.ops.fastlora._nf4_backward.default, arguments)


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=4)))
@pytest.mark.parametrize("dropped", [False, True])
def test_it_is_lora_backward_over_the_dequantised_weight(wanted, dropped):
    q, t = problem()
    drop = torch.tensor([3, 4]) if dropped else None
    ours, theirs = asked(q, t, *wanted, drop=drop, scaling=torch.tensor(2.0))
    for got, want in zip(ops.nf4_backward(*ours), ops.lora_backward(*theirs), strict=True):
        assert torch.equal(got, want)
    made = fastlora.launches().get(("dequantize", "torch"), 0)
    assert made == (2 if wanted[0] else 0)  # once for the weight to compare with


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3)))
@pytest.mark.parametrize("rank", [0, R])
def test_over_the_codes(monkeypatch, rank, wanted):
    """As where a kernel multiplies by them: g is made once, and serves dX and dA."""
    q, t = problem()
    seen = []

    def nf4_dx(dy, codes, scales, form, g, a):
        seen.append((g, a))
        w = torch_backend.dequantize(codes, scales, form, dy.dtype)
        return reference.gemm(dy, w.t(), g, None if a is None else a.t(), None)

    monkeypatch.setattr(nf4, "dx_reads_codes", lambda *_: "torch")
    monkeypatch.setattr(torch_backend, "nf4_dx", nf4_dx, raising=False)
    need_a, need_b, bias = wanted
    ours, theirs = asked(q, t, True, need_a and rank > 0, need_b and rank > 0, bias)
    if rank == 0:
        ours, theirs = ((*o[: i + 2], None, None, *o[i + 4 :]) for o, i in ((ours, 2), (theirs, 0)))
    got = ops.nf4_backward(*ours)
    ran = fastlora.launches()
    assert ran.get(("down", "torch"), 0) == (rank > 0) and len(seen) == 1
    assert all((part is None) == (rank == 0) for part in seen[0])
    for value, want in zip(got, ops.lora_backward(*theirs), strict=True):
        torch.testing.assert_close(value, want)


def test_what_takes_the_codes(monkeypatch):
    q, t = problem()
    dy, a = t["dy"].to(BF16), t["a"]

    def chosen(dy=dy, a=a, form=q.form, state=None):
        return nf4.dx_reads_codes(dy, q.codes, form, a, state)

    assert chosen() is None  # on a CPU
    monkeypatch.setattr(support, "miss", lambda *_: None)
    assert chosen() == chosen(a=None) == "cuda"
    assert chosen(state=torch.tensor([3, 4])) is None
    assert chosen(dy=torch.zeros(1025, N, dtype=BF16)) is None
    assert chosen(dy=dy[:1].expand(M, N)) is None
    assert chosen(form=ops.Form(N, K, 32, 256, False)) is None
    with fastlora.backend("cuda"):  # g, dA and dB would not be cuda's
        assert chosen() is None and chosen(a=None) == "cuda"
    with fastlora.backend("torch"):
        assert chosen(a=None) is None
    few, many = dy[:64], torch.zeros(65, N, dtype=BF16)
    with fastlora.backend("triton"):
        assert chosen(dy=few) == chosen(dy=few, a=None) == "triton"
        assert chosen(dy=few, state=torch.tensor([3, 4])) is None
        assert chosen(dy=many) is None
    monkeypatch.setattr(support, "miss", lambda op, *_: "no" if op == "nf4_dx" else None)
    assert chosen() is None


def test_what_the_kernel_does_not_take_is_named():
    q, t = problem()
    dy = t["dy"].to(BF16)

    def fit(dy=dy, state=None):
        return cuda_backend.nf4_dx_fit(dy, q.codes, q.form, state)

    assert fit() == fit(dy[:, :N]) == support.Fit()
    assert "16 bytes" in fit(torch.zeros(M, N + 1, dtype=BF16)[:, :N]).miss
    assert "16 bytes" in fit(dy.t().contiguous().t()).miss
    assert "dropout" in fit(state=torch.tensor([1, 2])).miss
    assert "in floats" in fit(torch.zeros(1025, N, dtype=BF16)).slower


@pytest.mark.parametrize(
    ("forward", "backward", "takers"),
    [
        (None, None, "W, for y and again for dX"),
        ("nf4_gemm", None, "W, for dX"),
        (None, "cuda", "W, for y"),
        ("nf4_gemm", "cuda", None),
    ],
)
@pytest.mark.parametrize("r", [0, 16])
def test_explain_tells_who_takes_the_codes(monkeypatch, r, forward, backward, takers):
    reader = nf4.Reader(forward, "cuda", True) if forward else None
    monkeypatch.setattr(explanation, "reads_codes", lambda *_: reader)
    monkeypatch.setattr(explanation, "dx_reads_codes", lambda *_: backward)
    layer = QLoRALinear.from_linear(torch.nn.Linear(128, 64), r=r or 8)
    layer.enable_adapters(r > 0)
    if r == 0:
        layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    lines = fastlora.explain(layer, torch.randn(5, 128)).splitlines()
    of = {line.split()[0]: line for line in lines[1:]}
    assert (takers is None) == ("dequantize" not in of)
    assert takers is None or takers + " " in of["dequantize"]
    assert ("nf4_dx" in of) == (backward is not None)
    if backward:
        assert "dX = dY W" in of["nf4_dx"] and "-> cuda   (over the codes)" in of["nf4_dx"]
        assert not any("dX" in line for line in lines if line.split()[0] == "gemm")
