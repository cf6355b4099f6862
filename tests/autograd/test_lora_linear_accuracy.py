"""lora_linear, forward and every gradient, against fp64 beside torch's own error: a covering set of hard cases."""

from __future__ import annotations

import pytest
import torch

import fastlora
from fastlora import reference, rng
from fastlora.ops import support
from fastlora.testing.compare import assert_accurate
from fastlora.testing.inputs import LAYOUTS, covering_cases, with_layout

NEEDS = ("all", "x", "adapters", "x+a", "b", "a")
AXES = {
    "rank": (0, 1, 4, 8, 16, 63, 64, 128, 256),
    "rows": (0, 1, 15, 16, 17, 127, 128, 129, 4097),
    "k": (64, 72, 1000, 4096),
    "n": (64, 72, 1000, 4096),
    "layout": LAYOUTS,
    "bias": ("none", "frozen", "trained"),
    "dropout": (0.0, 0.1, 1.0),
    "grad": ("ones", "random", "strided", "expanded"),
    "need": NEEDS,
    "adapters": ("float32", "same"),
}
# Triton's interpreter walks tiles in Python: at most 256 a dimension, and every pair of values rather than every triple.
SMALL = {
    **AXES,
    "rank": (0, 1, 4, 16, 63),
    "rows": (0, 1, 15, 16, 17, 70, 129),
    "k": (64, 72, 100),
    "n": (64, 72, 99),
}


def name_of(case: dict) -> str:
    return "-".join(str(value) for value in case.values())


def gpu_cases() -> list[dict]:
    return covering_cases({"dtype": (torch.bfloat16, torch.float16, torch.float32), **AXES})


def cpu_cases() -> list[dict]:
    return covering_cases({"dtype": (torch.float16, torch.float32), **SMALL}, strength=2)


def upstream(
    kind: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    if kind == "ones":
        return torch.ones(shape, dtype=dtype, device=device)
    if kind == "expanded":
        return torch.randn((), device=device).to(dtype).expand(shape)
    values = torch.randn(shape, device=device).to(dtype)
    return with_layout(values, "column_slice") if kind == "strided" else values


def check(case: dict, device: torch.device) -> None:
    dtype, m, k, n, r = case["dtype"], case["rows"], case["k"], case["n"], case["rank"]
    adapter_dtype = torch.float32 if case["adapters"] == "float32" else dtype
    x = with_layout(torch.randn(m, k, device=device).to(dtype), case["layout"])
    w = (torch.randn(n, k, device=device) / k**0.5).to(dtype)
    a = (torch.randn(r, k, device=device) / k**0.5).to(adapter_dtype)
    b = (torch.randn(n, r, device=device) / max(r, 1) ** 0.5).to(adapter_dtype)
    bias = None if case["bias"] == "none" else torch.randn(n, device=device).to(dtype)
    dy = upstream(case["grad"], (m, n), dtype, device)
    wanted = {"all": "xab", "x": "x", "adapters": "ab", "x+a": "xa", "b": "b", "a": "a"}[
        case["need"]
    ]
    wants = [t in wanted for t in "xab"] + [case["bias"] == "trained"]

    keep = rng.keep_threshold(case["dropout"])
    torch.manual_seed(7)
    mask = None
    if case["dropout"] == 1.0:
        mask = torch.zeros(m, k, dtype=torch.bool, device=device)
    elif case["dropout"] > 0:
        words = reference.mask(rng.draw_state(device).cpu(), m, k, keep)
        mask = reference.unpack_mask(words, m, k).to(device)

    def run(function, cast):
        leaves = [None if t is None else t.detach().to(cast or t.dtype) for t in (x, a, b, bias)]
        for leaf, want in zip(leaves, wants, strict=True):
            if leaf is not None:
                leaf.requires_grad_(want)
        y = function(*leaves)
        trained = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        grads = torch.autograd.grad(y, trained, dy.to(y.dtype)) if trained else ()
        return [y.detach(), *grads]

    def formula(cast):
        weight = w.to(cast) if cast else w
        return lambda x, a, b, bias: reference.lora_linear(x, weight, a, b, 1.5, bias, mask, keep)

    torch.manual_seed(7)  # the state that lora_linear draws is the one the mask above was made from
    got = run(
        lambda x, a, b, bias: fastlora.lora_linear(x, w, a, b, 1.5, bias, case["dropout"]), None
    )
    same = run(formula(None), None)
    truth = run(formula(torch.float64), torch.float64)
    names = ["y"] + [t for t, want in zip(("dX", "dA", "dB", "dbias"), wants, strict=True) if want]
    for name, ours, torchs, exact in zip(names, got, same, truth, strict=True):
        assert ours.dtype == torchs.dtype, name
        noise = rounding_noise(x, a, dy, mask, keep) if name == "dB" else None
        assert_accurate(name, ours, torchs, exact, noise=noise)


def rounding_noise(x, a, dy, mask, keep):
    """What rounding h to x's dtype must leave in dB = dY^T h: the deviation of a sum of uniform errors of half an ulp."""
    dropped = (
        x.double() if mask is None else torch.where(mask, x.double(), 0) * rng.keep_scale(keep)
    )
    h = 1.5 * dropped @ a.double().t()
    return torch.finfo(x.dtype).eps / 12**0.5 * (dy.double().square().t() @ h.square()).sqrt()


@pytest.mark.parametrize("case", cpu_cases(), ids=name_of)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the full matrix runs on the GPU instead")
def test_small_matrix(strict_backend, device, case):
    check(case, device)


@pytest.mark.gpu
@pytest.mark.parametrize("case", gpu_cases(), ids=name_of)
def test_matrix(device, case):
    with fastlora.backend("triton", strict=True):
        check(case, device)
    launched = fastlora.launches()
    assert {backend for _, backend in launched} <= {"triton"}
    if case["rows"]:
        assert ("gemm", "triton") in launched
        if case["rank"] and case["dropout"] < 1:
            assert ("down", "triton") in launched


def fused_cases() -> list[dict]:
    """What csrc/lora takes: with these the cuda backend must run it, and nothing else."""
    axes = {
        **AXES,
        "rank": (8, 16, 24, 64, 128, 512),
        "layout": ("contiguous", "every_other_row"),
        "dropout": (0.0, 0.1),
        "grad": ("ones", "random"),
        "need": ("all", "x", "x+a"),
    }
    return covering_cases({"dtype": (torch.bfloat16, torch.float16), **axes})


@pytest.mark.gpu
@pytest.mark.parametrize("case", fused_cases(), ids=name_of)
def test_matrix_of_the_fused_kernel(device, case):
    reason = support.miss("lora", "cuda", device, case["dtype"], case["rank"])
    if reason is not None:
        pytest.skip(reason)
    rides_on_d_b = case["bias"] != "trained" or case["need"] == "all"
    strict = case["rows"] > 0 and rides_on_d_b and (case["dropout"] == 0 or case["rank"] <= 64)
    with fastlora.backend("cuda", strict=strict):
        check(case, device)
    if strict:
        assert fastlora.launches() == {("lora_forward", "cuda"): 1, ("lora_backward", "cuda"): 1}


@pytest.mark.skipif(not support.interpreting(), reason="bf16 is checked on the GPU")
def test_the_interpreter_refuses_bf16_rather_than_computing_it_wrongly():
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    with fastlora.backend("triton", strict=True), pytest.raises(RuntimeError, match="bf16"):
        fastlora.lora_linear(x, x, x[:2], x[:, :2])


def test_bf16_on_the_torch_backend(device):
    case = dict(
        dtype=torch.bfloat16, rank=16, rows=65, k=72, n=100, layout="column_slice", bias="trained"
    )
    case |= dict(dropout=0.1, grad="strided", need="all", adapters="float32")
    with fastlora.backend("torch", strict=True):
        check(case, device)
