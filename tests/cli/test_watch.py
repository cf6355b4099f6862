"""Forgetting watched, ranks from a budget, layers that begin to train one by one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastlora.training.unfreezing import Unfreezing


def read(output: Path, name: str = "summary.json") -> Any:
    text = (output / name).read_text()
    return (
        json.loads(text) if name.endswith(".json") else [json.loads(x) for x in text.splitlines()]
    )


def test_the_watched_text_is_evaluated_beside_the_held_out(
    finetune_cli: Any, general: Path, tmp_path: Path
) -> None:
    result = finetune_cli("--watch", general, "--epochs", 3, "--eval-every", 10)
    assert result.exit_code == 0, result.output
    output = tmp_path / "run"
    summary, log = read(output), read(output, "log.jsonl")
    evaluations = [entry for entry in log if "eval_loss" in entry]
    assert len(evaluations) > 2
    assert all("watch_loss" in entry for entry in evaluations)
    for when, entry in (("before", evaluations[0]), ("after", evaluations[-1])):
        want = math.exp(entry["watch_loss"])
        assert summary[f"watched_perplexity_{when}"] == pytest.approx(want)
        assert f"watched perplexity {when}: {want:.2f}" in result.stdout
    # Independently, of the base model: the loss of the whole text's tokens.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(read(output, "run.json")["config"]["model"])
    tokenizer = AutoTokenizer.from_pretrained(read(output, "run.json")["config"]["model"])
    ids = torch.tensor(tokenizer(general.read_text()).input_ids)
    length = read(output, "run.json")["config"]["seq_length"]
    total = count = 0.0
    for piece in ids.split(length):
        if len(piece) > 1:
            with torch.no_grad():
                loss = model(piece[None], labels=piece[None]).loss
            total += float(loss) * (len(piece) - 1)
            count += len(piece) - 1
    assert evaluations[0]["watch_loss"] == pytest.approx(total / count, rel=0.05)


def test_without_watch_nothing_is_said(finetune_cli: Any, tmp_path: Path) -> None:
    result = finetune_cli("--max-steps", 2)
    assert "watched" not in result.stdout
    assert read(tmp_path / "run")["watched_perplexity_after"] is None


def test_the_watched_file_is_part_of_the_run(finetune_cli: Any, general: Path) -> None:
    assert finetune_cli("--watch", general, "--max-steps", 2).exit_code == 0
    general.write_text("Other text that says other things. " * 9)
    result = finetune_cli("--resume")
    assert result.exit_code == 2
    assert "--watch changed" in result.output
    missing = finetune_cli("--watch", str(general) + "x", "--overwrite")
    assert missing.exit_code == 2
    assert "--watch" in missing.output


def test_a_resumed_run_unfreezes_alike(finetune_cli: Any, tmp_path: Path) -> None:
    options = ("--max-steps", 12, "--save-every", 4, "--keep-last", 9, "--unfreeze-over", 0.8)
    assert finetune_cli(*options).exit_code == 0
    output = tmp_path / "run"
    whole = [e["loss"] for e in read(output, "log.jsonl") if "loss" in e]
    import shutil

    for step in (8, 12):
        shutil.rmtree(output / "checkpoints" / f"step-{step:08d}")
    assert finetune_cli("--resume").exit_code == 0
    assert [e["loss"] for e in read(output, "log.jsonl") if "loss" in e] == whole


def test_lower_layers_wait(finetune_cli: Any, tmp_path: Path) -> None:
    """Two layers over the whole run: the first begins at its half."""
    assert finetune_cli("--max-steps", 4, "--unfreeze-over", 1.0, "--save-every", 2, "--keep-last", 9).exit_code == 0  # fmt: skip
    at = {
        step: load_file(tmp_path / f"run/checkpoints/step-{step:08d}/parameters.safetensors")
        for step in (2, 4)
    }
    for name in at[2]:
        if "lora_B" in name:
            first = ".layers.0." in name
            assert bool(at[2][name].any()) != first, name
            assert bool(at[4][name].any()), name


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_every_parameter_starts_once_and_in_order(share: float) -> None:
    names = ["embed", "layers.0.a", "layers.1.a", "layers.2.a", "layers.3.a", "head"]
    parameters = {f"model.{name}": nn.Parameter(torch.zeros(1)) for name in names}
    unfreezing = Unfreezing(parameters, share)
    first: dict[str, float] = {}
    for step in range(101):
        unfreezing.at(step / 100)
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                first.setdefault(name, step / 100)
            else:
                assert name not in first
    want = [share, 0.75 * share, 0.5 * share, 0.25 * share, 0.0, 0.0]
    assert list(map(first.__getitem__, parameters)) == pytest.approx(want, abs=0.011)


def test_numbers_inside_a_head_are_no_layers() -> None:
    names = [
        "layers.0.a",
        "layers.1.a",
        "layers.2.a",
        "head.modules_to_save.1.0.weight",
        "head.modules_to_save.1.1.weight",
    ]
    parameters = {f"model.{name}": nn.Parameter(torch.zeros(1)) for name in names}
    Unfreezing(parameters, 1.0).at(0.0)
    assert [p.requires_grad for p in parameters.values()] == [False, False, True, True, True]


def test_the_share_of_a_run(
    fastlora_cli: Any, model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    run = ("finetune", "--model", model_dir, "--data", text_file, "--output", tmp_path / "run")
    run = (*run, "--seq-length", 32, "--device", "cpu", "--max-steps", 1, "--trainable-share")
    result = fastlora_cli(*run, "8%")
    assert result.exit_code == 0, result.output
    summary = read(tmp_path / "run")
    assert 0.05 < summary["trained_parameters"] / summary["total_parameters"] <= 0.08
    config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert f"rank {config['r']} trains at most 8.00%" in result.stdout
    for arguments, match in (
        (("8%", "--r", 4), "exclude"),
        (("many",), "no number"),
        (("200%",), "below 1"),
        (("0.001%",), "rank 1"),
    ):
        result = fastlora_cli(*run, *arguments, "--overwrite")
        assert result.exit_code == 2, result.output
        assert match in result.output
