"""IA3Layer and TunedNorm alone: formulas in fp64, gradients, dtypes, merging and what is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora import QLoRALinear
from fastlora.autograd import scale_columns as scale
from fastlora.layers.ia3 import IA3Layer
from fastlora.layers.norm_tuning import TunedNorm

K, N = 64, 128


def base(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    linear = nn.Linear(K, N, dtype=dtype)
    if kind == "conv1d":
        conv = Conv1D(N, K).to(dtype)
        nn.init.normal_(conv.bias)
        return conv
    return QLoRALinear.from_linear(linear, r=None) if kind == "nf4" else linear


def dense(module: nn.Module) -> tuple[Tensor, Tensor]:
    """W [N, K] and bias in fp64."""
    weight: Any = module.weight
    if isinstance(module, QLoRALinear):
        weight = weight.dequantize(torch.float32)
    weight = weight.detach().double()
    return weight.t() if isinstance(module, Conv1D) else weight, module.bias.detach().double()


def drawn(layer: IA3Layer) -> Tensor:
    with torch.no_grad():
        for vector in layer.ia3_l.values():
            vector.uniform_(0.5, 1.5)
    product = torch.ones(())
    for name in layer.acting_adapters():
        product = product * layer.ia3_l[name].detach().double().flatten()
    return product


def formula(module: nn.Module, x: Tensor, l: Tensor, feedforward: bool) -> Tensor:
    weight, bias = dense(module)
    x = x.double()
    return (x * l) @ weight.t() + bias if feedforward else (x @ weight.t() + bias) * l


@pytest.mark.parametrize("feedforward", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4"])
def test_formula(kind: str, feedforward: bool) -> None:
    module = base(kind)
    layer = IA3Layer(module, feedforward)
    assert layer.ia3_l["default"].shape == ((1, K) if feedforward else (N, 1))
    x = torch.randn(3, 5, K)
    torch.testing.assert_close(layer(x), module(x), rtol=0, atol=0)  # ones
    layer.add_adapter("second", init_ia3_weights=False)
    assert not torch.equal(layer.ia3_l["second"], torch.ones_like(layer.ia3_l["second"]))
    layer.set_adapter(["default", "second"])
    l = drawn(layer)
    exact = formula(module, x, l, feedforward)
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-4, atol=1e-4)
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), module(x), rtol=0, atol=0)


@pytest.mark.parametrize("feedforward", [False, True])
def test_gradients_are_those_of_the_formula(feedforward: bool) -> None:
    module = base("linear").requires_grad_(False)
    layer = IA3Layer(module, feedforward)
    drawn(layer)
    x = torch.randn(7, K, requires_grad=True)
    dy = torch.randn(7, N)
    layer(x).backward(dy)
    assert module.weight.grad is None
    x2 = x.detach().double().requires_grad_()
    l2 = layer.ia3_l["default"].detach().double().flatten().requires_grad_()
    formula(module, x2, l2, feedforward).backward(dy.double())
    assert x.grad is not None and x2.grad is not None and l2.grad is not None
    torch.testing.assert_close(x.grad.double(), x2.grad, rtol=1e-4, atol=1e-4)
    got = layer.ia3_l["default"].grad
    assert got is not None
    torch.testing.assert_close(got.double().flatten(), l2.grad, rtol=1e-4, atol=1e-4)


def test_scale_passes_gradcheck_and_has_no_second_derivative() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    l = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(scale, (x, l))
    assert torch.autograd.gradcheck(scale, (x.transpose(0, 1), l))
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(scale(x, l).sum(), x, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    x = torch.randn(1000, 33, dtype=dtype, requires_grad=True)
    l = torch.randn(33, requires_grad=True)
    y = scale(x, l)
    assert y.dtype == dtype
    assert torch.equal(y, (x.double() * l.double()).to(dtype))
    dy = torch.randn_like(y)
    y.backward(dy)
    assert x.grad is not None and l.grad is not None and l.grad.dtype == torch.float32
    assert torch.equal(x.grad, (dy.double() * l.double()).to(dtype))
    exact = (dy.double() * x.detach().double()).sum(0)
    torch.testing.assert_close(l.grad.double(), exact, rtol=1e-5, atol=1e-4)


def test_only_the_input_in_its_own_dtype_is_saved() -> None:
    x = torch.randn(50, K, dtype=torch.bfloat16)
    l = torch.randn(K, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        scale(x, l)
    assert {(t.dtype, t.numel()) for t in saved} == {(x.dtype, x.numel()), (l.dtype, K)}


def test_empty_and_strided_input() -> None:
    layer = IA3Layer(base("linear"))
    drawn(layer)
    assert layer(torch.randn(0, K)).shape == (0, N)
    wide = torch.randn(6, 2 * K)[:, ::2]
    torch.testing.assert_close(layer(wide), layer(wide.contiguous()))
    expanded = torch.randn(1, K).expand(6, K)
    torch.testing.assert_close(scale(expanded, torch.ones(K)), expanded)


@pytest.mark.parametrize("wanted", ["triton", "torch"])
@pytest.mark.parametrize("width", [1, K - 1, K + 1])
def test_rows_of_a_wrong_width_are_refused_before_a_kernel_sees_them(
    wanted: str, device: torch.device, width: int
) -> None:
    layer = IA3Layer(nn.Linear(K, N), is_feedforward=True).to(device)
    refused = pytest.raises(ValueError, match=rf"accepted is \[..., {K}\]")
    with fastlora.backend(wanted), refused:
        layer(torch.randn(3, width, device=device))


@pytest.mark.parametrize("feedforward", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4"])
def test_merge_is_the_formula_and_unmerge_restores_every_bit(kind: str, feedforward: bool) -> None:
    module = base(kind)
    before = copy.deepcopy(module.state_dict())
    layer = IA3Layer(module, feedforward)
    l = drawn(layer)
    x = torch.randn(4, K)
    exact = formula(module, x, l, feedforward)
    unmerged = layer(x)
    made = layer.merge()
    assert layer.base_layer is not module
    assert layer.acting_adapters() == []
    if kind == "nf4":
        assert 0 < made.error < 0.2  # quantised again, and says what that cost
    else:
        assert made.error < 1e-7
        torch.testing.assert_close(layer(x).double(), exact, rtol=1e-4, atol=1e-4)
    assert made.update > 0.1
    with pytest.raises(ValueError, match="unmerge first"):
        layer.add_adapter("other")
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), module(x), rtol=0, atol=0)
    layer.enable_adapters(True)
    layer.unmerge()
    assert layer.base_layer is module
    assert torch.equal(layer(x), unmerged)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), module.state_dict().values()))


def test_merging_a_broken_adapter_is_refused() -> None:
    layer = IA3Layer(base("linear"))
    with torch.no_grad():
        layer.ia3_l["default"][3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        layer.merge()
    assert layer.merged_adapters == []


def test_merging_over_a_foreign_linear_is_refused() -> None:
    class Other(nn.Linear):
        pass

    with pytest.raises(NotImplementedError, match="Other"):
        IA3Layer(Other(4, 4)).merge()


def test_pickle_and_deepcopy() -> None:
    layer = IA3Layer(base("linear"))
    drawn(layer)
    x = torch.randn(2, K)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert twin.weight is twin.base_layer.weight is not layer.weight


def test_a_module_that_is_no_linear_is_refused() -> None:
    with pytest.raises(TypeError, match="in_features"):
        IA3Layer(nn.LayerNorm(4))


def test_tuned_norm_switches_copies_and_merges() -> None:
    norm = nn.LayerNorm(6)
    layer = TunedNorm(norm)
    layer.add_adapter("other")
    with torch.no_grad():
        layer.ln_tuning_layers["default"].weight.fill_(2.0)
        layer.ln_tuning_layers["other"].bias.fill_(3.0)
    x = torch.randn(4, 6)
    torch.testing.assert_close(layer(x), norm(x) * 2)
    assert layer.eps == norm.eps
    layer.merge()
    torch.testing.assert_close(layer(x), norm(x) * 2)
    layer.unmerge()
    assert layer.base_layer is norm
    layer.set_adapter("other")
    assert [p.requires_grad for p in layer.ln_tuning_layers["default"].parameters()] == [False] * 2
    torch.testing.assert_close(layer(x), norm(x) + 3)
    with pytest.raises(ValueError, match="one of them at a time"):
        layer.set_adapter(["default", "other"])
    layer.enable_adapters(False)
    assert torch.equal(layer(x), norm(x))


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)])
def test_what_is_scaled_may_be_changed_in_place(shape):
    z, m = torch.randn(shape), torch.randn(8, requires_grad=True)
    y = scale(z, m)
    y += 1
    y.square().sum().backward()
    want = (2 * (z * m.detach() + 1) * z).flatten(0, -2).sum(0)
    torch.testing.assert_close(m.grad, want)
