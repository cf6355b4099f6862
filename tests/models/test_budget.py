"""The rank for a share of the parameters, against the models that such ranks make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import fastlora
from fastlora import LoraConfig
from fastlora.models.budget import rank_for_share
from tests.every_method import METHODS
from tests.tiny_models import assert_unchanged, plain_net, snapshot, tiny_llama
from tests.tiny_zoo import tiny

pytestmark = pytest.mark.filterwarnings("ignore")
LINEARS = {"target_modules": "all-linear"}


def classifier() -> Any:
    return tiny("llama", head="LlamaForSequenceClassification", num_labels=3, pad_token_id=0)


def deep(**changes: Any) -> Any:
    """Enough of a model that what is trained whole is a small part of it."""
    return tiny_llama(num_hidden_layers=6, attention_bias=True, **changes)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linears": (tiny_llama, LINEARS),
    "4 bits": (tiny_llama, {**LINEARS, "quantize": "nf4"}),
    "dora": (tiny_llama, {**LINEARS, "use_dora": True}),
    "dora, 4 bits": (tiny_llama, {**LINEARS, "use_dora": True, "quantize": "nf4"}),
    "lora_bias": (deep, {**LINEARS, "lora_bias": True}),
    "biases": (deep, {**LINEARS, "bias": "all"}),
    "their biases": (deep, {**LINEARS, "bias": "lora_only"}),
    "embeddings": (deep, {"target_modules": ["q_proj", "embed_tokens"]}),
    "copies": (deep, {**LINEARS, "modules_to_save": ["norm"]}),
    "a head": (classifier, {"target_modules": ["q_proj", "v_proj"], "task_type": "SEQ_CLS"}),
    "rows": (deep, {**LINEARS, "trainable_token_indices": [3, 5]}),
    "tied rows": (lambda: deep(tie_word_embeddings=True), {**LINEARS, "trainable_token_indices": [3]}),
    "experts": (METHODS["lora, parameters"].base, {"target_parameters": ["experts.down_proj"]}),
    "conv1d": (lambda: tiny("gpt2"), {"target_modules": ["c_attn", "c_fc"]}),
    "pissa": (tiny_llama, {**LINEARS, "init_lora_weights": "pissa"}),
    "tied ends": (lambda: deep(tie_word_embeddings=True), {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}),
    "layers that occur again": (deep, {**LINEARS, "layer_replication": [[0, 4], [2, 6]]}),
    "ranks that are given": (plain_net, {"target_modules": ["up", "down"], "rank_pattern": {"up": 2}}),
    "plain": (plain_net, {"target_modules": ["up", "embed", "head"], "use_rslora": True}),
}  # fmt: skip


def share_of(base: nn.Module, r: int, settings: dict[str, Any]) -> float:
    model = fastlora.get_peft_model(base, LoraConfig(r=r, **settings))
    trained, total = model.get_nb_trainable_parameters()
    return trained / total


@pytest.mark.parametrize("share", [0.1, 0.3])
@pytest.mark.parametrize("case", CASES)
def test_the_rank_is_the_largest_within_the_share(case: str, share: float) -> None:
    make, settings = CASES[case]
    base = make()
    before = snapshot(base)
    rank = rank_for_share(base, LoraConfig(r=400, **settings), share)
    assert_unchanged(base, before)
    assert share_of(base, rank, settings) <= share < share_of(make(), rank + 1, settings)


def test_a_share_that_is_met_exactly_and_ranks_that_end() -> None:
    exact = share_of(tiny_llama(), 7, LINEARS)
    assert rank_for_share(tiny_llama(), LoraConfig(**LINEARS), exact) == 7
    assert rank_for_share(tiny_llama(), LoraConfig(**LINEARS), 0.999) == 512


def test_factors_that_begin_as_halves_get_an_even_rank() -> None:
    halves = {**LINEARS, "init_lora_weights": "orthogonal"}
    for odd in (3, 7):
        share = share_of(tiny_llama(), odd, LINEARS)
        rank = rank_for_share(tiny_llama(), LoraConfig(**halves), share)
        assert rank == odd - 1
        assert share_of(tiny_llama(), rank, halves) < share
    with pytest.raises(ValueError, match=f"rank 2 trains {share_of(tiny_llama(), 2, LINEARS):.4%}"):
        rank_for_share(tiny_llama(), LoraConfig(**halves), share_of(tiny_llama(), 1, LINEARS))


def test_over_a_base_that_is_in_four_bits_already(tmp_path: Any) -> None:
    from fastlora.io.quantize import quantize_checkpoint

    tiny_llama().save_pretrained(tmp_path / "base")
    quantize_checkpoint(tmp_path / "base", tmp_path / "nf4")
    want = rank_for_share(tiny_llama(), LoraConfig(**LINEARS), 0.2)
    base = fastlora.load_quantized(tmp_path / "nf4")
    assert rank_for_share(base, LoraConfig(**LINEARS), 0.2) == want
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert rank_for_share(theirs, LoraConfig(**LINEARS), 0.2) == want


@pytest.mark.parametrize(
    "more",
    [{"modules_to_save": ["head"]}, {"modules_to_save": ["embed"]}, {"rank_pattern": {"down": 90}}],
    ids=str,
)
def test_what_trains_whatever_the_rank_may_be_too_much(more: dict[str, Any]) -> None:
    settings = {"target_modules": ["up", "down"], **more}
    with pytest.raises(ValueError, match=r"whatever the rank .* is \d+\.\d+% already"):
        rank_for_share(plain_net(), LoraConfig(**settings), 0.1)
    assert share_of(plain_net(), 1, settings) > 0.1
    every = {"target_modules": ["up", "down"], "rank_pattern": {"up": 1, "down": 1}}
    with pytest.raises(ValueError, match="a rank of its own"):
        rank_for_share(plain_net(), LoraConfig(**every), 0.3)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan"), 1e-6])
def test_shares_that_cannot_be(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        rank_for_share(plain_net(), LoraConfig(target_modules=["up"]), share)


def test_what_cannot_be_adapted_is_said_as_ever() -> None:
    base = plain_net()
    before = snapshot(base)
    with pytest.raises(ValueError, match="nothing"):
        rank_for_share(base, LoraConfig(target_modules=["nothing"]), 0.1)
    assert_unchanged(base, before)
