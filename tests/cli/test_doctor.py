"""fastlora doctor: what it prints, and that a failure of any kind reaches the exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlora import _library, reference
from fastlora.cli import doctor
from fastlora.ops import selftest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("with_rich", [True, False])
def test_a_healthy_machine(capsys, monkeypatch, with_rich):
    if with_rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert doctor.doctor() == 0
    printed = capsys.readouterr().out
    release = torch.__version__.split("+")[0]  # package records may leave the build label out
    for expected in (release, sys.version.split()[0], "down", "gemm", "wgrad", "triton"):
        assert expected in printed
    assert "Every self-test passed." in printed


def test_says_why_the_library_did_not_load(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(_library, "_status", None)
    monkeypatch.setenv("FASTLORA_LIBRARY", str(tmp_path / "gone.so"))
    monkeypatch.setenv("COLUMNS", "500")  # a long temporary path must not break the sentence
    with pytest.warns(UserWarning, match="compiled ops are not used"):
        doctor.doctor()
    assert "there is no such file" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.skipif(not _library.load(), reason=f"no op library: {_library.status().reason}")
def test_architectures_of_the_library(capsys):
    facts = doctor.compiled()
    assert facts["library"] == str(_library.status().path)
    assert facts["architectures"] == (
        " ".join(_library.build_info()["archs"]) or "none (CPU ops only)"
    )


def test_a_failed_self_test_is_the_exit_code(capsys, monkeypatch):
    bad = {
        "op": "gemm",
        "backend": "triton",
        "ok": False,
        "error": "RuntimeError: [boom]",
        "seconds": 0.1,
    }
    monkeypatch.setattr(selftest, "run", lambda device: [bad])
    with pytest.raises(SystemExit) as stop:
        doctor.doctor_command()
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed
    assert "[boom]" in printed


@pytest.mark.skipif(not _library.load(), reason=f"no op library: {_library.status().reason}")
def test_a_wrong_mask_is_noticed(monkeypatch):
    right = reference.mask
    assert [result["ok"] for result in doctor.check_dropout_mask(torch.device("cpu"))] == [True]
    monkeypatch.setattr(reference, "mask", lambda *args: right(*args) ^ 1)
    assert [result["ok"] for result in doctor.check_dropout_mask(torch.device("cpu"))] == [False]


def test_a_broken_torch_is_reported_not_raised(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libtorch_cpu.so: file too short')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "fastlora", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "torch does not import" in done.stdout
    assert "file too short" in done.stdout
    assert "python" in done.stdout
