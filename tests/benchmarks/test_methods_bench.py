"""benchmarks/bench_methods.py: its cases and tables, and that a wrong contender is named and not timed; the sweep's verdict."""

import json

import pytest

from benchmarks import bench_methods, sweep_bottleneck

DIRECTIONS = ("fwd", "f+b")
BOTTLENECKS = [f"bottleneck of 8 {d} 32x64" for d in DIRECTIONS]
DORAS = [f"DoRA {over}{d} 32x64x96" for over in ("", "over NF4 ") for d in DIRECTIONS]
SCALES = [f"(IA)^3 {d} 32x64x96" for d in DIRECTIONS]


def run(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    assert bench_methods.main(["--rounds", "15", "--out", str(tmp_path), "--device", "cpu"]) == 0
    found = json.loads(next(tmp_path.glob("methods-*.json")).read_text())
    return {(row["case"], row["contender"]): row for row in found["rows"]}


def cells(table, case):
    line = next(line for line in table.splitlines() if line.startswith(f"| {case} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_contender_is_timed_beside_its_base(tmp_path):
    rows = run(tmp_path)
    loras = ("frozen", "fastlora LoRA", "fastlora DoRA", "peft LoRA", "peft DoRA")
    scales = ("frozen", "fastlora (IA)^3", "peft (IA)^3")
    assert set(rows) == {
        *((case, name) for case in BOTTLENECKS for name in ("torch modules", "fastlora")),
        *((case, name) for case in DORAS for name in loras),
        *((case, name) for case in SCALES for name in scales),
    }
    for row in rows.values():
        assert row["error"] is None and len(row["times_us"]) == 15 and row["ratio"]["median"] > 0
    text = next(tmp_path.glob("methods-*.md")).read_text()
    _, bottlenecks, linears, over_lora = text.split("\n## ")
    assert cells(bottlenecks, BOTTLENECKS[1])[1] == "1.000 [1.000, 1.000]"
    assert f"- {BOTTLENECKS[0]}: " in bottlenecks
    assert cells(linears, DORAS[3])[1] == cells(linears, SCALES[0])[1] == "1.000 [1.000, 1.000]"
    names = [cell.strip() for cell in over_lora.splitlines()[2].strip("|").split("|")]
    lora, ours = (rows[DORAS[1], f"fastlora {kind}"]["times_us"] for kind in ("LoRA", "DoRA"))
    ratio = sorted(a / b for a, b in zip(ours, lora, strict=True))[7]
    shown = cells(over_lora, DORAS[1])[names.index("fastlora DoRA")]
    assert float(shown.split()[0]) == pytest.approx(ratio, abs=2e-3)
    assert "bottleneck" not in linears + over_lora and "(IA)^3" not in over_lora


def test_wrong_methods_are_named_and_have_no_time(tmp_path, monkeypatch):
    """A bottleneck that forgets the residual, and an (IA)^3 that is off by a tenth."""
    bottleneck, scaled = bench_methods.Bottleneck.forward, bench_methods.IA3Layer.forward
    forgets = lambda self, x, residual: bottleneck(self, x, residual) - residual  # noqa: E731
    monkeypatch.setattr(bench_methods.Bottleneck, "forward", forgets)
    monkeypatch.setattr(bench_methods.IA3Layer, "forward", lambda self, x: 1.1 * scaled(self, x))
    for (case, contender), row in run(tmp_path).items():
        wrong = contender in ("fastlora", "fastlora (IA)^3")
        assert ("wrong result" in (row["error"] or "")) == wrong, (case, contender)
        assert bool(row["times_us"]) != wrong


def test_the_sweep_counts_widths_up_to_the_first_that_is_slower():
    ratios = {16: [0.8, 0.9], 64: [1.05, 0.9], 8: [0.7, 0.7], 128: [1.3, 0.9], 256: [0.5, 0.5]}
    assert sweep_bottleneck.widest(ratios, 2) == 64
    assert sweep_bottleneck.widest({8: [0.5]}, 2) == 0  # where one number of rows failed
    assert sweep_bottleneck.widest({}, 2) == 0
