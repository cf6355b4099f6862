"""What is kept alive, for how long, and what is shared between calls that should not be."""

from __future__ import annotations

import gc
import importlib
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.ops import support
from tests.faults.common import operands, run_python, step


def tensors_in(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    if isinstance(value, (list, tuple, set)) or type(value).__name__ == "dict_values":
        return [t for inner in value for t in tensors_in(inner)]
    return []


@pytest.mark.parametrize("scaling", ["float", "tensor"])
def test_no_tensor_hangs_on_the_context(device, scaling):
    """Only save_for_backward is seen by checkpointing, by offloading hooks and by the version check."""
    x, w, a, b = (t.requires_grad_(i != 1) for i, t in enumerate(operands(device=device)))
    scaling = 0.5 if scaling == "float" else torch.tensor(0.5, device=device)
    y = fastlora.lora_linear(x, w, a, b, scaling, torch.zeros(20, device=device), 0.2)
    assert "scale" in vars(y.grad_fn)  # the context's attributes do show here
    assert tensors_in(vars(y.grad_fn)) == []


def test_what_was_saved_goes_with_backward(strict_backend, device):
    """y lives on, what it was made from does not; a second backward is refused."""
    x, w, a, b = (t.requires_grad_(i != 1) for i, t in enumerate(operands(device=device)))
    inner = x * 1.0
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(weakref.ref(t)) or t, lambda t: t
    ):
        y = fastlora.lora_linear(inner, w, a, b, 0.5, dropout_p=0.2)
    alive, h = weakref.ref(inner), [r for r in saved if r() is not None and r().shape == (12, 4)]
    assert len(h) == 1
    del inner
    assert alive() is not None
    loss = y.square().sum()
    loss.backward()
    gc.collect()
    assert alive() is None and h[0]() is None
    assert y.shape == (12, 20)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_graph_that_is_dropped_frees_everything(device):
    x, w, a, b = (t.requires_grad_(i != 1) for i, t in enumerate(operands(device=device)))
    inner = x * 1.0
    y, alive = fastlora.lora_linear(inner, w, a, b, dropout_p=0.2), weakref.ref(inner)
    gc.disable()  # by reference counts alone: no cycle through the context
    try:
        del inner, y
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_as_the_last_op_leaks_nothing(device, use_reentrant):
    x, w, a, b = (t.requires_grad_(i != 1) for i, t in enumerate(operands(device=device)))

    def block(x):
        inner = torch.tanh(x)
        seen.append(weakref.ref(inner))
        return fastlora.lora_linear(inner, w, a, b, 0.5, dropout_p=0.2)

    seen = []
    y = checkpoint(block, x, use_reentrant=use_reentrant)
    assert all(r() is None for r in seen)  # nothing is kept between forward and backward
    y.sum().backward()
    gc.collect()
    assert len(seen) == 2 and all(r() is None for r in seen)
    assert x.grad.abs().max() > 0


def test_models_of_different_dtypes_share_no_buffer(strict_backend, device):
    """Interleaved, forward and backward, same shapes: the bits of each alone."""
    halves = operands(32, 24, 40, 8, torch.float16, device)
    others = operands(32, 24, 40, 8, torch.float32, device)
    alone = [step(*tensors) for tensors in (halves, others)]
    graphs = []
    for x, w, a, b in (halves, others):
        leaves = [t.requires_grad_() for t in (x, a, b)]
        graphs.append((leaves, fastlora.lora_linear(x, w, a, b, 0.5)))
    for (leaves, y), expected in zip(graphs, alone):
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
        for got, want in zip((y, *grads), expected):
            assert got.dtype == want.dtype and torch.equal(got, want)


def test_results_of_earlier_calls_stay(strict_backend, device):
    """No output lives in scratch memory that the next call uses again."""
    first = step(*operands(device=device), dropout_p=0.2)
    kept = [t.clone() for t in first]
    for _ in range(3):
        step(*operands(device=device), dropout_p=0.2)
    assert all(map(torch.equal, first, kept))


@pytest.mark.parametrize("name", ["down", "gemm", "wgrad"])
def test_caches_of_plans_are_bounded(name):
    """Plans are cached by row count, and a training run meets new row counts for ever."""
    pytest.importorskip("triton")
    plan = importlib.import_module(f"fastlora.triton.{name}").tile_for
    by_rows = "m" in plan.__wrapped__.__code__.co_varnames[: plan.__wrapped__.__code__.co_argcount]
    assert not by_rows or plan.cache_info().maxsize is not None
    assert support.miss.cache_info().maxsize is not None


@pytest.mark.gpu
def test_memory_does_not_grow():
    def work():
        tensors = operands(1000, 256, 384, 16, torch.bfloat16, "cuda", torch.float32)
        step(*tensors, dropout_p=0.1, bias=torch.zeros(384, device="cuda"))

    used = []
    with fastlora.backend("triton", strict=True):
        for _ in range(20):
            work()
            torch.cuda.synchronize()
            gc.collect()
            used.append(torch.cuda.memory_allocated())
    assert used[-1] == used[1], used
    assert {backend for _, backend in fastlora.launches()} == {"triton"}


ON_THE_GPU = """
import time
import torch, fastlora
from tests.faults.common import assert_right, operands
with fastlora.backend("triton", strict=True):
    for m, k, n, r in ((1000, 256, 384, 16), (3, 4096, 64, 64), (129, 72, 1000, 5)):
        for _ in range(3):
            assert_right(*operands(m, k, n, r, torch.bfloat16, "cuda"), bias=torch.zeros(n, device="cuda"))
torch.cuda.synchronize()
print(sorted(fastlora.launches()))
time.sleep(0.2)  # autograd's thread lets go of its last task: it aborts where Python ends meanwhile
"""
LAUNCHED = "[('down', 'triton'), ('gemm', 'triton'), ('wgrad', 'triton')]"


@pytest.mark.gpu
def test_scratch_memory_outlives_its_kernels():
    """Without the caching allocator a freed block is gone at once: a use after free cannot hide."""
    assert run_python(ON_THE_GPU, PYTORCH_NO_CUDA_MEMORY_CACHING="1") == LAUNCHED


@pytest.mark.gpu
def test_processes_that_compile_at_once_do_not_disturb_each_other(tmp_path):
    """Ranks that start with one empty kernel cache."""
    import concurrent.futures

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        runs = [
            pool.submit(run_python, ON_THE_GPU, timeout=300, TRITON_CACHE_DIR=str(tmp_path))
            for _ in range(3)
        ]
        assert [run.result() for run in runs] == [LAUNCHED] * 3
