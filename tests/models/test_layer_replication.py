"""layer_replication: a base rebuilt of runs of its layers, which share weights and have adapters of their own."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora import LoraConfig
from fastlora.io.merge import merge_checkpoint
from tests.tiny_models import (
    assert_unchanged,
    logits,
    loss_and_grads,
    plain_net,
    randomize_adapters,
    snapshot,
    some_ids,
    tiny_llama,
)
from tests.tiny_zoo import tiny

RUNS = [[0, 2], [0, 1], [1, 2]]


def config(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj", "down_proj"], "layer_replication": RUNS, **settings})  # fmt: skip


def made(**settings: Any) -> Any:
    model = fastlora.get_peft_model(tiny_llama(initializer_range=0.2), config(**settings))
    randomize_adapters(model)
    return model


def deeper(ids: torch.Tensor) -> torch.Tensor:
    """The base run by hand through the layers that the runs name."""
    model = tiny_llama(initializer_range=0.2)
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList(layers[i] for i in (0, 1, 0, 1))
    model.config.num_hidden_layers = 4
    return model(ids, use_cache=False).logits


def test_layers_share_weights_and_have_adapters_of_their_own() -> None:
    base, ids = tiny_llama(initializer_range=0.2), some_ids()
    count = sum(p.numel() for p in base.parameters())
    model = fastlora.get_peft_model(base, config())
    assert torch.equal(logits(model, ids), deeper(ids))  # a new adapter does nothing
    layers = base.model.layers
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3]
    assert layers[0].self_attn.q_proj.weight is layers[2].self_attn.q_proj.weight
    assert layers[0].self_attn.q_proj.lora_A["default"] is not layers[2].self_attn.q_proj.lora_A["default"]  # fmt: skip
    assert layers[0].self_attn.config is base.config
    trained, total = model.get_nb_trainable_parameters()
    assert total == count + trained
    randomize_adapters(model)
    _, grads = loss_and_grads(model, ids)
    assert len(grads) == 4 * 2 * 2
    assert not torch.allclose(*(g for n, g in grads.items() if "q_proj.lora_A" in n and (".0." in n or ".2." in n)))  # fmt: skip
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), deeper(ids))


def test_generation_keeps_the_keys_of_every_layer() -> None:
    model, ids = made().eval(), some_ids(rows=1)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached, plain = (model.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)


def test_models_that_say_what_each_layer_is() -> None:
    base = tiny("gemma3", layer_types=["sliding_attention", "full_attention"], sliding_window=4)
    model = fastlora.get_peft_model(base, config())
    assert base.config.layer_types == ["sliding_attention", "full_attention"] * 2
    assert logits(model, some_ids()).shape == (2, 9, 96)


def test_copies_files_and_merging(tmp_path: Path) -> None:
    ids, model = some_ids(), made().eval()
    expected = logits(model, ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, ids), expected)
    model.save_pretrained(tmp_path)
    read = fastlora.PeftModel.from_pretrained(tiny_llama(initializer_range=0.2), tmp_path)
    assert torch.equal(logits(read, ids), expected)
    with pytest.warns(UserWarning, match="a weight of its own"):
        plain = model.merge_and_unload()
    torch.testing.assert_close(logits(plain, ids), expected, rtol=1e-4, atol=1e-4)
    q = [layer.self_attn.q_proj.weight for layer in plain.model.layers]
    assert q[0] is not q[2]
    assert plain.model.layers[0].mlp.up_proj.weight is plain.model.layers[2].mlp.up_proj.weight
    # As the documentation says: a file holds what layers share once for each.
    plain.save_pretrained(
        tmp_path / "plain", state_dict={k: v.clone() for k, v in plain.state_dict().items()}
    )
    again = type(plain).from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(again, ids), logits(plain, ids))


def test_files_with_other_layers_are_no_place_for_the_values(tmp_path: Path) -> None:
    """As many layers in another order have tensors of the same names and shapes."""
    model = made()
    before = snapshot(model)
    for runs in ([[0, 1], [0, 2], [1, 2]], [[0, 1], [1, 2], [0, 2]], None):
        made(layer_replication=runs).save_pretrained(tmp_path)
        for put in (fastlora.load_adapter, fastlora.hotswap_adapter):
            with pytest.raises(ValueError, match="layer_replication"):
                put(model, tmp_path)
            assert_unchanged(model, before)
    model.save_pretrained(tmp_path)
    fastlora.load_adapter(model, tmp_path)
    fastlora.hotswap_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_files_are_not_merged(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    made().save_pretrained(tmp_path / "adapter")
    with pytest.raises(NotImplementedError, match=r"layer_replication: .* merge_and_unload"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_another_adapter_has_the_same_layers() -> None:
    ids, model = some_ids(), made()
    first, before = logits(model, ids), snapshot(model)
    for other in (None, [[0, 2]]):
        with pytest.raises(ValueError, match=r"layer_replication: got .* accepted is the same"):
            model.add_adapter("other", config(layer_replication=other))
        assert_unchanged(model, before)
    model.add_adapter("other", config(layer_replication=[tuple(run) for run in RUNS]))
    model.set_adapter("other")
    assert torch.equal(logits(model, ids), deeper(ids))
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), first)
    plain = fastlora.get_peft_model(tiny_llama(), config(layer_replication=None))
    with pytest.raises(ValueError, match="of a base with None"):
        plain.add_adapter("other", config())


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (tiny_llama, {"layer_replication": [[0, 3]]}, "a model with 2 layers"),
        (tiny_llama, {"target_modules": ["nothing"]}, "matches no module"),
        (tiny_llama, {"init_lora_weights": "pissa"}, "another module shares"),
        (lambda: tiny("gpt2"), {"target_modules": ["c_attn"]}, "found no layers in this GPT2LMHeadModel"),
        (plain_net, {"target_modules": ["up"], "modules_to_save": ["nowhere"]}, "modules_to_save"),
    ],
)  # fmt: skip
def test_a_refusal_leaves_the_model_as_it_was(make: Any, settings: Any, message: str) -> None:
    model = make()
    before = snapshot(model)
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    with pytest.raises(ValueError, match=message):
        fastlora.get_peft_model(model, config(**settings))
    assert_unchanged(model, before)
    assert getattr(getattr(model, "config", None), "num_hidden_layers", None) == depth
