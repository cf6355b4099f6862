"""LoraConfig: defaults and files against stock peft, and every refusal."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest

from fastlora import EvaConfig, LoftQConfig, LoraConfig


def test_fields_and_defaults_are_pefts() -> None:
    theirs = peft.LoraConfig()
    for field in dataclasses.fields(LoraConfig):
        if field.name != "quantize":
            assert getattr(LoraConfig(), field.name) == getattr(theirs, field.name), field.name
    known = {f.name for f in dataclasses.fields(LoraConfig)} | {"peft_type", *LoraConfig.ignored}
    assert {f.name for f in dataclasses.fields(peft.LoraConfig)} <= known


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"r": 0}, ValueError),
        ({"r": -1}, ValueError),
        ({"r": 513}, ValueError),
        ({"r": 8.0}, ValueError),
        ({"r": True}, ValueError),
        ({"lora_alpha": float("nan")}, ValueError),
        ({"lora_alpha": "16"}, ValueError),
        ({"lora_dropout": 1.0}, ValueError),
        ({"lora_dropout": -0.1}, ValueError),
        ({"lora_dropout": None}, ValueError),
        ({"bias": "some"}, ValueError),
        ({"init_lora_weights": "mica"}, ValueError),
        ({"init_lora_weights": "loftq"}, ValueError),
        ({"lora_bias": True, "use_dora": True}, ValueError),
        ({"lora_bias": True, "init_lora_weights": "orthogonal"}, ValueError),
        ({"use_dora": 1}, TypeError),
        ({"eva_config": {"rho": 0.5}, "init_lora_weights": "eva"}, ValueError),
        ({"eva_config": {"rhoo": 2}, "init_lora_weights": "eva"}, TypeError),
        ({"loftq_config": {"loftq_bits": 8}, "quantize": "nf4"}, ValueError),
        ({"loftq_config": {"loftq_iter": 0}, "quantize": "nf4"}, ValueError),
        ({"task_type": "CHAT"}, ValueError),
        ({"use_rslora": 1}, TypeError),
        ({"target_modules": 3}, TypeError),
        ({"target_modules": [1]}, TypeError),
        ({"target_modules": [""]}, TypeError),
        ({"target_modules": "(q_proj"}, ValueError),
        ({"exclude_modules": "["}, ValueError),
        ({"modules_to_save": "head"}, TypeError),
        ({"layers_to_transform": [-1], "target_modules": ["q"]}, ValueError),
        ({"layers_to_transform": [0], "target_modules": "q.*"}, ValueError),
        ({"layers_pattern": "layers", "target_modules": ["q"]}, ValueError),
        ({"rank_pattern": ["q"]}, TypeError),
        ({"rank_pattern": {"q(": 4}}, ValueError),
        ({"rank_pattern": {"q": 0}}, ValueError),
        ({"alpha_pattern": {"q": float("inf")}}, ValueError),
        ({"quantize": "int3"}, ValueError),
        ({"quantize": "nf4", "init_lora_weights": "pissa"}, ValueError),
        ({"base_model_name_or_path": 3}, TypeError),
    ],
)
def test_bad_values_name_the_field(settings: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(settings))):
        LoraConfig(**settings)


@pytest.mark.parametrize("field", sorted(LoraConfig.unsupported))
def test_features_of_peft_that_are_not_there_point_to_accelerate(field: str) -> None:
    value = True if LoraConfig.unsupported[field] is False else {"some": "setting"}
    why = LoraConfig.reasons[field]
    with pytest.raises(NotImplementedError, match=rf"{field}.*{why}.*fastlora\.accelerate"):
        LoraConfig(**{field: value})


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="lora_aplha"):
        LoraConfig(lora_aplha=3)


FULL = {
    "r": 4,
    "target_modules": ["v_proj", "q_proj"],
    "exclude_modules": ["lm_head"],
    "lora_alpha": 12.5,
    "lora_dropout": 0.1,
    "bias": "lora_only",
    "use_rslora": True,
    "modules_to_save": ["embed_tokens"],
    "init_lora_weights": "pissa_niter_4",
    "layers_to_transform": [0, 1],
    "layers_pattern": "layers",
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 3},
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "some/model",
    "revision": "main",
}


def test_json_is_sorted_indented_and_has_the_values(tmp_path: Path) -> None:
    LoraConfig(**{**FULL, "target_modules": {"v_proj", "q_proj"}}).save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    values = json.loads(text)
    assert list(values) == sorted(values)
    assert text.startswith('{\n  "alpha_pattern"')
    assert values["target_modules"] == ["q_proj", "v_proj"]
    assert values["peft_type"] == "LORA"
    assert values["use_dora"] is False
    assert "quantize" not in values


def test_patterns_keep_their_order(tmp_path: Path) -> None:
    """The first that matches wins, so that a file in which they were sorted would mean something else."""
    patterns = {"q_proj": 3, ".*": 21, "a.*": 5}
    LoraConfig(rank_pattern=patterns, alpha_pattern=patterns).save_pretrained(tmp_path)
    for read in (LoraConfig.from_pretrained(tmp_path), peft.LoraConfig.from_pretrained(tmp_path)):
        assert list(read.rank_pattern.items()) == list(patterns.items())
        assert list(read.alpha_pattern.items()) == list(patterns.items())


def test_stock_peft_reads_our_file(tmp_path: Path) -> None:
    LoraConfig(**FULL).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Using Rank-Stabilized LoRA")
        theirs = peft.LoraConfig.from_pretrained(tmp_path)
    for name, value in FULL.items():
        theirs_value = getattr(theirs, name)
        assert (sorted(theirs_value) if isinstance(theirs_value, set) else theirs_value) == (
            sorted(value) if name in ("target_modules", "exclude_modules") else value
        )


def test_we_read_stock_pefts_file(tmp_path: Path) -> None:
    peft.LoraConfig(**FULL).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = LoraConfig.from_pretrained(tmp_path)
    for name, value in FULL.items():
        ours_value = getattr(ours, name)
        assert (sorted(ours_value) if name == "target_modules" else ours_value) == (
            sorted(value) if name == "target_modules" else value
        )


def test_unknown_keys_of_a_file_are_ignored_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="brand_new_field"):
        config = LoraConfig.from_dict({"peft_type": "LORA", "r": 3, "brand_new_field": 1})
    assert config.r == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[1, 2]", "JSON list"),
        ('{"r": 8}', "peft_type"),
        ('{"peft_type": "IA3"}', "IA3"),
        ('{"peft_type": "LORA", "r": 100000}', "r: got 100000"),
        ("[" * 100_000, "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
    ],
)
def test_hostile_files_are_refused_by_name(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        LoraConfig.from_pretrained(tmp_path)
    assert str(file) in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        LoraConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "given", [[3, 1], {"embed_tokens": [3, 1], "lm_head": [2]}], ids=["list", "dict"]
)
def test_parts_of_modules_go_through_pefts_file(given: Any, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "trainable_token_indices": given,
        "target_parameters": ["experts.down_proj"],
    }
    LoraConfig(**fields).save_pretrained(tmp_path)
    theirs = peft.LoraConfig.from_pretrained(tmp_path)
    assert theirs.trainable_token_indices == given
    assert theirs.target_parameters == ["experts.down_proj"]
    theirs.save_pretrained(tmp_path)
    ours = LoraConfig.from_pretrained(tmp_path)
    assert {name: getattr(ours, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"trainable_token_indices": []}, ValueError, "different indices"),
        ({"trainable_token_indices": [1, 1]}, ValueError, "different indices"),
        ({"trainable_token_indices": [-1]}, ValueError, "different indices"),
        ({"trainable_token_indices": [True]}, TypeError, "integers"),
        ({"trainable_token_indices": "12"}, TypeError, "list of indices"),
        ({"trainable_token_indices": {"": [1]}}, TypeError, "module names"),
        ({"trainable_token_indices": {"a": [0.5]}}, TypeError, r"\['a'\].*integers"),
        ({"trainable_token_indices": {"a": [1]}, "modules_to_save": ["a"]}, ValueError, "as well"),
        ({"target_parameters": "experts.up"}, TypeError, "list of module names"),
        ({"target_parameters": ["experts.up"], "lora_dropout": 0.1}, ValueError, "lora_dropout"),
        ({"layer_replication": []}, ValueError, "start below end"),
        ({"layer_replication": [[0, 2, 4]]}, ValueError, "start below end"),
        ({"layer_replication": [[2, 1]]}, ValueError, "start below end"),
        ({"layer_replication": [[-1, 1]]}, ValueError, "different indices"),
        ({"layer_replication": [["0", 1]]}, TypeError, "integers"),
        ({"layer_replication": [3]}, TypeError, "list of indices"),
        ({"layer_replication": 3}, TypeError, "start, end"),
        ({"layer_replication": [[0, 1]], "bias": "all"}, ValueError, "bias: got 'all'"),
        ({"layer_replication": [[0, 1]], "quantize": "nf4"}, ValueError, "quantize: got 'nf4'"),
        ({"ensure_weight_tying": 1}, TypeError, "ensure_weight_tying"),
    ],
)
def test_bad_parts_of_modules_are_refused(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        LoraConfig(**fields)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_dora_and_lora_bias_are_in_the_file(tmp_path: Path, settings: dict[str, bool]) -> None:
    peft.LoraConfig(**settings).save_pretrained(tmp_path)
    ours = LoraConfig.from_pretrained(tmp_path)
    assert {name: getattr(ours, name) for name in settings} == settings
    values = json.loads(ours.to_json())
    assert {name: values[name] for name in ("use_dora", "lora_bias")} == {
        "use_dora": False,
        "lora_bias": False,
        **settings,
    }


def test_eva_settings_go_both_ways(tmp_path: Path) -> None:
    settings = {"rho": 1.5, "tau": 0.9, "whiten": True}
    theirs = peft.LoraConfig(init_lora_weights="eva", eva_config=peft.EvaConfig(**settings))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = LoraConfig.from_pretrained(tmp_path / "theirs")
    assert ours.eva_config == EvaConfig(**settings)
    assert LoraConfig.from_dict(theirs.to_dict()).eva_config == ours.eva_config
    ours.save_pretrained(tmp_path / "ours")
    again = peft.LoraConfig.from_pretrained(tmp_path / "ours")
    assert (again.init_lora_weights, again.eva_config) == ("eva", theirs.eva_config)
    assert LoraConfig(init_lora_weights="eva").eva_config == EvaConfig()
    with pytest.warns(UserWarning, match="eva_config"):
        LoraConfig(eva_config=EvaConfig())


def test_loftq_is_for_making_the_base_and_not_in_the_file() -> None:
    config = LoraConfig(
        init_lora_weights="loftq", quantize="nf4", loftq_config=LoftQConfig(loftq_iter=3)
    )
    assert config.loftq_config == {"loftq_bits": 4, "loftq_iter": 3}
    values = json.loads(config.to_json())
    assert (values["init_lora_weights"], values["loftq_config"]) == (True, {})
    with pytest.warns(UserWarning, match="loftq_config"):
        assert LoraConfig(loftq_config={"loftq_iter": 2}).loftq_config == {}
