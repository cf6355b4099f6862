"""Shared by every test: Triton's interpreter where there is no GPU, and skips that say their reason."""

from __future__ import annotations

import os

import torch

# Triton reads this when its kernels are defined, so it must be set before fastlora.triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

import fastlora

GPUS = torch.cuda.device_count()
GIB = 2**30


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    memory = torch.cuda.get_device_properties(0).total_memory if GPUS else 0
    for item in items:
        if GPUS == 0 and any(map(item.get_closest_marker, ("gpu", "multigpu", "huge"))):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        elif GPUS < 2 and item.get_closest_marker("multigpu"):
            item.add_marker(pytest.mark.skip(reason="needs two CUDA GPUs"))
        elif memory < 100 * GIB and item.get_closest_marker("huge"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU with 100 GiB of memory"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    fastlora.reset_launches()


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one, else the CPU, whose Triton kernels run in the interpreter."""
    return torch.device("cuda", 0) if GPUS else torch.device("cpu")


@pytest.fixture(params=["torch", "triton"])
def strict_backend(request: pytest.FixtureRequest, device: torch.device):  # type: ignore[no-untyped-def]
    """Run the test once per backend, strictly; at the end nothing of another may have been launched."""
    name = request.param
    reason = fastlora.ops.support.miss("gemm", name, device, torch.float32, 16)
    if reason is not None:
        pytest.skip(reason)
    with fastlora.backend(name, strict=True):
        yield name
    ran = {backend for _, backend in fastlora.launches()}
    assert ran <= {name}, f"asked for {name} strictly, but {ran} ran"


@pytest.fixture(params=["triton", "cuda"])
def whole_backend(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    """Run a GPU test once per backend whose kernels are ours; `cuda` as one launch a direction (csrc/lora)."""
    name = request.param
    reason = fastlora.ops.support.miss(
        "lora" if name == "cuda" else "gemm", name, torch.device("cuda", 0), torch.bfloat16, 16
    )
    if reason is not None:
        pytest.skip(reason)
    with fastlora.backend(name, strict=True):
        yield name
    launched = fastlora.launches()
    assert {backend for _, backend in launched} <= {name}, launched
    if name == "cuda":
        assert {op for op, _ in launched} <= {"lora_forward", "lora_backward", "mask"}, launched
