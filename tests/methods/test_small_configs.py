"""IA3Config and LNTuningConfig: PEFT's fields, tables and files."""

from __future__ import annotations

import dataclasses
from typing import Any

import peft
import pytest
from peft.utils import constants

import fastlora
from fastlora.methods.ia3 import IA3_TARGETS
from fastlora.methods.ln_tuning import NORMS

COMMON = {"auto_mapping", "peft_version", "peft_type"}


def test_the_default_modules_are_pefts() -> None:
    targets = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    feedforward = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    assert {name: list(value) for name, value in targets.items()} == {
        name: value[0] for name, value in IA3_TARGETS.items()
    }
    assert feedforward == {name: value[1] for name, value in IA3_TARGETS.items()}
    assert constants.TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING == NORMS


@pytest.mark.parametrize("kind", ["IA3Config", "LNTuningConfig"])
def test_fields_and_defaults_are_pefts(kind: str) -> None:
    ours, theirs = getattr(fastlora, kind), getattr(peft, kind)
    names = {f.name for f in dataclasses.fields(theirs)} - COMMON
    assert {f.name for f in dataclasses.fields(ours)} == names
    mine, other = ours(), theirs()
    assert all(getattr(mine, name) == getattr(other, name) for name in names)
    assert mine.to_dict()["peft_type"] == other.peft_type.value
    assert type(fastlora.PeftConfig.from_dict(other.to_dict())) is ours


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"feedforward_modules": ["fc"], "target_modules": ["q"]}, ValueError, r"\['fc'\]"),
        ({"feedforward_modules": "("}, ValueError, "feedforward_modules"),
        ({"feedforward_modules": [3]}, TypeError, "feedforward_modules"),
        ({"init_ia3_weights": 1}, TypeError, "init_ia3_weights"),
        ({"fan_in_fan_out": "x"}, TypeError, "fan_in_fan_out"),
        ({"r": 8}, TypeError, "'r'"),
    ],
)
def test_bad_fields_are_named(settings: dict[str, Any], kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        fastlora.IA3Config(**settings)
