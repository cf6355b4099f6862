"""Mixed batches: every item as if it were alone with its adapter, in inference and in training; stock peft for inference."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

import fastlora
from fastlora import LoraConfig
from tests.tiny_models import logits, randomize_adapters, some_ids, tiny_llama

A = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
B = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj", "embed_tokens"]}
ORDERS = {
    "sorted": ["a", "a", "b", "__base__"],
    "mixed": ["b", "__base__", "a", "b"],
    "one": ["b", "b", "b", "b"],
    "none": ["__base__"] * 4,
}


def made(quantize: str | None = None, **changes: Any) -> fastlora.PeftModel:
    model = fastlora.get_peft_model(
        tiny_llama(), LoraConfig(**{**A, **changes}, quantize=quantize), adapter_name="a"
    )
    model.add_adapter("b", LoraConfig(**{**B, **changes}))
    randomize_adapters(model)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_embedding" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(4))
    return model


def alone(model: fastlora.PeftModel, ids: torch.Tensor, names: list[str]) -> torch.Tensor:
    """Each item by itself, with its adapter set."""
    rows = []
    for row, name in zip(ids, names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(logits(model, row[None]))
        else:
            model.set_adapter(name)
            rows.append(logits(model, row[None]))
    model.set_adapter("a")
    return torch.cat(rows)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("order", ORDERS)
def test_items_as_if_alone(order: str, quantize: str | None) -> None:
    model, ids, names = made(quantize), some_ids(rows=4), ORDERS[order]
    out = model(ids, adapter_names=names).logits
    torch.testing.assert_close(out, alone(model, ids, names), rtol=1e-4, atol=1e-5)
    model.set_adapter("a")
    one = logits(model, ids)
    with model.mixed_batch(names):
        assert torch.equal(logits(model, ids), out)
    assert torch.equal(logits(model, ids), one)


@pytest.mark.parametrize("order", ["sorted", "mixed"])
def test_as_stock_peft(order: str) -> None:
    ours, ids, names = made(), some_ids(rows=4), ORDERS[order]
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**A), adapter_name="a")
    theirs.add_adapter("b", peft.LoraConfig(**B))
    values = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(values[name.removesuffix(".weight")])
    want = theirs.eval()(ids, adapter_names=names).logits
    torch.testing.assert_close(ours(ids, adapter_names=names).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_sum_of_those_alone(checkpointing: bool) -> None:
    names, ids = ORDERS["mixed"], some_ids(rows=4)
    model, twin = made(), made()
    for one in (model, twin):
        one.set_adapter(["a", "b"])
        one.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
        with pytest.raises(ValueError, match="mixed_batch"):
            model(ids, adapter_names=names)
    with model.mixed_batch(names):
        logits(model, ids).square().mean().backward()
    twin.requires_grad_(False)
    for layer in twin.adapter_layers():
        for name in ("a", "b"):
            for parameter in layer.adapter_parameters(name):
                parameter.requires_grad_()
    total = 0
    for row, name in zip(ids, names, strict=True):
        for layer in twin.adapter_layers():
            layer.active_adapters = [name]
        total = total + logits(twin, row[None]).square().mean() / len(names)
    total.backward()
    grads = {n: p.grad for n, p in twin.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            want = grads[name]
            want = torch.zeros_like(parameter) if want is None else want
            torch.testing.assert_close(parameter.grad, want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation(beams: int) -> None:
    model, ids, names = made(), some_ids(rows=3, length=5), ["b", "__base__", "a"]
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    out = model.generate(input_ids=ids, adapter_names=names, **options)
    for row, name, found in zip(ids, names, out, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                want = model.generate(input_ids=row[None], **options)[0]
        else:
            model.set_adapter(name)
            want = model.generate(input_ids=row[None], **options)[0]
        assert torch.equal(found[: len(want)], want)


def test_dropout_is_drawn_for_the_whole_batch() -> None:
    model, ids, names = made(lora_dropout=0.0), some_ids(rows=4), ORDERS["mixed"]
    dropping = fastlora.get_peft_model(
        tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5), "a"
    )
    dropping.add_adapter("b", LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5))
    randomize_adapters(dropping)
    dropping.train()
    first, second = (dropping(ids, adapter_names=names).logits for _ in range(2))
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])  # the base's
    dropping.add_adapter("c", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="different dropouts"):
        dropping(ids, adapter_names=["a", "b", "c", "a"])
    assert dropping.eval()(ids, adapter_names=["a", "b", "c", "a"]).logits.shape[0] == 4
    assert model.training is False


def test_what_cannot_be_mixed() -> None:
    model, ids = made(), some_ids(rows=4)
    for names, match in (
        (["a", "b", "nobody", "a"], "nobody"),
        ([], "none"),
        (["a", "b"], "4, 9"),
    ):
        with pytest.raises(ValueError, match=match):
            model(ids, adapter_names=names)
        assert all(layer.mixed is None for layer in model.adapter_layers())
    dora = fastlora.get_peft_model(tiny_llama(), LoraConfig(**A, use_dora=True), adapter_name="a")
    with pytest.raises(ValueError, match="DoRA"):
        dora(ids, adapter_names=["a"] * 4)
    copies = fastlora.get_peft_model(tiny_llama(), LoraConfig(**A, modules_to_save=["norm"]), "a")
    with pytest.raises(ValueError, match="TrainableCopy"):
        copies(ids, adapter_names=["a"] * 4)
    model.merge_adapter(safe_merge=True)
    with pytest.raises(ValueError, match="merged"):
        model(ids, adapter_names=["a"] * 4)


def test_disabled_adapters_stay_disabled() -> None:
    model, ids = made(), some_ids(rows=4)
    plain = logits(tiny_llama(), ids)
    with model.disable_adapter():
        out = model(ids, adapter_names=ORDERS["mixed"]).logits
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-6)


def test_one_grouped_product_a_linear_and_no_loop() -> None:
    model, ids = made(), some_ids(rows=4)
    linears = sum(hasattr(layer, "lora_A") and layer.is_linear for layer in model.adapter_layers())
    fastlora.reset_launches()
    model(ids, adapter_names=ORDERS["mixed"])
    ran = fastlora.launches()
    assert sum(n for (op, _), n in ran.items() if op == "segment_down") == linears


def test_copies_of_an_adapter_that_is_not_in_the_batch_do_not_act() -> None:
    model = fastlora.get_peft_model(tiny_llama(), LoraConfig(**A, modules_to_save=["norm"]), "c")
    model.add_adapter("a", LoraConfig(**A))
    randomize_adapters(model)
    with torch.no_grad():
        model.get_base_model().model.norm.modules_to_save["c"].weight.fill_(9.0)
    ids = some_ids(rows=2)
    out = model(ids, adapter_names=["__base__", "a"]).logits
    with model.disable_adapter():
        torch.testing.assert_close(out[0], logits(model, ids)[0], rtol=1e-4, atol=1e-5)
    model.set_adapter("a")
    torch.testing.assert_close(out[1], logits(model, ids)[1], rtol=1e-4, atol=1e-5)


def test_an_inner_batch_gives_the_outer_one_back() -> None:
    model, ids = made(), some_ids(rows=2)
    with model.mixed_batch(["b", "__base__"]):
        before = logits(model, ids)
        model(ids, adapter_names=["a", "a"])
        assert torch.equal(logits(model, ids), before)
        for change in (model.merge_adapter, lambda: model.delete_adapter("b")):
            with pytest.raises(ValueError, match="mixed batch"):
                change()
    assert sorted(model.peft_config) == ["a", "b"]
