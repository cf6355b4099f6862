"""Every ``--method``: it trains, what it leaves loads elsewhere, it resumes, and what it has not is refused by name."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastlora
from fastlora.autograd.bottleneck import ACTIVATIONS
from fastlora.training import FinetuneConfig, InputError
from fastlora.training import compare as comparison
from fastlora.training.estimate import estimate
from fastlora.training.methods import METHOD_OPTIONS, METHODS, having
from tests.cli.test_finetune import finetune_config, held_out_loss, losses, read_log

ROOT = Path(__file__).resolve().parents[2]
LORA = having("r")
BOTTLENECKS = having("reduction_factor")
PROMPTS = having("virtual_tokens")
ADAPTERS = [name for name, kind in METHODS.items() if kind.configuration]
# The base has weights of 0.3 and few steps are taken: larger than the defaults.
RATES = dict.fromkeys(METHODS, 0.02) | dict.fromkeys(PROMPTS, 0.1) | {"full": 0.002}


@pytest.fixture
def train(fastlora_cli: Any, model_dir: Path, text_file: Path, tmp_path: Path) -> Any:
    def run(method: str, *arguments: object, data: Path = text_file, name: str = "run") -> Path:
        result = fastlora_cli(
            *("finetune", "--method", method, "--model", model_dir, "--data", data),
            *("--output", tmp_path / name, "--seq-length", 32, "--batch-size", 4),
            *("--lr", RATES[method], "--device", "cpu", *arguments),
        )
        assert result.exit_code == 0, result.output
        run.printed = result.stdout  # type: ignore[attr-defined]
        return tmp_path / name

    return run


def summary_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "summary.json").read_text())


def base_of(model_dir: Path, method: str) -> Any:
    """The base that ``method`` trains over, as a plain model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    if "quantize" in METHODS[method].fixed:
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                rounded = fastlora.NF4Tensor.quantize(module.weight.detach())
                module.weight.data = rounded.dequantize()
    return model


def loaded(output: Path, model_dir: Path, method: str) -> Any:
    """What was trained, by stock peft; by fastlora where peft has no such method; by transformers if it is a model."""
    import peft
    from transformers import AutoModelForCausalLM

    if method == "full":
        return AutoModelForCausalLM.from_pretrained(output / "model")
    load = fastlora.load_adapter if method in BOTTLENECKS else peft.PeftModel.from_pretrained
    return load(base_of(model_dir, method), output / "adapter").eval()


def check_resumes(train: Any, output: Path, method: str) -> None:
    """Without its last checkpoint the run ends where it ended, bit for bit."""
    whole = losses(output)
    (result,) = (output / name for name in ("adapter", "model") if (output / name).exists())
    files = {path.name: path.read_bytes() for path in result.glob("*.safetensors")}
    shutil.rmtree(result)
    shutil.rmtree(output / "checkpoints" / f"step-{len(whole):08d}")
    train(method, "--resume", name=output.name)
    assert losses(output) == whole
    assert {path.name: path.read_bytes() for path in result.glob("*.safetensors")} == files


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_and_what_it_leaves_loads(
    method: str, train: Any, fastlora_cli: Any, model_dir: Path, general: Path
) -> None:
    output = train(method, "--max-steps", 16, "--save-every", 12, "--watch", general)
    summary = summary_of(output)
    assert summary["perplexity_after"] < 0.8 * summary["perplexity_before"]
    assert summary["watched_perplexity_after"] != summary["watched_perplexity_before"]
    share = summary["trained_parameters"] / summary["total_parameters"]
    assert f"of {summary['total_parameters']:,} parameters ({share:.2%})" in train.printed
    (file,) = Path(summary["adapter"] or summary["model"]).glob("*.safetensors")
    assert summary["saved_bytes"] == file.stat().st_size
    assert f"({summary['saved_bytes'] / 2**20:,.3g} MiB)" in train.printed
    record = output / "adapter/trainable_parameters.json"
    if method != "full":
        shapes = [entry["shape"] for entry in json.loads(record.read_text())["parameters"]]
        assert sum(map(math.prod, shapes)) == summary["trained_parameters"]

    elsewhere = loaded(output, model_dir, method)
    after = read_log(output)[-1]["eval_loss"]
    assert held_out_loss(elsewhere, finetune_config(output)) == pytest.approx(after, rel=2e-5)
    if method in ADAPTERS and "quantize" not in METHODS[method].fixed:
        options = ("generate", "--model", model_dir, "--adapter", output / "adapter")
        told = fastlora_cli(
            *options, *("--prompt", "When", "--greedy", "--json", "-n", 6, "--device", "cpu")
        )
        assert told.exit_code == 0, told.output
        assert json.loads(told.stdout)["adapter"] == greedy(elsewhere, model_dir, "When", 6)
    check_resumes(train, output, method)


def greedy(model: Any, model_dir: Path, prompt: str, tokens: int) -> str:
    """Each token from a forward of its own over all before it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(tokens):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("method", "init"),
    [
        ("lora", "pissa"),
        ("rslora", "olora"),
        ("lora", "eva"),
        ("dora", "orthogonal"),
        ("qlora", "loftq"),
        ("qdora", "eva"),
        ("lora", "gaussian"),
    ],
)
def test_initialisations(method: str, init: str, train: Any, model_dir: Path) -> None:
    output = train(method, "--init", init, "--r", 4, "--max-steps", 10, "--save-every", 8)
    summary, config, log = summary_of(output), finetune_config(output), read_log(output)
    assert summary["perplexity_after"] < 0.8 * summary["perplexity_before"]
    # All but LoftQ, which is nearer to the model than 4 bits are, begin as the base is.
    differs = log[0]["eval_loss"] / held_out_loss(base_of(model_dir, method), config) - 1
    assert (abs(differs) > 1e-4) == (init == "loftq")
    assert saved(output)[0]["init_lora_weights"] == (True if init == "loftq" else init)
    loss = held_out_loss(loaded(output, model_dir, method), config)
    assert loss == pytest.approx(log[-1]["eval_loss"], rel=2e-5)
    if init == "eva":
        ranks = {
            tensor.shape[0]
            for name, tensor in load_file(output / "adapter/adapter_model.safetensors").items()
            if "lora_A" in name
        }
        assert len(ranks) > 1
    check_resumes(train, output, method)


def test_lora_plus_lets_b_learn_faster(train: Any) -> None:
    """AdamW's first step moves each number by the rate, and B begins at zero."""
    output = train("lora", "--loraplus-ratio", 8, "--max-steps", 1, "--lr", 1e-3, "--warmup", 0)
    rate = read_log(output)[1]["learning_rate"]
    assert 0 < rate < 1e-3  # half a step down the cosine
    factors = load_file(output / "adapter/adapter_model.safetensors")
    moved = torch.cat([t.flatten() for name, t in factors.items() if "lora_B" in name])
    assert float(moved.abs().median()) == pytest.approx(8 * rate, rel=1e-3)


def test_lora_plus_resumes(train: Any) -> None:
    output = train("dora", "--loraplus-ratio", 4, "--max-steps", 6, "--save-every", 4)
    check_resumes(train, output, "dora")


def saved(output: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    (file,) = (output / "adapter").glob("*.safetensors")
    config = json.loads((output / "adapter/adapter_config.json").read_text())
    return config, load_file(file)


def test_options_reach_the_adapter(train: Any, tmp_path: Path) -> None:
    output = train("pfeiffer", "--reduction-factor", 4, "--activation", "gelu", "--max-steps", 2)
    config, tensors = saved(output)
    assert (config["config"]["reduction_factor"], config["config"]["non_linearity"]) == (4, "gelu")
    assert {8} == {min(t.shape) for t in tensors.values() if t.ndim == 2}
    output = train("houlsby", "--target-modules", "down_proj", "--max-steps", 2, name="named")
    assert all("down_proj" in name for name in saved(output)[1])
    for encoder in ("mlp", "lstm"):
        output = train(
            *("p_tuning", "--virtual-tokens", 5, "--encoder", encoder),
            *("--encoder-hidden-size", 8, "--max-steps", 2),
            name=encoder,
        )
        config, tensors = saved(output)
        assert config["encoder_reparameterization_type"] == encoder.upper()
        assert config["encoder_hidden_size"] == 8
        assert tensors["prompt_embeddings"].shape == (5, 32)
    output = train(
        *("prefix_tuning", "--encoder", "mlp", "--max-steps", 6, "--save-every", 4), name="prefix"
    )
    assert saved(output)[0]["prefix_projection"] is True
    assert saved(output)[1]["prompt_embeddings"].shape == (20, 2 * 2 * 16)
    check_resumes(train, output, "prefix_tuning")
    output = train("ia3", "--target-modules", "v_proj", "--max-steps", 2, name="ia3")
    assert {name.split(".")[-2] for name in saved(output)[1]} == {"v_proj"}
    output = train("ln_tuning", "--target-modules", "norm", "--max-steps", 2, name="ln")
    assert len(saved(output)[1]) == 1


def test_a_prompt_begins_with_a_text(train: Any, model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = "Verse:"
    output = train(
        *("prompt_tuning", "--prompt-text", text, "--virtual-tokens", 9, "--lr", 1e-12),
        *("--max-steps", 1),
    )
    ids = AutoTokenizer.from_pretrained(model_dir)(text).input_ids
    ids = (ids * 9)[:9]
    rows = AutoModelForCausalLM.from_pretrained(model_dir).get_input_embeddings().weight[ids]
    torch.testing.assert_close(saved(output)[1]["prompt_embeddings"], rows.detach())


@pytest.mark.parametrize("method", PROMPTS)
def test_virtual_tokens_stand_in_front_of_every_document(
    method: str, train: Any, jsonl: Any, model_dir: Path
) -> None:
    """Documents of unequal length, in rows of their own: the losses are those that stock peft finds one by one."""
    data = jsonl(*[{"text": "verse " * (1 + i % 4) + str(i)} for i in range(24)])
    options = ("--eval-fraction", 0.5, "--max-steps", 2, "--virtual-tokens", 3)
    output = train(method, *options, data=data)
    loss = held_out_loss(loaded(output, model_dir, method), finetune_config(output))
    assert loss == pytest.approx(read_log(output)[-1]["eval_loss"], rel=2e-5)
    assert "see those before them" not in train.printed
    assert finetune_config(output).packs is False
    assert FinetuneConfig(model="m", data="d", method="lora").packs is True


@pytest.mark.parametrize(
    "method", [m for m in ADAPTERS if m not in ("rslora", "pfeiffer", "qdora")]
)
def test_sixteen_bits_and_checkpointing(method: str, train: Any) -> None:
    """Each in bf16 trains fp32 numbers; recomputing changes nothing."""
    options = ("--max-steps", 3, "--warmup", 0)
    whole = losses(train(method, *options))
    half = train(method, *options, "--dtype", "bfloat16", name="half")
    assert losses(half) == pytest.approx(whole, rel=0.1)
    assert {value.dtype for value in saved(half)[1].values()} == {torch.float32}
    if "gradient_checkpointing" not in METHODS[method].refuses:
        again = train(method, *options, "--gradient-checkpointing", name="again")
        assert losses(again) == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("method", ["dora", "houlsby", "ia3", "ln_tuning"])
def test_layers_begin_one_by_one(method: str, train: Any) -> None:
    output = train(
        method,
        *("--max-steps", 4, "--unfreeze-over", 1.0, "--save-every", 2, "--keep-last", 9),
    )
    states = [load_file(output / f"checkpoints/step-{step:08d}/parameters.safetensors") for step in (2, 4)]  # fmt: skip
    first = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    began = load_file(output / "checkpoints/step-00000002/optimizer.safetensors")
    assert any(".layers.0." in name for name in first)
    assert len({key.split(".")[0] for key in began}) < len(states[0])  # no state for what waits


def test_what_a_method_has_not_is_refused_by_name(
    fastlora_cli: Any, model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    common = ("finetune", "--model", model_dir, "--data", text_file, "--output", tmp_path / "run")
    for method, arguments, message in (
        ("ia3", ("--rank", 8), "--method ia3 has no --r: leave it out, or take one of lora, rslora"),
        ("houlsby", ("--trainable-share", "1%"), "--method houlsby has no --trainable-share"),
        ("prompt_tuning", ("--trainable-share", "1%"), "has no --trainable-share"),
        ("ln_tuning", ("--init", "pissa"), "--method ln_tuning has no --init"),
        ("full", ("--loraplus-ratio", 4), "--method full has no --loraplus-ratio"),
        ("lora", ("--virtual-tokens", 4), "has no --virtual-tokens: leave it out, or take one of prefix"),
        ("lora", ("--activation", "relu"), "or take one of houlsby, pfeiffer, parallel"),
        ("qlora", ("--init", "pissa"), "--init 'pissa' with --method qlora is not one of gaussian, orthogonal, eva, loftq (pissa goes with lora, rslora, dora)"),
        ("lora", ("--init", "loftq"), "(loftq goes with qlora, qdora)"),
        ("lora", ("--init", "magic"), "--init 'magic' with --method lora is not one of"),
        ("lora", ("--init", "eva", "--trainable-share", "1%"), "--init eva each layer's own"),
        ("lora", ("--init", "orthogonal", "--r", 3), "accepted are even ranks"),
        ("lora", ("--loraplus-ratio", -1), "--loraplus-ratio -1.0 must be a positive number"),
        ("pfeiffer", ("--activation", "magic"), "--activation 'magic' with --method pfeiffer"),
        ("pfeiffer", ("--reduction-factor", 0), "--reduction-factor 0.0 must be a positive"),
        ("prefix_tuning", ("--virtual-tokens", 0), "--virtual-tokens 0 is not in 1.."),
        ("prefix_tuning", ("--encoder", "lstm"), "is not one of none, mlp (lstm goes with p_tuning)"),
        ("prefix_tuning", ("--encoder-hidden-size", 4), "give --encoder mlp as well"),
        ("prefix_tuning", ("--gradient-checkpointing",), "a prefix is in the cache"),
        ("prompt_tuning", ("--packing",), "goes without --packing: of the documents packed"),
        ("p_tuning", ("--unfreeze-over", 0.5), "goes without --unfreeze-over: virtual tokens"),
        ("prompt_tuning", ("--prompt-text", " "), "--prompt-text is empty"),
        ("prompt_tuning", ("--seq-length", 120), "--seq-length 120 with 20 virtual tokens"),
        ("ia3", ("--target-modules", "x_proj"), "no module x_proj"),
    ):  # fmt: skip
        fitting = () if "--seq-length" in arguments else ("--seq-length", 32)
        result = fastlora_cli(*common, "--method", method, *fitting, *arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert message in result.stderr, (arguments, result.stderr)
        assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="--init eva"):
        estimate(FinetuneConfig(model=str(model_dir), data="", init="eva"))


def test_the_table_is_whole() -> None:
    fields = FinetuneConfig(model="m", data="d")
    for name in METHOD_OPTIONS:
        assert getattr(fields, name) is None, name
    for kind in METHODS.values():
        assert (ROOT / f"docs/{kind.page}.md").is_file()
        assert kind.configuration is None or hasattr(fastlora, kind.configuration)
    names = METHODS["houlsby"].options["activation"].values
    assert all(name in ACTIVATIONS for name in names)
    assert {ACTIVATIONS[name] for name in names} == set(ACTIVATIONS.values())


def test_compare_takes_methods_of_every_kind(
    fastlora_cli: Any,
    model_dir: Path,
    text_file: Path,
    general: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of each kind, in this process: a new one for each costs seconds."""
    methods = ["lora", "houlsby", "prefix_tuning", "prompt_tuning", "ia3", "full"]
    monkeypatch.setattr(comparison, "_run_apart", lambda *args: comparison._run(*args))
    out = tmp_path / "compared"
    result = fastlora_cli(
        *("compare", "--model", model_dir, "--data", text_file, "--output", out),
        *("--seq-length", 32, "--max-steps", 6, "--device", "cpu", "--methods", ",".join(methods)),
        *("--lr", 0.02, "--r", 4, "--virtual-tokens", 5, "--watch", general),
        *("--learning-rates", "prefix_tuning=0.1,prompt_tuning=0.1"),
    )
    assert result.exit_code == 0, result.output
    rows = {row["method"]: row for row in json.loads((out / "compare.json").read_text())["rows"]}
    assert list(rows) == methods
    table = (out / "compare.md").read_text()
    for method, row in rows.items():
        assert f"| {method} |" in table
        assert f"{method} {row['learning_rate']:g}" in table
        assert row["perplexity_after"] < row["perplexity_before"], method
        config = finetune_config(out / method)
        assert config.packs is False  # all as those with virtual tokens
        assert config.chosen("r") == (4 if method in LORA else None)
        assert config.chosen("virtual_tokens") == (5 if method in PROMPTS else None)
        want = 0.1 if method in PROMPTS else 100 * METHODS[method].learning_rate
        assert row["learning_rate"] == pytest.approx(want)
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_methods_that_pack_are_compared_packed(model_dir: Path) -> None:
    config = FinetuneConfig(model=str(model_dir), data="d")
    assert set(comparison._configs(config, list(METHODS), {})) == set(METHODS)
    assert all(c.packs for c in comparison._configs(config, ["lora", "ia3", "full"], {}).values())
    rates = comparison._configs(config, ["lora", "full"], {"lora": 0.5})
    assert [c.rate for c in rates.values()] == [0.5, METHODS["full"].learning_rate]
    packed = FinetuneConfig(model=str(model_dir), data="d", packing=True)
    with pytest.raises(InputError, match="goes without --packing"):
        comparison._configs(packed, ["lora", "p_tuning"], {})
