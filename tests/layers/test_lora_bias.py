"""lora_bias: the update's own bias, scaled, trained, merged and stacked."""

import pytest
import torch
import torch.nn.functional as F

from fastlora import LoRALinear, QLoRALinear
from fastlora.layers import LoRAWrapper
from tests.layers.common import BF16, FP32, K, N, stock, trained


@pytest.mark.parametrize("kind", [LoRALinear, QLoRALinear, LoRAWrapper])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_lora_bias_is_scaled_and_trained(kind, bias, dtype):
    layer = trained(kind, dtype, k=64, bias=bias, use_dora=False, lora_bias=True)
    x = torch.randn(6, 64).to(dtype)
    y = layer(x)
    y.float().sum().backward()
    w = layer.weight.dequantize(dtype) if kind is QLoRALinear else layer.weight
    base = F.linear(x.double(), w.double(), layer.bias.double() if bias else None)
    a, b, beta = (layer.lora_A["default"], layer.lora_B["default"], layer.lora_bias["default"])
    s = layer.scaling["default"]
    exact = base + s * F.linear(F.linear(x.double(), a.double()), b.double(), beta.double())
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == FP32 else {"rtol": 0.03, "atol": 0.05}
    torch.testing.assert_close(y.double(), exact, **close)
    torch.testing.assert_close(beta.grad, torch.full((N,), 6 * s))
    assert set(layer.adapter_tensors("default")) == {"lora_A.weight", "lora_B.weight", "lora_B.bias"}  # fmt: skip


@pytest.mark.parametrize("kind", [LoRALinear, QLoRALinear])
def test_merging_takes_lora_bias_along_and_back(kind):
    layer = trained(kind, k=64, use_dora=False, lora_bias=True)
    x, bias = torch.randn(6, 64), layer.bias
    before, y = bias.detach().clone(), layer(x)
    exact = layer.merged_weight(FP32).weight
    torch.testing.assert_close(F.linear(x, exact, layer.merged_bias()), y, rtol=1e-5, atol=1e-5)
    layer.merge()
    torch.testing.assert_close(layer(x), layer._base(x, bias + 1.5 * layer.lora_bias["default"]), rtol=1e-5, atol=1e-5)  # fmt: skip
    layer.enable_adapters(False)
    assert layer.bias is bias
    layer.enable_adapters(True)
    assert layer.bias is not bias
    layer.unmerge()
    assert layer.bias is bias and torch.equal(bias, before) and torch.equal(layer(x), y)


def test_lora_bias_without_a_base_bias_cannot_be_merged():
    layer = trained(bias=False, use_dora=False, lora_bias=True)
    with pytest.raises(ValueError, match="lora_bias"):
        layer.merge()
    assert not layer.merged_adapters


def test_lora_bias_stacked_below_dora_merges_as_it_acts():
    layer = trained(use_dora=False, lora_bias=True).eval()
    layer.add_adapter("second", 3, 5.0, use_dora=True)
    for p in layer.adapter_parameters("second"):
        p.data += torch.randn(p.shape) * 0.2
    layer.set_adapter(["default", "second"])
    x = torch.randn(6, K)
    y = layer(x)
    torch.testing.assert_close(stock(layer)(x), y, rtol=2e-5, atol=2e-5)
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=2e-5, atol=2e-5)
