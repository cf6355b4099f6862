"""Layers with adapters that are no longer what they began as, here and in stock PEFT."""

import peft
import torch
from torch import nn

from fastlora import LoRALinear
from fastlora.layers import LoRAWrapper

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
N, K, R = 24, 40, 4


def trained(kind=LoRALinear, dtype=FP32, n=N, k=K, bias=True, seed=0, scale=0.3, **settings):
    """A layer whose adapter is not what it began as."""
    torch.manual_seed(seed)
    settings = {"r": R, "lora_alpha": 6, "use_dora": True, **settings}
    linear = nn.Linear(k, n, bias=bias, dtype=dtype)
    layer = kind.from_linear(linear, **settings) if kind is not LoRAWrapper else kind(linear, **settings)  # fmt: skip
    generator = torch.Generator().manual_seed(seed + 1)
    for name in layer.adapters:
        for p in layer.adapter_parameters(name):
            p.data += torch.randn(p.shape, generator=generator).to(p) * scale
    return layer


def stock(layer):
    """Stock PEFT's layer over the same base with the same adapters."""
    base = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=layer.weight.dtype)  # fmt: skip
    base.weight.data = layer.weight.data.clone()
    if layer.bias is not None:
        base.bias.data = layer.bias.data.clone()
    first, *others = layer.adapters
    config = {
        name: peft.LoraConfig(
            r=layer.r[name],
            lora_alpha=layer.lora_alpha[name],
            lora_dropout=layer.lora_dropout[name],
            use_dora=name in layer.lora_magnitude_vector,
            lora_bias=name in layer.lora_bias,
            target_modules=["0"],
        )
        for name in layer.adapters
    }
    model = peft.get_peft_model(nn.Sequential(base), config[first], adapter_name=first)
    for name in others:
        model.add_adapter(name, config[name])
    theirs = model.base_model.model[0]
    model.base_model.set_adapter(list(layer.active_adapters))
    with torch.no_grad():
        for name in layer.adapters:
            theirs.lora_A[name].weight.copy_(layer.lora_A[name])
            theirs.lora_B[name].weight.copy_(layer.lora_B[name])
            if name in layer.lora_bias:
                theirs.lora_B[name].bias.copy_(layer.lora_bias[name])
            if name in layer.lora_magnitude_vector:
                theirs.lora_magnitude_vector[name].weight.copy_(layer.lora_magnitude_vector[name])
    return theirs.train(layer.training)
