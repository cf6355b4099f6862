"""``generate`` with virtual tokens: against stock PEFT, against steps by hand, and a padded batch against single rows."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import fastlora
from tests.models.prompts import METHODS, REPARAMETERISED, build
from tests.tiny_models import some_ids
from tests.tiny_zoo import TASKS

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

DECODERS = ["llama", "gpt2", "bloom", "opt"]
NEW = 6


def strengthened(library: Any, method: str, name: str) -> Any:
    """With virtual tokens far from nothing, so that one that is lost or moved changes what is generated."""
    model = build(library, method, name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "embedding.weight" in key and parameter.requires_grad:
                parameter.mul_(3.0)
    return model


def generated(model: Any, ids: Tensor, **settings: Any) -> Tensor:
    mask = settings.pop("attention_mask", torch.ones_like(ids))
    fixed = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    return model.generate(input_ids=ids, attention_mask=mask, **{**fixed, **settings})


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", [*DECODERS, "mistral", "t5", "t5-three-layers", "bart"])
@pytest.mark.parametrize("method", METHODS)
def test_the_same_as_peft(name: str, method: str, beams: int) -> None:
    theirs, ours = (strengthened(library, method, name) for library in (peft, fastlora))
    ids = some_ids()
    got = generated(ours, ids, num_beams=beams)
    assert torch.equal(got, generated(theirs, ids, num_beams=beams))
    with ours.disable_adapter():
        plain = generated(ours, ids, num_beams=beams)
    base = TASKS[name][1]()
    assert torch.equal(plain, generated(base, ids, num_beams=beams))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("method", METHODS)
def test_steps_by_hand(name: str, method: str) -> None:
    """Greedy generation is the arg max of a forward over all that there is, without a cache."""
    model, ids = strengthened(fastlora, method, name), some_ids()
    want = ids
    for _ in range(NEW):
        scores = model(want).logits[:, -1].clone()
        scores[:, 2] = -torch.inf  # the end, which min_new_tokens puts off
        want = torch.cat((want, scores.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(generated(model, ids), want)
    assert torch.equal(model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW), want)
    no_prompts = generated(TASKS[name][1](), ids)
    assert not torch.equal(no_prompts, want) and (want[:, -NEW:] != want[:, -NEW - 1 : -1]).any()
    if method.startswith("prefix"):
        with pytest.raises(ValueError, match="use_cache"):
            generated(model, ids, use_cache=False)
    else:
        assert torch.equal(generated(model, ids, use_cache=False), want)
        embeds = model.get_input_embeddings()(ids)
        more = generated(model, ids, inputs_embeds=embeds)
        assert torch.equal(more[:, -NEW:], want[:, -NEW:])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("method", METHODS)
def test_left_padding(name: str, method: str, beams: int) -> None:
    """Each row of a padded batch is what it is alone."""
    model, ids = strengthened(fastlora, method, name), some_ids(rows=3)
    pads = [0, 3, 5]
    mask = (torch.arange(9) >= torch.tensor(pads)[:, None]).long()
    batch = generated(model, ids * mask, attention_mask=mask, num_beams=beams)
    for row, pad in enumerate(pads):
        alone = generated(model, ids[row : row + 1, pad:], num_beams=beams)
        assert torch.equal(batch[row, pad:], alone[0])


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_padding_before_an_encoder(name: str, method: str) -> None:
    model, ids = strengthened(fastlora, method, name), some_ids(rows=2)
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    batch = generated(model, ids * mask, attention_mask=mask)
    for row, length in enumerate((9, 5)):
        assert torch.equal(batch[row], generated(model, ids[row : row + 1, :length])[0])


@pytest.mark.parametrize("method", ["prompt", "prefix", "p-lstm"])
def test_a_prompt_in_chunks_sampled_and_with_an_empty_cache(method: str) -> None:
    model, ids = strengthened(fastlora, method, "llama"), some_ids()
    want = generated(model, ids)
    assert torch.equal(generated(model, ids, prefill_chunk_size=4), want)
    empty = transformers.DynamicCache(config=model.config)
    assert torch.equal(generated(model, ids, past_key_values=empty), want)
    several = generated(model, ids, do_sample=True, num_return_sequences=3)
    assert several.shape == (6, 9 + NEW)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_loop_of_ones_own(method: str) -> None:
    """The cache that a forward gives back holds the virtual tokens; the next step needs no more of them."""
    model, ids = strengthened(fastlora, method, "gpt2"), some_ids()
    want = model(ids).logits[:, -1]
    first = model(ids[:, :-1])
    assert first.past_key_values.get_seq_length() == ids.shape[1] - 1 + 3
    for mask in (None, torch.ones_like(ids)):
        cache = model(ids[:, :-1]).past_key_values
        got = model(ids[:, -1:], attention_mask=mask, past_key_values=cache)
        torch.testing.assert_close(got.logits[:, -1], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_what_counts_tokens_by_the_cache_is_refused(method: str) -> None:
    model, ids = build(fastlora, method), some_ids(rows=1)
    full = model(ids).past_key_values
    static = transformers.GenerationConfig(cache_implementation="static")
    for settings, message in (
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"generation_config": static}, "cache_implementation"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({"assistant_model": TASKS["llama"][1]()}, "assistant_model"),
        ({"past_key_values": full}, "past_key_values"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(ids, **settings)
        with model.disable_adapter():  # nothing to count then
            assert model.generate(ids, max_new_tokens=2).shape[1] <= 11


@pytest.mark.parametrize("method", REPARAMETERISED)
def test_a_loaded_adapter_generates_the_same(method: str, tmp_path: Any) -> None:
    model, ids = strengthened(fastlora, method, "llama"), some_ids()
    model.save_pretrained(tmp_path)
    read = fastlora.PeftModel.from_pretrained(TASKS["llama"][1](), tmp_path)
    assert torch.equal(generated(read, ids), generated(model, ids))
