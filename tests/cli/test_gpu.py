"""``fastlora finetune`` on a GPU: bf16 by itself, fastlora's kernels, and the same losses after
a resume.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

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
    import shutil

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
