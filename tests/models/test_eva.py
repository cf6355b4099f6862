"""EVA: components and ranks against stock peft and an exact SVD, and what the model and its file are afterwards."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch

import fastlora
from fastlora import EvaConfig, LoraConfig
from tests.tiny_models import assert_unchanged, logits, plain_net, snapshot, some_ids, tiny_llama

SETTINGS = {
    "r": 4,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
    "init_lora_weights": "eva",
}


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    made = []
    for i in range(count):
        ids = some_ids(i, 6, 17)
        mask = torch.ones_like(ids)
        mask[i, -4:] = 0
        labels = ids.masked_fill(torch.arange(17) < 2, -100)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def own(**eva: Any) -> Any:
    config = LoraConfig(eva_config=EvaConfig(**eva), **SETTINGS)
    return fastlora.get_peft_model(tiny_llama(), config)


def stock(**eva: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(eva_config=peft.EvaConfig(**eva), **SETTINGS)
        return peft.get_peft_model(tiny_llama(), config)


@pytest.mark.parametrize(
    "eva",
    [
        {},
        {"rho": 1.0},
        {"whiten": True, "adjust_scaling_factors": False},
        {"use_label_mask": False},
        {"tau": 0.9},
    ],
    ids=str,
)
def test_factors_ranks_and_scalings_are_pefts(eva: dict[str, Any]) -> None:
    ours, theirs = own(**eva), stock(**eva)
    fastlora.initialize_lora_eva_weights(ours, batches())
    peft.initialize_lora_eva_weights(theirs, batches(), show_progress_bar=False)
    expected = {
        name.replace(".default.weight", ".default"): p
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    got = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert got.keys() == expected.keys()
    # Where layers share an input, PEFT whitens the one A that they share once for each of them; here it is once.
    shared = ("q_proj", "k_proj", "v_proj") if eva.get("whiten") else ()
    for name, p in got.items():
        if not any(part in name for part in shared):
            torch.testing.assert_close(p, expected[name], rtol=1e-3, atol=1e-4)
    for field in ("rank_pattern", "alpha_pattern"):
        left, right = (getattr(m.peft_config["default"], field) for m in (ours, theirs))
        assert left == pytest.approx(right)
    assert bool(ours.peft_config["default"].rank_pattern) == (eva.get("rho") != 1.0)
    layers = [m for m in theirs.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    own_layers = [m for m in ours.modules() if isinstance(m, fastlora.layers.LoRALayer)]
    assert [m.scaling["default"] for m in own_layers] == pytest.approx(
        [m.scaling["default"] for m in layers]
    )


def test_components_are_those_of_an_exact_svd() -> None:
    """One batch, so that increments do not matter: A holds as much of the centred inputs as their leading singular vectors
    do, but for what the randomised SVD leaves."""
    model = own(rho=1.0)
    batch = batches(1)[0]
    batch.pop("labels")
    seen = []
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    handle = layer.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    with torch.no_grad(), model.disable_adapter():
        model(**batch)
    handle.remove()
    rows = seen[0][batch["attention_mask"].bool()].double()
    rows = rows - rows.mean(0)
    most = torch.linalg.svdvals(rows)[:4].square().sum()
    fastlora.initialize_lora_eva_weights(model, [batch])
    a = layer.lora_A["default"].detach().double()
    torch.testing.assert_close(a @ a.t(), torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-5)
    assert 0.99 * most < (rows @ a.t()).square().sum() < 1.0001 * most


def test_whitening_divides_by_the_root_of_the_singular_value() -> None:
    plain = fastlora.get_eva_state_dict(own(rho=1.0), batches())
    white = fastlora.get_eva_state_dict(own(rho=1.0, whiten=True), batches())
    for name, a in plain.items():
        norms = white[name].norm(dim=1)
        torch.testing.assert_close(white[name] / norms[:, None], a, rtol=1e-4, atol=1e-5)
        assert bool((norms.diff() > 0).all())


def test_the_model_is_the_base_still_and_its_file_is_read(tmp_path: Any) -> None:
    model = own().train()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    state = torch.get_rng_state()
    fastlora.get_eva_state_dict(model, batches())
    assert torch.equal(torch.get_rng_state(), state)
    fastlora.initialize_lora_eva_weights(model, batches())
    assert model.training and layer.training
    ids = some_ids()
    torch.testing.assert_close(logits(model.eval(), ids), logits(tiny_llama(), ids))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B." in name:
                p.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    want = logits(model, ids)
    assert torch.equal(logits(fastlora.load_adapter(tiny_llama(), tmp_path), ids), want)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(theirs, ids), want, rtol=2e-5, atol=2e-6)


def test_a_layer_may_lose_the_adapter_and_the_file_says_so(tmp_path: Any) -> None:
    model = own()
    values = fastlora.get_eva_state_dict(model, batches())
    gone = "base_model.model.model.layers.1.mlp.down_proj"
    values[gone] = values[gone][:0]
    other = own()
    with torch.no_grad():
        fastlora.initialize_lora_eva_weights(other, eva_state_dict=values)
    config = other.peft_config["default"]
    assert "model.layers.1.mlp.down_proj" not in config.target_modules
    assert other.get_submodule(gone).adapters == []
    other.save_pretrained(tmp_path)
    again = fastlora.load_adapter(tiny_llama(), tmp_path)
    assert torch.equal(logits(again, some_ids()), logits(other, some_ids()))


def test_plain_models_by_their_rows() -> None:
    config = LoraConfig(r=3, target_modules=["up", "head"], init_lora_weights="eva", use_dora=True)
    model = fastlora.get_peft_model(plain_net(), config)
    data = [some_ids(i, 8, 12) for i in range(2)]
    settings = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}
    with pytest.raises(TypeError, match="prepare_model_inputs_fn"):
        fastlora.initialize_lora_eva_weights(model, data, forward_fn=lambda m, b: m(b))
    fastlora.initialize_lora_eva_weights(model, data, forward_fn=lambda m, b: m(b), **settings)
    ranks = {n: m.r["default"] for n, m in model.named_modules() if hasattr(m, "lora_A") and m.r}
    assert sum(ranks.values()) == 9
    torch.testing.assert_close(logits(model, some_ids()), logits(plain_net(), some_ids()))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 3 * len(ranks)


def test_refusals_leave_the_model_as_it_was() -> None:
    model = own()
    before = snapshot(model)
    short = [{"input_ids": some_ids(0, 1, 3)}]
    for error, message, arguments in (
        (ValueError, "dataloader: got None", {}),
        (ValueError, "is empty", {"dataloader": []}),
        (RuntimeError, "passes", {"dataloader": short}),
        (ValueError, "eva_state_dict: has other layers", {"eva_state_dict": {}}),
        (ValueError, "other", {"dataloader": batches(1), "adapter_name": "other"}),
    ):
        with pytest.raises(error, match=message):
            fastlora.initialize_lora_eva_weights(model, **arguments)
        assert_unchanged(model, before)
    values = fastlora.get_eva_state_dict(model, batches())
    name = next(iter(values))
    with pytest.raises(ValueError, match="accepted is"):
        fastlora.initialize_lora_eva_weights(
            model, eva_state_dict={**values, name: values[name][:, :3]}
        )
    assert_unchanged(model, before)
    rows = fastlora.get_peft_model(
        tiny_llama(), LoraConfig(target_modules=["q_proj", "embed_tokens"], init_lora_weights="eva")
    )
    with pytest.raises(ValueError, match=r"'model.embed_tokens' \(LoRAEmbedding\)"):
        fastlora.initialize_lora_eva_weights(rows, batches())
    plain = fastlora.get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="eva"):
        fastlora.initialize_lora_eva_weights(plain, batches())
    with pytest.raises(TypeError, match="peft"):
        fastlora.initialize_lora_eva_weights(stock(), batches())
