"""The bottleneck's ops on the torch backend: what a compiler is told about their outputs is so. Kernels: tests/triton."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastlora.activations import KINDS
from fastlora.autograd.bottleneck import bottleneck

M, K, R = 12, 24, 5
LIB = torch.ops.fastlora


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_tensors_of_their_own(kind: str) -> None:
    """Neither one another nor p, in place of which a compiler puts something else as soon as nobody reads it."""
    x, l, bias, p = drawn(M, K), drawn(R, K), drawn(R), drawn(M, R)
    torch.library.opcheck(LIB._bottleneck_down.default, (x, l, bias, kind, True))
    torch.library.opcheck(LIB._bottleneck_down_backward.default, (x, l, p, kind, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sum_lies_in_rows_whatever_the_residual_does(dtype: torch.dtype) -> None:
    h, l, residual = drawn(M, R), drawn(K, R), drawn(K, M).to(dtype).t()
    torch.library.opcheck(LIB._bottleneck_up.default, (h, l, None, residual))


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("name", ["linear", "gelu_new"])
def test_compiled_it_is_what_it_is_in_eager_mode(name: str, transposed: bool) -> None:
    x, dy = drawn(K, M).t() if transposed else drawn(M, K), drawn(M, K)
    shapes = (R, K), (R,), (K, R), (K,)
    leaves = [t.requires_grad_() for t in (x, *(drawn(*shape) for shape in shapes))]

    def run(x: Tensor, *factors: Tensor) -> Tensor:
        return bottleneck(x, x, *factors, name)

    compiled = torch.compile(run, fullgraph=True)
    for got, want in zip(
        torch.autograd.grad(compiled(*leaves), leaves, dy),
        torch.autograd.grad(run(*leaves), leaves, dy),
        strict=True,
    ):
        torch.testing.assert_close(got, want)
