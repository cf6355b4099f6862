"""benchmarks/bench_segments.py: its cases and tables, and that a wrong contender is named and not timed."""

import json

import pytest
import torch

import fastlora
from benchmarks import bench_segments


def run(tmp_path):
    code = bench_segments.main(["--rounds", "15", "--out", str(tmp_path), "--device", "cpu"])
    assert code == 0
    found = json.loads(next(tmp_path.glob("segments-*.json")).read_text())
    return {(row["case"], row["contender"]): row for row in found["rows"]}


def test_every_contender_is_timed_beside_the_frozen_linear_and_one_adapter(tmp_path):
    rows = run(tmp_path)
    cases = [
        f"{d} 64x64x96 {pieces}" for d in ("fwd", "f+b") for pieces in ("1 segment", "4 segments")
    ]
    contenders = ("frozen", "fastlora one adapter", "fastlora segments", "loop")
    assert set(rows) == {(case, contender) for case in cases for contender in contenders}
    for row in rows.values():
        assert row["error"] is None and len(row["times_us"]) == 15 and row["ratio"]["median"] > 0
    _, over_frozen, over_one = next(tmp_path.glob("segments-*.md")).read_text().split("\n## ")
    one = rows[cases[3], "fastlora one adapter"]["times_us"]
    ours = rows[cases[3], "fastlora segments"]["times_us"]
    ratio = torch.tensor([a / b for a, b in zip(ours, one, strict=True)]).median()
    line = next(line for line in over_one.splitlines() if line.startswith(f"| {cases[3]} |"))
    assert float(line.split("|")[4].split()[0]) == pytest.approx(float(ratio), abs=2e-3)
    assert "1.000 [1.000, 1.000]" in over_frozen


def test_wrong_segments_are_named_and_have_no_time(tmp_path, monkeypatch):
    right = fastlora.lora_linear_segments
    monkeypatch.setattr(fastlora, "lora_linear_segments", lambda *args: right(*args[:-1], 1.0))
    rows = run(tmp_path)
    for (_, contender), row in rows.items():
        wrong = contender == "fastlora segments"
        assert ("wrong result" in (row["error"] or "")) == wrong and bool(row["times_us"]) != wrong
