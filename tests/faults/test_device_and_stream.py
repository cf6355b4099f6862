"""Kernels belong on the device of their tensors, and on that device's current stream."""

from __future__ import annotations

import importlib
import threading
from types import SimpleNamespace

import pytest
import torch

import fastlora
from tests.faults.common import assert_right, operands, step

BF16 = torch.bfloat16


def test_device_properties_have_no_fixed_number_of_devices(monkeypatch):
    pytest.importorskip("triton")
    launch = importlib.import_module("fastlora.triton.launch")
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(multi_processor_count=100 + device.index),
    )
    launch.multiprocessors.cache_clear()
    try:
        for index in (0, 15, 16, 63, 127):
            assert launch.multiprocessors(torch.device("cuda", index)) == 100 + index
    finally:
        launch.multiprocessors.cache_clear()


@pytest.mark.parametrize("which", ["weight", "lora_a", "lora_b", "bias", "scaling"])
def test_tensors_of_another_device_are_named(which):
    tensors = dict(zip(("x", "weight", "lora_a", "lora_b"), operands()))
    tensors |= {"bias": torch.zeros(20), "scaling": torch.tensor(1.0)}
    tensors[which] = tensors[which].to("meta")
    with pytest.raises(ValueError, match=f"{which}: .*meta"):
        fastlora.lora_linear(**tensors)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_backend")
def test_kernels_wait_for_the_stream_they_are_called_on():
    """x is still being made on a side stream: a launch on any other stream would read what was there before."""
    x, w, a, b = operands(1024, 512, 512, 16, BF16, "cuda")
    fresh, dy = torch.randn_like(x), torch.randn(1024, 512, device="cuda").to(BF16)
    expected = step(fresh, w, a, b, dy)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(x, w, a, b, dy)  # compiled, and memory taken, before anything is timed
        torch.cuda._sleep(200_000_000)
        x.copy_(fresh)
        got = step(x, w, a, b, dy)
    torch.cuda.synchronize()
    assert all(map(torch.equal, got, expected))


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_backend")
def test_kernels_of_a_side_stream_do_not_wait_for_the_default_one():
    x, w, a, b = operands(256, 256, 256, 16, BF16, "cuda")
    stream, done, busy = torch.cuda.Stream(), torch.cuda.Event(), torch.cuda.Event()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(x, w, a, b, dropout_p=0.1)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second on the default stream
    busy.record()
    with torch.cuda.stream(stream):
        step(x, w, a, b, dropout_p=0.1)
        done.record()
    done.synchronize()
    assert not busy.query(), "the side stream waited for the default stream"
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_backend")
def test_a_captured_graph_holds_every_kernel():
    """A kernel that went to another stream would be missing: its output would stay as poisoned below."""
    x, w, a, b = operands(300, 256, 264, 16, BF16, "cuda")
    bias, dy = torch.randn(264, device="cuda"), torch.randn(300, 264, device="cuda").to(BF16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(x, w, a, b, dy, bias=bias)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(x, w, a, b, dy, bias=bias)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        dy.copy_(torch.randn_like(dy))
        for result in results:
            result.fill_(torch.nan)
        graph.replay()
        assert all(map(torch.equal, results, step(x, w, a, b, dy, bias=bias)))


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_backend")
def test_a_thread_with_a_stream_of_its_own():
    """A fresh thread has no current device set and another stream; forward there, backward here."""
    x, w, a, b = operands(512, 256, 384, 16, BF16, "cuda")
    expected = step(x, w, a, b)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    torch.cuda.synchronize()
    made = []

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            made.append(fastlora.lora_linear(x, w, a, b, 0.5))
            torch.cuda.current_stream().synchronize()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    (y,) = made
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert all(map(torch.equal, (y, *grads), expected))


@pytest.mark.multigpu
@pytest.mark.usefixtures("whole_backend")
def test_a_model_over_two_devices():
    """Layer by layer on cuda:0 and cuda:1, cuda:0 current throughout; the same kernels on both in turn."""
    first, second = (operands(64, 128, 128, 8, BF16, f"cuda:{i}") for i in range(2))
    leaves = [t.requires_grad_() for t in (first[0], *first[2:], *second[2:])]
    hidden = fastlora.lora_linear(first[0], first[1], *first[2:], 0.5)
    y = fastlora.lora_linear(hidden.to("cuda:1"), second[1], *second[2:], 0.5)
    grads = torch.autograd.grad(y.float().square().mean(), leaves)
    assert torch.cuda.current_device() == 0
    same = [t.detach().to("cuda:0") for t in (*first, *second[1:])]
    for i in (0, 2, 3, 5, 6):
        same[i].requires_grad_()
    hidden = fastlora.lora_linear(*same[:4], 0.5)
    z = fastlora.lora_linear(hidden, *same[4:], 0.5)
    expected = torch.autograd.grad(z.float().square().mean(), [same[i] for i in (0, 2, 3, 5, 6)])
    assert y.device.index == 1 and torch.equal(y.cpu(), z.cpu())
    for leaf, got, want in zip(leaves, grads, expected):
        assert got.device == leaf.device and torch.equal(got.cpu(), want.cpu())


@pytest.mark.multigpu
@pytest.mark.usefixtures("whole_backend")
def test_a_fresh_thread_on_the_second_device():
    failures = []

    def work():
        try:
            for _ in range(3):
                assert_right(*operands(200, 128, 72, 8, BF16, "cuda:1"))
            assert torch.cuda.current_device() == 0
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures, failures
