"""Memory within 10 % of what was measured, file sizes exactly, times from operations counted by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from examples import memory
from fastlora.training import FinetuneConfig, InputError
from fastlora.training.estimate import (
    CUBLAS_BYTES,
    OF_GEMM,
    OF_PEAK,
    PEAK_FLOPS,
    Estimate,
    estimate,
)
from fastlora.training.footprint import Footprint, GpuKernels, backward
from fastlora.training.methods import METHODS

RESULTS = Path(__file__).parents[2] / "benchmarks/results"


def config_of(shape: memory.Shape, folder: Path, **changes: Any) -> Path:
    """A model of the shapes that examples/memory.py measures: config.json alone."""
    from transformers import LlamaConfig

    settings = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
    }
    LlamaConfig(**settings | changes).save_pretrained(folder)
    return folder


def run(model: Path, method: str = "lora", **options: Any) -> FinetuneConfig:
    return FinetuneConfig(model=str(model), data="", method=method, **options)


@pytest.mark.parametrize("case", memory.CASES, ids=lambda case: case.name)
def test_peaks_are_within_a_tenth_of_those_measured(case: memory.Case, tmp_path: Path) -> None:
    method = "qlora" if case.quantize else "lora"
    config = run(
        config_of(case.shape, tmp_path),
        method,
        r=memory.RANK,
        batch_size=1,
        seq_length=case.shape.tokens,
        gradient_checkpointing=True,
        packing=False,
    )
    made = estimate(config, card=case.card_gib)
    files = sorted(RESULTS.glob("memory-nvidia-*.json"))
    assert len(files) >= 2
    for file in files:
        rows = {row["case"]: row for row in json.loads(file.read_text())["rows"]}
        measured = rows[case.name]
        assert made.peak_allocated_bytes == pytest.approx(measured["peak_allocated"], rel=0.02)
        assert made.peak_reserved_bytes == pytest.approx(measured["peak_reserved"], rel=0.05)
    assert made.fits  # as was measured
    factors = sum(memory.RANK * (n + k) for n, k in case.shape.linears())
    assert made.trained_parameters == factors


def ranked(method: str) -> dict[str, int]:
    return {"r": 4} if "r" in METHODS[method].options else {}


def tiny(model_dir: Path, method: str = "lora", **options: Any) -> Estimate:
    options = {"seq_length": 32, "batch_size": 2, **ranked(method)} | options
    return estimate(run(model_dir, method, **options), tokens_per_second=1.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sizes_and_counts_are_exactly_those_of_a_run(
    model_dir: Path, tmp_path: Path, method: str, dtype: str
) -> None:
    made = tiny(model_dir, method, dtype=dtype)
    summary, saved = trained(model_dir, tmp_path, method, dtype)
    assert (made.trained_parameters, made.total_parameters) == summary
    assert made.saved_bytes == saved
    assert made.rank == ranked(method).get("r")


def trained(model_dir: Path, folder: Path, method: str, dtype: str) -> tuple[tuple[int, int], int]:
    """Parameters (trained, all) and bytes saved, by the real thing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastlora.training import base
    from fastlora.training.engine import engine_of
    from fastlora.training.output import OutputDirectory

    how = engine_of(run(model_dir, method, **ranked(method)))
    wanted = base.DTYPES[dtype]
    model = how.load(wanted, torch.device("cpu"))
    entered = how.enter(model, torch.device("cpu"), print)
    out = OutputDirectory(folder / "out")
    how.save(entered, out, AutoTokenizer.from_pretrained(model_dir), wanted)
    (file,) = how.result(out).glob("*.safetensors")
    if method == "full":
        AutoModelForCausalLM.from_pretrained(out.model)
    return how.count(entered), file.stat().st_size


def test_operations_are_those_counted_by_hand(model_dir: Path) -> None:
    """Llama: 2 layers of 32 wide, 48 in the MLP, 4 heads of 8 of which 2 for keys and values."""
    config = json.loads((model_dir / "config.json").read_text())
    h, i, kv, v = 32, 48, 16, config["vocab_size"]
    linears = [(h, h), (kv, h), (kv, h), (h, h), (i, h), (i, h), (h, i)] * 2
    base = sum(2 * n * k for n, k in linears)
    factors = sum(2 * 4 * (n + k) for n, k in linears)
    tokens = 32
    # causal: half of S scores a token; forward has two products of them, backward five
    scores = 2 * (2 * tokens * h // 2)
    head = 2 * h * v

    def per_token(**options: Any) -> float:
        return tiny(model_dir, packing=False, **options).flops_per_token

    # The first layer's input needs no gradient: q, k, v make no dX there, but g for dA.
    first = sum(2 * n * k + 2 * 4 * k for n, k in linears[:3])
    lora = 2 * base + 3 * factors + 2 * head + scores * 2 * 7 // 2 - first
    assert per_token() == pytest.approx(lora, rel=1e-9)
    assert per_token(method="qlora") == pytest.approx(lora, rel=1e-9)
    again = per_token(gradient_checkpointing=True) - per_token()
    # up to what backward needs first: the last product of a layer is not made again
    assert again == pytest.approx(base + factors + scores * 2, rel=0.15)
    for method in ("dora", "qdora"):
        assert per_token(method=method) == pytest.approx(
            lora + sum(2 * n * k * 5 for n, k in linears) / (2 * tokens), rel=1e-9
        )  # s B A once a step
    norms = 2 * (base + head) + scores * 2 * 7 // 2  # the first one is below every linear
    assert per_token(method="ln_tuning") == pytest.approx(norms, rel=1e-9)
    # Four bottlenecks of width 2, the first behind an attention that needs no backward: down, up, and
    # backward one product for the activation, one for x (but of the first) and two for the weights.
    bottlenecks = 2 * h * 2 * (4 * 6 - 1)
    attention = sum(2 * n * k for n, k in linears[:4]) + scores * 5 // 2
    assert per_token(method="houlsby") == pytest.approx(norms - attention + bottlenecks, rel=1e-9)
    assert per_token(method="full") == pytest.approx(
        3 * (base + head) + scores * 2 * 7 // 2, rel=1e-9
    )


def test_time_is_operations_over_the_rate(model_dir: Path) -> None:
    made = estimate(run(model_dir, seq_length=64), gpu="nvidia h100", card=80.0)
    rate = OF_PEAK * PEAK_FLOPS["H100"]
    assert made.tokens_per_second == pytest.approx(rate / made.flops_per_token)
    assert made.step_seconds == pytest.approx(4 * 64 / made.tokens_per_second)
    assert (made.steps, made.seconds) == (None, None)
    elsewhere = estimate(run(model_dir, seq_length=64), card=80.0)
    if not torch.cuda.is_available():
        assert elsewhere.tokens_per_second is None  # whose card?
    assert elsewhere.dtype == "bfloat16"
    here = estimate(run(model_dir, seq_length=64))
    if not torch.cuda.is_available():
        assert here.dtype == "float32"
        assert "measured on cpu" in str(here.rate_from)


def test_the_efficiency_is_the_benchmarks(tmp_path: Path) -> None:
    """OF_PEAK and OF_GEMM, from the operations of the step that benchmarks/bench_step.py times."""
    from transformers import AutoModel, LlamaConfig

    from benchmarks.bench_step import LLAMA_3_8B, SETTINGS

    with torch.device("meta"):
        model = AutoModel.from_config(
            LlamaConfig(**LLAMA_3_8B, vocab_size=8, use_cache=False), dtype=torch.bfloat16
        )
    adapted = fastlora.get_peft_model(model, fastlora.LoraConfig(**SETTINGS))
    step = Footprint()
    with step, GpuKernels(step):
        x = torch.empty(2, 4096, 4096, dtype=torch.bfloat16, device="meta", requires_grad=True)
        backward(adapted(inputs_embeds=x).last_hidden_state.sum())
    result = json.loads((RESULTS / "step-nvidia-h200.json").read_text())
    times = {row["contender"]: sorted(row["times_us"]) for row in result["rows"]}
    lora = times["fastlora LoRA"]
    rate = step.flops / (lora[len(lora) // 2] * 1e-6)
    assert rate / PEAK_FLOPS["H200"] == pytest.approx(OF_PEAK, abs=0.01)
    assert rate / result["ceilings"]["gemm_flops_per_s"] == pytest.approx(OF_GEMM, abs=0.01)


def test_memory_grows_as_it_must(model_dir: Path) -> None:
    """Differences that are known: logits in fp32 twice or more, states of AdamW, a mask for packed documents."""
    one, two = tiny(model_dir, batch_size=8), tiny(model_dir, batch_size=16)
    vocabulary = json.loads((model_dir / "config.json").read_text())["vocab_size"]
    assert two.peak_allocated_bytes - one.peak_allocated_bytes >= 2 * 4 * 8 * 32 * vocabulary
    assert one.optimizer_bytes == pytest.approx(8 * one.trained_parameters, rel=0.2)  # 512 each
    full = tiny(model_dir, "full", dtype="bfloat16")
    least = 16 * full.trained_parameters  # weight, gradient, two moments in fp32
    assert full.peak_allocated_bytes > least
    assert full.weights_bytes == pytest.approx(4 * full.trained_parameters, rel=0.1)
    accumulated = tiny(model_dir, "full", grad_accumulation=2)
    assert accumulated.peak_allocated_bytes >= tiny(model_dir, "full").peak_allocated_bytes
    assert accumulated.step_seconds == pytest.approx(2 * tiny(model_dir, "full").step_seconds)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("method", "dtype", "checkpointing"),
    [
        *(("full", dtype, again) for dtype in ("float32", "bfloat16") for again in (False, True)),
        *((method, "float32", False) for method in METHODS if method != "full"),
        *((method, "bfloat16", True) for method in ("lora", "qdora", "houlsby", "p_tuning")),
        *((method, "bfloat16", False) for method in ("prefix_tuning", "ia3", "ln_tuning")),
    ],
)
def test_a_step_holds_what_it_holds_on_a_cpu(
    method: str, dtype: str, checkpointing: bool, tmp_path: Path
) -> None:
    """Attention, autocast and AdamW as they are, against how they are modelled."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from fastlora.training import base
    from fastlora.training.engine import engine_of
    from fastlora.training.loop import adamw, summed_loss
    from fastlora.training.packing import Batch
    from fastlora.training.run import prepare_model

    folder = config_of(memory.Shape(256, 688, 4, 8, 4, 1000), tmp_path)
    config = run(
        folder,
        method,
        batch_size=4,
        seq_length=256,
        dtype=dtype,
        packing=False,
        gradient_checkpointing=checkpointing,
    )
    made = estimate(config, tokens_per_second=1.0)
    engine, cpu = engine_of(config), torch.device("cpu")
    wanted = base.DTYPES[dtype]
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder), dtype=engine.stored_as(wanted)
    ).requires_grad_(False)
    prepare_model(model, config, None)
    lm = base.CausalLM(engine.enter(model, cpu, print).train(), model, engine.cast_to(wanted))
    real = Footprint("cpu")
    real.hold([*lm.model.parameters(), *lm.model.buffers()])
    optimizer = adamw(lm.model, config, foreach=True)
    with real:
        for parameter in filter(lambda p: p.requires_grad, lm.model.parameters()):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        ids = torch.randint(0, 1000, (4, 256))
        batch = Batch(ids, ids, torch.arange(256).expand(4, -1))
        summed_loss(lm, batch, cpu).backward()
    assert made.peak_allocated_bytes - CUBLAS_BYTES == pytest.approx(real.peak, rel=0.002)


def test_attention_never_is_a_matrix_but_its_mask_is(tmp_path: Path) -> None:
    shape = memory.Shape(64, 64, 1, 4, 4, 64)
    model = config_of(shape, tmp_path, max_position_embeddings=1 << 16)

    def peak(tokens: int, packing: bool) -> int:
        config = run(model, batch_size=1, seq_length=tokens, packing=packing, dtype="bfloat16")
        return estimate(config, card=1.0).peak_allocated_bytes

    s = 1 << 12
    assert peak(2 * s, False) - peak(s, False) < s * s
    extra = peak(2 * s, True) - peak(2 * s, False)
    # bool, and what is added to scores in 16 bits; less what the other peak held there
    assert extra >= 2.8 * (2 * s) ** 2


@pytest.mark.parametrize(
    "kind",
    [
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96}),
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96}),
        ("qwen2", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 96}),
        ("gemma2", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "vocab_size": 96}),
        ("gpt_neox", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 96}),
        ("opt", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": 96, "word_embed_proj_dim": 32}),
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96, "state_size": 4}),
    ],
    ids=lambda kind: kind[0],
)  # fmt: skip
def test_other_architectures(kind: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind[0], **kind[1])
    config.save_pretrained(tmp_path)
    made = estimate(run(tmp_path, seq_length=16, batch_size=2, r=2), card=8.0)
    assert made.fits
    model = AutoModelForCausalLM.from_config(config)
    assert made.total_parameters - made.trained_parameters == sum(
        p.numel() for p in model.parameters()
    )


def test_the_command(fastlora_cli: Any, model_dir: Path, text_file: Path) -> None:
    options = ("estimate", "--model", model_dir, "--seq-length", 32, "--r", 4)
    result = fastlora_cli(*options, "--card", 8, "--gpu", "RTX 4090")
    assert result.exit_code == 0, result.output
    for text in ("lora r=4,", "fits: 7.25 GiB", "adapter file", "tokens/s", "46% of 165 TFLOP/s"):
        assert text in result.stdout
    tight = fastlora_cli(*options, "--card", 0.76)
    assert "does not fit" in tight.stdout
    assert ("not known: give --gpu" in tight.stdout) == (not torch.cuda.is_available())
    result = fastlora_cli(
        *options, "--data", text_file, "--epochs", 2, "--tokens-per-second", 100, "--json"
    )
    made = json.loads(result.stdout)
    assert made["steps"] > 2
    assert made["seconds"] == pytest.approx(made["steps"] * 4 * 32 / 100)
    half = json.loads(fastlora_cli(*options, "--data", text_file, "--json").stdout)
    assert 2 * half["steps"] - made["steps"] in (0, 1)


def test_what_cannot_be_estimated(fastlora_cli: Any, model_dir: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "config.json").write_text('{"model_type": "no such"}')
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "config.json").write_text("{")
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    (quantised / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    for arguments, message in (
        ((), "--model is missing"),
        (("--model", tmp_path / "nowhere"), "does not exist"),
        (("--model", odd), "is no causal language model"),
        (("--model", torn), "cannot be read"),
        (("--model", quantised), "is quantised (gptq)"),
        (("--model", model_dir, "--gpu", "Voodoo"), "--gpu 'Voodoo' is not one of B200"),
        (("--model", model_dir, "--gpu", "H100", "--dtype", "float32"), "--tokens-per-second"),
        (("--model", model_dir, "--card", -1), "--card -1 must be a positive number"),
        (("--model", model_dir, "--tokens-per-second", 0), "--tokens-per-second 0 must"),
        (("--model", model_dir, "--seq-length", 4096), "takes at most 128 tokens"),
        (("--model", model_dir, "--target-modules", "x_proj"), "no module x_proj"),
        (("--model", model_dir, "--r", 8, "--trainable-share", "1%"), "exclude each other"),
        (("--model", model_dir, "--method", "magic"), "--method 'magic'"),
        (("--model", model_dir, "--method", "full", "--r", 8), "--method full has no --r"),
    ):
        fitting = () if "--seq-length" in arguments else ("--seq-length", 64)
        result = fastlora_cli("estimate", *fitting, *arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert message in result.stderr, (arguments, result.stderr)
    with pytest.raises(InputError, match="card"):
        estimate(run(model_dir, seq_length=64), card=float("inf"))


def test_nothing_stays_changed(model_dir: Path) -> None:
    state = torch.get_rng_state()
    tiny(model_dir)
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.zeros(1, requires_grad=True)
    (x * 2).backward()  # modes are off again
    assert x.grad is not None
