"""4-bit weights in the faults of the other files: devices, streams, shared buffers, layouts, hooks, sharding, offloading."""

from __future__ import annotations

import contextlib
import time

import pytest
import torch
from torch import nn

import fastlora
from fastlora import LoRALinear, NF4Tensor, QLoRALinear, ops, reference, rng
from fastlora.ops import Form, support
from fastlora.testing.inputs import LAYOUTS, with_layout
from tests.faults.common import ROUNDING, assert_close, truth, weight64
from tests.faults.test_training_stack import WRAPPERS, losses

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
UNUSUAL = [layout for layout in LAYOUTS if layout != "contiguous"]


def operands(m=12, k=72, n=40, r=4, dtype=FP32, device="cpu", **options):
    """x, a 4-bit weight, lora_a, lora_b."""
    q = NF4Tensor.quantize(torch.randn(n, k, device=device) / k**0.5, **options)
    x, a = (torch.randn(rows, k, device=device) for rows in (m, r))
    b = torch.randn(n, r, device=device)
    return x.to(dtype), q, (a / k**0.5).to(dtype), b.to(dtype)


def step(x, q, a, b, dy=None, **kwargs):
    """[y, dX, dA, dB] of ``fastlora.qlora_linear``; memory layouts stay as given."""
    leaves = [t.detach().requires_grad_() for t in (x, a, b)]
    y = fastlora.qlora_linear(leaves[0], q, *leaves[1:], 0.5, **kwargs)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y) if dy is None else dy)]


def assert_right(x, q, a, b, dy=None):
    """``step`` on these operands, as they lie in memory, is the formula over the formula's weight."""
    expected = truth(x, weight64(q).to(x.device), a, b, dy)
    assert_close(step(x, q, a, b, dy), expected, ROUNDING[x.dtype])


# ---- devices and streams --------------------------------------------------------------------------------------------


def exact(op, device, dtype):
    """What ``op`` reads, ``op``, and what it must make of that, bit for bit, on the CPU: no sum of these is rounded."""
    rows, n, k = 1100 if op == "floats" else 40, 96, 192 if op == "few" else 256
    signs = torch.randint(-1, 2, (n * k // 64, 64))
    signs[:, 0] = 1
    w = (signs * 2.0 ** torch.randint(-1, 3, (n * k // 64, 1))).view(n, k)
    form = Form(n, k, 64, 0, False)
    codes, absmax = reference.quantize_nf4(w)
    if op == "quantize":
        return w.to(device, dtype), lambda w: ops.quantize(w, 64), lambda w: (reference.quantize_nf4(w.cpu()))  # fmt: skip
    if op == "dequantize":
        scales = (absmax.to(device),)
        return (
            codes.to(device),
            lambda codes: (ops.dequantize(codes, scales, form, dtype),),
            lambda codes: (reference.dequantize_nf4(codes.cpu(), absmax, (n, k), 64, dtype),),
        )
    x, a, b, bias = (
        torch.randint(-limit, limit + 1, shape)
        for limit, shape in ((3, (rows, k)), (1, (16, k)), (2, (n, 16)), (3, (n,)))
    )
    weight = codes.to(device), (absmax.to(device),), form
    factors = [t.to(device, dtype) for t in (a, b, bias)]

    def run(x):
        return ops.nf4_linear(x, *weight, *factors, None, 0.5, None, rng.KEEP_ALL)

    def formula(x):
        x = x.double().cpu()
        h = (0.5 * x @ a.double().t()).to(dtype)
        return (x @ w.double().t() + h.double() @ b.double().t() + bias).to(dtype), h

    return x.to(device, dtype), run, formula


def assert_exact(got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours.cpu(), theirs)


OPS = ("quantize", "dequantize", "few", "gemm", "floats")
CASES = [
    *((op, "cuda") for op in OPS),
    *((op, "triton") for op in ("quantize", "dequantize", "floats")),
]


@contextlib.contextmanager
def strictly(op, backend, device=0):
    """On that backend, and by the op's own kernel."""
    own = {"few": "nf4_few", "gemm": "nf4_gemm"}.get(op)
    needed = own or {"floats": "gemm"}.get(op, op)
    reason = support.miss(needed, backend, torch.device("cuda", device), BF16, 16)
    if reason is not None:
        pytest.skip(reason)
    with fastlora.backend(backend, strict=True):
        yield
    ran = fastlora.launches()
    assert {by for _, by in ran} == {backend}, ran
    assert ran[own or {"floats": "dequantize"}.get(op, op), backend], ran


@pytest.mark.parametrize("op", OPS)
def test_the_exact_cases_are_exact_in_torch(op):
    source, run, formula = exact(op, "cpu", FP32)
    with fastlora.backend("torch", strict=True):
        assert_exact(run(source), formula(source))
    assert not torch.equal(formula(torch.zeros_like(source))[0], formula(source)[0])


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "backend"), CASES)
def test_it_waits_for_the_stream_it_is_called_on(op, backend):
    """What it reads is still being written on a side stream: a launch on any other stream would read zeros."""
    source, run, formula = exact(op, "cuda", BF16)
    buffer = torch.zeros_like(source)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with strictly(op, backend), torch.cuda.stream(stream):
        run(buffer)  # compiled, and memory taken, before anything is timed
        torch.cuda._sleep(200_000_000)
        buffer.copy_(source)
        got = run(buffer)
        torch.cuda.synchronize()
    assert_exact(got, formula(source))


@pytest.mark.multigpu
@pytest.mark.parametrize(("op", "backend"), CASES)
def test_it_runs_on_the_device_of_its_tensors(op, backend):
    """cuda:0 is current throughout; in turn on both devices."""
    for device in (1, 0, 1):
        source, run, formula = exact(op, torch.device("cuda", device), BF16)
        with strictly(op, backend, device):
            got = run(source)
        assert torch.cuda.current_device() == 0
        assert {t.device.index for t in got} == {device}
        assert_exact(got, formula(source))


@pytest.mark.multigpu
@pytest.mark.parametrize("m", [40, 300, 2048])
def test_forward_and_backward_on_the_second_device(m):
    x, q, a, b = operands(m, 256, 512, 16, BF16, "cuda:1")
    assert_right(x, q, a, b, torch.randn(m, 512, device="cuda:1").to(BF16))
    assert torch.cuda.current_device() == 0
    assert {backend for _, backend in fastlora.launches()} <= {"cuda", "triton"}


@pytest.mark.parametrize("which", ["qweight", "lora_a", "lora_b", "bias"])
def test_tensors_of_another_device_are_named(which):
    given = dict(zip(("x", "qweight", "lora_a", "lora_b"), operands()), bias=torch.zeros(40))
    given[which] = given[which].to("meta")
    with pytest.raises(ValueError, match=f"{which.replace('qw', 'w')}: .*meta"):
        fastlora.qlora_linear(**given)


# ---- no buffer shared -------------------------------------------------------------------------------------------------


def two_dtypes(m, k, n, r, device, dtypes):
    problems = [operands(m, k, n, r, dtype, device) for dtype in dtypes]
    return problems, [step(*problem) for problem in problems]


def test_models_of_two_dtypes_share_no_dequantised_weight(strict_backend, device):
    """Interleaved, forward and backward, same shapes: the bits of each alone."""
    dtypes = (FP16, FP32) if strict_backend == "triton" else (BF16, FP16)  # Triton's interpreter
    problems, alone = two_dtypes(32, 64, 40, 8, device, dtypes)
    graphs = []
    for x, q, a, b in problems:
        assert_right(x, q, a, b)
        leaves = [t.requires_grad_() for t in (x, a, b)]
        graphs.append((leaves, fastlora.qlora_linear(x, q, a, b, 0.5)))
    for (leaves, y), expected, dtype in zip(graphs, alone, dtypes, strict=True):
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
        for got, want in zip((y, *grads), expected, strict=True):
            assert got.dtype == dtype and torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_models_of_two_dtypes_on_two_streams(backend):
    """More rows than are multiplied by codes: every pass makes a weight in floats, beside the other model's."""
    with fastlora.backend(backend, strict=True):
        problems, alone = two_dtypes(2048, 1024, 512, 16, "cuda", (BF16, FP16))
        streams = [torch.cuda.Stream() for _ in problems]
        torch.cuda.synchronize()
        results = []
        for i in range(40):
            with torch.cuda.stream(streams[i % 2]):
                results.append((i % 2, step(*problems[i % 2])))
            if i % 10 == 9:
                torch.cuda.synchronize()
                for which, got in results:
                    assert all(map(torch.equal, got, alone[which]))
                results.clear()
    ran = fastlora.launches()
    assert ran["dequantize", backend] == 2 * 42 and {by for _, by in ran} == {backend}


@pytest.mark.gpu
@pytest.mark.parametrize("m", [40, 300, 2048])
def test_memory_is_the_allocators_and_is_given_back(m):
    """A weight in floats lives as long as its product: between forward and backward there is none, nor afterwards."""
    n, k = 2048, 4096
    x, q, a, b = operands(m, k, n, 16, BF16, "cuda")
    leaves = [t.requires_grad_() for t in (x, a, b)]
    dy = torch.randn(m, n, device="cuda").to(BF16)

    def run():
        y = fastlora.qlora_linear(leaves[0], q, *leaves[1:], 0.5)
        torch.cuda.synchronize()
        between = torch.cuda.memory_allocated()
        grads = torch.autograd.grad(y, leaves, dy)
        torch.cuda.synchronize()
        return between, torch.cuda.memory_allocated(), [t.nbytes for t in (y, *grads)]

    run()  # libraries' workspaces stay
    for _ in range(3):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        between, after, sizes = run()
        slack = 1 << 17  # h, small tensors, rounding to 512 bytes
        assert between - before <= sizes[0] + m * 16 * 2 + slack
        assert after - before <= sum(sizes) + m * 16 * 2 + slack  # y's graph holds h no more
        weight = 2 * n * k
        peak = torch.cuda.max_memory_allocated() - before
        assert peak <= weight + sum(sizes) + 0.75 * weight  # partial sums of dA and dB
        ran = {op for op, _ in fastlora.launches()}
        assert (peak >= weight) == (
            "dequantize" in ran
        )  # where codes are read there is none at all
        # Autograd's thread holds what it gave until it is scheduled once more.
        until = time.monotonic() + 5
        while torch.cuda.memory_allocated() != before and time.monotonic() < until:
            time.sleep(0.001)
        assert torch.cuda.memory_allocated() == before
    assert {backend for _, backend in fastlora.launches()} <= {"cuda", "triton"}


# ---- layouts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["x", "dY"])
@pytest.mark.parametrize("layout", UNUSUAL)
@pytest.mark.parametrize("k", [64, 72])  # a row of whole blocks, and not
def test_operands_of_any_layout(strict_backend, device, layout, which, k):
    x, q, a, b = operands(36, k, 40, device=device)
    dy = torch.randn(36, 40, device=device)
    x, dy = (with_layout(t, layout) if name == which else t for name, t in (("x", x), ("dY", dy)))
    assert_right(x, q, a, b, dy)


def test_upstream_gradient_of_a_sum_has_no_strides(strict_backend, device):
    assert_right(*operands(device=device), torch.tensor(1.5, device=device).expand(12, 40))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [40, 300, 2048])
@pytest.mark.parametrize("which", ["x", "dY", "both"])
@pytest.mark.parametrize("layout", UNUSUAL)
def test_operands_of_any_layout_on_the_gpu(layout, which, m):
    """By whichever kernels take them: plain torch never runs."""
    x, q, a, b = operands(m, 256, 512, 16, BF16, "cuda")
    dy = torch.randn(m, 512, device="cuda").to(BF16)
    x, dy = (with_layout(t, layout) if which in (name, "both") else t for name, t in (("x", x), ("dY", dy)))  # fmt: skip
    assert_right(x, q, a, b, dy)
    assert_right(x, q, a, b, torch.tensor(1.5, device="cuda", dtype=BF16).expand(m, 512))
    ran = {backend for _, backend in fastlora.launches()}
    assert ran and ran <= {"cuda", "triton"}, ran


# ---- the training stack ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRAPPERS)
def test_saving_less_trains_the_same(strict_backend, device, name):
    """Over blocks that straddle rows, and over rows of whole blocks."""
    for width in (24, 64) if strict_backend == "torch" else (24,):
        options = dict(steps=3, width=width, kind=QLoRALinear)
        expected = losses(device, lambda f, x: f(x), **options)
        assert losses(device, WRAPPERS[name], **options) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_saving_less_trains_the_same_on_the_gpu_under_autocast(name, backend):
    def under_autocast(wrap):
        def run(function, x):
            with torch.autocast("cuda", BF16):
                return wrap(function, x).float()

        return run

    with fastlora.backend(backend, strict=True):
        saving = losses("cuda", under_autocast(WRAPPERS[name]), width=256, kind=QLoRALinear)
        plain = losses("cuda", under_autocast(lambda f, x: f(x)), width=256, kind=QLoRALinear)
    assert saving == plain
    ran = fastlora.launches()
    assert ran["dequantize", backend] and {by for _, by in ran} == {backend}


# ---- sharding and offloading -----------------------------------------------------------------------------------------------


def _stock(device="cpu"):
    """PEFT over two Linear4bit."""
    import bitsandbytes as bnb
    import peft

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128, bias=False), nn.ReLU(), nn.Linear(128, 64, bias=False))
    for i in (0, 2):
        linear = bnb.nn.Linear4bit(
            net[i].in_features, net[i].out_features, False, FP32, quant_type="nf4"
        )
        linear.load_state_dict(net[i].state_dict())
        net[i] = linear.to(device)
    net.is_loaded_in_4bit = True
    config = peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
    return peft.get_peft_model(net, config)


def _pairs(model, x):
    y = model(x)
    model.zero_grad()
    y.square().sum().backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _shard_params4bit(rank, world, store):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    try:
        mesh = init_device_mesh("cpu", (world,))
        for by_layer in (False, True):
            model, x = _stock(), torch.randn(3, 64)
            want, want_grads = _pairs(model, x)
            weight = model.base_model.model[0].base_layer.weight
            before = weight.detach().clone()
            fastlora.accelerate(model)
            fastlora.reset_launches()
            _pairs(model, x)
            assert fastlora.launches()  # fast while it is whole
            if by_layer:
                for i in (0, 2):
                    fully_shard(model.base_model.model[i], mesh=mesh)
            fully_shard(model, mesh=mesh)
            report = fastlora.acceleration_report(model)
            assert len(report) == 2 and not any(layer.accelerated for layer in report)
            assert {r.reason for r in report} == {"its base is a Linear4bit over a DTensor"}
            weight = model.base_model.model[0].base_layer.weight
            assert weight.to_local().numel() == before.numel() // world
            fastlora.reset_launches()
            y, grads = _pairs(model, x)
            assert not fastlora.launches()  # PEFT's own forward
            assert torch.equal(y, want)
            assert grads.keys() == want_grads.keys() and len(grads) == 4
            for name, grad in grads.items():  # a mean over ranks of the same
                torch.testing.assert_close(grad.full_tensor(), want_grads[name])
            weight = model.state_dict()["base_model.model.0.base_layer.weight"].full_tensor()
            assert torch.equal(weight, before)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_sharded_params4bit_runs_pefts_own_way_and_says_so(tmp_path):
    """fully_shard makes a DTensor of a Params4bit, which has no bytes to multiply by: exact, and reported."""
    pytest.importorskip("bitsandbytes")
    import torch.multiprocessing as mp

    mp.spawn(_shard_params4bit, (2, tmp_path / "store"), nprocs=2)  # raises what a process raises


class Offloaded(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (
            kind.from_linear(nn.Linear(64, 64), r=4, init_lora_weights=False) for _ in range(2)
        )

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("how", ["cpu", "disk"])
@pytest.mark.parametrize("kind", [LoRALinear, QLoRALinear])
def test_offloaded_by_accelerate(kind, how, tmp_path, device):
    """Its hooks bring a module's parameters right before that module's forward; factors and codes belong to submodules that
    have none. With the layer named they come with the layer; without, the error says so."""
    accelerate = pytest.importorskip("accelerate")

    def offload(**options):
        model = Offloaded(kind).to(device)
        expected = model(x).detach()
        if how == "cpu":
            return accelerate.cpu_offload(model, device, **options), expected
        return accelerate.disk_offload(model.cpu(), tmp_path, device, **options), expected

    x = torch.randn(3, 64, device=device)
    model, expected = offload(preload_module_classes=[kind.__name__])
    for _ in range(2):
        assert all(p.is_meta for p in model.parameters())
        assert torch.equal(model(x), expected)
    model, _ = offload()
    with pytest.raises(ValueError, match=f"lora_a: is on meta, .*preload_module_classes=.*'{kind.__name__}'"):  # fmt: skip
        model(x)
