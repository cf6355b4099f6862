"""Virtual tokens against stock PEFT beyond tests/interop: other inputs, masks and positions, and how they begin."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

import fastlora
from tests.models.prompts import (
    COUNT,
    METHODS,
    assert_same,
    build,
    config,
    inputs,
    same,
    trained,
)
from tests.tiny_models import assert_unchanged, snapshot, some_ids, tiny_llama

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")


# Against PEFT.


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "opt", "t5", "bert"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_embeddings_instead_of_ids(name: str, method: str) -> None:
    theirs, ours = build(peft, method, name), build(fastlora, method, name)
    given = inputs(name, "right")
    expected = ours(**given)
    given["inputs_embeds"] = ours.get_input_embeddings()(given.pop("input_ids")).detach()
    assert_same(ours(**given), expected)
    assert_same(ours(**given), theirs(**given))
    for bad in ({}, {"input_ids": some_ids(), "inputs_embeds": given["inputs_embeds"]}):
        if name not in ("t5", "bert") or method == "prompt":  # else the model says so itself
            with pytest.raises(ValueError, match="input_ids"):
                ours(**bad)


@pytest.mark.parametrize("method", METHODS)
def test_masks_of_a_decoder_behind_an_encoder(method: str) -> None:
    theirs, ours = build(peft, method, "t5"), build(fastlora, method, "t5")
    given = inputs("t5", "right")
    plain = ours(**given)
    given["decoder_attention_mask"] = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    assert_same(ours(**given), theirs(**given))
    assert not same(ours(**given), plain)


@pytest.mark.parametrize("name", ["bert-sequence", "bert-token", "bert-question"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_token_types(name: str, method: str) -> None:
    theirs, ours = build(peft, method, name), build(fastlora, method, name)
    given = inputs(name, "right")
    plain = ours(**given)
    given["token_type_ids"] = torch.tensor([[0] * 4 + [1] * 5] * 2)
    assert_same(ours(**given), theirs(**given))
    dropped = name == "bert-question"  # which stock PEFT does without a word
    assert torch.equal(ours(**given)[-1], plain[-1]) == dropped


def test_what_is_dropped_is_dropped_with_a_warning() -> None:
    model, bert = build(fastlora, "prompt", "gpt2"), build(fastlora, "prompt", "bert-sequence")
    ids = some_ids()
    with pytest.warns(UserWarning, match="token_type_ids"):
        got = model(ids, token_type_ids=torch.ones_like(ids))
    assert_same(got, model(ids))
    with pytest.warns(UserWarning, match="position_ids"):
        got = bert(ids, position_ids=torch.arange(9).flip(0).expand(2, -1))
    assert_same(got, bert(ids))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_positions_count_the_virtual_tokens(name: str, method: str) -> None:
    """Those that count from 0 change nothing, others are shifted: left padding then gives what no padding gives."""
    model, ids = build(fastlora, method, name), some_ids(rows=1)
    want = model(ids).logits
    counted = torch.arange(9).expand(1, -1)
    torch.testing.assert_close(model(ids, position_ids=counted).logits, want)
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), ids), dim=1)
    mask = (torch.arange(13) >= 4).long()[None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = model(padded, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(got[:, -9:], want[:, -9:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["prompt", "p-mlp"])
@pytest.mark.parametrize("name", ["bert-token"])
def test_labels_of_tokens_leave_the_virtual_ones_out(name: str, method: str) -> None:
    """Token classification, whose labels stock PEFT does not extend: it fails there."""
    model, ids = build(fastlora, method, name), some_ids()
    output = model(ids, labels=ids % 3)
    logits = output.logits[:, COUNT:].reshape(-1, 3)
    want = torch.nn.functional.cross_entropy(logits, (ids % 3).flatten())
    torch.testing.assert_close(output.loss, want)


# Beginnings.


def test_sampled_and_given_beginnings(tmp_path: Path) -> None:
    from tests.tiny_tokenizer import make_tokenizer

    make_tokenizer().save_pretrained(tmp_path)
    text = {"tokenizer_name_or_path": str(tmp_path), "prompt_tuning_init": "TEXT"}
    many = tiny_llama(vocab_size=300)
    table = many.get_input_embeddings().weight
    for words in ("abcdefgh", "ab"):  # cut to the number of tokens, or repeated
        own = config(fastlora, "prompt", prompt_tuning_init_text=words, **text)
        ours = fastlora.get_peft_model(tiny_llama(vocab_size=300), own)
        theirs = peft.get_peft_model(
            tiny_llama(vocab_size=300),
            config(peft, "prompt", prompt_tuning_init_text=words, **text),
        )
        got = ours.get_prompt_embedding_to_save("default")
        assert torch.equal(got, theirs.get_prompt_embedding_to_save("default"))
        ids = make_tokenizer()(words * 2)["input_ids"][:COUNT]
        assert torch.equal(got, table[ids])
    sampled = build(fastlora, "prompt", prompt_tuning_init="SAMPLE_VOCAB")
    stock = build(peft, "prompt", prompt_tuning_init="SAMPLE_VOCAB")
    got = sampled.get_prompt_embedding_to_save("default")
    assert torch.equal(got, stock.get_prompt_embedding_to_save("default"))
    base = sampled.get_input_embeddings().weight
    assert (got[:, None] == base).all(-1).any(1).all()
    # The tokenizer's ids must be the model's.
    base = tiny_llama(vocab_size=20)
    before = snapshot(base)
    with pytest.raises(ValueError, match="prompt_tuning_init_text"):
        fastlora.get_peft_model(
            base, config(fastlora, "prompt", prompt_tuning_init_text="xyz", **text)
        )
    assert_unchanged(base, before)


@pytest.mark.parametrize("method", ["prefix", "prefix-mlp"])
def test_keys_and_values_that_begin_at_zero(method: str) -> None:
    model = build(fastlora, method, init_weights="zero")
    assert not model.get_prompt_embedding_to_save("default").any()
    assert trained(model)[0].requires_grad
