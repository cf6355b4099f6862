"""BottleneckConfig: the adapters library's fields, presets and file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fastlora
from fastlora import BottleneckConfig, HoulsbyConfig, ParallelConfig, PeftConfig, PfeifferConfig

# The presets as a file of the adapters library (1.2) spells them.
DEFAULTS = {
    "original_ln_before": False,
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "init_weights": "bert",
    "is_parallel": False,
    "scaling": 1.0,
    "use_gating": False,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "cross_adapter": False,
    "leave_out": [],
    "dropout": 0.0,
    "phm_layer": False,
    "phm_dim": 4,
    "factorized_phm_W": True,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "factorized_phm_rule": False,
    "phm_c_init": "normal",
    "phm_init_range": 0.0001,
    "learn_phm": True,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "phm_rank": 1,
    "phm_bias": True,
    "stochastic_depth": 0.0,
}
DOUBLE = {"mh_adapter": True, "output_adapter": True, "reduction_factor": 16}
SINGLE = {"mh_adapter": False, "output_adapter": True, "reduction_factor": 16}
PRESETS: dict[Any, dict[str, Any]] = {
    HoulsbyConfig: {**DEFAULTS, **DOUBLE, "non_linearity": "swish"},
    PfeifferConfig: {**DEFAULTS, **SINGLE, "non_linearity": "relu", "original_ln_before": True},
    ParallelConfig: {
        **DEFAULTS,
        **SINGLE,
        "non_linearity": "relu",
        "reduction_factor": 2,
        "is_parallel": True,
        "scaling": 4.0,
        "init_weights": "mam_adapter",
    },
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_the_librarys(preset: Any, tmp_path: Path) -> None:
    file = {"config": PRESETS[preset], "name": "task", "model_type": "bert", "version": "1.2.0"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(file))
    read = PeftConfig.from_pretrained(tmp_path)
    assert read == preset()
    preset().save_pretrained(tmp_path)
    text = json.loads((tmp_path / "adapter_config.json").read_text())
    wanted = PRESETS[preset]
    assert text["config"] == {key: wanted[key] for key in text["config"]}
    left = set(wanted) - set(text["config"])  # at the library's defaults
    assert all(wanted[key] == DEFAULTS[key] for key in left)
    assert PeftConfig.from_pretrained(tmp_path) == preset()


def test_the_file_keeps_what_the_library_has_no_field_for(tmp_path: Path) -> None:
    config = ParallelConfig(
        target_modules=["mlp"], modules_to_save=["head"], task_type="CAUSAL_LM", scaling=2
    )
    config.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "target_modules" not in text["config"]
    assert text["config"]["scaling"] == 2.0 and isinstance(text["config"]["scaling"], float)
    assert fastlora.PeftConfig.from_pretrained(tmp_path) == config


def test_files_from_before_versions_name_activations_otherwise() -> None:
    config = {**PRESETS[PfeifferConfig], "non_linearity": "gelu"}
    assert BottleneckConfig.from_dict({"config": config}).non_linearity == "gelu_new"
    assert BottleneckConfig.from_dict({"config": config, "version": "1"}).non_linearity == "gelu"


def test_other_architectures_of_the_library_are_refused() -> None:
    with pytest.raises(ValueError, match="architecture: got 'lora'"):
        PeftConfig.from_dict({"config": {"architecture": "lora", "r": 8}})


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"phm_layer": True}, NotImplementedError, "phm_layer"),
        ({"inv_adapter": "nice"}, NotImplementedError, "inv_adapter"),
        ({"cross_adapter": True}, NotImplementedError, "cross_adapter"),
        ({"stochastic_depth": 0.1}, NotImplementedError, "stochastic_depth"),
        ({"phm_dim": 4}, TypeError, "phm_dim"),
        ({"mh_adapter": 1}, TypeError, "mh_adapter"),
        ({"reduction_factor": 0}, ValueError, "reduction_factor"),
        ({"reduction_factor": {"x": 2}}, ValueError, "'x'"),
        ({"reduction_factor": {"1": -2}}, ValueError, "positive"),
        ({"non_linearity": "magic"}, ValueError, "non_linearity: got 'magic'"),
        ({"non_linearity": None}, TypeError, "non_linearity"),
        ({"init_weights": "zero"}, ValueError, "init_weights"),
        ({"scaling": "big"}, ValueError, "scaling"),
        ({"scaling": float("inf")}, ValueError, "scaling"),
        ({"residual_before_ln": "pre"}, ValueError, "residual_before_ln"),
        ({"dropout": 1.0}, ValueError, "dropout"),
        ({"leave_out": [-1]}, ValueError, "leave_out"),
        ({"leave_out": [0], "target_modules": ["mlp"]}, ValueError, "exclude_modules"),
        ({"original_ln_before": True, "target_modules": ["mlp"]}, ValueError, "added to"),
        ({"original_ln_after": False, "target_modules": ["mlp"]}, ValueError, "follows"),
        ({"reduction_factor": {"default": 2}, "target_modules": ["m"]}, ValueError, "no index"),
    ],
)
def test_bad_fields_are_named(changes: dict[str, Any], kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        HoulsbyConfig(**changes)


def test_reduction_factors() -> None:
    config = HoulsbyConfig(reduction_factor={1: 4, "default": 8})
    assert [config.width(64, i) for i in range(3)] == [8, 16, 8]
    assert HoulsbyConfig(reduction_factor=1000).width(64, 0) == 1
    assert HoulsbyConfig(reduction_factor=0.5).width(64, 0) == 128
    with pytest.raises(ValueError, match="neither layer 2"):
        HoulsbyConfig(reduction_factor={"1": 4}).width(64, 2)
