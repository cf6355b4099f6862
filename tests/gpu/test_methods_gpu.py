"""The methods beside plain LoRA on a GPU: on its kernels, as accurate as torch, in bf16 and over 4 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastlora
from fastlora import LoraConfig, LoRALinear, QLoRALinear, reference
from fastlora.activations import ACTIVATIONS
from fastlora.autograd.bottleneck import bottleneck
from fastlora.ops.bottleneck import WIDEST
from fastlora.testing.compare import assert_accurate
from tests.tiny_models import randomize_adapters, some_ids, tiny_llama

pytestmark = pytest.mark.gpu
BF16, M, K, N, R = torch.bfloat16, 700, 512, 384, 16


def launched() -> set[str]:
    return {by for _, by in fastlora.launches()}


def gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.device, y.dtype)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def dora(linear: type[Any], k: int = K, n: int = N) -> Any:
    torch.manual_seed(0)
    base = torch.nn.Linear(k, n, device="cuda", dtype=BF16)
    layer = linear.from_linear(base, r=R, use_dora=True)
    with torch.no_grad():
        layer.lora_B["default"].normal_(std=0.05)
        layer.lora_magnitude_vector["default"].mul_(1.1)
    return layer


@pytest.mark.parametrize("linear", [LoRALinear, QLoRALinear])
def test_dora_of_many_rows_is_scaled_as_the_product_is_stored(linear: type[Any]) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("csrc/lora is for compute capability 9.0")
    layer, x = dora(linear, 512, 2048), torch.randn(4096, 512, device="cuda").to(BF16)
    magnitude = layer.lora_magnitude_vector["default"]
    for grad, trained in ((True, True), (True, False), (False, True)):
        magnitude.requires_grad_(trained)
        fastlora.reset_launches()
        with torch.set_grad_enabled(grad):
            y = layer(x)
        ran = fastlora.launches()
        assert ran["lora_scaled", "cuda"] == 1 and ("scale_columns", "triton") not in ran
        if grad:
            y.sum().backward()
            assert (magnitude.grad is not None) == trained
        magnitude.grad = None


@pytest.mark.parametrize(("m", "k", "n"), [(M, K, N), (4100, 512, 2048)])
@pytest.mark.parametrize("linear", [LoRALinear, QLoRALinear])
def test_dora(linear: type[Any], m: int, k: int, n: int) -> None:
    layer = dora(linear, k, n)
    names = ("lora_A", "lora_B", "lora_magnitude_vector")
    factors = [getattr(layer, name)["default"] for name in names]
    x = torch.randn(m, k, device="cuda").to(BF16).requires_grad_()
    weight = layer.weight.dequantize(BF16) if linear is QLoRALinear else layer.weight.detach()
    fastlora.reset_launches()
    got = gradients(layer(x), [x, *factors])
    assert "torch" not in launched()
    four_bits = linear is QLoRALinear
    assert ("nf4_row_norms" if four_bits else "row_norms", "triton") in fastlora.launches()
    assert ("its codes read once" in fastlora.explain(layer, x)) == four_bits
    results = []
    for dtype in (BF16, torch.float64):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *factors)]
        y = reference.dora_linear(
            leaves[0], weight.to(dtype), *leaves[1:], layer.scaling["default"], layer.bias.to(dtype)
        )
        results.append(gradients(y, leaves))
    for name, ours, torchs, truth in zip(("y", "dX", "dA", "dB", "dm"), got, *results, strict=True):
        assert_accurate(name, ours, torchs, truth)


def test_dora_over_fp64_that_autocast_makes_16_bits() -> None:
    """Its norms are fp64; the kernels' factors are fp32."""
    layer = dora(LoRALinear, 512, 2048).double()
    x = torch.randn(4096, 512, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
    assert y.dtype == BF16
    m, s = layer.lora_magnitude_vector["default"], layer.scaling["default"]
    factors = layer.lora_A["default"], layer.lora_B["default"], m
    true = reference.dora_linear(x.double(), layer.weight, *[t.double() for t in factors], s, layer.bias)  # fmt: skip
    assert (y.double() - true).norm() < 0.01 * true.norm()


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


def bottleneck_operands(m: int, r: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(1)
    x = torch.randn(m, K, device="cuda").to(BF16).requires_grad_()
    shapes = (r, K), (r,), (K, r), (K,)
    factors = [(0.1 * torch.randn(s, device="cuda")).to(BF16).to(dtype) for s in shapes]
    return x, [f.requires_grad_() for f in factors]


def check_bottleneck(got: list[Tensor], x: Tensor, factors: list[Tensor], name: str, around: bool) -> None:  # fmt: skip
    """Against torch's five calls in fp64, and no further from them than torch's in bf16."""
    results = []
    for dtype in (BF16, torch.float64):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *factors)]
        down, d, up, u = leaves[1:]
        y = F.linear(ACTIVATIONS[name].forward(F.linear(leaves[0], down, d)), up, u)
        results.append(gradients(y + leaves[0] if around else y, leaves))
    for what, ours, torchs, truth in zip(
        ("y", "dX", "dDown", "dd", "dUp", "du"), got, *results, strict=True
    ):
        assert_accurate(what, ours, torchs, truth, factor=3.0)


@pytest.mark.parametrize("m", [1, 33, M, 4096])  # the first ones split K
@pytest.mark.parametrize("r", [R, 24, 64, 256, 512])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_bottlenecks_of_any_width_on_their_kernels(m: int, r: int, dtype: torch.dtype) -> None:
    x, factors = bottleneck_operands(m, r, dtype)
    fastlora.reset_launches()
    with fastlora.backend("triton", strict=True):
        got = gradients(bottleneck(x, x, *factors, "gelu_new"), [x, *factors])
    ops = {"bottleneck_down": 1, "bottleneck_down_backward": 1, "bottleneck_up": 2, "wgrad": 1}
    assert fastlora.launches() == {(op, "triton"): times for op, times in ops.items()}
    check_bottleneck(got, x, factors, "gelu_new", True)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("around", [True, False])
def test_bottlenecks(name: str, around: bool) -> None:
    x, factors = bottleneck_operands(M, R, torch.float32)
    fastlora.reset_launches()
    got = gradients(bottleneck(x, x if around else None, *factors, name), [x, *factors])
    assert "torch" not in launched()
    check_bottleneck(got, x, factors, name, around)


def test_wide_bottlenecks_are_torchs_products_where_those_are_faster() -> None:
    x, factors = bottleneck_operands(M, 400, BF16)
    fastlora.reset_launches()
    got = gradients(bottleneck(x, x, *factors, "relu"), [x, *factors])
    by = {op: "triton" if WIDEST[part] >= 400 else "torch" for part, op in (
        ("down", "bottleneck_down"), ("down", "bottleneck_down_backward"), ("up", "bottleneck_up"), ("wgrad", "wgrad"),
    )}  # fmt: skip
    assert set(fastlora.launches()) == set(by.items())
    check_bottleneck(got, x, factors, "relu", True)


def test_a_bottleneck_under_autocast_adds_to_an_fp32_stream_in_one_pass() -> None:
    x, factors = bottleneck_operands(M, R, torch.float32)
    stream = x.detach().float().requires_grad_()
    fastlora.reset_launches()
    with torch.autocast("cuda", BF16):
        y = bottleneck(stream, stream, *factors, "relu")
    assert y.dtype == torch.float32
    assert fastlora.launches() == {
        ("bottleneck_down", "triton"): 1,
        ("bottleneck_up", "triton"): 1,
    }
    down, d, up, u = factors
    exact = stream.double() + F.linear(
        F.relu(F.linear(stream.double(), down.double(), d.double())), up.double(), u.double()
    )
    update = (exact - stream).norm()
    assert (y - exact).norm() < 0.01 * update


def test_a_bottleneck_in_a_graph_with_its_gradients() -> None:
    x, factors = bottleneck_operands(M, R, BF16)
    dy, leaves = torch.randn(M, K, device="cuda").to(BF16), [x, *factors]

    def step() -> list[Tensor]:
        y = bottleneck(x, x, *factors, "swish")
        return [y, *torch.autograd.grad(y, leaves, dy)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(1.5)
    graph.replay()
    for mine, again in zip(captured, step(), strict=True):
        assert torch.equal(mine, again)


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
