"""_lora_forward and _lora_backward: sound as torch ops, and equal to the formulas whatever is asked for."""

import itertools

import pytest
import torch

import fastlora
from fastlora import ops, reference, rng
from fastlora.ops import cuda_backend, support

M, N, K, R = 24, 40, 32, 8
F32 = torch.float32


@pytest.fixture
def tensors():
    make = lambda *shape: torch.randn(*shape)  # noqa: E731
    return dict(
        x=make(M, K), w=make(N, K), a=make(R, K), b=make(N, R), bias=make(N), dy=make(M, N), h=make(M, R)
    )  # fmt: skip


def state():
    return torch.tensor([3, 4])


@pytest.mark.parametrize("dropped", [False, True])
def test_opcheck(tensors, dropped):
    t, drop = tensors, state() if dropped else None
    keep = 40000 if dropped else rng.KEEP_ALL
    forward = (t["x"], t["w"], t["a"], t["b"], t["bias"], None, 0.5, drop, keep)
    torch.library.opcheck(torch.ops.fastlora._lora_forward.default, forward)
    backward = (t["dy"], t["w"], t["a"], t["b"], t["x"], t["h"], torch.tensor(2.0), 0.5, drop, keep, K, F32, F32, F32)  # fmt: skip
    torch.library.opcheck(torch.ops.fastlora._lora_backward.default, backward)
    for missing in (1, 4, 5, 13):
        partial = list(backward)
        partial[missing] = None
        torch.library.opcheck(torch.ops.fastlora._lora_backward.default, tuple(partial))


@pytest.mark.parametrize(
    ("need_x", "need_a", "need_b", "bias"), list(itertools.product((False, True), repeat=4))
)
@pytest.mark.parametrize("dropped", [False, True])
def test_what_is_asked_for_and_nothing_else(tensors, need_x, need_a, need_b, bias, dropped):
    t, drop = tensors, state() if dropped else None
    keep = 40000 if dropped else rng.KEEP_ALL
    low = need_x or need_a
    dx, d_a, d_b, d_bias = ops.lora_backward(
        t["dy"],
        t["w"] if need_x else None,
        t["a"] if need_x else None,
        t["b"] if low else None,
        t["x"] if need_a else None,
        t["h"] if need_b else None,
        None,
        0.5,
        drop,
        keep,
        K,
        F32,
        F32,
        F32 if bias else None,
    )
    wide = {name: tensor.double() for name, tensor in t.items()}
    mask = torch.ones(M, K, dtype=torch.bool)
    if dropped:
        mask = reference.unpack_mask(reference.mask(drop, M, K, keep), M, K)
    g = 0.5 * wide["dy"] @ wide["b"]
    truth = (
        wide["dy"] @ wide["w"] + mask * (g @ wide["a"]) if need_x else None,
        g.t() @ (mask * wide["x"]) if need_a else None,
        wide["dy"].t() @ wide["h"] if need_b else None,
        wide["dy"].sum(0) if bias else None,
    )
    for got, expected in zip((dx, d_a, d_b, d_bias), truth, strict=True):
        if expected is None:
            assert got.shape == (0,)
        else:
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)


def test_the_whole_is_only_for_those_who_may_run_it(tensors):
    t = tensors
    fit = cuda_backend.lora_fit(t["x"], t["w"], t["a"], t["b"], None)
    assert fit == support.Fit()  # few rows
    assert "multiples of 8" in (
        cuda_backend.lora_fit(t["x"], t["w"], t["a"][:5], t["b"][:, :5], None).miss or ""
    )
    assert "bfloat16" in (
        cuda_backend.lora_fit(t["x"], t["w"], t["a"].bfloat16(), t["b"], None).miss or ""
    )


@pytest.mark.parametrize(
    ("m", "n", "r", "factors", "kind", "faster"),
    [
        (1, 4096, 16, torch.bfloat16, "forward", True),
        (128, 14336, 64, torch.bfloat16, "forward", True),
        (256, 4096, 16, torch.float32, "forward", True),
        (64, 4096, 64, torch.float32, "forward", True),
        (256, 4096, 64, torch.float32, "forward", False),
        (512, 4096, 16, torch.bfloat16, "forward", False),  # 32 tiles, of 66 clusters
        (8192, 4096, 16, torch.bfloat16, "forward", True),
        (16, 4096, 16, torch.bfloat16, "dropout", False),
        (16, 4096, 16, torch.bfloat16, "backward", False),
        (16, 4096, 128, torch.bfloat16, "forward", False),
    ],
)
def test_where_one_launch_is_the_faster_way(m, n, r, factors, kind, faster):
    """As measured on an H200 (benchmarks/NOTES.md)."""
    k = 16
    x, w = torch.empty(m, k, dtype=torch.bfloat16), torch.empty(n, k, dtype=torch.bfloat16)
    a, b = torch.empty(r, k, dtype=factors), torch.empty(n, r, dtype=factors)
    state = torch.zeros(2, dtype=torch.int64) if kind == "dropout" else None
    fit = cuda_backend.lora_fit(x, w, a, b, state, backward=kind == "backward")
    assert fit.miss is None and (fit.slower is None) == faster


@pytest.mark.parametrize(
    ("m", "n", "k", "r", "factors", "drops", "faster"),
    [
        (1, 4096, 4096, 16, torch.bfloat16, False, True),
        (256, 14336, 4096, 16, torch.bfloat16, False, True),
        (128, 64, 4096, 16, torch.float32, False, True),
        (128, 64, 4096, 64, torch.float32, False, False),
        (16, 64, 14336, 16, torch.bfloat16, False, False),
        (512, 64, 4096, 16, torch.bfloat16, False, None),
        (16, 64, 4096, 128, torch.bfloat16, False, None),
        (16, 64, 4096, 16, torch.bfloat16, True, None),
    ],
)
def test_where_dx_of_few_rows_is_one_launch(m, n, k, r, factors, drops, faster):
    """As measured on an H200; None where csrc/few is not for it."""
    dy, w = torch.empty(m, n, dtype=torch.bfloat16), torch.empty(n, k, dtype=torch.bfloat16)
    a, b = torch.empty(r, k, dtype=factors), torch.empty(n, r, dtype=factors)
    state = torch.zeros(2, dtype=torch.int64) if drops else None
    fit = cuda_backend.dx_fit(dy, w, a, b, state)
    assert (fit.miss is not None) == (faster is None)
    assert faster is None or (fit.slower is None) == faster


def test_a_backend_that_may_not_run_it_all_is_not_asked(tensors):
    t = tensors
    ask = ("lora", t["x"].device, torch.bfloat16, R, lambda: support.Fit())
    assert not support.takes_whole(*ask)  # no GPU tensor
    with fastlora.backend("torch", strict=True):
        assert not support.takes_whole(*ask)
    with fastlora.backend("cuda", strict=True), pytest.raises(RuntimeError, match="lora on cpu"):
        support.takes_whole(*ask)
