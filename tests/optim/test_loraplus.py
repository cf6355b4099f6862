"""LoRA+: the groups of stock PEFT, and what they do to a step."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer as theirs
from torch import nn

import fastlora
from fastlora.optim import create_loraplus_optimizer
from tests.tiny_models import plain_net, some_ids, tiny_llama

SETTINGS = {"lr": 1e-3, "loraplus_lr_ratio": 16.0, "loraplus_weight_decay": 0.1}


def canonical(name: str) -> str:
    return name.replace("lora_B.default.bias", "lora_bias.default").replace(
        "default.weight", "default"
    )


def groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    names = {id(p): canonical(n) for n, p in model.named_parameters()}
    return [
        {**group, "params": sorted(names[id(p)] for p in group["params"])}
        for group in optimizer.param_groups
    ]


CASES = {
    "lora": {"target_modules": ["q_proj", "up_proj"]},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "lora_bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_groups_are_pefts(case: str, kind: type[torch.optim.Optimizer]) -> None:
    stock = peft.get_peft_model(
        tiny_llama(attention_bias=True), peft.LoraConfig(r=2, **CASES[case])
    )
    own = fastlora.get_peft_model(
        tiny_llama(attention_bias=True), fastlora.LoraConfig(r=2, **CASES[case])
    )
    expected = groups(stock, theirs(stock, kind, **SETTINGS))
    got = groups(own, create_loraplus_optimizer(own, kind, **SETTINGS))
    if case == "biases":  # PEFT calls an adapted linear's base_layer.bias what is bias here
        for group in expected:
            group["params"] = sorted(n.replace(".base_layer", "") for n in group["params"])
    assert got == expected
    assert groups(stock, create_loraplus_optimizer(stock, kind, **SETTINGS)) == groups(
        stock, theirs(stock, kind, **SETTINGS)
    )


def test_saved_modules_and_layer_norms_go_where_peft_puts_them() -> None:
    settings = {"r": 2, "target_modules": ["up"], "modules_to_save": ["norm", "head"]}
    stock = peft.get_peft_model(plain_net(), peft.LoraConfig(**settings))
    own = fastlora.get_peft_model(plain_net(), fastlora.LoraConfig(**settings))
    expected = groups(stock, theirs(stock, torch.optim.AdamW, **SETTINGS))
    got = groups(own, create_loraplus_optimizer(own, torch.optim.AdamW, **SETTINGS))
    assert got == expected
    assert any(".norm." in name for name in got[3]["params"])


def test_pefts_adapted_embeddings_have_a_rate_of_their_own() -> None:
    stock = peft.get_peft_model(plain_net(), peft.LoraConfig(r=2, target_modules=["embed", "up"]))
    settings = {**SETTINGS, "loraplus_lr_embedding": 1e-5}
    expected = groups(stock, theirs(stock, torch.optim.AdamW, **settings))
    got = groups(stock, create_loraplus_optimizer(stock, torch.optim.AdamW, **settings))
    assert got == expected and len(got[1]["params"]) == 2


def test_b_moves_faster_and_the_loss_falls() -> None:
    model = fastlora.get_peft_model(
        tiny_llama(), fastlora.LoraConfig(r=4, target_modules="all-linear", use_dora=True)
    )
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0)
    ids = some_ids()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    losses = []
    for step in range(12):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step == 0:
            moved = {n: p.detach() - before[n] for n, p in model.named_parameters() if n in before}
            b = max(d.abs().max() for n, d in moved.items() if "lora_B" in n)
            assert b == pytest.approx(8e-3, rel=0.01)
            assert all(d.abs().max() <= 1.1e-3 for n, d in moved.items() if "lora_A" in n)
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1.0}, "lr"),
        ({"loraplus_lr_ratio": float("nan")}, "loraplus_lr_ratio"),
        ({"loraplus_lr_embedding": float("inf")}, "loraplus_lr_embedding"),
    ],
)
def test_bad_rates_are_named(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_loraplus_optimizer(nn.Linear(2, 2), torch.optim.SGD, **{**SETTINGS, **change})


def test_a_model_that_trains_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="trains nothing"):
        create_loraplus_optimizer(
            nn.Linear(2, 2).requires_grad_(False), torch.optim.SGD, **SETTINGS
        )
