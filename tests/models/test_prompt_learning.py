"""Virtual tokens against stock PEFT: every method on every kind of model, forward, backward, files; and what PEFT does not
say: other states of a model, refusals."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fastlora
from tests.tiny_architectures import MODELS
from tests.tiny_models import assert_unchanged, plain_net, snapshot, some_ids, tiny_llama

transformers = pytest.importorskip("transformers")

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("PromptTuningConfig", {}),
    "p-mlp": ("PromptEncoderConfig", {}),
    "p-lstm": (
        "PromptEncoderConfig",
        {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 12},
    ),
    "prefix": ("PrefixTuningConfig", {}),
    "prefix-mlp": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 20}),
}
REPARAMETERISED = ("p-mlp", "p-lstm", "prefix-mlp")
COUNT = 3


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def config(library: Any, method: str, task: str = "CAUSAL_LM", **changes: Any) -> Any:
    kind, settings = METHODS[method]
    settings = {"task_type": task, "num_virtual_tokens": COUNT, **settings, **changes}
    return getattr(library, kind)(**settings)


def build(library: Any, method: str, name: str = "llama", **changes: Any) -> Any:
    """The model with an adapter that one seed made; the base is the same for the same name."""
    task, make = MODELS[name]
    base = make()
    torch.manual_seed(1)
    return library.get_peft_model(base, config(library, method, task, **changes)).eval()


def inputs(name: str, padding: str | None = None) -> dict[str, Tensor]:
    task, ids = MODELS[name][0], some_ids()
    mask = torch.ones_like(ids)
    if padding is not None:
        mask[1, slice(-3, None) if padding == "right" else slice(3)] = 0
    labels = {
        "CAUSAL_LM": {"labels": ids},
        "SEQ_2_SEQ_LM": {"labels": some_ids(seed=8, length=5)},
        "SEQ_CLS": {"labels": torch.tensor([0, 2])},
        "QUESTION_ANS": {
            "start_positions": torch.tensor([1, 2]),
            "end_positions": torch.tensor([4, 3]),
        },
    }
    found = {"input_ids": ids * mask, **labels.get(task, {})}
    return found if padding is None else {**found, "attention_mask": mask}


def tensors(output: Any) -> dict[str, Tensor]:
    return {key: value for key, value in output.items() if isinstance(value, Tensor)}


def assert_same(got: Any, want: Any) -> None:
    got, want = tensors(got), tensors(want)
    assert got.keys() == want.keys() and got
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=2e-5, atol=5e-6)


def same(got: Any, want: Any) -> bool:
    return torch.equal(got.loss, want.loss)


def trained(model: Any) -> list[torch.nn.Parameter]:
    """In an order that both libraries share: the virtual tokens, then modules trained whole."""
    pairs = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [p for n, p in sorted(pairs, key=lambda pair: "modules_to_save" in pair[0])]


# Against PEFT.


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_the_same_as_peft(name: str, method: str, tmp_path: Path) -> None:
    """One seed gives the same start, outputs, gradients and shares; files of each are read by the other, same keys."""
    theirs, ours = build(peft, method, name), build(fastlora, method, name)
    assert isinstance(ours, fastlora.PeftModel) and isinstance(ours, peft.PeftModel)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    for padding in (None, "right", "left"):
        given = inputs(name, padding)
        assert_same(ours(**given), theirs(**given))

    given = inputs(name, "right")
    for model in (ours, theirs):
        output = model(**given)
        loss = output.loss if "loss" in output else output[0].square().mean()
        loss.backward()
    mine, stock = trained(ours), trained(theirs)
    assert [p.shape for p in mine] == [p.shape for p in stock]
    moved = 0.0
    for got, want in zip(mine, stock):
        assert torch.equal(got, want)
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-6)
        moved += float(want.grad.abs().sum())
    assert moved > 0

    with torch.no_grad():  # away from the start that a fresh model would have
        for got, want in zip(mine, stock):
            noise = torch.randn(got.shape, generator=torch.Generator().manual_seed(got.numel()))
            got.add_(noise, alpha=0.3)
            want.add_(noise, alpha=0.3)
    expected = ours(**given)
    assert_same(expected, theirs(**given))
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine_file, stock_file = (
        load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs")
    )
    assert mine_file.keys() == stock_file.keys() and "prompt_embeddings" in mine_file
    for key, value in stock_file.items():
        assert mine_file[key].dtype == value.dtype
        torch.testing.assert_close(mine_file[key], value, rtol=1e-5, atol=1e-6)
    for reader in (peft, fastlora):
        for side in ("ours", "theirs"):
            read = reader.PeftModel.from_pretrained(MODELS[name][1](), tmp_path / side)
            assert_same(read(**given), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_configurations_and_their_files_are_pefts(name: str, method: str, tmp_path: Path) -> None:
    ours, theirs = build(fastlora, method, name), build(peft, method, name)
    mine = ours.peft_config["default"].to_dict()
    stock = {
        key: getattr(value, "value", value)
        for key, value in theirs.peft_config["default"].to_dict().items()
        if key not in ("auto_mapping", "peft_version")
    }
    assert mine == stock
    ours.save_pretrained(tmp_path)
    read = peft.PeftConfig.from_pretrained(tmp_path)
    assert type(read) is type(theirs.peft_config["default"]) and read.inference_mode
    given = fastlora.get_peft_model(MODELS[name][1](), config(peft, method, MODELS[name][0]))
    assert given.peft_config["default"].to_dict() == mine


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


# The life of an adapter.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "t5", "bert-sequence"])
def test_the_life_of_an_adapter(name: str, method: str, tmp_path: Path) -> None:
    base, given = MODELS[name][1](), inputs(name, "right")
    original = base.requires_grad_(False)(
        **given
    )  # CPU kernels differ where weights have gradients
    torch.manual_seed(1)
    model = fastlora.get_peft_model(base, config(fastlora, method, MODELS[name][0])).eval()
    first = model(**given)
    assert not same(first, original)
    with model.disable_adapter():
        for key, value in tensors(model(**given)).items():
            assert torch.equal(value, tensors(original)[key])
    assert_same(model(**given), first)

    task = MODELS[name][0]
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
            lambda: fastlora.load_adapter(MODELS["llama"][1](), tmp_path, is_trainable=True),
            lambda: model.load_adapter(tmp_path, "default"),
        ):
            with pytest.raises(ValueError, match="network"):
                load()
        torch.testing.assert_close(model(some_ids()).logits, want)
        again = fastlora.load_adapter(MODELS["llama"][1](), tmp_path)
        again.set_adapter("default")
    else:
        again = fastlora.load_adapter(MODELS["llama"][1](), tmp_path, is_trainable=True)
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
    base = MODELS["gpt2"][1]()  # keys and values of other widths
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"token_dim|num_attention_heads"):
        fastlora.load_adapter(base, tmp_path)
    assert_unchanged(base, before)
    (tmp_path / "adapter_config.json").write_text(
        build(fastlora, "prefix").peft_config["default"].to_json()
    )
    base = MODELS["llama"][1]()
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


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["prompt", "p-lstm"])
def test_prompts_train_under_checkpointing(method: str, reentrant: bool) -> None:
    want = losses(build(fastlora, method).train())
    model = build(fastlora, method).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert losses(model) == pytest.approx(want, rel=1e-4)
    assert want[-1] < want[0]


def test_a_prefix_refuses_checkpointing() -> None:
    """Layers that compute again get no cache; stock PEFT refuses as well, and only when it builds the model."""
    base = MODELS["llama"][1]()
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


@pytest.mark.parametrize("method", METHODS)
def test_transformers_trainer(method: str, tmp_path: Path) -> None:
    from tests.models.test_trainers import Tokens, train

    def loss() -> float:
        with torch.no_grad():
            return float(model.eval()(Tokens().rows, labels=Tokens().rows).loss)

    model = build(fastlora, method)
    before = loss()
    train(model, tmp_path, learning_rate=0.05)
    assert loss() < before
    checkpoint = tmp_path / "checkpoint-6"
    assert set(load_file(checkpoint / "adapter_model.safetensors")) == {"prompt_embeddings"}
    read = peft.PeftModel.from_pretrained(MODELS["llama"][1](), checkpoint)
    torch.testing.assert_close(read(some_ids()).logits, model.eval()(some_ids()).logits)


# Refusals.


def _moe_like() -> Any:
    model = MODELS["llama"][1]()
    model.config.layer_types = ["full_attention", "linear_attention"]
    return model


REFUSED: dict[str, tuple[Any, str, dict[str, Any], str]] = {
    "plain torch": (plain_net, "prompt", {}, "transformers model"),
    "no task": (tiny_llama, "prompt", {"task_type": None}, "task_type: got None"),
    "decoder for seq2seq": (tiny_llama, "prefix", {"task_type": "SEQ_2_SEQ_LM"}, "task_type"),
    "seq2seq as decoder": (MODELS["t5"][1], "prompt", {}, "task_type"),
    "no head": (MODELS["llama-features"][1], "prompt", {}, "no language modelling head"),
    "two stacks": (tiny_llama, "p-mlp", {"num_transformer_submodules": 2}, "one stack"),
    "width of prompts": (tiny_llama, "prompt", {"token_dim": 16}, "token_dim: got 16"),
    "width of keys": (MODELS["gpt2"][1], "prefix", {"token_dim": 16}, "token_dim: got 16"),
    "heads": (MODELS["gpt2"][1], "prefix", {"num_attention_heads": 2}, "num_attention_heads"),
    "layers": (tiny_llama, "prefix", {"num_layers": 3}, "num_layers: got 3"),
    "linear attention": (_moe_like, "prefix", {}, "linear_attention"),
    "encoder trained whole": (
        MODELS["t5"][1],
        "prompt",
        {"task_type": "SEQ_2_SEQ_LM", "modules_to_save": ["encoder"]},
        "takes the virtual tokens",
    ),
    "backbone trained whole": (
        MODELS["bert-sequence"][1],
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
