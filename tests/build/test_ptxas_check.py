"""csrc/ptxas_check.py: the build stops where ptxas says that a Hopper kernel cannot be fast, and only there."""

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "csrc" / "ptxas_check.py"
spec = importlib.util.spec_from_file_location("ptxas_check", PATH)
ptxas_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ptxas_check)

CLEAN = """ptxas info    : Compiling entry function '_Z6kernelv' for 'sm_90a'
ptxas info    : Function properties for _Z6kernelv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
"""
SPILLED = CLEAN.replace("0 bytes spill stores", "12 bytes spill stores")
SERIALISED = CLEAN + (
    "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x "
    "in the function '_Z5otherv'\n"
)


def nvcc(output: str, code: int = 0) -> list[str]:
    return [sys.executable, "-c", f"import sys; sys.stderr.write({output!r}); sys.exit({code})"]


def test_a_clean_kernel_passes_without_a_word(capfd):
    assert ptxas_check.main(nvcc(CLEAN)) == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (SPILLED, "12 bytes of registers are spilled in _Z6kernelv"),
        (SERIALISED, "ptxas serialises wgmma in _Z5otherv"),
    ],
)
def test_a_slow_kernel_stops_the_build_unless_it_is_allowed(monkeypatch, capfd, output, told):
    monkeypatch.delenv("FASTLORA_ALLOW_SLOW_KERNELS", raising=False)
    assert ptxas_check.main(nvcc(output)) == 1
    assert told in capfd.readouterr().err
    monkeypatch.setenv("FASTLORA_ALLOW_SLOW_KERNELS", "1")
    assert ptxas_check.main(nvcc(output)) == 0
    assert told in capfd.readouterr().err


def test_errors_and_warnings_come_through(capfd):
    assert ptxas_check.main(nvcc(CLEAN + "gemm.cu(3): error: no such thing\n", 2)) == 2
    assert capfd.readouterr().err == "gemm.cu(3): error: no such thing\n"
