"""The methods beside plain LoRA on a GPU: on its kernels, as accurate as torch, in bf16 and over 4 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastlora
from fastlora import LoraConfig, LoRALinear, QLoRALinear, reference
from fastlora.autograd.bottleneck import bottleneck
from fastlora.testing.compare import assert_accurate
from tests.tiny_models import randomize_adapters, some_ids, tiny_llama

pytestmark = pytest.mark.gpu
BF16, M, K, N, R = torch.bfloat16, 700, 512, 384, 16


def launched() -> set[str]:
    return {by for _, by in fastlora.launches()}


def gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.device, y.dtype)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def dora(linear: type[Any]) -> Any:
    torch.manual_seed(0)
    base = torch.nn.Linear(K, N, device="cuda", dtype=BF16)
    layer = linear.from_linear(base, r=R, use_dora=True)
    with torch.no_grad():
        layer.lora_B["default"].normal_(std=0.05)
        layer.lora_magnitude_vector["default"].mul_(1.1)
    return layer


@pytest.mark.parametrize("linear", [LoRALinear, QLoRALinear])
def test_dora(linear: type[Any]) -> None:
    layer = dora(linear)
    names = ("lora_A", "lora_B", "lora_magnitude_vector")
    factors = [getattr(layer, name)["default"] for name in names]
    x = torch.randn(M, K, device="cuda").to(BF16).requires_grad_()
    weight = layer.weight.dequantize(BF16) if linear is QLoRALinear else layer.weight.detach()
    fastlora.reset_launches()
    got = gradients(layer(x), [x, *factors])
    assert "torch" not in launched()
    results = []
    for dtype in (BF16, torch.float64):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *factors)]
        y = reference.dora_linear(
            leaves[0], weight.to(dtype), *leaves[1:], layer.scaling["default"], layer.bias.to(dtype)
        )
        results.append(gradients(y, leaves))
    for name, ours, torchs, truth in zip(("y", "dX", "dA", "dB", "dm"), got, *results, strict=True):
        assert_accurate(name, ours, torchs, truth)


def test_dora_in_a_graph_follows_its_factors() -> None:
    """The rows whose norm is done again are chosen on the device."""
    layer, x = dora(LoRALinear), torch.randn(M, K, device="cuda").to(BF16)
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(2):
            layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = layer(x)
    with torch.no_grad():
        layer.lora_B["default"].mul_(3)
    graph.replay()
    with torch.no_grad():
        torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize("name", ["relu", "gelu_new", "swish"])
@pytest.mark.parametrize("around", [True, False])
def test_bottlenecks(name: str, around: bool) -> None:
    torch.manual_seed(1)
    x = torch.randn(M, K, device="cuda").to(BF16).requires_grad_()
    shapes = (R, K), (R,), (K, R), (K,)
    factors = [(0.1 * torch.randn(s, device="cuda")).requires_grad_() for s in shapes]
    act = {"relu": F.relu, "gelu_new": lambda p: F.gelu(p, approximate="tanh"), "swish": F.silu}[
        name
    ]
    fastlora.reset_launches()
    got = gradients(bottleneck(x, x if around else None, *factors, name), [x, *factors])
    assert "torch" not in launched()
    results = []
    for dtype in (BF16, torch.float64):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *factors)]
        down, d, up, u = leaves[1:]
        y = F.linear(act(F.linear(leaves[0], down, d)), up, u)
        results.append(gradients(y + leaves[0] if around else y, leaves))
    for what, ours, torchs, truth in zip(
        ("y", "dX", "dDown", "dd", "dUp", "du"), got, *results, strict=True
    ):
        assert_accurate(what, ours, torchs, truth, factor=3.0)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_mixed_batches(quantize: str | None) -> None:
    """Four items, each as if alone, trained in bf16 by kernels alone."""
    model = fastlora.get_peft_model(
        tiny_llama(dtype=BF16, hidden_size=64, intermediate_size=128),
        LoraConfig(r=8, target_modules="all-linear", quantize=quantize),
        "a",
        device="cuda",
    )
    model.add_adapter("b", LoraConfig(r=5, target_modules="all-linear"))
    randomize_adapters(model)
    ids, names = some_ids(rows=4).cuda(), ["b", "a", "__base__", "b"]
    fastlora.reset_launches()
    mixed = model(ids, adapter_names=names).logits
    assert {op for op, _ in fastlora.launches()} >= {"segment_down"}
    assert "torch" not in launched()
    for row, name, got in zip(ids, names, mixed, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                want = model(row[None]).logits[0]
        else:
            model.set_adapter(name)
            want = model(row[None]).logits[0]
        torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)
    model.set_adapter(["a", "b"])
    model.train()
    with model.mixed_batch(names):
        model(ids).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert bool(parameter.grad.abs().sum() > 0), name


def test_experts() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    base = MixtralForCausalLM(config).eval()
    if not any(hasattr(module, "_is_expert_parallel") for module in base.modules()):
        pytest.skip("this transformers does not say how its experts are spread")
    model = fastlora.get_peft_model(
        base, LoraConfig(r=4, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    )  # fmt: skip
    randomize_adapters(model)
    ids = some_ids(rows=2)
    want = model(ids).logits
    fastlora.reset_launches()
    got = model.cuda()(ids.cuda()).logits
    assert launched() - {"torch"}
    torch.testing.assert_close(got.cpu(), want, rtol=1e-3, atol=1e-3)
