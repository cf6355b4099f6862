"""Mixed precision: autocast, scalars of another width, integer and tiny values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastlora
from fastlora import reference
from fastlora.testing.compare import assert_same_bits
from tests.faults.common import NAMES, assert_right, operands, step

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_is_an_explicit_cast_and_nothing_else(strict_backend, device, backward_inside):
    """The ops' own fp32 arithmetic must not be cast by the autocast around them."""
    x, w, a, b = operands(64, 48, 40, 8, device=device)
    bias, dy = torch.randn(40, device=device), torch.randn(64, 40, device=device).to(F16)
    want = step(x.to(F16), w.to(F16), a, b, dy, 0.3, bias)
    leaves = [t.detach().requires_grad_() for t in (x, a, b, bias)]
    with torch.autocast(device.type, F16):
        y = fastlora.lora_linear(leaves[0], w, *leaves[1:3], 0.3, leaves[3])
        if backward_inside:
            grads = torch.autograd.grad(y, leaves, dy)
    if not backward_inside:
        grads = torch.autograd.grad(y, leaves, dy)
    for name, got, expected in zip(NAMES, (y.detach(), *grads), want):
        wide = F16 if name == "y" else F32
        assert_same_bits(name, got, expected.to(wide))


@pytest.mark.parametrize("base", [F16, F32])
@pytest.mark.parametrize("activations", [F16, F32])
def test_any_mixture_of_dtypes_under_autocast(device, base, activations):
    """fp32 activations meet half-precision weights and fp32 adapters, and the reverse."""
    x, w, a, b = operands(device=device, adapters=F32)
    leaves = [x.to(activations).requires_grad_(), a.requires_grad_(), b.requires_grad_()]
    bias = torch.randn(20, device=device).to(base)
    with torch.autocast(device.type, F16):
        y = fastlora.lora_linear(leaves[0], w.to(base), *leaves[1:], 0.5, bias)
    assert y.dtype == F16
    grads = torch.autograd.grad(y.float().sum(), leaves)
    assert [g.dtype for g in grads] == [activations, F32, F32]


def test_inside_somebody_elses_custom_fwd(device):
    """``custom_fwd(cast_inputs=...)`` turns autocast off: what then does not match is named, not run."""
    x, w, a, b = operands(device=device)

    class Theirs(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type=device.type, cast_inputs=F32)
        def forward(ctx, x, inner):
            assert not torch.is_autocast_enabled(device.type)
            return inner(x)

        @staticmethod
        def backward(ctx, dy):
            raise NotImplementedError

    with torch.autocast(device.type, F16), torch.no_grad():
        y = Theirs.apply(x.half(), lambda x: fastlora.lora_linear(x, w, a, b))
        assert y.dtype == F32
        with pytest.raises(ValueError, match=r"x: got torch.float32 where weight is torch.float16"):
            Theirs.apply(x.half(), lambda x: fastlora.lora_linear(x, w.half(), a, b))


@pytest.mark.parametrize("which", ["x", "weight"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn])
def test_autocast_casts_no_quantised_values(device, which, dtype):
    """An int8 or fp8 weight means something only with its scales: cast to floats it is silently wrong."""
    tensors = dict(zip(("x", "weight", "lora_a", "lora_b"), operands(device=device)))
    tensors[which] = tensors[which].mul(3).to(dtype)
    with torch.autocast(device.type, F16), pytest.raises(ValueError, match=f"{which}: got {dtype}"):
        fastlora.lora_linear(**tensors)


SCALINGS = {
    "int": 2,
    "numpy fp64": np.float64(2.0),
    "0-d fp64": torch.tensor(2.0, dtype=F64),
    "0-d fp32": torch.tensor(2.0),
    "0-d fp16": torch.tensor(2.0, dtype=F16),
    "0-d int64": torch.tensor(2),
}


@pytest.mark.parametrize("dtype", [F16, F32])
@pytest.mark.parametrize("kind", SCALINGS)
def test_a_scaling_never_promotes(strict_backend, device, kind, dtype):
    """2 of any width is 2.0: the same dtypes and the same bits, forward and backward."""
    scaling = SCALINGS[kind]
    if isinstance(scaling, torch.Tensor):
        scaling = scaling.to(device)
    tensors = operands(dtype=dtype, adapters=F32, device=device)
    for got, expected in zip(step(*tensors, None, scaling), step(*tensors, None, 2.0)):
        assert got.dtype == expected.dtype and torch.equal(got, expected)


@pytest.mark.parametrize("scale", [1e-30, 1e-40, 0.0])
def test_tiny_inputs_give_tiny_outputs_not_nan(strict_backend, device, scale):
    """Below fp32's normal range, where a division by a computed scale would give NaN."""
    x, w, a, b = operands(device=device)
    bias = torch.randn(20, device=device)
    y, *grads = step(x * scale, w, a, b, None, 0.5, bias)
    torch.testing.assert_close(y, bias.expand(12, 20))
    assert all(torch.isfinite(g).all() for g in grads)
    assert (grads[1].abs().max() == 0) == (scale == 0)


def test_subnormal_halves_follow_the_formula(strict_backend, device):
    x, w, a, b = operands(dtype=F16, device=device)
    small = (x.float() * 2**-18).half()
    assert ((small != 0) & (small.abs() < torch.finfo(F16).tiny)).any()
    y = fastlora.lora_linear(small, w, a, b, 0.5)
    exact = reference.lora_linear(*(t.double() for t in (small, w, a, b)), 0.5)
    # h and y are rounded to fp16, whose steps down there are 2^-24 wide.
    assert (y.double() - exact).abs().max() < 2**-24 * (1 + b.abs().sum(1).max())


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", [0.5, torch.tensor(0.5, dtype=F64)], ids=["float", "0-d fp64"])
def test_inductor_keeps_the_dtype(scaling):
    tensors = operands(256, 128, 192, 16, BF16, "cuda")
    leaves = [t.requires_grad_(i != 1) for i, t in enumerate(tensors)]
    scaling = scaling.cuda() if isinstance(scaling, torch.Tensor) else scaling
    torch._dynamo.reset()
    with fastlora.backend("triton", strict=True):
        compiled = torch.compile(lambda *t: fastlora.lora_linear(*t, scaling) * 1.0, fullgraph=True)
        y = compiled(*leaves)
        grads = torch.autograd.grad(y.sum(), (leaves[0], *leaves[2:]))
        eager = step(*tensors, None, 0.5)
    for got, expected in zip((y, *grads), eager):
        assert got.dtype == BF16 and torch.equal(got, expected)
    assert {backend for _, backend in fastlora.launches()} == {"triton"}


@pytest.mark.gpu
def test_autocast_on_the_gpu():
    tensors = operands(300, 200, 264, 16, F32, "cuda")
    with fastlora.backend("triton", strict=True):
        want = step(tensors[0].bfloat16(), tensors[1].bfloat16(), *tensors[2:])
        with torch.autocast("cuda", BF16):
            got = step(*tensors)
        assert_right(*(t.bfloat16() for t in tensors))
    for ours, expected in zip(got, want):
        assert torch.equal(ours.float(), expected.float())


def test_autocast_leaves_fp64_alone_as_torch_does(device):
    x, w, a, b = (t.to(F64) for t in operands(device=device))
    with torch.autocast(device.type, F16):
        assert (
            fastlora.lora_linear(x, w, a, b).dtype == torch.nn.functional.linear(x, w).dtype == F64
        )


def test_autocast_casts_a_checkpoint_of_another_half_dtype(device):
    """fp16 weights, bias and adapters under bf16 autocast: what torch's own linear takes."""
    x, w, a, b = operands(device=device, adapters=F32)
    bias = torch.randn(w.shape[0], device=device, dtype=F16, requires_grad=True)
    half = [a.to(F16).requires_grad_(), b.to(F16).requires_grad_()]
    with fastlora.backend("torch"), torch.autocast(device.type, torch.bfloat16):
        y = fastlora.lora_linear(x.bfloat16(), w.to(F16), *half, 0.5, bias)
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in torch.autograd.grad(y.sum(), (*half, bias))] == [F16] * 3
