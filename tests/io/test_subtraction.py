"""PiSSA and OLoRA saved as plain LoRA: read by stock peft and here over the base as it was."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import fastlora
from fastlora import LoraConfig
from tests.io.test_adapter_files import CONFIG, llama, train_everything_a_little
from tests.tiny_models import logits, plain_net, some_ids


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}}])  # fmt: skip
@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_16"])
def test_pissa_and_olora_become_plain_lora(
    init: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=init, **settings
    )
    model = fastlora.get_peft_model(llama(), config)
    model.save_pretrained(tmp_path / "initial")
    train_everything_a_little(model)
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    assert model.peft_config["default"].r == 4
    values = json.loads((tmp_path / "plain" / CONFIG).read_text())
    assert (values["init_lora_weights"], values["r"]) == (True, 8)
    want = logits(model.eval(), some_ids())
    assert not torch.allclose(want, logits(llama(), some_ids()), atol=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = peft.PeftModel.from_pretrained(llama(), tmp_path / "plain")
    for other in (stock, fastlora.load_adapter(llama(), tmp_path / "plain")):
        torch.testing.assert_close(logits(other, some_ids()), want, atol=1e-4, rtol=1e-4)


def test_conversions_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    model = fastlora.get_peft_model(plain_net(), LoraConfig(r=4, target_modules=["up"]))
    model.save_pretrained(tmp_path / "initial")
    with pytest.raises(ValueError, match="this adapter has True"):
        fastlora.save_adapter(
            model, tmp_path / "out", path_initial_model_for_weight_conversion=tmp_path / "initial"
        )
    config = LoraConfig(r=8, target_modules=["up"], init_lora_weights="pissa")
    other = fastlora.get_peft_model(plain_net(), config)
    with pytest.raises(ValueError, match=r"\[4, 24\].*\[8, 24\]"):
        fastlora.save_adapter(
            other, tmp_path / "out", path_initial_model_for_weight_conversion=tmp_path / "initial"
        )
    with pytest.raises(FileNotFoundError):
        fastlora.save_adapter(
            other, tmp_path / "out", path_initial_model_for_weight_conversion=tmp_path / "nowhere"
        )
    assert not (tmp_path / "out").exists()
