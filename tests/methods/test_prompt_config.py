"""Prompt learning's configurations: PEFT's fields and defaults, values that are refused by name."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest

import fastlora
from fastlora import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

KINDS = {
    "PROMPT_TUNING": ("PromptTuningConfig", PromptTuningConfig),
    "PREFIX_TUNING": ("PrefixTuningConfig", PrefixTuningConfig),
    "P_TUNING": ("PromptEncoderConfig", PromptEncoderConfig),
}


@pytest.mark.parametrize("peft_type", KINDS)
def test_fields_and_defaults_are_pefts(peft_type: str, tmp_path: Path) -> None:
    name, own = KINDS[peft_type]
    stock = getattr(peft, name)(num_virtual_tokens=4)
    mine = own(num_virtual_tokens=4)
    theirs = {f.name: getattr(stock, f.name) for f in dataclasses.fields(stock)}
    for ignored in ("auto_mapping", "peft_version", "peft_type"):
        theirs.pop(ignored)
    assert {f.name: getattr(mine, f.name) for f in dataclasses.fields(mine)} == theirs
    assert mine.peft_type == peft_type == stock.peft_type.value and mine.is_prompt_learning
    stock.save_pretrained(tmp_path)
    assert fastlora.PeftConfig.from_pretrained(tmp_path) == mine
    mine.save_pretrained(tmp_path / "own")
    assert type(peft.PeftConfig.from_pretrained(tmp_path / "own")) is type(stock)
    assert own.from_dict(stock.to_dict()) == mine


def test_enums_of_peft_are_taken() -> None:
    config = PromptEncoderConfig(
        num_virtual_tokens=2,
        task_type=peft.TaskType.CAUSAL_LM,
        encoder_reparameterization_type=peft.PromptEncoderReparameterizationType.LSTM,
    )
    assert config.encoder_reparameterization_type == "LSTM" and config.task_type == "CAUSAL_LM"
    init = peft.PromptTuningInit.SAMPLE_VOCAB
    assert PromptTuningConfig(num_virtual_tokens=2, prompt_tuning_init=init).to_dict()["prompt_tuning_init"] == "SAMPLE_VOCAB"  # fmt: skip


REFUSED: list[tuple[type, dict[str, Any], type[Exception], str]] = [
    (PromptTuningConfig, {"num_virtual_tokens": None}, ValueError, "num_virtual_tokens"),
    (PromptTuningConfig, {"num_virtual_tokens": 0}, ValueError, "num_virtual_tokens"),
    (PromptTuningConfig, {"num_virtual_tokens": True}, ValueError, "num_virtual_tokens"),
    (PromptTuningConfig, {"num_transformer_submodules": 3}, ValueError, "num_transformer"),
    (PromptTuningConfig, {"token_dim": -1}, ValueError, "token_dim"),
    (PromptTuningConfig, {"prompt_tuning_init": "ZEROS"}, ValueError, "prompt_tuning_init"),
    (PromptTuningConfig, {"prompt_tuning_init": "TEXT"}, ValueError, "prompt_tuning_init_text"),
    (
        PromptTuningConfig,
        {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a"},
        ValueError,
        "tokenizer_name_or_path",
    ),
    (PromptTuningConfig, {"tokenizer_kwargs": {"a": 1}}, ValueError, "tokenizer_kwargs"),
    (PromptTuningConfig, {"modules_to_save": "head"}, TypeError, "modules_to_save"),
    (PromptTuningConfig, {"prefix_projection": True}, TypeError, "prefix_projection"),
    (PrefixTuningConfig, {"init_weights": "ones"}, ValueError, "init_weights"),
    (PrefixTuningConfig, {"prefix_projection": 1}, TypeError, "prefix_projection"),
    (PrefixTuningConfig, {"encoder_hidden_size": 0}, ValueError, "encoder_hidden_size"),
    (PromptEncoderConfig, {"encoder_reparameterization_type": "GRU"}, ValueError, "encoder_repar"),
    (PromptEncoderConfig, {"encoder_dropout": 1.0}, ValueError, "encoder_dropout"),
    (PromptEncoderConfig, {"encoder_num_layers": 0}, ValueError, "encoder_num_layers"),
    (PromptEncoderConfig, {"task_type": "LM"}, ValueError, "task_type"),
    (PromptEncoderConfig, {"target_modules": ["q"]}, TypeError, "target_modules"),
]


@pytest.mark.parametrize(("kind", "changes", "error", "message"), REFUSED)
def test_bad_values_are_refused_by_name(
    kind: type, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kind(**{"num_virtual_tokens": 4, **changes})


def test_a_field_without_a_use_warns() -> None:
    with pytest.warns(UserWarning, match="encoder_num_layers"):
        PromptEncoderConfig(num_virtual_tokens=2, encoder_num_layers=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PromptEncoderConfig(
            num_virtual_tokens=2, encoder_num_layers=3, encoder_reparameterization_type="LSTM"
        )
