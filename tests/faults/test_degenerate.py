"""Nothing, one of something, and arguments at the end of their range."""

from __future__ import annotations

import importlib

import pytest
import torch

import fastlora
from fastlora import LoraConfig
from tests.faults.common import assert_close, assert_right, operands, step, truth


@pytest.fixture
def nan_filled():
    """Memory that nobody writes shows: torch fills every new tensor with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # the fp64 truth may use any algorithm
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    "sizes", [(0, 8, 8, 4), (4, 0, 8, 4), (4, 8, 0, 4), (4, 8, 8, 0), (0,) * 4]
)
@pytest.mark.usefixtures("nan_filled")
def test_any_dimension_may_be_zero(strict_backend, device, sizes, dropout_p):
    m, _, n, _ = sizes
    tensors = operands(*sizes, device=device)
    bias, dy = torch.randn(n, device=device), torch.randn(m, n, device=device)
    torch.manual_seed(1)
    got = step(*tensors, dy, bias=bias, dropout_p=dropout_p)
    expected = truth(*tensors, dy, bias=bias)
    assert_close(got, expected, 2e-6)  # the low-rank term is zero, whatever is dropped


@pytest.mark.parametrize("shape", [(0, 24), (0, 3, 24), (3, 0, 24), (1, 1, 24), (24,), (1, 24)])
@pytest.mark.usefixtures("nan_filled")
def test_no_token_and_one_token(strict_backend, device, shape):
    _, w, a, b = operands(device=device)
    x, dy = torch.randn(shape, device=device), torch.randn(*shape[:-1], 20, device=device)
    assert_right(x, w, a, b, dy, bias=torch.randn(20, device=device))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (33, 31, 65, 7), (17, 33, 1, 1), (1, 65, 33, 17)])
@pytest.mark.usefixtures("nan_filled")
def test_partial_tiles_are_written_whole(strict_backend, device, sizes):
    m, _, n, _ = sizes
    bias, dy = torch.randn(n, device=device), torch.randn(m, n, device=device)
    assert_right(*operands(*sizes, device=device), dy, bias=bias)


@pytest.mark.parametrize("rank_or_p", ["rank 0", "p = 1"])
@pytest.mark.usefixtures("nan_filled")
def test_gradients_of_an_absent_update_are_zeros(strict_backend, device, rank_or_p):
    r, p = (0, 0.0) if rank_or_p == "rank 0" else (4, 1.0)
    x, w, a, b = operands(r=r, device=device, adapters=torch.float32)
    scaling = torch.tensor(3.0, device=device)
    y, dx, da, db = step(x, w, a, b, None, scaling, dropout_p=p)
    torch.testing.assert_close(y, x @ w.t())
    torch.testing.assert_close(dx, torch.ones_like(y) @ w)
    assert torch.equal(da, torch.zeros_like(a)) and torch.equal(db, torch.zeros_like(b))


def test_models_take_empty_and_single_token_batches():
    import peft

    net = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.ReLU(), torch.nn.Linear(12, 5))
    own = fastlora.get_peft_model(net, LoraConfig(r=2, target_modules=["0", "2"]))
    net = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.ReLU(), torch.nn.Linear(12, 5))
    stock = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    for model in (own, fastlora.accelerate(stock)):
        for shape in ((0, 8), (2, 0, 8), (1, 1, 8), (8,)):
            fastlora.reset_launches()
            y = model(torch.randn(shape))
            y.sum().backward()
            assert y.shape == (*shape[:-1], 5)
            assert ("gemm", "torch") in fastlora.launches()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), float("inf")])
def test_absurd_dropout_is_refused(p):
    with pytest.raises(ValueError, match="dropout_p"):
        fastlora.lora_linear(*operands(), dropout_p=p)


def test_any_length_splits_into_whole_blocks_none_empty():
    """A split heuristic divides by what may be zero, or leaves a part with nothing to do."""
    pytest.importorskip("triton")
    split_evenly = importlib.import_module("fastlora.triton.launch").split_evenly
    for length in (1, 15, 16, 17, 31, 32, 33, 100, 128, 4097):
        for block in (16, 32, 128):
            for parts in (0, 1, 2, 3, 7, 32, 10**6):
                run, count = split_evenly(length, block, parts)
                assert run > 0 and run % block == 0 and 1 <= count <= max(1, parts)
                assert (count - 1) * run < length <= count * run


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (1, 4096, 64, 512), (3, 64, 4096, 63), (0, 8, 8, 4)]
)
@pytest.mark.usefixtures("nan_filled")
def test_everything_is_written_on_the_gpu(sizes):
    m, _, n, _ = sizes
    with fastlora.backend("triton", strict=True):
        for dtype in (torch.bfloat16, torch.float32):
            bias, dy = (torch.randn(s, device="cuda").to(dtype) for s in ((n,), (m, n)))
            assert_right(*operands(*sizes, dtype, "cuda"), dy, bias=bias)
            got = step(*operands(*sizes, dtype, "cuda"), dy, bias=bias, dropout_p=0.2)
            assert all(torch.isfinite(t).all() for t in got)
    assert {backend for _, backend in fastlora.launches()} <= {"triton"}
