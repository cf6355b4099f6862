"""The life of adapters with virtual tokens, how they train, and what they refuse: what PEFT does not say."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import fastlora
from tests.models.prompts import (
    METHODS,
    REPARAMETERISED,
    assert_same,
    build,
    config,
    inputs,
    same,
    tensors,
    trained,
)
from tests.tiny_models import assert_unchanged, plain_net, snapshot, some_ids, tiny_llama
from tests.tiny_zoo import TASKS

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")


# The life of an adapter.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "t5", "bert-sequence"])
def test_the_life_of_an_adapter(name: str, method: str, tmp_path: Path) -> None:
    base, given = TASKS[name][1](), inputs(name, "right")
    original = base.requires_grad_(False)(
        **given
    )  # CPU kernels differ where weights have gradients
    torch.manual_seed(1)
    model = fastlora.get_peft_model(base, config(fastlora, method, TASKS[name][0])).eval()
    first = model(**given)
    assert not same(first, original)
    with model.disable_adapter():
        for key, value in tensors(model(**given)).items():
            assert torch.equal(value, tensors(original)[key])
    assert_same(model(**given), first)

    task = TASKS[name][0]
    model.add_adapter("other", config(fastlora, method, task, num_virtual_tokens=5))
    assert model.active_adapters == ["default"]
    assert_same(model(**given), first)
    model.set_adapter("other")
    second = model(**given)
    assert not same(second, first)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names and all(".other." in n for n in names)
    with pytest.raises(ValueError, match=r"one adapter at a time|one of them at a time"):
        model.set_adapter(["default", "other"])
    assert model.active_adapters == ["other"]
    model.rename_adapter("other", "third")
    assert_same(model(**given), second)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(clone(**given), second)
        clone.set_adapter("default")
        assert_same(clone(**given), first)
    assert_same(model(**given), second)

    model.save_pretrained(tmp_path)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.delete_adapter("third")
    assert_same(model(**given), first)
    model.load_adapter(tmp_path / "third", "again")
    model.set_adapter("again")
    assert_same(model(**given), second)
    model.delete_adapter("again")
    model.delete_adapter("default")
    for key, value in tensors(model(**given)).items():
        assert torch.equal(value, tensors(original)[key])
    assert any(".third." in key for key in state)


@pytest.mark.parametrize("method", METHODS)
def test_values_from_a_state_dict(method: str, tmp_path: Path) -> None:
    """A gathered one, say: the network is run on its values, not the model's own."""
    model = build(fastlora, method)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    want = model.get_prompt_embedding_to_save("default").clone()
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(1.0)
    model.save_pretrained(tmp_path, state_dict=state)
    saved = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    torch.testing.assert_close(saved, want)
    lacking = {key: value for key, value in state.items() if "embedding.weight" not in key}
    with pytest.raises(ValueError, match="state_dict: lacks"):
        model.save_pretrained(tmp_path, state_dict=lacking)


@pytest.mark.parametrize("method", METHODS)
def test_loading_to_train_on(method: str, tmp_path: Path) -> None:
    """What a network made is trained on as it is; into the network it cannot go back."""
    model = build(fastlora, method)
    want = model(some_ids()).logits
    model.save_pretrained(tmp_path)
    if method in REPARAMETERISED:
        for load in (
            lambda: fastlora.load_adapter(TASKS["llama"][1](), tmp_path, is_trainable=True),
            lambda: model.load_adapter(tmp_path, "default"),
        ):
            with pytest.raises(ValueError, match="network"):
                load()
        torch.testing.assert_close(model(some_ids()).logits, want)
        again = fastlora.load_adapter(TASKS["llama"][1](), tmp_path)
        again.set_adapter("default")
    else:
        again = fastlora.load_adapter(TASKS["llama"][1](), tmp_path, is_trainable=True)
        model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(again(some_ids()).logits, want)
    ids = some_ids()
    again(ids, labels=ids).loss.backward()
    assert len(trained(again)) == 1 and trained(again)[0].grad.abs().sum() > 0


def test_a_file_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    build(fastlora, "prefix", num_virtual_tokens=5).save_pretrained(tmp_path)
    model = build(fastlora, "prefix")
    before = snapshot(model)
    with pytest.raises(ValueError, match="prompt_embeddings: has shape"):
        model.load_adapter(tmp_path, "default")
    assert_unchanged(model, before)
    base = TASKS["gpt2"][1]()  # keys and values of other widths
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"token_dim|num_attention_heads"):
        fastlora.load_adapter(base, tmp_path)
    assert_unchanged(base, before)
    (tmp_path / "adapter_config.json").write_text(
        build(fastlora, "prefix").peft_config["default"].to_json()
    )
    base = TASKS["llama"][1]()
    before = snapshot(base)
    with pytest.raises(ValueError, match="prompt_embeddings: has shape"):
        fastlora.load_adapter(base, tmp_path)
    assert_unchanged(base, before)
    assert not base._forward_pre_hooks


def test_an_lstm_with_dropout_is_saved_without_it(tmp_path: Path) -> None:
    model = build(fastlora, "p-lstm", encoder_dropout=0.5).train()
    saved = [model.get_prompt_embedding_to_save("default") for _ in range(2)]
    assert torch.equal(*saved) and model.prompt_encoder["default"].training
    encoder = model.prompt_encoder["default"]
    assert not torch.equal(encoder(), encoder())
    torch.testing.assert_close(model.eval().prompt_encoder["default"](), saved[0])


def test_other_modules_are_trained_whole_and_saved(tmp_path: Path) -> None:
    theirs = build(peft, "prompt", modules_to_save=["lm_head"])
    ours = build(fastlora, "prompt", modules_to_save=["lm_head"])
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    ours.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        "prompt_embeddings",
        "base_model.lm_head.weight",
    }


# Training.


def losses(model: Any, steps: int = 12, **forward: Any) -> list[float]:
    ids = some_ids(seed=9)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found = []
    for _ in range(steps):
        loss = model(ids, labels=ids, **forward).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("method", METHODS)
def test_it_trains_in_low_precision(method: str) -> None:
    """A bf16 base with fp32 virtual tokens, and an fp32 base under autocast."""
    model = fastlora.get_peft_model(tiny_llama(dtype=torch.bfloat16), config(fastlora, method))
    assert {p.dtype for p in trained(model)} == {torch.float32}
    found = losses(model.train())
    assert found[-1] < found[0]
    narrow = fastlora.get_peft_model(
        tiny_llama(dtype=torch.bfloat16), config(fastlora, method), autocast_adapter_dtype=False
    )
    assert {p.dtype for p in trained(narrow)} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        found = losses(build(fastlora, method).train())
    assert found[-1] < found[0]


def test_a_prefix_refuses_checkpointing() -> None:
    """Layers that compute again get no cache; stock PEFT refuses as well, and only when it builds the model."""
    base = TASKS["llama"][1]()
    base.gradient_checkpointing_enable()
    before = snapshot(base)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        fastlora.get_peft_model(base, config(fastlora, "prefix"))
    assert_unchanged(base, before)
    model = build(fastlora, "prefix")
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model.gradient_checkpointing_enable()
    model.get_base_model().gradient_checkpointing_enable()  # past the PeftModel
    model(some_ids())  # evaluation keeps its cache
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model.train()(some_ids())


# Refusals.


def _moe_like() -> Any:
    model = TASKS["llama"][1]()
    model.config.layer_types = ["full_attention", "linear_attention"]
    return model


REFUSED: dict[str, tuple[Any, str, dict[str, Any], str]] = {
    "plain torch": (plain_net, "prompt", {}, "transformers model"),
    "no task": (tiny_llama, "prompt", {"task_type": None}, "task_type: got None"),
    "decoder for seq2seq": (tiny_llama, "prefix", {"task_type": "SEQ_2_SEQ_LM"}, "task_type"),
    "seq2seq as decoder": (TASKS["t5"][1], "prompt", {}, "task_type"),
    "no head": (TASKS["llama-features"][1], "prompt", {}, "no language modelling head"),
    "two stacks": (tiny_llama, "p-mlp", {"num_transformer_submodules": 2}, "one stack"),
    "width of prompts": (tiny_llama, "prompt", {"token_dim": 16}, "token_dim: got 16"),
    "width of keys": (TASKS["gpt2"][1], "prefix", {"token_dim": 16}, "token_dim: got 16"),
    "heads": (TASKS["gpt2"][1], "prefix", {"num_attention_heads": 2}, "num_attention_heads"),
    "layers": (tiny_llama, "prefix", {"num_layers": 3}, "num_layers: got 3"),
    "linear attention": (_moe_like, "prefix", {}, "linear_attention"),
    "encoder trained whole": (
        TASKS["t5"][1],
        "prompt",
        {"task_type": "SEQ_2_SEQ_LM", "modules_to_save": ["encoder"]},
        "takes the virtual tokens",
    ),
    "backbone trained whole": (
        TASKS["bert-sequence"][1],
        "prefix",
        {"task_type": "SEQ_CLS", "modules_to_save": ["bert"]},
        "takes the virtual tokens",
    ),
    "no such module": (tiny_llama, "prompt", {"modules_to_save": ["nowhere"]}, "modules_to_save"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_do_is_refused_when_it_is_built(case: str) -> None:
    make, method, changes, message = REFUSED[case]
    base = make()
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        fastlora.get_peft_model(base, config(fastlora, method, **changes))
    assert_unchanged(base, before)
    assert not any(module._forward_pre_hooks for module in base.modules())


def test_encoders_without_a_cache_are_refused() -> None:
    settings = transformers.DistilBertConfig(vocab_size=96, dim=32, n_layers=2, n_heads=4)
    base = transformers.DistilBertForSequenceClassification(settings)
    with pytest.raises(ValueError, match="past_key_values"):
        fastlora.get_peft_model(base, config(fastlora, "prefix", "SEQ_CLS"))
    model = fastlora.get_peft_model(base, config(fastlora, "prompt", "SEQ_CLS")).eval()
    assert model(some_ids()).logits.shape == (2, 2)


def test_one_method_a_model_and_no_merging() -> None:
    model = build(fastlora, "prompt")
    before = snapshot(model)
    with pytest.raises(ValueError, match="one model takes one method"):
        model.add_adapter("b", config(fastlora, "prefix"))
    for name in ("merge_and_unload", "merge_adapter", "unmerge_adapter", "merge_report"):
        with pytest.raises(NotImplementedError, match=name):
            getattr(model, name)()
    assert_unchanged(model, before)
    model.delete_adapter("default")
    with pytest.raises(ValueError, match="prepared for PROMPT_TUNING"):
        model.add_adapter("b", config(fastlora, "prefix"))


def test_masks_of_other_shapes_are_refused() -> None:
    ids = some_ids()
    for method in ("prompt", "prefix"):
        with pytest.raises(ValueError, match="attention_mask"):
            build(fastlora, method)(ids, attention_mask=torch.ones(2, 1, 9, 9))
