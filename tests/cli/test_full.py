"""``--method full``: all weights are trained, kept in fp32, and saved as a plain checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastlora.training import FinetuneConfig, InputError
from tests.tiny_models import tiny_llama

FULL = ("--method", "full", "--lr", 0.002, "--max-steps", 12)


@pytest.fixture
def full_cli(fastlora_cli: Any, model_dir: Path, text_file: Path, tmp_path: Path) -> Any:
    def run(*arguments: object, output: Path = tmp_path / "run", model: Path = model_dir) -> Any:
        return fastlora_cli(
            *("finetune", "--model", model, "--data", text_file, "--output", output),
            *("--seq-length", 32, "--batch-size", 4, "--device", "cpu", *FULL, *arguments),
        )

    return run


def read(output: Path, name: str = "summary.json") -> Any:
    text = (output / name).read_text()
    return json.loads(text) if name == "summary.json" else list(map(json.loads, text.splitlines()))


def losses(output: Path) -> list[float]:
    return [entry["loss"] for entry in read(output, "log.jsonl") if "loss" in entry]


def test_every_weight_learns_and_the_checkpoint_is_transformers_own(
    full_cli: Any, model_dir: Path, tmp_path: Path
) -> None:
    result = full_cli()
    assert result.exit_code == 0, result.output
    output = tmp_path / "run"
    summary = read(output)
    assert summary["perplexity_after"] < 0.8 * summary["perplexity_before"]
    assert summary["trained_parameters"] == summary["total_parameters"]
    assert (summary["adapter"], summary["model"]) == (None, str(output / "model"))
    assert not (output / "adapter").exists()
    before, after = (load_file(d / "model.safetensors") for d in (model_dir, output / "model"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    # The folder is a model of its own: training it goes on where this run ended.
    again = full_cli("--max-steps", 1, model=output / "model", output=tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert read(tmp_path / "again")["perplexity_before"] == pytest.approx(
        summary["perplexity_after"], rel=1e-5
    )


def test_the_steps_are_those_of_plain_adamw(full_cli: Any, model_dir: Path, tmp_path: Path) -> None:
    """Two steps from the logged learning rates, in fp64 by hand."""
    from rich.console import Console
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastlora.training.blocks import prepare_data
    from fastlora.training.display import Display
    from fastlora.training.packing import BatchOrder, collate

    assert full_cli("--max-steps", 2, "--grad-clip", 0).exit_code == 0
    output = tmp_path / "run"
    config = FinetuneConfig.from_json(json.loads((output / "run.json").read_text())["config"])
    data = prepare_data(
        config,
        AutoTokenizer.from_pretrained(model_dir),
        Display(Console(quiet=True), torch.device("cpu")),
    )
    model = AutoModelForCausalLM.from_pretrained(model_dir).double()
    moments = {name: [torch.zeros_like(p)] * 2 for name, p in model.named_parameters()}
    order = BatchOrder(len(data.training), config.batch_size, config.seed)
    steps = [entry for entry in read(output, "log.jsonl") if "loss" in entry]
    for step, entry in enumerate(steps):
        batch = collate([data.training[i] for i in order(step)], 0, config.seq_length)
        logits = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100
        )
        assert entry["loss"] == pytest.approx(loss.item(), rel=1e-5)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for (name, p), g in zip(model.named_parameters(), gradients, strict=True):
                m, v = moments[name]
                m, v = moments[name] = [0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g]
                corrected = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
                p -= entry["learning_rate"] * corrected[0] / (corrected[1].sqrt() + 1e-8)
    saved = load_file(output / "model" / "model.safetensors")
    for name, p in model.named_parameters():
        # A gradient of zero but for rounding moves a weight by the learning rate either way: few of them.
        off = (saved[name].double() - p).abs() > 1e-5
        assert float(off.double().mean()) < 0.01, name


def test_a_resumed_run_is_the_run(full_cli: Any, tmp_path: Path) -> None:
    assert full_cli("--save-every", 4, "--keep-last", 9).exit_code == 0
    output = tmp_path / "run"
    whole, final = losses(output), load_file(output / "model" / "model.safetensors")
    for step in (8, 12):
        shutil.rmtree(output / "checkpoints" / f"step-{step:08d}")
    shutil.rmtree(output / "model")
    resumed = full_cli("--resume")
    assert resumed.exit_code == 0, resumed.output
    assert losses(output) == whole
    again = load_file(output / "model" / "model.safetensors")
    assert all(torch.equal(final[name], again[name]) for name in final)


def test_sixteen_bits_compute_and_fp32_remembers(full_cli: Any, tmp_path: Path) -> None:
    """A learning rate so small that bf16 weights would not move."""
    result = full_cli("--dtype", "bfloat16", "--lr", 1e-6, "--max-steps", 3)
    assert result.exit_code == 0, result.output
    output = tmp_path / "run"
    saved = load_file(output / "model" / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    assert json.loads((output / "model/config.json").read_text())["dtype"] == "bfloat16"
    (checkpoint,) = (output / "checkpoints").iterdir()
    masters = load_file(checkpoint / "parameters.safetensors")
    assert {value.dtype for value in masters.values()} == {torch.float32}
    assert losses(output)[-1] < losses(output)[0] + 0.1
    assert read(output)["dtype"] == "bfloat16"


def test_tied_weights_stay_tied(full_cli: Any, model_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tied = tiny_llama(vocab_size=len(tokenizer), tie_word_embeddings=True, initializer_range=0.3)
    tied.save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    assert full_cli("--dtype", "bfloat16", model=tmp_path / "tied").exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    summary = read(tmp_path / "run")
    assert summary["total_parameters"] == sum(p.numel() for p in tied.parameters())
    saved = load_file(tmp_path / "run/model/model.safetensors")
    assert sum(value.numel() for value in saved.values()) == summary["total_parameters"]


def test_checkpointing_unfreezing_and_a_sample(full_cli: Any, tmp_path: Path) -> None:
    plain = full_cli("--max-steps", 3)
    assert plain.exit_code == 0, plain.output
    whole = losses(tmp_path / "run")
    recomputed = full_cli(
        *("--max-steps", 3, "--gradient-checkpointing", "--overwrite"),
        *("--sample-prompt", "When", "--sample-tokens", 3),
    )
    assert recomputed.exit_code == 0, recomputed.output
    assert losses(tmp_path / "run") == pytest.approx(whole, rel=1e-5)
    assert "sample after: When" in recomputed.stdout
    staged = full_cli("--max-steps", 4, "--unfreeze-over", 1.0, "--overwrite")
    assert staged.exit_code == 0, staged.output


def test_what_full_cannot_be(full_cli: Any, model_dir: Path, tmp_path: Path) -> None:
    quantised = tmp_path / "quantised"
    shutil.copytree(model_dir, quantised)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(config))
    for result, message in (
        (full_cli(model=quantised), "is quantised (bitsandbytes)"),
        (full_cli("--r", 8), "--method full has no --r: leave it out, or take one of lora"),
        (full_cli("--target-modules", "q_proj"), "has no --target-modules"),
        (full_cli("--trainable-share", "1%"), "--trainable-share"),
    ):
        assert result.exit_code == 2, result.output
        assert message in result.stderr
        assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="trainable-share"):
        FinetuneConfig(model="m", data="d", method="full", trainable_share=0.1).validate()
