"""FASTLORA_OFF: what it names, and what it refuses."""

import os
import subprocess
import sys

import pytest
import torch

from fastlora import switches
from fastlora.ops import support


def test_names_are_read_and_others_refused():
    assert switches._parsed("") == frozenset()
    assert switches._parsed(" one_read, beside,") == {"one_read", "beside"}
    with pytest.raises(ValueError, match="got flags, one; accepted are one_launch, one_read"):
        switches._parsed("one,beside,flags")


def test_it_is_read_on_import():
    def told(value):
        code = (
            "from fastlora import switches; print([s for s in switches.STEPS if switches.off(s)])"
        )
        environment = {**os.environ, "FASTLORA_OFF": value}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )

    assert told("beside,one_launch").stdout.strip() == "['one_launch', 'beside']"
    refused = told("everything")
    assert refused.returncode != 0
    assert "FASTLORA_OFF: got everything; accepted are" in refused.stderr


@pytest.mark.parametrize(
    ("step", "op", "backend"),
    [
        ("one_launch", "lora", "cuda"),
        ("nf4_codes", "nf4_few", "cuda"),
        *(
            ("nf4_codes", op, backend)
            for op in ("nf4_gemm", "nf4_dx")
            for backend in ("cuda", "triton")
        ),
    ],
)
def test_what_is_switched_off_is_no_kernel(monkeypatch, step, op, backend):
    monkeypatch.setattr(switches, "_OFF", frozenset({step}))
    support.miss.cache_clear()
    try:
        reason = support.miss(op, backend, torch.device("cuda", 0), torch.bfloat16, 16)
        assert reason == f"{step} is switched off by FASTLORA_OFF"
    finally:
        support.miss.cache_clear()
