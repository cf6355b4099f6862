"""What only a GPU can show: graphs, streams, devices, tf32, sizes beyond 2^31, repeatability."""

from __future__ import annotations

import threading

import pytest
import torch

import fastlora
from fastlora import ops, reference, rng
from fastlora.ops import support
from fastlora.testing.compare import assert_accurate, assert_same_bits, relative_error
from fastlora.testing.inputs import integers, with_layout

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("whole_backend")]
BF16 = torch.bfloat16
only_triton = pytest.mark.parametrize("whole_backend", ["triton"], indirect=True)


def operands(m=512, k=256, n=384, r=16, dtype=BF16, device="cuda", adapters=None):
    adapters = adapters or dtype
    x = torch.randn(m, k, device=device).to(dtype).requires_grad_()
    w = (torch.randn(n, k, device=device) / k**0.5).to(dtype)
    a = (torch.randn(r, k, device=device) / k**0.5).to(adapters).requires_grad_()
    b = torch.randn(n, r, device=device).to(adapters).requires_grad_()
    return x, w, a, b


def step(x, w, a, b, **kwargs):
    y = fastlora.lora_linear(x, w, a, b, 0.5, **kwargs)
    return [y, *torch.autograd.grad(y, (x, a, b), torch.ones_like(y))]


def test_every_op_launches_its_kernel(whole_backend):
    step(*operands(), dropout_p=0.1)
    counts = {op: count for (op, _), count in fastlora.launches().items()}
    whole = {"lora_forward": 1, "lora_backward": 1}
    assert counts == (whole if whole_backend == "cuda" else {"down": 2, "gemm": 2, "wgrad": 1})


def test_three_runs_give_the_same_bits():
    tensors = operands(m=3000, k=1024, n=640)
    runs = []
    for _ in range(3):
        torch.manual_seed(1)
        runs.append(step(*tensors, dropout_p=0.1))
    for name, *results in zip(("y", "dX", "dA", "dB"), *runs, strict=True):
        assert_same_bits(name, results[1], results[0])
        assert_same_bits(name, results[2], results[0])


def test_graph_replay_draws_a_new_mask_that_forward_and_backward_share():
    x, w, a, b = operands(m=256)
    w.zero_()  # then dX is zero exactly where x was dropped
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(x, w, a, b, dropout_p=0.5)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dx, da, db = step(x, w, a, b, dropout_p=0.5)
    masks = []
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        mask = dx != 0
        assert 0.45 < mask.float().mean() < 0.55
        keep = rng.keep_threshold(0.5)
        exact = [t.detach().double().requires_grad_() for t in (x, a, b)]
        truth = reference.lora_linear(exact[0], w.double(), *exact[1:], 0.5, None, mask, keep)
        grads = torch.autograd.grad(truth, exact, torch.ones_like(truth))
        for got, expected in zip((y, dx, da, db), (truth, *grads), strict=True):
            assert relative_error(got, expected) < 6e-3
        masks.append(mask)
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])


def test_side_streams_do_not_mix():
    inputs = [operands(m=1024, k=512, n=512) for _ in range(2)]
    expected = [step(*t) for t in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(50):
        results = []
        for stream, tensors in zip(streams, inputs, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results.append(step(*tensors))
        torch.cuda.synchronize()
        for got, truth in zip(results, expected, strict=True):
            for one, other in zip(got, truth, strict=True):
                assert torch.equal(one, other)


def test_threads_may_call_at_once():
    tensors = operands()
    expected = step(*tensors)
    failures = []

    def work():
        for _ in range(20):
            got = step(*tensors)
            torch.cuda.synchronize()
            if not all(map(torch.equal, got, expected)):
                failures.append("differs")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.multigpu
def test_tensors_on_another_device_than_the_current_one():
    here, there = (operands(device=f"cuda:{i}") for i in range(2))
    for theirs, ours in zip(there, here, strict=True):
        theirs.data.copy_(ours.data)
    assert torch.cuda.current_device() == 0
    for one, other in zip(step(*there), step(*here), strict=True):
        assert one.device.index == 1 and torch.equal(one.cpu(), other.cpu())


@only_triton
def test_fp32_is_not_tf32_unless_torch_says_so():
    x, w, a, b = operands(m=256, k=2048, n=256, dtype=torch.float32)
    truth = reference.lora_linear(x.double(), w.double(), a.double(), b.double(), 0.5)
    assert relative_error(fastlora.lora_linear(x, w, a, b, 0.5), truth) < 2e-6
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert 5e-5 < relative_error(fastlora.lora_linear(x, w, a, b, 0.5), truth) < 2e-3
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@only_triton
@pytest.mark.parametrize("transposed", [False, True])
def test_descriptor_and_pointer_paths_agree_bit_for_bit(transposed):
    """The odd offset cannot be described to TMA; on integers both paths are exact."""
    m, k, n, r = 300, 200, 264, 16
    make = lambda *shape: integers(*shape, low=-1, high=1, dtype=BF16, device="cuda")  # noqa: E731
    x, w, h, l = make(m, k), make(n, k), make(m, r), make(n, r)
    if transposed:
        w = w.t().contiguous().t()
    described = ops.gemm(x, w, h, l)
    assert_same_bits("y", ops.gemm(with_layout(x, "odd_offset"), w, h, l), described)
    truth = reference.gemm(x.double(), w.double(), h.double(), l.double(), None)
    assert_same_bits("y", described, truth.to(BF16))


@pytest.mark.parametrize("r", [16, 64, 128, 512])
@pytest.mark.parametrize(("k", "n"), [(4096, 4096), (4096, 14336), (14336, 4096)])
def test_model_sizes_with_dropout(k, n, r, whole_backend):
    if whole_backend == "cuda" and r > 64:
        pytest.skip("csrc/lora takes dropout up to rank 64")
    x, w, a, b = operands(m=4097, k=k, n=n, r=r, adapters=torch.float32)
    torch.manual_seed(3)
    mask = reference.unpack_mask(
        ops.mask(rng.draw_state(x.device), 4097, k, rng.keep_threshold(0.05)), 4097, k
    )

    def run(dtype):
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, a, b)]
        weight = w.to(dtype or w.dtype)
        y = reference.lora_linear(
            leaves[0], weight, *leaves[1:], 0.5, None, mask, rng.keep_threshold(0.05)
        )
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    torch.manual_seed(3)
    ours = step(x, w, a, b, dropout_p=0.05)
    for name, *results in zip(
        ("y", "dX", "dA", "dB"), ours, run(None), run(torch.float64), strict=True
    ):
        assert_accurate(name, *results)


@pytest.mark.huge
@pytest.mark.parametrize(
    ("m", "k", "n"), [(2**20 + 3, 2080, 64), (64, 2080, 2**20 + 8), (2**20 + 3, 64, 2080)]
)
def test_more_than_two_to_the_31_elements(m, k, n):
    """x, W or y above 2^31 elements: the last rows and columns are where a 32-bit offset would wrap."""
    x = torch.randn(m, k, device="cuda", dtype=BF16).requires_grad_()
    w = torch.randn(n, k, device="cuda", dtype=BF16) / k**0.5
    a, b = (torch.randn(s, device="cuda", dtype=BF16).requires_grad_() for s in ((16, k), (n, 16)))
    y = fastlora.lora_linear(x, w, a, b, 0.5)
    dy = torch.randn_like(y)
    dx, da, db = torch.autograd.grad(y, (x, a, b), dy)
    with torch.no_grad():
        for rows in (slice(0, 70), slice(m - 70, m)):
            for cols in (slice(0, 50), slice(n - 50, n)):
                truth = reference.lora_linear(
                    x[rows].double(), w[cols].double(), a.double(), b[cols].double(), 0.5
                )
                assert relative_error(y[rows, cols], truth) < 6e-3
            g = 0.5 * dy[rows].double() @ b.double()
            truth = dy[rows].double() @ w.double() + g @ a.double()
            assert relative_error(dx[rows], truth) < 6e-3
        with fastlora.backend("triton", strict=True):
            g, _ = ops.down(dy, b.t(), None, 0.5)
            h, _ = ops.down(x, a, None, 0.5)
        fastlora.reset_launches()
        cols = slice(k - 40, k)
        assert relative_error(da[:, cols], g.double().t() @ x[:, cols].double()) < 6e-3
        cols = slice(n - 40, n)
        assert relative_error(db[cols], dy[:, cols].double().t() @ h.double()) < 6e-3


def test_no_tensor_needs_a_hidden_synchronisation():
    tensors = operands()
    step(*tensors, dropout_p=0.1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*tensors, dropout_p=0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_small_memory_footprint():
    """Forward and backward take their outputs, h, g, the mask words and the partial sums: nothing like an fp32 copy."""
    x, w, a, b = operands(m=8192, k=1024, n=1024)
    step(x, w, a, b, dropout_p=0.1)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = step(x, w, a, b, dropout_p=0.1)
    outputs = sum(t.numel() * t.element_size() for t in results)
    upstream = results[0].numel() * 2
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < outputs + upstream + 0.35 * x.numel() * 2, (peak, outputs)


@only_triton
def test_doctor_table_says_triton_runs_everything():
    assert all(
        row["ok"] for row in support.table(torch.device("cuda", 0)) if row["backend"] == "triton"
    )


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_layers_train_as_eager_ones_do(mode):
    """reduce-overhead captures every direction in CUDA graphs, and looks after the memory of its pool."""
    torch._dynamo.reset()
    torch.manual_seed(2)
    layers = torch.nn.Sequential(
        *(
            fastlora.LoRALinear(n, k, r=16, init_lora_weights=False, bias=False, dtype=BF16)
            for n, k in ((512, 384), (384, 512))
        )
    ).cuda()
    factors = [p for p in layers.parameters() if p.requires_grad]
    compiled = torch.compile(layers, mode=mode)
    for _ in range(6):
        x = torch.randn(300, 512, device="cuda").to(BF16).requires_grad_()
        torch.compiler.cudagraph_mark_step_begin()
        runs = []
        for model in (compiled, layers):
            y = model(x)
            grads = torch.autograd.grad(y.float().square().sum(), (x, *factors))
            runs.append([t.clone() for t in (y.detach(), *grads)])
        for got, expected in zip(*runs, strict=True):
            assert relative_error(got, expected.double()) < 2e-2
        with torch.no_grad():
            for p in factors:
                p.mul_(1.01)
