"""DoRA, lora_bias and the initialisations in whole models: trained, switched, copied and merged. Beside stock peft: tests/interop."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from torch import nn

import fastlora
from fastlora import LoraConfig
from tests.tiny_models import logits, loss_and_grads, plain_net, some_ids, tiny_llama

TARGETS = ["q_proj", "v_proj", "down_proj"]
VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "dora, dropout": {"use_dora": True, "lora_dropout": 0.2},
    "dora, nf4": {"use_dora": True, "quantize": "nf4"},
    "lora_bias": {"lora_bias": True},
    "lora_bias, nf4": {"lora_bias": True, "quantize": "nf4"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "loftq": {"init_lora_weights": "loftq", "quantize": "nf4", "use_dora": True},
}


def llama(**changes: Any) -> Any:
    return tiny_llama(attention_bias=True, mlp_bias=True, **changes)


def made(variant: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(2)
    config = LoraConfig(r=4, target_modules=TARGETS, **VARIANTS[variant])
    return fastlora.get_peft_model(llama(dtype=dtype), config)


def move(model: nn.Module, name: str = "default", seed: int = 3) -> None:
    """Every trained tensor of an adapter moves, alike in both libraries."""
    generator = torch.Generator().manual_seed(seed)
    named = {
        n.replace("lora_B.default.bias", "lora_bias.default").replace(
            "default.weight", "default"
        ): p
        for n, p in model.named_parameters()
        if ".lora_" in n and f".{name}" in n
    }
    with torch.no_grad():
        for _, p in sorted(named.items()):
            p.add_(torch.randn(p.shape, generator=generator).to(p) * 0.1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_falls_and_only_the_adapter_moves(variant: str) -> None:
    model = made(variant).train()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert all(".lora_" in name for name in trained)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    ids, losses = some_ids(), []
    for _ in range(20):
        loss, _ = loss_and_grads(model, ids)
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.95 * losses[0]
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert not any(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("variant", ["dora", "dora, nf4", "lora_bias", "orthogonal"])
def test_the_life_of_several_adapters(variant: str) -> None:
    ids, base = some_ids(), logits(made(variant).eval(), some_ids())
    model = made(variant).eval()
    torch.testing.assert_close(base, logits(model, ids))  # a new adapter does nothing
    move(model)
    first = logits(model, ids)
    settings = {k: v for k, v in VARIANTS[variant].items() if k != "quantize"}
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], **settings))
    move(model, "second", seed=4)
    assert torch.equal(logits(model, ids), first)
    model.set_adapter("second")
    second = logits(model, ids)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.endswith(".second") for name in trained)
    with model.disable_adapter():
        disabled = logits(model, ids)
    torch.testing.assert_close(disabled, base)
    model.set_adapter(["default", "second"])
    both = logits(model, ids)
    for one, other in ((first, second), (both, first), (both, second), (first, base)):
        assert not torch.allclose(one, other, atol=1e-4)
    assert torch.equal(logits(copy.deepcopy(model), ids), both)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), ids), both)
    model.rename_adapter("second", "third")
    assert torch.equal(logits(model, ids), both)
    model.set_adapter("third")
    model.delete_adapter("default")
    assert torch.equal(logits(model, ids), second)
    assert not [name for name, _ in model.named_parameters() if name.endswith(".default")]


@pytest.mark.parametrize("variant", ["dora", "dora, nf4", "lora_bias"])
def test_merging_and_unloading(variant: str) -> None:
    ids, model = some_ids(), made(variant).eval()
    move(model)
    want = logits(model, ids)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if "nf4" not in variant:
        model.merge_adapter()
        torch.testing.assert_close(logits(model, ids), want, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    plain = model.merge_and_unload(dequantize=True)
    assert not [m for m in plain.modules() if isinstance(m, fastlora.layers.AdapterLayer)]
    torch.testing.assert_close(logits(plain, ids), want, rtol=1e-4, atol=1e-4)


def test_merged_dora_is_pefts_merged_dora() -> None:
    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True)
    stock, own = peft.get_peft_model(llama(), config), made("dora")
    for model in (stock, own):
        move(model)
    theirs, ours = (model.merge_and_unload().state_dict() for model in (stock, own))
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)


def test_lora_bias_over_bases_without_biases_is_not_merged() -> None:
    model = fastlora.get_peft_model(
        tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True)
    )
    before = logits(model, some_ids())
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"q_proj.*lora_bias"):
            call()
    assert torch.equal(logits(model, some_ids()), before)


def test_a_dora_file_goes_into_a_four_bit_base(tmp_path: Any) -> None:
    model = made("dora, nf4").eval()
    move(model)
    model.save_pretrained(tmp_path)
    again = made("lora_bias, nf4")
    again.delete_adapter("default")
    again.load_adapter(tmp_path, "default")
    again.set_adapter("default")
    assert torch.equal(logits(again.eval(), some_ids()), logits(model, some_ids()))


def test_a_layer_whose_weight_cannot_be_read_leaves_the_model_as_it_was() -> None:
    net = plain_net()
    net.layers[1]["down"].weight = nn.Parameter(torch.zeros(24, 40, dtype=torch.int8), False)
    before = {name: type(module) for name, module in net.named_modules()}
    with pytest.raises(NotImplementedError, match="use_dora"):
        fastlora.get_peft_model(net, LoraConfig(target_modules=["up", "down"], use_dora=True))
    assert {name: type(module) for name, module in net.named_modules()} == before
