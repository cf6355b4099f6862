"""``merge_checkpoint``: files against merging in memory, in stock peft, and against fp64."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastlora
from fastlora.io.merge import merge_checkpoint
from fastlora.io.quantize import quantize_checkpoint
from tests.tiny_models import logits, randomize_adapters, some_ids, tiny_llama

transformers = pytest.importorskip("transformers")
TARGETS = ["q_proj", "down_proj"]


def saved(tmp_path: Path, **changes: Any) -> Path:
    folder = tmp_path / "base"
    tiny_llama(**changes).save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path, **config: Any) -> Path:
    """A random adapter that stock peft wrote."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(**{"target_modules": TARGETS, "r": 3, **config})
    )
    randomize_adapters(theirs)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad and ".lora_A." not in name and ".lora_B." not in name:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    theirs.save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {
            "use_rslora": True,
            "lora_alpha": 5,
            "rank_pattern": {"q_proj": 7},
            "alpha_pattern": {"down_proj": 3},
        },
        {"target_modules": "all-linear"},
        {"modules_to_save": ["norm"]},
        {"bias": "all"},
        {"target_modules": [*TARGETS, "lm_head"]},
        {"use_dora": True},
        {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
        {"target_modules": [*TARGETS, "embed_tokens"]},
    ],
    ids=str,
)
def test_loads_in_transformers_and_computes_what_peft_does(
    config: dict[str, Any], tmp_path: Path
) -> None:
    base = saved(tmp_path, attention_bias=True)
    path = adapter(base, tmp_path / "adapter", **config)
    reports = merge_checkpoint(base, path, tmp_path / "out")
    theirs, ids = peft.PeftModel.from_pretrained(load(base), path).eval(), some_ids()
    torch.testing.assert_close(
        logits(load(tmp_path / "out"), ids), logits(theirs, ids), rtol=1e-4, atol=1e-4
    )
    lora = [m for m in theirs.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(reports) == len(lora)
    assert all(0 < r.update < 10 and r.error < 1e-6 for r in reports)


def test_untouched_tensors_are_the_same_bits_and_others_the_exact_sum_rounded(
    tmp_path: Path,
) -> None:
    base = saved(tmp_path, dtype=torch.bfloat16)
    path = adapter(base, tmp_path / "adapter")
    (base / "tokenizer.json").write_text("{}")
    merge_checkpoint(base, path, tmp_path / "out")
    before, after, low_rank = tensors(base), tensors(tmp_path / "out"), tensors(path)
    assert before.keys() == after.keys()
    for key in before:
        prefix = f"base_model.model.{key.removesuffix('.weight')}"
        a, b = (low_rank.get(f"{prefix}.lora_{x}.weight") for x in "AB")
        want = before[key].double()
        if a is not None and b is not None:
            want = want + (8 / 3) * b.double() @ a.double()
            assert not torch.equal(after[key], before[key])
        assert torch.equal(after[key], want.to(torch.bfloat16)), key
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]  # fmt: skip


@pytest.mark.parametrize("target", ["lm_head", "q_proj"])
def test_a_tied_output_layer(target: str, tmp_path: Path) -> None:
    base = saved(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in tensors(base)
    path = adapter(base, tmp_path / "adapter", target_modules=[target])
    merge_checkpoint(base, path, tmp_path / "out")
    theirs, ids = peft.PeftModel.from_pretrained(load(base), path).eval(), some_ids()
    merged = load(tmp_path / "out")
    torch.testing.assert_close(logits(merged, ids), logits(theirs, ids), rtol=1e-4, atol=1e-4)
    assert merged.config.tie_word_embeddings == (target == "q_proj")
    key = "model.embed_tokens.weight"
    assert torch.equal(tensors(tmp_path / "out")[key], tensors(base)[key])


def test_a_head_that_the_base_does_not_have(tmp_path: Path) -> None:
    base = saved(tmp_path)
    kind = transformers.AutoModelForSequenceClassification
    torch.manual_seed(3)
    theirs = peft.get_peft_model(
        kind.from_pretrained(base), peft.LoraConfig(task_type="SEQ_CLS", target_modules=TARGETS)
    )
    randomize_adapters(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    merged, ids = kind.from_pretrained(tmp_path / "out"), some_ids()
    torch.testing.assert_close(
        logits(merged, ids), logits(theirs.eval(), ids), rtol=1e-4, atol=1e-4
    )


def test_shards_and_progress(tmp_path: Path) -> None:
    base = saved(tmp_path)
    path, seen = adapter(base, tmp_path / "adapter"), []
    merge_checkpoint(base, path, tmp_path / "one")
    merge_checkpoint(
        base, path, tmp_path / "many", shard_bytes=9000, progress=lambda *told: seen.append(told)
    )
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[key], many[key]) for key in one)
    assert [done for _, done, _ in seen] == list(range(len(one)))
    assert {key for key, _, _ in seen} == set(one)
    assert torch.equal(logits(load(tmp_path / "one"), some_ids()), logits(load(tmp_path / "many"), some_ids()))  # fmt: skip


@pytest.mark.parametrize("keep", [False, True])
def test_a_base_in_four_bits(keep: bool, tmp_path: Path) -> None:
    base = saved(tmp_path)
    path = adapter(base, tmp_path / "adapter", r=8)
    quantize_checkpoint(base, tmp_path / "nf4")
    reports = merge_checkpoint(tmp_path / "nf4", path, tmp_path / "out", keep_4bit=keep)
    ids = some_ids()
    four = fastlora.load_adapter(fastlora.load_quantized(tmp_path / "nf4"), path)
    want = logits(four, ids)
    if keep:
        merged = fastlora.load_quantized(tmp_path / "out")
        assert min(r.error for r in reports) > 1e-3  # quantising again costs, and it is told
        four.merge_adapter()
        assert torch.equal(logits(merged, ids), logits(four, ids))
        return
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config
    torch.testing.assert_close(logits(load(tmp_path / "out"), ids), want, rtol=1e-4, atol=1e-4)
    assert max(r.error for r in reports) < 1e-6


def test_what_cannot_be_merged_writes_nothing(tmp_path: Path) -> None:
    base = saved(tmp_path)
    path = adapter(base, tmp_path / "adapter")
    small = adapter(saved(tmp_path / "x", hidden_size=16), tmp_path / "small")
    torn = tmp_path / "torn"
    shutil.copytree(path, torn)
    data = (torn / "adapter_model.safetensors").read_bytes()
    (torn / "adapter_model.safetensors").write_bytes(data[:-7])
    nan = tmp_path / "nan"
    shutil.copytree(path, nan)
    values = load_file(nan / "adapter_model.safetensors")
    next(iter(values.values())).fill_(float("nan"))
    save_file(values, nan / "adapter_model.safetensors")
    headless = tmp_path / "headless"
    shutil.copytree(base, headless)
    kept = {k: v for k, v in tensors(base).items() if "layers.1.self_attn.q_proj" not in k}
    save_file(kept, headless / "model.safetensors", {"format": "pt"})
    for source, what, kind, match in (
        (base, small, ValueError, "shape"),
        (base, torn, ValueError, "not a whole"),
        (base, nan, ValueError, "overflows|NaN"),
        (headless, path, ValueError, "q_proj"),
        (tmp_path / "none", path, FileNotFoundError, "config.json"),
        (base, tmp_path / "none", FileNotFoundError, "none"),
    ):
        with pytest.raises(kind, match=match):
            merge_checkpoint(source, what, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (fastlora.IA3Config(), "IA3"),
        (fastlora.LNTuningConfig(), "LN_TUNING"),
        (fastlora.PfeifferConfig(), "BOTTLENECK"),
        (fastlora.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PROMPT_TUNING"),
        (fastlora.LoraConfig(target_modules=TARGETS, trainable_token_indices=[3]), "trainable_tok"),
        (fastlora.LoraConfig(target_parameters=["q_proj.weight"]), "target_parameters"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_methods_are_refused_by_name(config: Any, message: str, tmp_path: Path) -> None:
    fastlora.save_adapter(fastlora.get_peft_model(tiny_llama(), config), tmp_path / "adapter")
    with pytest.raises(NotImplementedError, match=message):
        merge_checkpoint(saved(tmp_path), tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(fastlora_cli: Any, tmp_path: Path) -> None:
    base = saved(tmp_path)
    path = adapter(base, tmp_path / "adapter")
    result = fastlora_cli("merge", base, path, "-o", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "4 layers merged" in result.stdout
    assert load(tmp_path / "out") is not None
    again = fastlora_cli("merge", base, path, "-o", tmp_path / "out")
    assert again.exit_code == 2
    assert "exists already" in again.output
    wrong = fastlora_cli("merge", base, tmp_path, "-o", tmp_path / "out2", "--device", "cpu")
    assert wrong.exit_code == 2
    assert "adapter_config.json" in wrong.output


@pytest.fixture
def fastlora_cli() -> Any:
    from typer.testing import CliRunner

    from fastlora.cli.app import app

    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


def test_a_shard_that_is_full_is_not_followed_by_an_empty_one(tmp_path: Path) -> None:
    from fastlora.io.shards import Shards

    shards = Shards(tmp_path, 10)
    shards.add({"w": torch.zeros(8)})
    shards.add({})
    shards.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
