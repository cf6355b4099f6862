"""Strides, storage offsets, alignment and what lies around a tensor in memory."""

from __future__ import annotations

import importlib

import pytest
import torch

import fastlora
from fastlora import ops, reference
from fastlora.testing.inputs import LAYOUTS, with_layout
from tests.faults.common import assert_right, operands

UNUSUAL = [layout for layout in LAYOUTS if layout != "contiguous"]
F32 = torch.float32


@pytest.mark.parametrize("layout", UNUSUAL)
def test_upstream_gradients_of_any_layout(strict_backend, device, layout):
    x, w, a, b = operands(40, 33, 27, 5, device=device)
    assert_right(x, w, a, b, with_layout(torch.randn(40, 27, device=device), layout))


def test_upstream_gradient_of_a_sum_has_no_strides(strict_backend, device):
    """``y.sum()`` sends back one number, expanded over both dimensions."""
    x, w, a, b = operands(device=device)
    assert_right(x, w, a, b, torch.tensor(1.5, device=device).expand(12, 20))


@pytest.mark.parametrize("which", ["x", "weight", "lora_a", "lora_b"])
@pytest.mark.parametrize("layout", UNUSUAL)
def test_operands_of_any_layout(strict_backend, device, which, layout):
    tensors = list(operands(36, 40, 48, 6, device=device))
    at = ("x", "weight", "lora_a", "lora_b").index(which)
    tensors[at] = with_layout(tensors[at], layout)
    assert_right(*tensors, torch.randn(36, 48, device=device))


@pytest.mark.parametrize("layout", ["every_other", "expanded", "odd_offset", "column"])
def test_bias_of_any_layout(strict_backend, device, layout):
    values = torch.randn(2 * 20 + 1, device=device)
    bias = {
        "every_other": values[:40:2],
        "expanded": values[:1].expand(20),
        "odd_offset": values[1:21],
        "column": values[:40].view(20, 2)[:, 1],
    }[layout]
    assert_right(*operands(device=device), torch.randn(12, 20, device=device), bias=bias)


def test_overlapping_rows(strict_backend, device):
    """Sliding windows over a signal: rows share memory, and the row pitch is shorter than the row."""
    _, w, a, b = operands(device=device)
    windows = torch.randn(64, device=device).unfold(0, 24, 1)[:12]
    assert windows.stride() == (1, 1)
    assert_right(windows, w, a, b, torch.randn(12, 20, device=device))


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0), (0, 2, 1)])
def test_non_contiguous_batches(strict_backend, device, order):
    """[..., K] whose leading dimensions cannot be merged without a copy, and so for dY."""
    shape = (3, 5, 24)
    x = torch.randn([shape[order.index(i)] for i in range(3)], device=device).permute(order)
    dy = torch.randn(20, 3, 5, device=device).permute(1, 2, 0)
    _, w, a, b = operands(device=device)
    assert x.shape == shape and not x.is_contiguous()
    assert_right(x, w, a, b, dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("m", "k", "n", "r"), [(33, 40, 24, 8), (17, 35, 41, 5)])
def test_nothing_outside_a_tensor_is_read(strict_backend, device, dtype, m, k, n, r):
    """Every operand is a window in a sea of NaN; aligned (descriptors) and not (pointers)."""

    def window(values):
        rows, cols = values.shape
        sea = values.new_full((rows + 16, (cols + 23) // 8 * 8), torch.nan)
        sea[8 : 8 + rows, 8 : 8 + cols] = values
        return sea[8 : 8 + rows, 8 : 8 + cols]

    tensors = map(window, operands(m, k, n, r, dtype, device))
    dy = window(torch.randn(m, n, device=device).to(dtype))
    bias = window(torch.randn(1, n, device=device).to(dtype))[0]
    assert_right(*tensors, dy, bias=bias)


def test_a_strided_dropout_state(strict_backend, device):
    state = torch.tensor([5, 0, 6, 0], device=device)[::2]
    got = ops.mask(state, 9, 70, 20000)
    expected = reference.mask(torch.tensor([5, 6]), 9, 70, 20000)
    assert torch.equal(got.cpu(), expected)


def test_symbolic_strides_under_compile(device):
    """Dynamic shapes give symbolic strides; the compiled program must follow both."""
    _, w, a, b = operands(device=device)
    torch._dynamo.reset()

    def run(x):
        return fastlora.lora_linear(x, w, a, b, 0.5)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, pitch in ((12, 30), (7, 41), (5, 24)):
        x = torch.randn(rows, pitch, device=device)[:, :24].requires_grad_()
        y = compiled(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
        eager = run(x)
        torch.testing.assert_close(y, eager)
        torch.testing.assert_close(dx, torch.autograd.grad(eager.sum(), x)[0])


# ---- tensor descriptors (TMA) -------------------------------------------------------------------------------

pytest.importorskip("triton")
launch = importlib.import_module("fastlora.triton.launch")
gemm = importlib.import_module("fastlora.triton.gemm")


def aligned(rows: int, cols: int, dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    """[rows, cols] whose first byte lies ``offset`` elements past a 64-byte boundary."""
    flat = torch.zeros(rows * cols + 64 + offset, dtype=dtype)
    skip = -flat.data_ptr() % 64 // flat.element_size() + offset
    return flat[skip : skip + rows * cols].view(rows, cols)


HALF = torch.float16
DESCRIBABLE = {
    "plain": (lambda: aligned(6, 32, HALF), True),
    "rows apart": (lambda: aligned(6, 32, HALF)[::2], True),
    "16 bytes in": (lambda: aligned(6, 32, HALF, offset=8), True),
    "aligned column slice": (lambda: aligned(6, 32, HALF)[:, 8:20], True),
    "2 bytes in": (lambda: aligned(6, 32, HALF, offset=1), False),
    "8 bytes in": (lambda: aligned(6, 32, HALF, offset=4), False),
    "column slice off 16 bytes": (lambda: aligned(6, 32, HALF)[:, 3:], False),
    "pitch of 66 bytes": (lambda: aligned(6, 33, HALF), False),
    "pitch of 24 bytes": (lambda: aligned(6, 6, F32), False),
    "transposed": (lambda: aligned(6, 32, HALF).t(), False),
    "every other column": (lambda: aligned(6, 32, HALF)[:, ::2], False),
    "expanded rows": (lambda: aligned(1, 32, HALF).expand(6, 32), False),
    "expanded columns": (lambda: aligned(6, 8, HALF)[:, :1].expand(6, 8), False),
    "pitch below the row": (lambda: aligned(1, 64, HALF).as_strided((4, 32), (8, 1)), False),
    "no rows": (lambda: aligned(6, 32, HALF)[:0], False),
    "no columns": (lambda: aligned(6, 32, HALF)[:, :0], False),
    "2^31 rows": (lambda: torch.empty(2**31, 8, dtype=HALF, device="meta"), False),
    "pitch of 2^40 bytes": (lambda: torch.empty(2, 2**39, dtype=HALF, device="meta"), False),
}


@pytest.mark.parametrize("name", DESCRIBABLE)
def test_only_what_the_hardware_can_describe_is_described(name):
    make, expected = DESCRIBABLE[name]
    assert launch.describable(make()) is expected


@pytest.mark.parametrize(
    ("capability", "offset", "described"),
    [((9, 0), 0, True), ((12, 0), 0, True), ((9, 0), 1, False), ((8, 9), 0, False)],
)
@pytest.mark.parametrize("which", ["x", "w"])
def test_descriptors_are_for_new_gpus_and_aligned_tensors(
    monkeypatch, capability, offset, described, which
):
    """False detection of TMA is a crash at the first launch: no descriptor below sm_90, none unaligned."""
    launched = []
    monkeypatch.setattr(launch, "capability", lambda device: capability)
    monkeypatch.setattr(
        launch, "run", lambda kernel, grid, device, arguments, constants, *_: launched.append(
            (arguments, constants)
        )
    )  # fmt: skip
    x, w = (aligned(16, 32, HALF, offset if which == name else 0) for name in "xw")
    tile = gemm.GemmTile(16, 16, 32, 4, 1)
    gemm.gemm(x, w, None, None, None, None, tile)
    ((arguments, constants),) = launched
    assert constants["TMA"] is described
    assert isinstance(arguments[0], gemm.TensorDescriptor) is described
