"""(IA)^3 and LN tuning in whole models: merging, the life of an adapter. Beside stock peft: tests/interop."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch

import fastlora
from fastlora import QLoRALinear
from fastlora.layers.ia3 import IA3Layer
from tests.tiny_models import (
    assert_unchanged,
    logits,
    loss_and_grads,
    plain_net,
    snapshot,
    some_ids,
    tiny_llama,
)
from tests.tiny_zoo import run, tiny

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CASES: dict[str, tuple[str, str]] = {
    "ia3 llama": ("IA3", "llama"),
    "ia3 gpt2": ("IA3", "gpt2"),
    "ln llama": ("LNTuning", "llama"),
}


def in_order(model: Any) -> list[tuple[str, Any]]:
    return sorted(model.named_parameters(), key=lambda item: item[0].replace(".base_layer", ""))


def bump(model: Any) -> Any:
    """Every trained parameter moves by name, alike in both libraries."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, p in in_order(model):
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.eval()


def made(case: str) -> Any:
    method, kind = CASES[case]
    base = tiny(kind)
    torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bump(fastlora.get_peft_model(base, getattr(fastlora, f"{method}Config")()))


@pytest.mark.parametrize("case", CASES)
def test_merging_and_back(case: str) -> None:
    model, ids = made(case), some_ids()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    out = run(model, ids).logits
    with model.disable_adapter():
        base = run(model, ids).logits
    reports = model.merge_adapter()
    assert reports and all(report.error < 1e-7 < report.update for report in reports)
    torch.testing.assert_close(run(model, ids).logits, out, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(run(model, ids).logits, base)
    model.unmerge_adapter()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(run(model, ids).logits, out)
    plain = model.merge_and_unload()
    torch.testing.assert_close(run(plain, ids).logits, out, rtol=1e-4, atol=1e-5)
    kind = CASES[case][1]
    assert [type(m) for m in plain.modules()] == [type(m) for m in tiny(kind).modules()]
    assert plain.state_dict().keys() == tiny(kind).state_dict().keys()


@pytest.mark.parametrize("method", ["IA3", "LNTuning"])
def test_several_adapters(method: str) -> None:
    config = getattr(fastlora, f"{method}Config")()
    ids = some_ids()
    base = logits(tiny_llama(), ids)
    model = fastlora.get_peft_model(tiny_llama(), config)
    bump(model)
    first = logits(model, ids)
    model.add_adapter("second", config)
    assert torch.equal(logits(model, ids), first)
    model.set_adapter("second")
    torch.testing.assert_close(logits(model, ids), base)
    bump(model)
    second = logits(model, ids)
    assert not torch.allclose(second, base, atol=1e-4)
    assert all(".second" in n for n, p in model.named_parameters() if p.requires_grad)
    if method == "IA3":
        model.set_adapter(["default", "second"])
        assert not torch.allclose(logits(model, ids), second, atol=1e-4)
    else:
        with pytest.raises(ValueError, match="one of them"):
            model.set_adapter(["default", "second"])
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), first)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, ids), first)
    model.rename_adapter("default", "third")
    assert torch.equal(logits(model, ids), first)
    model.delete_adapter("second")
    model.delete_adapter("third")
    assert torch.equal(logits(model, ids), base)


def test_ia3_over_a_4_bit_base_trains_and_merges() -> None:
    model = tiny_llama(hidden_size=64, intermediate_size=128)
    for layer in model.model.layers:
        for parent, name in ((layer.self_attn, "k_proj"), (layer.mlp, "down_proj")):
            setattr(parent, name, QLoRALinear.from_linear(getattr(parent, name), r=None))
    ids = some_ids()
    base = logits(model, ids)
    model = fastlora.get_peft_model(model, fastlora.IA3Config())
    layer = model.get_base_model().model.layers[0].self_attn.k_proj
    assert isinstance(layer, IA3Layer) and isinstance(layer.base_layer, QLoRALinear)
    torch.testing.assert_close(logits(model, ids), base)
    bump(model)
    out = logits(model, ids)
    _, grads = loss_and_grads(model, ids)
    assert all(float(g.abs().sum()) > 0 for g in grads.values()) and len(grads) == 6
    weight = layer.base_layer.weight.dequantize()
    with pytest.warns(UserWarning, match="rounds away"):
        model.merge_adapter()
    assert not torch.allclose(layer.base_layer.weight.dequantize(), weight, rtol=1e-2)
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), out)
    plain = model.merge_and_unload(dequantize=True)
    torch.testing.assert_close(logits(plain, ids), out, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, QLoRALinear) for m in plain.modules())


@pytest.mark.parametrize("method", ["IA3", "LNTuning"])
@pytest.mark.parametrize("autocast", [False, True])
def test_training_lowers_the_loss_and_leaves_the_base(method: str, autocast: bool) -> None:
    ids = some_ids()
    model = fastlora.get_peft_model(tiny_llama(), getattr(fastlora, f"{method}Config")())
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.08
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            fastlora.IA3Config(target_modules=["embed"], feedforward_modules=[]),
            r"embed.*or use peft\.get_peft_model$",  # not fastlora.accelerate, which is for LoRA
        ),
        (fastlora.IA3Config(target_modules=["nothing"], feedforward_modules=[]), "nothing"),
        (fastlora.IA3Config(), "target_modules: not given"),
        (fastlora.IA3Config(target_modules=["up"]), "feedforward_modules: not given"),
        (fastlora.LNTuningConfig(), "target_modules: not given"),
        (fastlora.LNTuningConfig(target_modules=["layers"]), "no forward"),
        (fastlora.LNTuningConfig(target_modules=r"|norm|layers\.0.*"), "forward|inside"),
    ],
)
def test_what_cannot_be_adapted_is_named_and_nothing_changes(config: Any, message: str) -> None:
    model = plain_net()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        fastlora.get_peft_model(model, config)
    assert_unchanged(model, before)


def test_a_second_adapter_scales_the_same_side() -> None:
    model = fastlora.get_peft_model(
        plain_net(), fastlora.IA3Config(target_modules=["up"], feedforward_modules=[])
    )
    before = snapshot(model)
    other = fastlora.IA3Config(target_modules=["up"], feedforward_modules=["up"])
    with pytest.raises(ValueError, match="scale this module's output"):
        model.add_adapter("other", other)
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="one method"):
        model.add_adapter("other", fastlora.LNTuningConfig(target_modules=["norm"]))
