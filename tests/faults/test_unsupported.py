"""A GPU, a build or a package that is missing, too old or half broken: a reason, and something that still works."""

from __future__ import annotations

import sys

import pytest
import torch

import fastlora
from fastlora import _library
from fastlora.ops import support
from tests.faults.common import run_python

GPU = torch.device("cuda", 0)
BF16 = torch.bfloat16


def forget() -> None:
    """Drop every cached answer about devices."""
    support.miss.cache_clear()
    _library._runs_on.cache_clear()


@pytest.fixture
def capability(monkeypatch):
    """Pretend that cuda:0 has a given compute capability."""

    def set_to(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
        forget()

    yield set_to
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize("op", support.OPS)
@pytest.mark.parametrize("have", [(3, 5), (6, 1), (7, 0), (7, 5)])
def test_a_gpu_older_than_the_table_is_refused_with_the_reason(capability, op, have):
    pytest.importorskip("triton")
    capability(*have)
    reason = support.miss(op, "triton", GPU, BF16, 16)
    assert reason == f"needs compute capability 8.0, cuda:0 has {have[0]}.{have[1]}"
    assert "triton" not in support.choose(op, GPU, BF16, 16)
    with (
        fastlora.backend("triton", strict=True),
        pytest.raises(RuntimeError, match=r"needs compute capability 8\.0"),
    ):
        support.choose(op, GPU, BF16, 16)


@pytest.mark.parametrize("have", [(8, 0), (8, 9), (9, 0), (10, 3), (12, 0), (13, 0)])
def test_newer_gpus_are_taken(capability, have):
    pytest.importorskip("triton")
    capability(*have)
    assert support.miss("gemm", "triton", GPU, BF16, 16) is None


@pytest.mark.parametrize("kind", ["mps", "xpu", "meta"])
def test_other_devices_get_plain_torch(kind):
    device = torch.device(kind)
    for backend in ("triton", "cuda"):
        assert support.miss("mask", backend, device, torch.float32, 0)
    assert support.choose("gemm", device, torch.float32, 16) == "torch"


def test_without_triton_every_op_has_a_backend(monkeypatch, capability):
    capability(9, 0)
    monkeypatch.setitem(sys.modules, "triton", None)  # what import finds where nothing is installed
    support.triton_missing.cache_clear()
    try:
        reason = support.miss("down", "triton", GPU, BF16, 16)
        assert reason is not None and "triton" in reason
        assert support.choose("down", GPU, BF16, 16) == "torch"
    finally:
        support.triton_missing.cache_clear()


def test_a_slower_kernel_is_better_than_none(monkeypatch):
    """Where Triton is missing, a cuda kernel that would lose to it still beats plain torch."""
    missing = {"triton": "not installed"}
    monkeypatch.setattr(support, "miss", lambda op, name, *_: missing.get(name))
    fits = {
        "cuda": support.Fit(),
        "triton or cuda": support.Fit(slower="few rows"),
        "torch": support.Fit(miss="odd pitch"),
    }
    for expected, fit in fits.items():
        chosen = support.choose("gemm", GPU, BF16, 16, lambda fit=fit: fit)
        assert chosen in expected
    missing.clear()
    assert support.choose("gemm", GPU, BF16, 16, lambda: fits["triton or cuda"]) == "triton"


BROKEN = {
    "triton": "raise ImportError('libtriton.so: undefined symbol: _ZN4mlir')",
    "transformers": "raise RuntimeError('half installed')",
    "peft": "raise RuntimeError('half installed')",
    "matplotlib": "raise OSError('no font')",
    "rich": "raise AttributeError('moved')",
    "typer": "raise ImportError('gone')",
    "datasets": "raise ImportError('gone')",
}


@pytest.fixture
def broken(tmp_path):
    """A path on which every optional package is installed and none can be imported."""
    for name, line in BROKEN.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(line + "\n")
    return str(tmp_path)


def test_broken_optional_packages_stop_nothing_that_does_not_need_them(broken):
    program = (
        "import torch, fastlora\n"
        "net = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))\n"
        "model = fastlora.get_peft_model(net, fastlora.LoraConfig(r=2, target_modules=['0', '1']))\n"
        "model(torch.randn(3, 8)).sum().backward()\n"
        "print(fastlora.launches()['gemm', 'torch'], fastlora.explain(model.get_base_model()[0], torch.randn(3, 8)))\n"
    )
    output = run_python(program, PYTHONPATH=broken, TRITON_INTERPRET="0")
    assert output.startswith("3 LoRALinear")  # two forwards, and dX of the second layer


def test_a_triton_that_cannot_be_imported_is_as_good_as_missing(broken):
    """Found, but broken (a torch upgrade, say): a GPU's tensors go to plain torch, with the reason on record."""
    program = (
        "import torch\n"
        "torch.cuda.get_device_capability = lambda device=None: (9, 0)\n"
        "from fastlora.ops import support\n"
        "gpu = torch.device('cuda', 0)\n"
        "print(support.choose('down', gpu, torch.bfloat16, 16))\n"
        "print(support.miss('down', 'triton', gpu, torch.bfloat16, 16))\n"
    )
    chosen, reason = run_python(program, PYTHONPATH=broken, TRITON_INTERPRET="0").splitlines()
    assert chosen == "torch" and "undefined symbol" in reason
