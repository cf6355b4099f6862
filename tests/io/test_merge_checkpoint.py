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
from tests.every_method import IN_PEFT, METHODS, VIRTUAL
from tests.tiny_models import logits, randomize_adapters, some_ids, tiny_llama
from tests.tiny_zoo import run, tiny

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


def test_what_is_merged_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    base = saved(tmp_path / "all")
    path = adapter(base, tmp_path / "all" / "adapter")
    for target in (path, tmp_path / "all", tmp_path / "all" / "adapter" / ".." / "adapter"):
        with pytest.raises(ValueError, match=r"target: .* give another folder"):
            merge_checkpoint(base, path, target)
        assert (base / "config.json").is_file() and (path / "adapter_config.json").is_file()
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors: not found"):
        merge_checkpoint(base, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Every method that is a change of weights.

MERGED = [name for name in IN_PEFT if name not in VIRTUAL]


def stored(name: str, tmp_path: Path, **settings: Any) -> tuple[Path, Path]:
    """The folders of a method's base and of a random adapter that stock peft wrote."""
    method = METHODS[name]
    method.base().save_pretrained(tmp_path / "base", **settings)
    theirs = method.moved(peft)
    theirs.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MERGED)
def test_every_method_of_weights(name: str, tmp_path: Path) -> None:
    """Equal to stock peft's merge_and_unload; under the keys that the base has."""
    base, path = stored(name, tmp_path)
    reports = merge_checkpoint(base, path, tmp_path / "out")
    theirs, ids = peft.PeftModel.from_pretrained(load(base), path), some_ids()
    changed = logits(theirs.eval(), ids)
    want = logits(theirs.merge_and_unload().eval(), ids)
    got = logits(load(tmp_path / "out"), ids)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got, changed, rtol=1e-4, atol=1e-4)
    assert (got - logits(load(base), ids)).abs().max() > 1e-3
    assert tensors(tmp_path / "out").keys() == tensors(base).keys()
    assert reports and all(r.error < 1e-6 < r.update for r in reports)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    "name", ["ia3", "ln_tuning", "dora", "lora, rows", "lora, copies", "lora, parameters"]
)
def test_every_method_of_weights_over_four_bits(name: str, keep: bool, tmp_path: Path) -> None:
    base, path = stored(name, tmp_path)
    quantize_checkpoint(base, tmp_path / "nf4")
    merge_checkpoint(tmp_path / "nf4", path, tmp_path / "out", keep_4bit=keep)
    model, ids = fastlora.load_adapter(fastlora.load_quantized(tmp_path / "nf4"), path), some_ids()
    if keep:
        want = logits(model.merge_and_unload(), ids)
        got = logits(fastlora.load_quantized(tmp_path / "out"), ids)
    else:
        want, got = logits(model, ids), logits(load(tmp_path / "out"), ids)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("original", [True, False])
def test_stacked_experts_keep_the_format_they_are_stored_in(original: bool, tmp_path: Path) -> None:
    """One by one, as published, or stacked; what the adapter does not touch stays the same bits."""
    base, path = stored("lora, parameters", tmp_path, save_original_format=original)
    merge_checkpoint(base, path, tmp_path / "out")
    before, after = tensors(base), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert any(".experts.0." in key for key in before) == original
    for key, value in before.items():
        touched = ".experts." in key or "q_proj" in key or "v_proj" in key
        assert torch.equal(after[key], value) != touched, key
    read = fastlora.load_adapter(METHODS["lora, parameters"].base(), path)
    torch.testing.assert_close(logits(load(tmp_path / "out"), some_ids()), logits(read, some_ids()), rtol=1e-4, atol=1e-5)  # fmt: skip


def test_a_weight_that_transformers_takes_apart(tmp_path: Path, monkeypatch: Any) -> None:
    """Stored fused, adapted in parts, and stored fused again; one part alone as well."""
    mapping = pytest.importorskip("transformers.conversion_mapping")
    loading = pytest.importorskip("transformers.core_model_loading")
    base = saved(tmp_path)
    values = tensors(base)
    for i in range(2):
        at = f"model.layers.{i}.mlp"
        values[f"{at}.gate_up.weight"] = torch.cat([values.pop(f"{at}.{n}_proj.weight") for n in ("gate", "up")])  # fmt: skip
    fused = tmp_path / "fused"
    shutil.copytree(base, fused)
    save_file(values, fused / "model.safetensors", {"format": "pt"})
    splits = loading.WeightConverter("mlp.gate_up.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [loading.Chunk(dim=0)])  # fmt: skip
    for targets in (["gate_proj", "up_proj"], ["up_proj"], ["gate_proj", "q_proj"]):
        path = adapter(base, tmp_path / "-".join(targets), target_modules=targets)
        theirs = peft.PeftModel.from_pretrained(load(base), path).eval()
        with monkeypatch.context() as patch:
            patch.setitem(mapping._checkpoint_conversion_mapping_cache, "llama", [splits])
            merge_checkpoint(fused, path, tmp_path / "out")
            got = logits(load(tmp_path / "out"), some_ids())
        torch.testing.assert_close(got, logits(theirs, some_ids()), rtol=1e-4, atol=1e-4)
        after = tensors(tmp_path / "out")
        assert after.keys() == values.keys()
        other = "model.layers.0.self_attn.o_proj.weight"
        assert torch.equal(after[other], values[other])


@pytest.mark.parametrize("both", [False, True], ids=["head not stored", "head stored"])
@pytest.mark.parametrize("config", [{"target_modules": ["q_proj"], "trainable_token_indices": [15, 23, 45]}, {"target_modules": ["embed_tokens"]}], ids=["rows", "lora"])  # fmt: skip
def test_tied_ends(config: dict[str, Any], both: bool, tmp_path: Path) -> None:
    """Trained rows act at both ends, which stay tied; an embedding's LoRA at one, and they are tied no longer."""
    base = saved(tmp_path, tie_word_embeddings=True)
    path = adapter(base, tmp_path / "adapter", **config)
    if both:
        values = tensors(base)
        values["lm_head.weight"] = values["model.embed_tokens.weight"].clone()
        save_file(values, base / "model.safetensors", {"format": "pt"})
    merge_checkpoint(base, path, tmp_path / "out")
    theirs, merged = peft.PeftModel.from_pretrained(load(base), path).eval(), load(tmp_path / "out")
    torch.testing.assert_close(logits(merged, some_ids()), logits(theirs, some_ids()), rtol=1e-4, atol=1e-4)  # fmt: skip
    rows = "trainable_token_indices" in config
    assert merged.config.tie_word_embeddings == rows
    assert ("lm_head.weight" in tensors(tmp_path / "out")) != rows


@pytest.mark.parametrize(("kind", "method"), [("gpt2", "IA3Config"), ("t5", "IA3Config"), ("gpt_neox", "IA3Config"), ("bart", "LNTuningConfig")])  # fmt: skip
def test_other_architectures(kind: str, method: str, tmp_path: Path) -> None:
    """Conv1D, whose weight is stored [K, N]; encoder-decoders; fused projections."""
    base = tiny(kind)
    base.save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(tiny(kind), getattr(peft, method)())
    torch.manual_seed(3)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape) * 0.3)
    theirs.eval().save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    got = run(type(base).from_pretrained(tmp_path / "out").eval(), some_ids()).logits
    torch.testing.assert_close(got, run(theirs, some_ids()).logits, rtol=1e-4, atol=1e-5)
    assert (got - run(base.eval(), some_ids()).logits).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["IA3Config", "LNTuningConfig"])
def test_a_head_beside_other_methods(kind: str, tmp_path: Path) -> None:
    base = saved(tmp_path)
    auto = transformers.AutoModelForSequenceClassification
    torch.manual_seed(3)
    theirs = peft.get_peft_model(
        auto.from_pretrained(base), getattr(peft, kind)(task_type="SEQ_CLS")
    )
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape) * 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    got = logits(auto.from_pretrained(tmp_path / "out"), some_ids())
    torch.testing.assert_close(got, logits(theirs.eval(), some_ids()), rtol=1e-4, atol=1e-4)


def test_a_bf16_base_gets_the_exact_value_rounded_once(tmp_path: Path) -> None:
    base = saved(tmp_path, dtype=torch.bfloat16)
    theirs = peft.get_peft_model(load(base), peft.IA3Config())
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape) * 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    before, after, vectors = tensors(base), tensors(tmp_path / "out"), tensors(tmp_path / "adapter")
    for key in before:
        vector = vectors.get(f"base_model.model.{key.removesuffix('.weight')}.ia3_l")
        want = before[key].double() * (1 if vector is None else vector.double())
        assert torch.equal(after[key], want.to(torch.bfloat16)), key
    assert len(vectors) == 6


@pytest.mark.parametrize("name", ["ia3", "ln_tuning", "lora, parameters", "lora, rows"])
def test_a_layer_that_fails_half_way_leaves_nothing(name: str, tmp_path: Path) -> None:
    base, path = stored(name, tmp_path)
    values = tensors(path)
    sorted(values.items())[-1][1].view(-1)[0] = float("nan")
    save_file(values, path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"NaN"):
        merge_checkpoint(base, path, tmp_path / "out", shard_bytes=1000)
    assert not (tmp_path / "out").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: Any) -> None:
    from fastlora.io import shards

    base, path = stored("ia3", tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("kept")
    writes: list[Path] = []

    def full(values: Any, file: Path, metadata: Any) -> None:
        writes.append(file)
        if len(writes) == 3:
            raise OSError(28, "No space left on device")
        save_file(values, file, metadata)

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        merge_checkpoint(base, path, tmp_path / "out", shard_bytes=1000)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["old"]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("prompt", "PROMPT_TUNING.*input to the model"),
        ("p-lstm", "P_TUNING.*input to the model"),
        ("prefix", "PREFIX_TUNING.*input to the model"),
        ("houlsby", "BOTTLENECK.*activation"),
    ],
)
def test_what_is_no_change_of_weights_is_refused(name: str, message: str, tmp_path: Path) -> None:
    METHODS[name].make().save_pretrained(tmp_path / "checkpoint-1")  # with a file of that name
    with pytest.raises(NotImplementedError, match=message):
        merge_checkpoint(saved(tmp_path), tmp_path / "checkpoint-1", tmp_path / "out")
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
