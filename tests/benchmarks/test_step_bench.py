"""benchmarks/bench_step.py: its contenders are alike, wrong ones are named, and missing libraries say so."""

import json
import sys

import pytest
import torch

from benchmarks import bench_step

OURS = ("fastlora LoRA", "fastlora QLoRA")


def run(tmp_path):
    assert bench_step.main(["--rounds", "15", "--out", str(tmp_path), "--device", "cpu"]) == 0
    found = json.loads(next(tmp_path.glob("step-*.json")).read_text())
    return {row["contender"]: row for row in found["rows"]}


def test_every_contender_is_timed_beside_the_frozen_layers(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    rows = run(tmp_path)
    assert list(rows) == ["frozen bf16", *OURS, "peft LoRA", "peft + bitsandbytes QLoRA"]
    for row in rows.values():
        assert row["error"] is None and len(row["times_us"]) == 15 and row["ratio"]["median"] > 0
    assert "| 2 layers, 2 x 32 tokens | 1.000" in next(tmp_path.glob("step-*.md")).read_text()


def test_an_update_of_the_wrong_size_is_named_and_not_timed(tmp_path, monkeypatch):
    monkeypatch.setitem(bench_step.SETTINGS, "lora_alpha", 2 * bench_step.RANK)
    rows = run(tmp_path)
    assert rows["frozen bf16"]["times_us"]
    for name in OURS:
        assert "wrong result: relative error" in rows[name]["error"]
        assert not rows[name]["times_us"]


@pytest.mark.parametrize("library", ["peft", "bitsandbytes"])
def test_a_missing_library_is_the_reason_given(tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    rows = run(tmp_path)
    assert library in rows["peft + bitsandbytes QLoRA"]["error"]
    assert not rows["peft + bitsandbytes QLoRA"]["times_us"]
    assert all(rows[name]["times_us"] for name in OURS)


def test_contenders_share_the_weights():
    base = torch.nn.Sequential(torch.nn.Linear(3, 4))
    again = bench_step.shared(base)
    assert again is not base and again[0] is not base[0]
    assert again[0].weight is base[0].weight and again[0].bias is base[0].bias
