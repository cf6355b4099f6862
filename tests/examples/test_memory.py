"""examples/memory.py: the arithmetic against what a model holds, and a case from the command line to its files."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import fastlora

SCRIPT = Path(__file__).parents[2] / "examples" / "memory.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def memory() -> ModuleType:
    spec = importlib.util.spec_from_file_location("memory_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


def gib(memory: ModuleType, name: str) -> tuple[float, float]:
    case = next(case for case in memory.CASES if case.name == name)
    total = sum(memory.arithmetic(case.shape, case.quantize).values())
    return total / memory.GIB, case.cap_bytes / memory.GIB


@pytest.mark.parametrize(
    ("name", "total", "cap"),
    [("qlora-7b", 4.7, 5.4), ("qlora-13b", 8.3, 11.4), ("qlora-70b", 42.0, 47.4), ("lora-7b", 13.6, 15.4)],
)  # fmt: skip
def test_what_the_shapes_add_up_to(memory: ModuleType, name: str, total: float, cap: float) -> None:
    assert gib(memory, name) == (pytest.approx(total, abs=0.05), pytest.approx(cap))


@pytest.mark.parametrize("quantize", [True, False])
def test_a_model_holds_what_the_arithmetic_says(memory: ModuleType, quantize: bool) -> None:
    model = memory.build(memory.TINY, quantize, CPU)
    parts = memory.arithmetic(memory.TINY, quantize)
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert frozen == parts["linears"] + parts["embedding, head, norms"]
    assert 4 * trained == parts["adapters, gradients, AdamW"]
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_it_is_the_model_that_quantize_makes_of_a_whole_one(memory: ModuleType) -> None:
    ours = memory.build(memory.TINY, True, CPU)
    shape = memory.TINY
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
    )
    lora = fastlora.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", quantize="nf4")
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    usual = fastlora.get_peft_model(whole, lora)

    def described(model: torch.nn.Module) -> dict[str, tuple[object, ...]]:
        return {n: (p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()}

    assert described(ours) == described(usual)
    rotary, same = (m.get_base_model().model.rotary_emb.inv_freq for m in (ours, usual))
    assert torch.equal(rotary, same)
    assert ours.is_gradient_checkpointing and ours.training


@pytest.mark.parametrize("step", [0.0, -2e-4])
def test_a_loss_that_does_not_fall_is_an_error(
    memory: ModuleType, monkeypatch: pytest.MonkeyPatch, step: float
) -> None:
    case = dataclasses.replace(memory.CASES[0], shape=memory.TINY)
    good = memory.run(case, CPU)
    assert good.error is None and len(good.losses) == 10 and good.losses[-1] < good.losses[0]
    adamw = torch.optim.AdamW

    def other(trained, lr, fused):  # type: ignore[no-untyped-def]
        return adamw(trained, lr=-step, maximize=step < 0, fused=fused)

    monkeypatch.setattr(torch.optim, "AdamW", other)
    assert memory.run(case, CPU).error == "the loss did not fall"


def test_what_goes_wrong_is_written_down(
    memory: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(memory, "build", full)
    monkeypatch.setattr(memory, "run_apart", memory.run)
    arguments = ["--tiny", "--case", "qlora-13b", "--out", str(tmp_path)]
    assert memory.main(arguments) == 1
    (row,) = json.loads(next(tmp_path.glob("memory-*.json")).read_text())["rows"]
    assert row["error"].startswith("OutOfMemoryError: CUDA out of memory")
    assert row["losses"] == []
    assert "OutOfMemoryError" in next(tmp_path.glob("memory-*.md")).read_text()


def test_the_whole_script(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--tiny", "--case", "qlora-70b", "--out", tmp_path],
        capture_output=True,
        text=True,
        timeout=150,
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[1]), "FASTLORA_COMMIT": "c0ffee"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "qlora-70b: no cap here" in done.stdout
    found = json.loads(next(tmp_path.glob("memory-qlora-70b-cpu*.json")).read_text())
    assert found["environment"]["commit"] == "c0ffee"
    (row,) = found["rows"]
    assert row["losses"][-1] < row["losses"][0] and row["peak_reserved"] is None
    assert 0 < row["host_peak"] < 8 << 30
    table = next(tmp_path.glob("memory-qlora-70b-cpu*.md")).read_text()
    assert "| qlora-70b | 48 | 47.40 |" in table and "commit `c0ffee`" in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_runs(
    memory: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        memory.main(["--case", "qlora-7b"])
    assert "--tiny runs on the CPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_cap_holds(memory: ModuleType, tmp_path: Path) -> None:
    """A card without room for the model: in a process of its own, for a cap lasts as long as one."""
    script = (
        "import dataclasses, importlib.util, sys, torch\n"
        f"spec = importlib.util.spec_from_file_location('memory_example', {str(SCRIPT)!r})\n"
        "memory = sys.modules[spec.name] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(memory)\n"
        "shape = dataclasses.replace(memory.LLAMA_7B, layers=2)\n"
        "for card, told in ((1.0, 'OutOfMemoryError'), (2.6, 'None')):\n"
        "    result = memory.run(memory.Case('two layers', shape, False, card), torch.device('cuda', 0))\n"
        "    print(result)\n"
        "    assert str(result.error).startswith(told)\n"
        "    assert 0 < result.peak_allocated <= result.peak_reserved\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
