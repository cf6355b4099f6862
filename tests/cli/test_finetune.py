"""``fastlora finetune`` on a tiny model: what it leaves behind, and that its options do what
they say.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

LOSS_KEYS = ("step", "loss", "learning_rate", "grad_norm")


def read_log(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[float]:
    return [entry["loss"] for entry in read_log(output) if "loss" in entry]


def test_text_end_to_end(finetune_cli: Any, model_dir: Path, tmp_path: Path) -> None:
    result = finetune_cli(
        "--epochs", 3, "--sample-prompt", "When", "--sample-tokens", 5, "--eval-every", 20
    )
    assert result.exit_code == 0, result.output
    output = tmp_path / "run"
    summary = json.loads((output / "summary.json").read_text())
    assert summary["perplexity_after"] < 0.8 * summary["perplexity_before"]
    assert f"held-out perplexity before: {summary['perplexity_before']:.2f}" in result.stdout
    assert f"held-out perplexity after: {summary['perplexity_after']:.2f}" in result.stdout
    assert f"sample after: When{summary['sample_after']}" in result.stdout
    for path in (summary["adapter"], summary["curve"], summary["log"]):
        assert str(path) in result.stdout
        assert Path(path).exists()

    log = read_log(output)
    steps = [entry for entry in log if "loss" in entry]
    held_out = [entry for entry in log if "eval_loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, summary["steps"] + 1))
    assert [entry["step"] for entry in held_out] == [
        *range(0, summary["steps"], 20),
        summary["steps"],
    ]
    assert math.exp(held_out[0]["eval_loss"]) == pytest.approx(summary["perplexity_before"])
    assert steps[-1]["tokens"] == summary["tokens"] == 3 * summary["training_tokens"]
    assert (output / "loss_curve.png").read_bytes().startswith(b"\x89PNG")

    # The adapter in stock PEFT computes the perplexity that was reported.
    import peft
    from transformers import AutoModelForCausalLM

    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_dir), output / "adapter"
    )
    assert held_out_loss(model, finetune_config(output)) == pytest.approx(
        held_out[-1]["eval_loss"], rel=1e-5
    )


def finetune_config(output: Path) -> Any:
    from fastlora.training import FinetuneConfig

    return FinetuneConfig.from_json(json.loads((output / "run.json").read_text())["config"])


def held_out_loss(model: Any, config: Any) -> float:
    """The mean loss over the run's held-out segments, one by one, through the model's own loss."""
    from rich.console import Console

    from fastlora.training.base import load_tokenizer
    from fastlora.training.blocks import prepare_data
    from fastlora.training.display import Display

    data = prepare_data(
        config, load_tokenizer(config.model), Display(Console(quiet=True), torch.device("cpu"))
    )
    total = count = 0.0
    with torch.no_grad():
        for segment in (segment for block in data.held_out for segment in block):
            ids = torch.tensor(segment.ids[None].astype("int64"))
            labels = ids.clone()
            labels[:, 0] = -100  # nor does a virtual token have to tell the first
            targets = len(segment) - 1
            total += float(model(input_ids=ids, labels=labels).loss) * targets
            count += targets
    return total / count


def test_chat_trains_on_answers_only(finetune_cli: Any, jsonl: Any, tmp_path: Path) -> None:
    """Questions are random, answers constant: with the loss on answers alone it must come near
    zero.
    """
    generator = torch.Generator().manual_seed(0)
    records = [
        {
            "messages": [
                {
                    "role": "user",
                    "content": "".join(
                        chr(97 + c) for c in torch.randint(0, 26, (4,), generator=generator)
                    ),
                },
                {"role": "assistant", "content": "yes"},
            ]
        }
        for _ in range(60)
    ]
    result = finetune_cli("--epochs", 12, "--seq-length", 64, "--lr", 0.02, data=jsonl(*records))
    assert result.exit_code == 0, result.output
    assert losses(tmp_path / "run")[-1] < 0.3
    result = finetune_cli(
        "--epochs",
        12,
        "--seq-length",
        64,
        "--lr",
        0.02,
        "--loss-on",
        "all",
        "--overwrite",
        data=jsonl(*records),
    )
    assert result.exit_code == 0, result.output
    assert losses(tmp_path / "run")[-1] > 0.5  # the random letters cannot be learnt


def test_accumulation_equals_a_larger_batch(finetune_cli: Any, tmp_path: Path, jsonl: Any) -> None:
    """Documents of unequal length: the mean must be over the step's tokens, not over its
    batches' means.
    """
    data = jsonl(
        *[{"prompt": "p" * (i % 7), "completion": "word " * (1 + i % 5)} for i in range(40)]
    )
    runs = {}
    for name, arguments in {
        "large": ("--batch-size", 8, "--grad-accumulation", 1),
        "small": ("--batch-size", 1, "--grad-accumulation", 8),
        "checkpointed": ("--batch-size", 8, "--gradient-checkpointing"),
    }.items():
        result = finetune_cli(
            "--max-steps", 6, "--no-packing", *arguments, data=data, output=tmp_path / name
        )
        assert result.exit_code == 0, result.output
        runs[name] = losses(tmp_path / name)
    assert len(set(runs["large"])) == 5  # an epoch of 40 blocks (less those held out) at 8 a step
    assert runs["small"] == pytest.approx(runs["large"], rel=1e-4)
    assert runs["checkpointed"] == pytest.approx(runs["large"], rel=1e-4)


def test_packing_changes_the_number_of_rows_not_the_loss(
    finetune_cli: Any, jsonl: Any, tmp_path: Path
) -> None:
    data = jsonl(*[{"text": f"document {i}"} for i in range(40)])
    steps, before = {}, {}
    for name in ("packing", "no-packing"):
        result = finetune_cli(
            "--eval-fraction", 0.5, f"--{name}", data=data, output=tmp_path / name
        )
        assert result.exit_code == 0, result.output
        assert "see those before them" not in result.output
        before[name] = read_log(tmp_path / name)[0]["eval_loss"]
        steps[name] = len(losses(tmp_path / name))
    assert before["packing"] == pytest.approx(before["no-packing"], rel=1e-5)
    assert steps["packing"] == pytest.approx(steps["no-packing"] / 2, abs=1)  # two fit into a block


def test_evaluation_file(finetune_cli: Any, jsonl: Any, tmp_path: Path, text_file: Path) -> None:
    held_out = jsonl({"text": "A text of its own."}, name="eval.jsonl")
    result = finetune_cli("--max-steps", 1, "--eval-data", held_out)
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["held_out_tokens"] == len("A text of its own.") + 1
    assert summary["training_tokens"] == len(text_file.read_text()) + 1


def test_target_modules_and_rank(finetune_cli: Any, tmp_path: Path) -> None:
    for wanted, count in (
        ("q_proj,v_proj", 8),
        ("all-linear", 28),
        (r"regex:.*\.0\.mlp\.up_proj", 2),
    ):
        result = finetune_cli("--max-steps", 1, "--target-modules", wanted, "--overwrite")
        assert result.exit_code == 0, result.output
        record = json.loads((tmp_path / "run/adapter/trainable_parameters.json").read_text())
        assert len(record["parameters"]) == count
        assert all(4 in entry["shape"] for entry in record["parameters"])


def test_same_seed_same_run_other_seed_other_run(finetune_cli: Any, tmp_path: Path) -> None:
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        result = finetune_cli(
            "--max-steps", 4, "--dropout", 0.2, "--seed", seed, output=tmp_path / name
        )
        assert result.exit_code == 0, result.output
        runs.append(losses(tmp_path / name))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_time_limit_ends_the_run_and_fits_the_schedule(finetune_cli: Any, tmp_path: Path) -> None:
    result = finetune_cli("--epochs", 100_000, "--max-minutes", 0.03, "--schedule", "cosine")
    assert result.exit_code == 0, result.output
    steps = [entry for entry in read_log(tmp_path / "run") if "loss" in entry]
    assert len(steps) > 2
    assert steps[-1]["seconds"] <= 0.03 * 60 * 1.5
    assert steps[-1]["learning_rate"] < 0.2 * max(entry["learning_rate"] for entry in steps)


def test_weight_decay_and_clip_reach_the_optimizer(finetune_cli: Any, tmp_path: Path) -> None:
    def after(*arguments: object) -> torch.Tensor:
        from safetensors.torch import load_file

        result = finetune_cli("--max-steps", 3, "--overwrite", "--save-every", 0, *arguments)
        assert result.exit_code == 0, result.output
        tensors = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
        return torch.cat(
            [value.flatten() for name, value in sorted(tensors.items()) if "lora_A" in name]
        )

    plain = after()
    assert after("--weight-decay", 10.0).norm() < 0.9 * plain.norm()
    assert not torch.equal(after("--grad-clip", 1e-3), plain)


def test_bfloat16_base_keeps_fp32_adapters(finetune_cli: Any, tmp_path: Path) -> None:
    result = finetune_cli("--max-steps", 2, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "run/adapter/trainable_parameters.json").read_text())
    assert {entry["dtype"] for entry in record["parameters"]} == {"float32"}
    assert json.loads((tmp_path / "run/summary.json").read_text())["dtype"] == "bfloat16"


def test_qlora_trains_over_a_base_in_four_bits(finetune_cli: Any, tmp_path: Path) -> None:
    import fastlora

    fastlora.reset_launches()
    assert finetune_cli("--max-steps", 3, "--method", "qlora").exit_code == 0
    ran = {op for op, _ in fastlora.launches()}
    assert {"quantize", "dequantize"} <= ran
    assert finetune_cli("--max-steps", 5, "--method", "qlora", "--resume").exit_code == 0
    config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and "quantize" not in config  # any base takes it


def test_rslora_is_recorded(finetune_cli: Any, tmp_path: Path) -> None:
    assert finetune_cli("--max-steps", 1, "--method", "rslora").exit_code == 0
    assert (
        json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["use_rslora"] is True
    )


def test_backend_choice_holds_for_the_run_only(finetune_cli: Any) -> None:
    import fastlora

    fastlora.reset_launches()
    assert finetune_cli("--max-steps", 1, "--backend", "torch").exit_code == 0
    assert {backend for _, backend in fastlora.launches()} == {"torch"}
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize("missing", [False, True])
def test_strict_determinism_changes_nothing_and_gives_way_where_an_op_lacks_it(
    missing: bool, finetune_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU run does before its first step, here on the CPU."""
    from fastlora.training import loop

    arguments = ("--max-steps", 3, "--dropout", 0.3)
    assert finetune_cli(*arguments, output=tmp_path / "plain").exit_code == 0

    class Strict(loop.Trainer):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.strict = True

    modes = []
    real = loop.summed_loss

    def summed_loss(*arguments: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            modes.append(torch.is_deterministic_algorithms_warn_only_enabled())
            if missing and len(modes) == 1:
                real(*arguments)  # draws dropout masks before it fails
                raise RuntimeError("histc_cuda does not have a deterministic implementation")
        return real(*arguments)

    monkeypatch.setattr("fastlora.training.session.Trainer", Strict)
    monkeypatch.setattr(loop, "summed_loss", summed_loss)
    result = finetune_cli(*arguments, output=tmp_path / "strict")
    assert result.exit_code == 0, result.output
    assert modes == [False, *[missing] * 3]
    assert ("may differ in the last digits" in result.output) == missing
    assert losses(tmp_path / "strict") == losses(tmp_path / "plain")
