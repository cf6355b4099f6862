"""benchmarks/bench_kernels.py and bench_qlora.py: their cases, files, and that a wrong kernel is named and not timed."""

import json
import sys

import pytest
import torch

from benchmarks import bench_kernels, bench_qlora
from fastlora.ops import raw


def run(tmp_path):
    code = bench_kernels.main(["--rounds", "15", "--out", str(tmp_path), "--device", "cpu"])
    assert code == 0
    found = json.loads(next(tmp_path.glob("kernels-*.json")).read_text())
    return {(row["case"], row["contender"]): row for row in found["rows"]}, found


def test_every_kernel_is_timed_and_written_down(tmp_path):
    rows, found = run(tmp_path)
    assert found["environment"]["torch"] == torch.__version__
    for case in ("gemm y 128x64x96", "gemm dX 128x96x64"):
        for contender in ("torch", "torch-again", "fastlora-torch"):
            assert len(rows[case, contender]["times_us"]) == 15
            assert rows[case, contender]["ratio"]["median"] > 0
    for case in ("segment_gemm y 128x64x96", "segment_gemm dX 128x64x96"):
        for contender in ("torch", "fastlora-torch"):
            assert rows[case, contender]["ratio"]["median"] > 0
    for op in ("segment_down", "segment_up", "segment_wgrad"):
        assert rows[f"{op} 128x64x96", "fastlora-torch"]["share"]["median"] > 0
    for case in ("down 128x64", "wgrad 128x96x64"):
        row = rows[case, "fastlora-torch"]
        moved = 4 * (128 * 64 + 16 * 64 + 128 * 16)
        if case.startswith("wgrad"):
            moved = 4 * (128 * (96 + 64 + 32) + 16 * (96 + 64))
        bound_us = moved / found["ceilings"]["copy_bytes_per_s"] * 1e6
        median = float(torch.tensor([bound_us / us for us in row["times_us"]]).median())
        torch.testing.assert_close(row["share"]["median"], median, rtol=1e-4, atol=0)
    table = next(tmp_path.glob("kernels-*.md")).read_text()
    assert "| down 128x64 |" in table and "`fastlora-torch`: geometric mean" in table


def test_a_wrong_kernel_is_named_and_has_no_time(tmp_path, monkeypatch):
    right = raw.down
    monkeypatch.setattr(raw, "down", lambda x, a: (right(x, a)[0] * 1.1, None))
    rows, _ = run(tmp_path)
    row = rows["down 128x64", "fastlora-torch"]
    assert "wrong result: relative error 0.1" in row["error"] and not row["times_us"]
    assert rows["wgrad 128x64x96", "fastlora-torch"]["times_us"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "3"], "got '3'; the timing rule asks for a number of at least 15"),
        (["--rounds", "many"], "got 'many'; the timing rule"),
        (["--device", "nosuch"], "got 'nosuch'; accepted are cpu, cuda and cuda:N"),
        (["--device", "cuda:99"], "got 'cuda:99'; torch sees"),
    ],
)
def test_bad_options_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        bench_kernels.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def qlora(tmp_path):
    assert bench_qlora.main(["--rounds", "15", "--out", str(tmp_path), "--device", "cpu"]) == 0
    return json.loads(next(tmp_path.glob("qlora-*.json")).read_text())


def test_qlora_is_timed_beside_the_frozen_linear_and_pefts_own_layer(tmp_path, monkeypatch):
    bnb, peft = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
    theirs = pytest.importorskip("peft.tuners.lora.bnb").Linear4bit
    calls, forward = [], theirs.forward

    def counted(layer, x):
        factors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        kinds = {layer.base_layer.compute_dtype, *(f.dtype for f in factors)}
        calls.append((type(layer.base_layer), layer.scaling["default"], *kinds))
        return forward(layer, x)

    monkeypatch.setattr(theirs, "forward", counted)
    found = qlora(tmp_path)
    rows = {(row["case"], row["contender"]): row for row in found["rows"]}
    assert {case for case, _ in rows} == {"fwd 1x64x96", "fwd 16x64x96", "f+b 32x64x96"}
    assert {contender for _, contender in rows} == {"frozen bf16", "fastlora", bench_qlora.PEFT}
    for row in rows.values():
        assert row["error"] is None and row["ratio"]["median"] > 0
    assert set(calls) == {(bnb.nn.Linear4bit, 2, torch.float32)}  # the bench's dtype on a CPU
    assert len(calls) > 3 * 15
    for library in (bnb, peft):
        assert found["environment"][library.__name__] == library.__version__


@pytest.mark.parametrize("library", ["peft", "bitsandbytes"])
def test_qlora_without_a_library_says_so(tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    rows = qlora(tmp_path)["rows"]
    theirs = [row for row in rows if row["contender"] == bench_qlora.PEFT]
    assert len(theirs) == 3 and all(library in row["error"] for row in theirs)
    assert all(row["times_us"] for row in rows if row not in theirs)
