"""``fastlora finetune`` and ``quantize`` on a GPU: bf16 by itself, fastlora's kernels, the same losses after a resume, the
same files as on the CPU.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastlora

pytestmark = pytest.mark.gpu


def losses(output: Path) -> list[float]:
    entries = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
def test_trains_repeats_and_resumes_exactly(dtype: str, finetune_cli: Any, tmp_path: Path) -> None:
    arguments = ("--device", "cuda", "--dtype", dtype, "--epochs", 9, "--dropout", 0.1)
    fastlora.reset_launches()
    for name in ("whole", "again"):
        result = finetune_cli(*arguments, "--max-steps", 24, output=tmp_path / name)
        assert result.exit_code == 0, result.output
        assert "may differ in the last digits" not in result.output
    assert {backend for _, backend in fastlora.launches()} & {"triton", "cuda"}
    whole = losses(tmp_path / "whole")
    assert losses(tmp_path / "again") == whole
    summary = json.loads((tmp_path / "whole/summary.json").read_text())
    assert summary["perplexity_after"] < summary["perplexity_before"]
    assert summary["dtype"] == ("bfloat16" if dtype == "auto" else dtype)

    # A run that lost what came after its checkpoint of step 8.
    cut = tmp_path / "cut"
    result = finetune_cli(
        *arguments, "--max-steps", 24, "--save-every", 8, "--keep-last", 9, output=cut
    )
    assert result.exit_code == 0, result.output
    for step in (16, 24):
        shutil.rmtree(cut / "checkpoints" / f"step-{step:08d}")
    result = finetune_cli("--device", "cuda", "--resume", output=cut)
    assert result.exit_code == 0, result.output
    assert "resuming from step 8" in result.stdout
    assert losses(cut) == whole


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_qlora_trains_on_kernels_alone_and_resumes_exactly(
    backend: str, finetune_cli: Any, tmp_path: Path
) -> None:
    strict = backend == "triton"
    arguments = ("--device", "cuda", "--method", "qlora", "--epochs", 9, "--dropout", 0.1)
    arguments += ("--max-steps", 12, "--save-every", 4, "--keep-last", 9)
    with fastlora.backend("triton", strict=True) if strict else contextlib.nullcontext():
        fastlora.reset_launches()
        for name in ("whole", "cut"):
            result = finetune_cli(*arguments, output=tmp_path / name)
            assert result.exit_code == 0, result.output
        for step in (8, 12):
            shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step-{step:08d}")
        result = finetune_cli("--device", "cuda", "--resume", output=tmp_path / "cut")
        assert result.exit_code == 0, result.output
        assert "resuming from step 4" in result.stdout
    ran = fastlora.launches()
    assert {by for _, by in ran} <= ({"triton"} if strict else {"triton", "cuda"}), ran
    count = {op: sum(n for (o, _), n in ran.items() if o == op) for op, _ in ran}
    assert count["quantize"] == 3 * 14  # each linear, of each of the three starts
    products = sum(count.get(op, 0) for op in ("dequantize", "nf4_few", "nf4_gemm", "nf4_dx"))
    # The weight is made floats, or read as codes: forward, and backward but for the first layer's three.
    assert products >= (12 + 12 + 8) * (14 + 11), ran
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    summary = json.loads((tmp_path / "whole/summary.json").read_text())
    assert summary["perplexity_after"] < summary["perplexity_before"]
    assert summary["dtype"] == "bfloat16"


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    return torch.stack((codes >> 4, codes & 15), dim=-1).int()


@pytest.mark.parametrize("double_quant", [True, False])
def test_quantize_writes_on_a_gpu_what_it_writes_on_the_cpu(
    double_quant: bool, fastlora_cli: Any, tmp_path: Path
) -> None:
    """But for rounding: a GPU's reciprocal, and its mean of the scales, may be a last bit off, so that a value on a bound
    gets the code beside."""
    from tests.tiny_models import tiny_llama

    tiny_llama(dtype=torch.bfloat16, hidden_size=256, intermediate_size=512).save_pretrained(tmp_path / "floats")  # fmt: skip
    flag = "--double-quant" if double_quant else "--no-double-quant"
    fastlora.reset_launches()
    for device in ("cpu", "cuda"):
        result = fastlora_cli(
            "quantize", tmp_path / "floats", "-o", tmp_path / device, flag, "--device", device
        )
        assert result.exit_code == 0, result.output
    ran = fastlora.launches()
    assert ran["quantize", "torch"] == 14
    assert sum(n for (op, by), n in ran.items() if op == "quantize" and by != "torch") == 14
    files = {path.name for path in (tmp_path / "cpu").iterdir()}
    assert files == {path.name for path in (tmp_path / "cuda").iterdir()}
    for name in files - {"model.safetensors"}:
        assert (tmp_path / "cpu" / name).read_bytes() == (tmp_path / "cuda" / name).read_bytes()
    cpu, gpu = (load_file(tmp_path / device / "model.safetensors") for device in ("cpu", "cuda"))
    assert cpu.keys() == gpu.keys()
    for key, want in cpu.items():
        got = gpu[key]
        assert got.dtype == want.dtype and got.shape == want.shape, key
        if f"{key}.absmax" in cpu:
            apart = (nibbles(got) - nibbles(want)).abs()
            assert apart.max() <= 1 and apart.count_nonzero() <= want.numel() // 1000, key
        elif double_quant and key.endswith(".absmax"):
            apart = (got.int() - want.int()).abs()
            assert apart.max() <= 1 and apart.count_nonzero() <= max(1, want.numel() // 100), key
        elif key.endswith(".nested_absmax"):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=0, msg=key)
        elif key.endswith("bitsandbytes__nf4"):
            states = [json.loads(bytes(t.tolist())) for t in (got, want)]
            offsets = [state.pop("nested_offset", 0.0) for state in states]
            assert states[0] == states[1] and offsets[0] == pytest.approx(offsets[1], rel=1e-5)
        else:
            assert torch.equal(got, want), key
