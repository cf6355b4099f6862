"""The fused bottleneck against its formula in fp64: values, gradients, dtypes, what it saves, hostile shapes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

import fastlora
from fastlora.activations import ACTIVATIONS
from fastlora.autograd.bottleneck import bottleneck
from fastlora.ops import bottleneck as ops_bottleneck
from fastlora.ops import support
from fastlora.ops.support import BOTTLENECK_OPS, MAX_RANK

M, K, N, R = 13, 24, 40, 6


def drawn(r: int = R, n: int = N, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = (r, K), (r,), (n, r), (n,)
    return [torch.randn(*s, dtype=dtype, requires_grad=True) for s in shapes]


def act(name: str) -> Callable[[Tensor], Tensor]:
    """transformers' own function, which the adapters library takes."""
    return F.leaky_relu if name == "leakyrelu" else ACT2FN[name]


def formula(x: Tensor, residual: Tensor | None, down, d, up, u, name: str) -> Tensor:  # type: ignore[no-untyped-def]
    y = F.linear(act(name)(F.linear(x, down, d)), up, u)
    return y if residual is None else residual + y


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_gradients(name: str) -> None:
    x = torch.randn(2, M, K, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(2, M, N, dtype=torch.float64, requires_grad=True)
    factors = drawn()
    dy = torch.randn(2, M, N, dtype=torch.float64)
    got = bottleneck(x, residual, *factors, name)
    exact = formula(x, residual, *factors, name)
    torch.testing.assert_close(got, exact)
    leaves = [x, residual, *factors]
    for mine, true in zip(
        torch.autograd.grad(got, leaves, dy), torch.autograd.grad(exact, leaves, dy)
    ):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("kind", ["around", "beside", "alone"])
@pytest.mark.parametrize("name", ["relu", "gelu_new", "swish"])
def test_gradcheck(kind: str, name: str) -> None:
    x = torch.randn(5, K, dtype=torch.float64, requires_grad=True)
    factors = drawn(n=K)
    if kind == "beside":
        residual = torch.randn(5, K, dtype=torch.float64, requires_grad=True)
        call = lambda x, r, *rest: bottleneck(x, r, *rest, name)  # noqa: E731
        assert torch.autograd.gradcheck(call, (x, residual, *factors))
    else:
        around = kind == "around"
        call = lambda x, *rest: bottleneck(x, x if around else None, *rest, name)  # noqa: E731
        assert torch.autograd.gradcheck(call, (x, *factors))


def test_frozen_inputs_get_no_gradient() -> None:
    x, residual = torch.randn(3, K), torch.randn(3, N)
    factors = drawn(dtype=torch.float32)
    factors[0].requires_grad_(False)
    bottleneck(x, residual, *factors, "relu").sum().backward()
    assert factors[0].grad is None
    assert all(f.grad is not None for f in factors[1:])
    x.requires_grad_()
    frozen = [f.detach() for f in factors]
    bottleneck(x, residual, *frozen, "relu").sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("name", ["gelu", "gelu_new"])
@pytest.mark.parametrize("r", [R, MAX_RANK + 1])
@pytest.mark.parametrize("trained", range(4))
def test_one_factor_trained_alone(trained: int, r: int, name: str) -> None:
    x, residual, dy = torch.randn(3, K), torch.randn(3, N), torch.randn(3, N)
    factors = [
        f.detach().requires_grad_(i == trained)
        for i, f in enumerate(drawn(r=r, dtype=torch.float32))
    ]
    (got,) = torch.autograd.grad(bottleneck(x, residual, *factors, name), factors[trained], dy)
    wide = [f.detach().double().requires_grad_(f.requires_grad) for f in factors]
    y = formula(x.double(), residual.double(), *wide, name)
    (exact,) = torch.autograd.grad(y, wide[trained], dy.double())
    torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_accurate_as_torch(dtype: torch.dtype, master: bool) -> None:
    """At most twice the error of the same formula in torch at that dtype, per output and gradient."""
    factors = [
        (f.detach() * 0.3).to(dtype).to(torch.float32 if master else dtype).requires_grad_()
        for f in drawn(r=16, n=K)
    ]
    x = torch.randn(200, K, dtype=dtype).requires_grad_()
    dy = torch.randn(200, K, dtype=dtype)

    def run(call, *inputs: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
        y = call(inputs[0], inputs[0], *inputs[1:], "gelu")
        return [y, *torch.autograd.grad(y, inputs, dy.to(y.dtype))]

    mine = run(bottleneck, x, *factors)
    theirs = run(formula, x, *[f.detach().to(dtype).requires_grad_() for f in factors])
    wide = [t.detach().double().requires_grad_() for t in (x, *factors)]
    exact = run(formula, *wide)
    assert mine[0].dtype == dtype
    assert [g.dtype for g in mine[1:]] == [t.dtype for t in (x, *factors)]
    for got, other, true in zip(mine, theirs, exact):
        error, allowed = ((t.double() - true).norm() for t in (got, other))
        assert error.item() <= 2 * allowed.item() + 1e-6 * true.norm().item()


def test_saved_are_x_the_preactivation_and_the_factors() -> None:
    x = torch.randn(50, K, requires_grad=True)
    factors = drawn(n=K, dtype=torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bottleneck(x, x, *factors, "swish")
    assert sorted(t.shape for t in saved) == sorted([x.shape, (50, R), (R, K), (K, R)])


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [
        ("x", [(50, R), (R, K), (K, R)]),
        ("down", [(50, K), (50, R), (K, R)]),
        ("d", [(50, R), (K, R)]),
        ("up", [(50, R)]),
        ("u", []),
    ],
)
def test_nothing_is_saved_that_no_gradient_reads(wanted: str, kept: list[tuple[int, ...]]) -> None:
    """Of a frozen adapter behind a trained one, no [M, K]."""
    factors = [f.detach() for f in drawn(n=K, dtype=torch.float32)]
    leaves = dict(zip(("x", "down", "d", "up", "u"), (torch.randn(50, K), *factors), strict=True))
    leaves[wanted].requires_grad_()
    x, *factors = leaves.values()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = bottleneck(x, x, *factors, "swish")
    assert sorted(t.shape for t in saved) == sorted(map(torch.Size, kept))
    (got,) = torch.autograd.grad(y.sum(), leaves[wanted])
    (want,) = torch.autograd.grad(formula(x, x, *factors, "swish").sum(), leaves[wanted])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, K), (3, 0, K), (1, K), (K,)])
def test_empty_and_odd_shapes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    factors = drawn(n=K, dtype=torch.float32)
    y = bottleneck(x, x, *factors, "relu")
    assert y.shape == shape
    torch.testing.assert_close(y, formula(x, x, *factors, "relu"), rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == shape


def test_strided_input_and_upstream_gradient() -> None:
    x = torch.randn(2 * K, 7).t()[:, ::2].requires_grad_()
    residual = torch.randn(1, N).expand(7, N)
    factors = drawn(dtype=torch.float32)
    got, exact = bottleneck(x, residual, *factors, "tanh"), formula(x, residual, *factors, "tanh")
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)
    dy = torch.randn(N, 7).t()
    for mine, true in zip(
        torch.autograd.grad(got, [x, *factors], dy), torch.autograd.grad(exact, [x, *factors], dy)
    ):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-4)


def test_neither_the_residual_nor_the_upstream_gradient_is_written() -> None:
    x = torch.randn(4, K, requires_grad=True)
    kept = x.detach().clone()
    factors = drawn(n=K, dtype=torch.float32)
    y = bottleneck(x, x, *factors, "relu")
    assert y.data_ptr() != x.data_ptr()
    dy = torch.randn_like(y)
    before = dy.clone()
    y.backward(dy)
    assert torch.equal(x.detach(), kept) and torch.equal(dy, before)


def test_a_wide_bottleneck_is_no_skinny_product() -> None:
    factors = drawn(r=MAX_RANK + 1, n=K, dtype=torch.float32)
    x = torch.randn(4, K, requires_grad=True)
    got, exact = bottleneck(x, x, *factors, "relu"), formula(x, x, *factors, "relu")
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-3)
    leaves = [x, *factors]
    dy = torch.randn(4, K)
    for mine, true in zip(
        torch.autograd.grad(got, leaves, dy), torch.autograd.grad(exact, leaves, dy)
    ):
        torch.testing.assert_close(mine, true, rtol=1e-3, atol=1e-3)


def test_under_autocast_the_residual_keeps_its_dtype() -> None:
    x = torch.randn(4, K, requires_grad=True)
    factors = drawn(n=K, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        wide = bottleneck(x, x, *factors, "relu")
        narrow = bottleneck(x, None, *factors, "relu")
        half = bottleneck(x, x.bfloat16(), *factors, "relu")
    assert (wide.dtype, narrow.dtype, half.dtype) == (torch.float32, *[torch.bfloat16] * 2)
    exact = formula(x, x, *factors, "relu")
    assert (wide - exact).norm() < 0.02 * exact.norm()
    wide.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_the_ops_run_it(strict_backend: str, device: torch.device) -> None:
    """On whichever backend is asked for: the skinny products are fastlora's own."""
    x = torch.randn(33, K, device=device, requires_grad=True)
    factors = [f.detach().to(device).requires_grad_() for f in drawn(n=K, dtype=torch.float32)]
    dy = torch.randn(33, K, device=device)
    got = bottleneck(x, x, *factors, "swish")
    exact = formula(x, x, *factors, "swish")
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)
    leaves = [x, *factors]
    for mine, true in zip(
        torch.autograd.grad(got, leaves, dy), torch.autograd.grad(exact, leaves, dy)
    ):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-4)
    assert {op for op, _ in fastlora.launches()} == {*BOTTLENECK_OPS, "wgrad"}


def test_kernels_are_taken_up_to_the_width_measured_and_above_where_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """As on a GPU, where Triton's kernels are the dispatcher's choice; the results are the same either way."""
    if reason := support.miss("bottleneck_up", "triton", device, torch.float32, 8):
        pytest.skip(reason)
    monkeypatch.setattr(support, "choose", lambda *_: "triton")
    monkeypatch.setattr(ops_bottleneck, "WIDEST", {"down": 8, "up": 16, "wgrad": 4})
    x, dy = torch.randn(9, K, device=device), torch.randn(9, K, device=device)

    def run(r: int) -> set[str]:
        factors = [f.detach().to(device).requires_grad_() for f in drawn(r, K, torch.float32)]
        fastlora.reset_launches()
        y = bottleneck(x, x, *factors, "relu")
        torch.testing.assert_close(y, formula(x, x, *factors, "relu"), rtol=1e-4, atol=1e-4)
        got, want = (
            torch.autograd.grad(call(x, x, *factors, "relu"), factors, dy)
            for call in (bottleneck, formula)
        )
        for mine, true in zip(got, want):
            torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-4)
        return {op for op, name in fastlora.launches() if name == "triton"}

    downs = {"bottleneck_down", "bottleneck_down_backward"}
    assert run(4) == {*downs, "bottleneck_up", "wgrad"}
    assert run(8) == {*downs, "bottleneck_up"}
    assert run(9) == {"bottleneck_up"}
    assert run(17) == set()
    with fastlora.backend("triton"):
        assert run(17) == {*downs, "bottleneck_up", "wgrad"}


@pytest.mark.parametrize("r", [R, 100])
@pytest.mark.parametrize("around", [True, False])
def test_compiles_whole(r: int, around: bool) -> None:
    """In one graph, forward and backward, whoever makes the products."""
    x = torch.randn(5, K, requires_grad=True)
    leaves = [x, *drawn(r, K, torch.float32)]

    def run(x: Tensor, *factors: Tensor) -> Tensor:
        return bottleneck(x, x if around else None, *factors, "gelu")

    dy = torch.randn(5, K)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        torch.autograd.grad(compiled(*leaves), leaves, dy),
        torch.autograd.grad(run(*leaves), leaves, dy),
    ):
        torch.testing.assert_close(got, want)


def test_bad_shapes_and_second_derivatives_are_refused() -> None:
    factors = drawn(dtype=torch.float32)
    x = torch.randn(3, K, requires_grad=True)
    with pytest.raises(ValueError, match="x: got shape"):
        bottleneck(torch.randn(3, K + 1), None, *factors, "relu")
    with pytest.raises(ValueError, match="residual: got shape"):
        bottleneck(x, torch.randn(1, N), *factors, "relu")
    with pytest.raises(ValueError, match="up_bias"):
        bottleneck(x, None, *factors[:3], torch.randn(1), "relu")
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(bottleneck(x, None, *factors, "relu").sum(), x, create_graph=True)
