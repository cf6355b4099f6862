"""Target matching against peft's own functions, on generated names and configurations."""

from __future__ import annotations

import warnings

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import (
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn

import fastlora
from fastlora.methods import LoraConfig, matching
from tests.tiny_models import PlainNet, tiny_llama

PARTS = [
    "model",
    "layers",
    "h",
    "block",
    "0",
    "1",
    "12",
    "experts",
    "q_proj",
    "k_proj",
    "proj",
    "q",
]
names = st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map(".".join)
lists = st.lists(names, min_size=1, max_size=3)
regexes = st.sampled_from(
    ["q_proj", ".*q_proj", r"model\..*\.(q|k)_proj", r".*\.\d+\..*", "(q|k).*", ".*", r"[^.]*"]
)
layer_filters = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {"layers_to_transform": st.one_of(st.integers(0, 13), st.lists(st.integers(0, 13)))},
        optional={"layers_pattern": st.sampled_from(["layers", "h", ["block", "layers"], [], ""])},
    ),
)
configs = st.one_of(
    st.tuples(lists.map(lambda t: {"target_modules": t}), layer_filters).map(lambda p: p[0] | p[1]),
    regexes.map(lambda t: {"target_modules": t}),
)
exclusions = st.one_of(st.none(), lists, regexes)
saved = st.one_of(st.none(), st.lists(st.sampled_from(PARTS), max_size=2))


@settings(max_examples=600, deadline=None)
@given(configs, exclusions, saved, lists)
def test_targets_match_as_in_peft(
    chosen: dict[str, object],
    excluded: list[str] | str | None,
    to_save: list[str] | None,
    modules: list[str],
) -> None:
    values = {**chosen, "exclude_modules": excluded, "modules_to_save": to_save}
    ours, theirs = LoraConfig(**values), peft.LoraConfig(**values)
    for name in modules:
        expected = check_target_module_exists(theirs, name)
        assert matching.is_target(ours, name) == bool(expected), name
        assert matching.is_excluded(ours, name) == isinstance(expected, _ExcludedModule), name


@settings(max_examples=400, deadline=None)
@given(
    st.dictionaries(st.one_of(names, regexes, st.just("^model.layers")), st.integers(1, 64)),
    names,
)
def test_patterns_match_as_in_peft(patterns: dict[str, int], name: str) -> None:
    expected = patterns.get(get_pattern_key(patterns.keys(), name), 8)
    assert matching.pattern_value(patterns, name, 8) == expected
    matched = [p for p in patterns if p not in matching.unmatched_patterns(patterns, [name])]
    assert bool(matched) == (get_pattern_key(patterns.keys(), name) in patterns)


class WithHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.score = PlainNet(), nn.Linear(24, 3)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(PlainNet, id="plain"),
        pytest.param(WithHead, id="plain with a head"),
        pytest.param(tiny_llama, id="llama"),
        pytest.param(lambda: tiny_llama(tie_word_embeddings=True), id="tied llama"),
    ],
)
def test_all_linear_is_pefts(model: object) -> None:
    built = model()
    theirs = peft.LoraConfig(target_modules="all-linear")
    expected = _maybe_include_all_linear_layers(theirs, built).target_modules
    names = matching.all_linear(LoraConfig(target_modules="all-linear"), built)
    assert set(names) == expected
    short = matching.shortest_names(names, [name for name, _ in built.named_modules()])
    config = LoraConfig(target_modules=short)
    assert {n for n, _ in built.named_modules() if matching.is_target(config, n)} == expected


def test_all_linear_covers_gpt2s_conv1d_and_leaves_a_classifier_out() -> None:
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    small = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    for kind, task in ((GPT2LMHeadModel, "CAUSAL_LM"), (GPT2ForSequenceClassification, "SEQ_CLS")):
        model = kind(small)
        theirs = peft.LoraConfig(target_modules="all-linear", task_type=task)
        expected = _maybe_include_all_linear_layers(theirs, model).target_modules
        config = LoraConfig(target_modules="all-linear", task_type=task)
        assert set(matching.all_linear(config, model)) == expected
        assert any(name.endswith("c_attn") for name in expected)


def test_short_names_are_used_only_where_they_mean_the_same() -> None:
    everything = ["a.q", "a.k", "b.q", "b.v"]
    assert matching.shortest_names(["a.q", "b.q"], everything) == ["q"]
    assert matching.shortest_names(["a.q"], everything) == ["a.q"]


def test_default_targets_are_pefts() -> None:
    for model_type, targets in matching.DEFAULT_TARGETS.items():
        assert TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[model_type] == targets, model_type
    model = fastlora.get_peft_model(tiny_llama(), LoraConfig())
    assert model.peft_config["default"].target_modules == ["q_proj", "v_proj"]
    with pytest.raises(ValueError, match="plain torch model"):
        fastlora.get_peft_model(PlainNet(), LoraConfig())


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 1},
        {"target_modules": r".*\.(gate|up)_proj", "exclude_modules": r".*layers\.0.*"},
        {"target_modules": ["q_proj", "lm_head"], "rank_pattern": {"layers.0.*q_proj": 2}},
        {"target_modules": ["q_proj"], "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
        {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"], "bias": "all"},
    ],
)
def test_whole_models_are_adapted_as_by_peft(settings: dict[str, object]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = peft.get_peft_model(
            tiny_llama(attention_bias=True), peft.LoraConfig(r=4, **settings)
        )
        ours = fastlora.get_peft_model(tiny_llama(attention_bias=True), LoraConfig(r=4, **settings))
    theirs = {
        name: (module.r["default"], module.scaling["default"])
        for name, module in stock.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert theirs == {
        name: (module.r["default"], module.scaling["default"])
        for name, module in ours.named_modules()
        if isinstance(module, fastlora.LoRALinear)
    }
    assert ours.get_nb_trainable_parameters() == stock.get_nb_trainable_parameters()
    count = sum(entry["count"] for entry in ours.trainable_record())
    assert count == stock.get_nb_trainable_parameters()[0]
