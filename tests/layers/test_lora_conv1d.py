"""LoRAConv1D: the numbers of LoRALinear over the transposed weight, kept as the Conv1D keeps it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastlora
from fastlora.layers import LoRAConv1D, LoRALinear

Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
K, N = 24, 40


def pair(dtype: torch.dtype = torch.float32, **settings: object) -> tuple[LoRAConv1D, LoRALinear]:
    """A Conv1D and the linear with the same weight, with the same adapter."""
    conv1d, linear = Conv1D(N, K).to(dtype), nn.Linear(K, N).to(dtype)
    with torch.no_grad():
        conv1d.weight.normal_()
        conv1d.bias.normal_()
        linear.weight.copy_(conv1d.weight.t())
        linear.bias.copy_(conv1d.bias)
    layers = []
    for make, base in ((LoRAConv1D, conv1d), (LoRALinear.from_linear, linear)):
        torch.manual_seed(1)
        layer = make(base, r=4, lora_alpha=6, **settings)
        if settings.get("init_lora_weights", True) is True:
            with torch.no_grad():
                layer.lora_B["default"].normal_()
        layers.append(layer)
    return layers[0], layers[1]


@pytest.mark.parametrize("shape", [(K,), (0, K), (7, K), (2, 3, K)])
def test_forward_and_gradients_are_the_linears(shape: tuple[int, ...]) -> None:
    layer, twin = pair()
    x = torch.randn(shape, requires_grad=True)
    mine, other = layer(x), twin(x)
    torch.testing.assert_close(mine, other)
    seed = torch.randn_like(mine)
    got = torch.autograd.grad(mine, [x, layer.lora_A["default"], layer.lora_B["default"]], seed)
    expected = torch.autograd.grad(other, [x, twin.lora_A["default"], twin.lora_B["default"]], seed)
    torch.testing.assert_close(got, expected)


def test_it_is_one_call_of_the_op_over_a_view(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = fastlora.lora_linear

    def spy(x, weight, *rest):  # type: ignore[no-untyped-def]
        seen.append(weight)
        return real(x, weight, *rest)

    monkeypatch.setattr("fastlora.layers.conv1d.lora_linear", spy)
    layer, _ = pair()
    layer(torch.randn(3, K))
    assert [w.data_ptr() for w in seen] == [layer.weight.data_ptr()]
    assert seen[0].shape == (N, K)


def test_the_triton_kernels_take_the_view(strict_backend: str, device: torch.device) -> None:
    layer, twin = pair()
    x = torch.randn(5, K, device=device, requires_grad=True)
    y = layer.to(device)(x)
    y.sum().backward()
    with torch.no_grad():
        expected = torch.nn.functional.linear(x, twin.weight.to(device), twin.bias.to(device))
        a, b = twin.lora_A["default"].to(device), twin.lora_B["default"].to(device)
        expected = expected + 1.5 * x @ a.t() @ b.t()
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_inits_that_split_the_weight(init: str) -> None:
    layer, twin = pair(init_lora_weights=init)
    assert layer.weight.shape == (K, N)
    assert layer.weight.is_contiguous()
    torch.testing.assert_close(layer.weight.t(), twin.weight)
    x = torch.randn(3, K)
    torch.testing.assert_close(layer(x), twin(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_is_the_linears_and_kept_as_the_conv1ds(dtype: torch.dtype) -> None:
    layer, twin = pair(dtype)
    before = layer.weight
    made, other = layer.merge(), twin.merge()
    assert torch.equal(layer.weight, twin.weight.t())
    assert layer.weight.is_contiguous()
    assert made[1:] == pytest.approx(other[1:])
    layer.unmerge()
    assert layer.weight is before
    plain = layer.as_base(layer.merged_weight().weight)
    assert type(plain) is Conv1D
    x = torch.randn(3, K, dtype=dtype)
    torch.testing.assert_close(plain(x), twin(x))
    layer.enable_adapters(False)
    assert layer.as_base(layer.merged_weight().weight).weight is before


def test_keys_are_the_conv1ds_and_explain_reads_it() -> None:
    layer, _ = pair()
    assert layer.state_dict().keys() == {"weight", "bias", "lora_A.default", "lora_B.default"}
    assert f"M=3 K={K} N={N} r=4" in fastlora.explain(layer, torch.randn(3, K))


def test_other_modules_are_refused() -> None:
    with pytest.raises(TypeError, match="accepted is a transformers Conv1D"):
        LoRAConv1D(nn.Linear(3, 4), r=2)
    conv1d = Conv1D(N, K)
    conv1d.weight.data = conv1d.weight.data.to(torch.complex64)
    with pytest.raises(ValueError, match="float weight"):
        LoRAConv1D(conv1d, r=2)
