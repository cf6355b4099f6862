"""ensure_weight_tying: one adapter, or one trained copy, for the input embeddings and the output layer over their weight."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fastlora
from fastlora import LoraConfig
from fastlora.io.merge import merge_checkpoint
from fastlora.layers import LoRAEmbedding, TiedLoRALinear, TrainableCopy
from tests.tiny_models import assert_unchanged, logits, snapshot, some_ids, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore")

ADAPTED = {"target_modules": ["embed_tokens", "q_proj"]}
COPIED = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
BOTH = pytest.mark.parametrize("settings", [ADAPTED, COPIED, {**ADAPTED, "use_dora": True}])


def tied_llama() -> Any:
    return tiny_llama(tie_word_embeddings=True, initializer_range=0.2)


def config(settings: dict[str, Any], **more: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 6, "ensure_weight_tying": True, **settings, **more})


def moved(model: Any, seed: int = 3) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def made(settings: dict[str, Any], **more: Any) -> Any:
    return moved(fastlora.get_peft_model(tied_llama(), config(settings, **more)))


def ends(model: Any) -> tuple[Any, Any]:
    base = model.get_base_model()
    return base.model.embed_tokens, base.lm_head


def assert_tied(model: Any, name: str = "default") -> None:
    first, last = ends(model)
    if isinstance(first, LoRAEmbedding):
        assert isinstance(last, TiedLoRALinear)
        assert last.lora_embedding_A[name] is first.lora_embedding_A[name]
        assert last.lora_embedding_B[name] is first.lora_embedding_B[name]
        assert torch.equal(last.lora_A[name], first.lora_embedding_B[name].t())
    else:
        assert isinstance(last, TrainableCopy)
        assert last.modules_to_save[name].weight is first.modules_to_save[name].weight


@BOTH
def test_it_begins_as_the_base_and_both_uses_train_one_parameter(settings: dict[str, Any]) -> None:
    ids = some_ids()
    model = fastlora.get_peft_model(tied_llama(), config(settings))
    torch.testing.assert_close(logits(model, ids), logits(tied_llama(), ids))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.95 * losses[0]
    assert_tied(model)


@BOTH
def test_the_life_of_several(settings: dict[str, Any]) -> None:
    ids = some_ids()
    model = made(settings)
    first = logits(model, ids)
    model.add_adapter("other", config(settings))
    model.set_adapter("other")
    moved(model, 4)
    second = logits(model, ids)
    assert_tied(model, "other")
    assert not torch.allclose(first, second, atol=1e-3)
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), first)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, ids), logits(tied_llama(), ids))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, ids), first)
        assert_tied(twin)
        moved(twin, 5)
        assert_tied(twin)
    assert torch.equal(logits(model, ids), first)
    model.to(torch.float64)
    assert_tied(model)
    model.to(torch.float32)
    model.rename_adapter("other", "mine")
    model.delete_adapter("default")
    model.set_adapter("mine")
    assert_tied(model, "mine")
    assert torch.equal(logits(model, ids), second)
    assert not any("default" in name for name, _ in model.named_parameters())


@BOTH
def test_merged_it_stays_tied_where_both_got_the_same(settings: dict[str, Any]) -> None:
    ids, model = some_ids(), made(settings)
    expected, before = logits(model, ids), snapshot(model)
    if settings is not COPIED:
        model.merge_adapter()
        torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        assert_unchanged(model, before)
    plain = model.merge_and_unload()
    torch.testing.assert_close(logits(plain, ids), expected, rtol=1e-4, atol=1e-4)
    same = "use_dora" not in settings  # lengths of rows and of columns part them
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) is same
    assert plain.config.tie_word_embeddings is same


@BOTH
def test_merged_into_files(settings: dict[str, Any], tmp_path: Path) -> None:
    model = made(settings)
    tied_llama().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = some_ids()
    torch.testing.assert_close(logits(plain, ids), logits(model, ids), rtol=1e-4, atol=1e-4)


def test_a_state_dict_may_be_saved_in_place_of_the_model(tmp_path: Path) -> None:
    """As those that gather sharded models do."""
    model, other = made(ADAPTED), moved(made(ADAPTED), 8)
    model.save_pretrained(tmp_path / "given", state_dict=other.state_dict())
    other.save_pretrained(tmp_path / "own")
    given, own = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("given", "own"))
    assert given.keys() == own.keys()
    assert all(torch.equal(given[key], value) for key, value in own.items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    results = []
    for checkpointing in (False, True):
        model = made(ADAPTED).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(some_ids(), labels=some_ids()).loss.backward()
        results.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*results)


def test_a_file_with_two_different_adapters_for_one_is_refused(tmp_path: Path) -> None:
    """As stock peft writes over a base in 16 bits, where it does not keep them tied."""
    model = made(ADAPTED)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors["base_model.model.lm_head.lora_A.weight"] += 1
    save_file(tensors, weights)
    base = tied_llama()
    before = snapshot(base)
    with pytest.raises(ValueError, match="ensure_weight_tying"):
        fastlora.PeftModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="ensure_weight_tying"):
        merge_checkpoint(tmp_path / "base", tmp_path, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    # As the message says: both as they are.
    file = tmp_path / "adapter_config.json"
    fields = json.loads(file.read_text())
    fields |= {
        "ensure_weight_tying": False,
        "target_modules": ["embed_tokens", "lm_head", "q_proj"],
    }
    file.write_text(json.dumps(fields))
    read = fastlora.PeftModel.from_pretrained(base, tmp_path)
    assert not isinstance(ends(read)[1], TiedLoRALinear)
    assert torch.equal(
        ends(read)[1].lora_A["default"], tensors["base_model.model.lm_head.lora_A.weight"]
    )


def test_values_that_are_not_numbers_are_read_as_they_are(tmp_path: Path) -> None:
    model = made(ADAPTED)
    with torch.no_grad():
        model.get_base_model().model.layers[1].self_attn.q_proj.lora_A["default"][0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    read = fastlora.PeftModel.from_pretrained(tied_llama(), tmp_path)
    assert read.get_base_model().model.layers[1].self_attn.q_proj.lora_A["default"][0, 0].isnan()


@BOTH
def test_hot_swapped_it_stays_tied(settings: dict[str, Any], tmp_path: Path) -> None:
    ids, model = some_ids(), made(settings)
    before = logits(model, ids)
    other = moved(fastlora.get_peft_model(tied_llama(), config(settings, r=5, lora_alpha=2)), 9)
    other.save_pretrained(tmp_path)
    fastlora.prepare_hotswap(model, 6)
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-4, atol=1e-5)
    assert_tied(model)
    where = {name: p.data_ptr() for name, p in model.named_parameters()}
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        fastlora.hotswap_adapter(twin, tmp_path)
        torch.testing.assert_close(logits(twin, ids), logits(other, ids), rtol=1e-4, atol=1e-5)
        assert_tied(twin)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == where
    model.save_pretrained(tmp_path / "again")
    read = fastlora.PeftModel.from_pretrained(tied_llama(), tmp_path / "again")
    torch.testing.assert_close(logits(read, ids), logits(other, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_a_slot_may_be_widened_from_either_end(first: bool) -> None:
    ids, model = some_ids(), made(ADAPTED)
    expected = logits(model, ids)
    for layer in ends(model) if first else reversed(ends(model)):
        layer.widen_slot("default", 6)
    assert_tied(model)
    assert ends(model)[1].lora_A["default"].shape == (6, 32)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", [ADAPTED, COPIED])
def test_a_swap_that_would_untie_them_changes_nothing(
    given: dict[str, Any], tmp_path: Path
) -> None:
    model, other = made(given), moved(made(given), 9)
    before = snapshot(model)

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match):
            fastlora.hotswap_adapter(model, tmp_path)
        assert_unchanged(model, before)

    other.save_pretrained(tmp_path)
    weights, file = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors = load_file(weights)
    head = [key for key in tensors if "lm_head" in key]
    save_file({**tensors, head[0]: tensors[head[0]] + 1}, weights)
    refused("ensure_weight_tying")
    for end in ("lm_head", "embed_tokens"):
        save_file({key: value for key, value in tensors.items() if end not in key}, weights)
        refused("ensure_weight_tying")
    save_file(tensors, weights)
    file.write_text(json.dumps({**json.loads(file.read_text()), "ensure_weight_tying": False}))
    refused("ensure_weight_tying")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**ADAPTED, "rank_pattern": {"lm_head": 2}}, "has rank 3"),
        ({**ADAPTED, "init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}}, "different rows"),
        ({"target_modules": ["lm_head", "q_proj"], "modules_to_save": ["embed_tokens"]}, "has other adapters"),
    ],
)  # fmt: skip
def test_a_refusal_leaves_the_model_as_it_was(settings: dict[str, Any], message: str) -> None:
    model = tied_llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        fastlora.get_peft_model(model, config(settings))
    assert_unchanged(model, before)


@pytest.mark.parametrize("given", [ADAPTED, COPIED])
def test_adapters_that_are_tied_and_others_do_not_mix(given: dict[str, Any]) -> None:
    ends_ = ["embed_tokens", "lm_head"]
    alone = (
        {"target_modules": ["q_proj", *ends_]}
        if given is ADAPTED
        else {**COPIED, "modules_to_save": ends_}
    )
    for first, second in ((True, False), (False, True)):
        model = fastlora.get_peft_model(
            tied_llama(), LoraConfig(**alone, ensure_weight_tying=first)
        )
        before = snapshot(model)
        with pytest.raises(ValueError, match="ensure_weight_tying"):
            model.add_adapter("other", LoraConfig(**alone, ensure_weight_tying=second))
        assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("make", "targets", "message"),
    [(tiny_llama, ["lm_head"], "no other module"), (tied_llama, ["q_proj"], "neither of")],
)
def test_nothing_to_tie_is_said(make: Any, targets: list[str], message: str) -> None:
    with pytest.warns(UserWarning, match=f"ensure_weight_tying: {message}"):
        fastlora.get_peft_model(
            make(), LoraConfig(target_modules=targets, ensure_weight_tying=True)
        )
