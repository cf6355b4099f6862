"""LoRA on what is no nn.Linear, in whole models: merging, and the life of such adapters. Beside stock peft: tests/interop."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora import LoraConfig
from fastlora.io.adapter import _entries
from fastlora.layers import LoRAConv1D, LoRAEmbedding, LoRALinear, LoRAParameter, TrainableTokens
from tests.tiny_models import (
    assert_unchanged,
    logits,
    plain_net,
    snapshot,
    some_ids,
    tiny_llama,
)
from tests.tiny_zoo import tiny

pytestmark = pytest.mark.filterwarnings("ignore")

gpt2 = partial(tiny, "gpt2", resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
mixtral, qwen2_moe, llama4, gemma3 = (
    partial(tiny, kind) for kind in ("mixtral", "qwen2_moe", "llama4", "gemma3")
)


def gpt_oss() -> Any:
    """With biases that are not zero."""
    model = tiny("gpt_oss")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("_bias"):
                parameter.normal_(std=0.1)
    return model


def tied_llama() -> Any:
    return tiny_llama(tie_word_embeddings=True)


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d pissa": (gpt2, {"target_modules": ["c_attn"], "init_lora_weights": "pissa"}),
    "conv1d and embedding": (gpt2, {"target_modules": ["c_attn", "wte", "wpe"]}),
    "embedding": (tiny_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding tied": (tied_llama, {"target_modules": ["embed_tokens"], "use_rslora": True}),
    "embedding random": (tiny_llama, {"target_modules": "model.embed_tokens", "init_lora_weights": False}),
    "both ends": (tiny_llama, {"target_modules": ["embed_tokens", "lm_head"], "rank_pattern": {"embed_tokens": 2}}),
    "embedding scaled": (gemma3, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding, head copied": (tiny_llama, {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]}),
    "experts": (mixtral, {"target_parameters": EXPERTS}),
    "experts, one": (mixtral, {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]}),
    "experts, patterns": (mixtral, {"target_parameters": EXPERTS, "rank_pattern": {"down_proj": 2}}),
    "experts shared": (qwen2_moe, {"target_parameters": EXPERTS, "init_lora_weights": "gaussian"}),
    "experts transposed": (gpt_oss, {"target_parameters": EXPERTS}),
    "experts' biases": (gpt_oss, {"target_parameters": ["experts.down_proj_bias", "experts.down_proj"]}),
    "stacked, unmarked": (llama4, {"target_parameters": EXPERTS}),
    "a linear's weight": (tiny_llama, {"target_modules": [], "target_parameters": ["q_proj.weight"]}),
    "rows": (tiny_llama, {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3, 0, 50]}),
    "rows tied": (tied_llama, {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3, 0]}),
    "rows of two": (tied_llama, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7], "lm_head": [5, 7]}}),
    "rows of two alike": (tied_llama, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7], "lm_head": [7]}}),
    "rows scaled": (gemma3, {"target_modules": ["q_proj"], "trainable_token_indices": [9, 4]}),
    "rows and conv1d": (gpt2, {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [4]}}),
    "rows and experts": (mixtral, {"target_parameters": EXPERTS, "trainable_token_indices": [4]}),
}  # fmt: skip
EVERY = pytest.mark.parametrize("case", CASES)
SOME = pytest.mark.parametrize(
    "case", ["conv1d", "both ends", "experts", "stacked, unmarked", "rows tied"]
)


def settings_of(case: str) -> tuple[Callable[[], Any], dict[str, Any]]:
    make, settings = CASES[case]
    return make, {"r": 3, "lora_alpha": 8, **settings}


def ours_of(case: str, **settings: Any) -> Any:
    make, given = settings_of(case)
    torch.manual_seed(1)
    return fastlora.get_peft_model(make(), LoraConfig(**given, **settings))


def theirs_of(case: str) -> Any:
    make, given = settings_of(case)
    torch.manual_seed(1)
    return peft.get_peft_model(make(), peft.LoraConfig(**given))


def state_of(model: Any) -> dict[str, Tensor]:
    """Key in the file -> the adapter's tensor, of ours and theirs (whose file may have base embeddings as well)."""
    if isinstance(model, fastlora.PeftModel):
        return {k: entry.tensor for k, entry in _entries(model, model.active_adapter).items()}
    return peft.get_peft_model_state_dict(model, save_embedding_layers=False)


def fill(model: Any, seed: int = 3, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, tensor in sorted(state_of(model).items()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)


def gradients(model: Any) -> dict[str, Tensor]:
    """By the key in the file."""
    model.zero_grad()
    model(some_ids(), labels=some_ids()).loss.backward()
    by_place = {p.data_ptr(): p.grad for p in model.parameters() if p.requires_grad}
    return {key: by_place[tensor.data_ptr()] for key, tensor in state_of(model).items()}


@EVERY
def test_merging(case: str) -> None:
    make = settings_of(case)[0]
    ours = ours_of(case)
    fill(ours)
    ours.eval()
    expected, ids = logits(ours, some_ids()), some_ids()
    before = snapshot(ours)
    report = ours.merge_adapter()
    assert max(entry.update for entry in report) > 1e-3
    assert all(entry.error < 1e-6 for entry in report)
    torch.testing.assert_close(logits(ours, ids), expected)
    with ours.disable_adapter():
        assert "pissa" in case or torch.equal(logits(ours, ids), logits(make(), ids))
    ours.unmerge_adapter()
    assert_unchanged(ours, before)
    plain = ours.merge_and_unload()
    torch.testing.assert_close(logits(plain, ids), expected)
    assert [type(m) for m in plain.modules()] == [type(m) for m in make().modules()]
    assert plain.state_dict().keys() == make().state_dict().keys()
    assert all(p.is_contiguous() for p in plain.parameters())


@SOME
def test_several_adapters(case: str) -> None:
    make, given = settings_of(case)
    ids = some_ids()
    first, second = ours_of(case), ours_of(case)
    fill(first, 3)
    fill(second, 4)
    expected = logits(first, ids), logits(second, ids)
    both = ours_of(case)
    fill(both, 3)
    both.add_adapter("other", LoraConfig(**given))
    assert torch.equal(logits(both, ids), expected[0])
    both.set_adapter("other")
    fill(both, 4)
    assert torch.equal(logits(both, ids), expected[1])
    trained = [n for n, p in both.named_parameters() if p.requires_grad]
    assert trained
    assert all("other" in name for name in trained)
    with both.disable_adapter():
        assert torch.equal(logits(both, ids), logits(make(), ids))
    for made in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        assert torch.equal(logits(made, ids), expected[1])
        fill(made, 5)
        assert not torch.equal(logits(made, ids), expected[1])
    assert torch.equal(logits(both, ids), expected[1])
    both.rename_adapter("other", "mine")
    both.delete_adapter("default")
    assert torch.equal(logits(both, ids), expected[1])
    assert not any(".default" in name for name, _ in both.named_parameters())


@pytest.mark.parametrize("case", ["conv1d and embedding", "both ends", "experts", "stacked, unmarked"])  # fmt: skip
def test_stacked_adapters_add_up_as_in_peft(case: str) -> None:
    given = settings_of(case)[1]
    ours, theirs = ours_of(case), theirs_of(case)
    ours.add_adapter("other", LoraConfig(**given))
    theirs.add_adapter("other", peft.LoraConfig(**given))
    ours.set_adapter(["default", "other"])
    theirs.base_model.set_adapter(["default", "other"])
    for model in (ours, theirs):
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, p in sorted((n.replace(".weight", ""), p) for n, p in model.named_parameters() if p.requires_grad):  # fmt: skip
                assert name.endswith(("default", "other"))
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    expected = logits(theirs, some_ids())
    torch.testing.assert_close(logits(ours, some_ids()), expected)
    ours.merge_adapter()
    torch.testing.assert_close(logits(ours, some_ids()), expected)


@SOME
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(case: str, reentrant: bool) -> None:
    plain, checkpointed = ours_of(case), ours_of(case)
    fill(plain)
    fill(checkpointed)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    plain.train()
    checkpointed.train()
    expected, got = gradients(plain), gradients(checkpointed)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-7)


@SOME
def test_under_autocast(case: str) -> None:
    ours, theirs = ours_of(case), theirs_of(case)
    fill(ours)
    fill(theirs)
    exact = logits(theirs, some_ids())
    with torch.autocast("cpu", torch.bfloat16):
        mine, other = logits(ours, some_ids()), logits(theirs, some_ids())
        loss = ours(some_ids(), labels=some_ids()).loss
    assert (mine.float() - exact).norm() <= 2 * (other.float() - exact).norm()
    loss.backward()
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)


@SOME
def test_the_loss_falls(case: str) -> None:
    model = ours_of(case)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(12):
        loss = model(some_ids(), labels=some_ids()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02


# What becomes what.


def test_each_module_gets_its_layer() -> None:
    model = fastlora.get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn", "wte"]))
    block = model.get_base_model().transformer.h[0]
    assert type(block.attn.c_attn) is LoRAConv1D
    assert type(model.get_base_model().transformer.wte) is LoRAEmbedding
    model = ours_of("experts")
    assert type(model.get_base_model().model.layers[0].mlp.experts) is LoRAParameter
    assert type(model.get_base_model().model.layers[0].mlp.experts.base_layer) is LoRAParameter
    assert type(ours_of("rows").get_base_model().model.embed_tokens) is TrainableTokens


def test_all_linear_leaves_embeddings_and_experts_out() -> None:
    for make in (gpt2, tied_llama):
        ours = fastlora.get_peft_model(make(), LoraConfig(r=2, target_modules="all-linear"))
        theirs = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules="all-linear"))
        mine, other = state_of(ours).keys(), state_of(theirs).keys()
        assert mine == other
        assert not any("embed" in key or "wte" in key for key in mine)
    ours = fastlora.get_peft_model(mixtral(), LoraConfig(r=2, target_modules="all-linear"))
    assert {key.split(".")[-3] for key in state_of(ours)} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }


def test_all_linear_again_beside_an_embedding_with_adapters() -> None:
    model = ours_of("both ends")
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    layers = {n for n, m in model.named_modules() if "other" in getattr(m, "adapters", [])}
    assert layers
    assert not any("embed" in name or "lm_head" in name for name in layers)


def test_base_keys_stay() -> None:
    for case in ("conv1d and embedding", "both ends"):
        keys = settings_of(case)[0]().state_dict().keys()
        own = {k.removeprefix("base_model.model.") for k in ours_of(case).state_dict()}
        assert keys <= own


@pytest.mark.parametrize(
    ("make", "targets", "given", "settled"),
    [(gpt2, ["c_attn"], False, True), (tiny_llama, ["q_proj"], True, False)],
)
def test_fan_in_fan_out_is_corrected_with_a_warning(
    make: Any, targets: list[str], given: bool, settled: bool
) -> None:
    config = LoraConfig(r=2, target_modules=targets, fan_in_fan_out=given)
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = fastlora.get_peft_model(make(), config)
    assert model.peft_config["default"].fan_in_fan_out is settled
    config.fan_in_fan_out = settled
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastlora.get_peft_model(make(), config)


def test_tied_weights_are_said_when_adapted_and_when_merged() -> None:
    with pytest.warns(UserWarning, match="tied weights"):
        model = fastlora.get_peft_model(tied_llama(), LoraConfig(target_modules=["embed_tokens"]))
    fill(model)
    expected = logits(model, some_ids())
    with pytest.warns(UserWarning, match="tie_word_embeddings becomes False"):
        plain = model.merge_and_unload()
    assert plain.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(plain, some_ids()), expected)


def test_tied_rows_stay_tied() -> None:
    model = ours_of("rows tied")
    fill(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = model.merge_and_unload()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert plain.config.tie_word_embeddings is True


# Refusals: the model is as it was.


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (tiny_llama, {"target_modules": ["q_proj"], "trainable_token_indices": [96]}, "0 to 95"),
        (tiny_llama, {"target_modules": ["q_proj"], "trainable_token_indices": {"nowhere": [1]}}, "matches no module"),
        (tiny_llama, {"target_modules": ["embed_tokens"], "trainable_token_indices": [1]}, "has adapters already"),
        (tied_llama, {"target_modules": ["lm_head"], "trainable_token_indices": [1]}, "has adapters already"),
        (tied_llama, {"target_modules": ["q_proj"], "trainable_token_indices": [1], "modules_to_save": ["lm_head"]}, "modules_to_save"),
        (tiny_llama, {"target_modules": ["q_proj"], "trainable_token_indices": {"q_proj": [1]}}, "has adapters already"),
        (tiny_llama, {"target_modules": ["q_proj"], "trainable_token_indices": {"model.norm": [1]}}, "LlamaRMSNorm"),
        (mixtral, {"target_parameters": ["experts.w1"]}, "match no Parameter"),
        (mixtral, {"target_modules": ["q_proj"], "target_parameters": ["q_proj.weight"]}, "as a whole"),
        (mixtral, {"target_parameters": ["input_layernorm.weight"]}, "two or three dimensions"),
        (mixtral, {"target_parameters": EXPERTS, "modules_to_save": ["experts"]}, "modules_to_save"),
        (mixtral, {"target_parameters": EXPERTS, "init_lora_weights": "pissa"}, "init_lora_weights"),
        (mixtral, {"target_modules": ["experts"]}, "target_parameters"),
        (plain_net, {"target_modules": ["up"], "target_parameters": ["norm.weight"]}, "two or three"),
    ],
)  # fmt: skip
def test_a_refusal_leaves_the_model_as_it_was(make: Any, settings: Any, message: str) -> None:
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        fastlora.get_peft_model(model, LoraConfig(**settings))
    assert_unchanged(model, before)


def test_another_adapter_that_does_not_fit_is_refused() -> None:
    model = ours_of("experts")
    before = snapshot(model)
    with pytest.raises(ValueError, match="accepted are the same"):
        model.add_adapter("other", LoraConfig(target_parameters=EXPERTS[:1]))
    with pytest.raises(ValueError, match="another adapter is on its Parameters"):
        model.add_adapter("other", LoraConfig(target_modules=["experts"]))
    assert_unchanged(model, before)
    model = ours_of("rows tied")
    before = snapshot(model)
    with pytest.raises(ValueError, match="rows"):
        model.add_adapter("other", LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="0 to 95"):
        model.add_adapter("other", LoraConfig(target_modules=["q_proj"], trainable_token_indices=[99]))  # fmt: skip
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"], trainable_token_indices=[9]))
    with pytest.raises(ValueError, match="one of them at a time"):
        model.set_adapter(["default", "other"])
    model.delete_adapter("other")
    assert model.state_dict().keys() == before["values"].keys()


def test_rows_and_whole_copies_may_stand_side_by_side() -> None:
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = fastlora.get_peft_model(tiny_llama(), LoraConfig(**settings, trainable_token_indices=[4]))  # fmt: skip
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}
    assert trained == {
        "base_model.model.model.embed_tokens.trainable_tokens_delta.default",
        "base_model.model.lm_head.modules_to_save.default.weight",
    }
    assert isinstance(model.get_base_model().model.layers[0].self_attn.q_proj, LoRALinear)
    assert isinstance(model.get_base_model().model.embed_tokens.original_module, nn.Embedding)
