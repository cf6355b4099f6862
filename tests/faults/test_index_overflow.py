"""Offsets, sizes and grids beyond what 32 (or 16) bits hold. See also tests/gpu's and tests/csrc's huge tests."""

from __future__ import annotations

import importlib

import pytest
import torch

import fastlora
from fastlora import ops, reference, rng
from fastlora.testing.inputs import integers
from tests.faults.common import assert_right, operands, run_python, step

BF16 = torch.bfloat16
MAX_GRID_YZ = 65535


@pytest.fixture
def grids(monkeypatch):
    """Every grid that would be launched; nothing runs, so that sizes cost nothing."""
    pytest.importorskip("triton")
    recorded = []
    launch = importlib.import_module("fastlora.triton.launch")

    def run(kernel, grid, *_):
        assert all(0 < extent < 2**31 for extent in grid), grid
        assert all(extent <= MAX_GRID_YZ for extent in grid[1:]), grid
        recorded.append(grid)

    monkeypatch.setattr(launch, "run", run)
    return recorded


def zeros(rows: int, cols: int) -> torch.Tensor:
    return torch.zeros(1, 1).expand(rows, cols)


@pytest.mark.parametrize(("rows", "cols"), [(1, 2**28), (2**24, 1), (300, 2**22)])
def test_grid_of_mask(grids, rows, cols):
    triton = importlib.import_module("fastlora.triton")
    triton.mask(torch.tensor([1, 2]), rows, cols, 20000)
    assert grids


@pytest.mark.parametrize(("m", "k", "r"), [(2**22, 8, 1), (1, 2**28, 512), (2**16, 64, 300)])
@pytest.mark.parametrize("emit", [0, 2**27])
def test_grid_of_down(grids, m, k, r, emit):
    triton = importlib.import_module("fastlora.triton")
    state = torch.tensor([1, 2])
    triton.down(zeros(m, k), zeros(r, k), None, 1.0, state, 20000, emit if m == 1 else 0)
    assert grids


@pytest.mark.parametrize(("m", "k", "n"), [(2**22, 8, 8), (8, 2**28, 8), (8, 8, 2**22)])
def test_grid_of_gemm_and_wgrad(grids, m, k, n):
    triton = importlib.import_module("fastlora.triton")
    x, dy = zeros(m, k), zeros(m, n)
    triton.gemm(x, zeros(n, k), None, None, None, None)
    triton.wgrad(x, zeros(m, 4), dy, zeros(m, 4), None, *[torch.float32] * 3)
    assert grids


@pytest.mark.parametrize(("m", "n"), [(2**22, 8), (3, 2**24), (2**16, 40)])
def test_grid_of_scales_norms_and_bottlenecks(grids, m, n):
    scale, norms, bottleneck = (
        importlib.import_module(f"fastlora.triton.{name}")
        for name in ("scale", "norms", "bottleneck")
    )
    z, row = zeros(m, n), zeros(1, n)[0]
    scale.scale_columns(z, row, None, None)
    scale.scale_columns_backward(z, z, row, None, True, True)
    norms.row_norms(z, zeros(4, n), zeros(m, 4), None, 1.0)
    codes, form = torch.zeros(1, dtype=torch.uint8), ops.Form(m, n, 64, 0, False)
    norms.nf4_row_norms(codes, [z], form, zeros(4, n), zeros(m, 4), None, 1.0)
    bottleneck.bottleneck_down(z, zeros(4, n), row[:4], "relu", True)
    bottleneck.bottleneck_up(zeros(m, 4), zeros(n, 4), row, z)
    assert len(grids) >= 7


# ---- on a GPU ---------------------------------------------------------------------------------------------


@pytest.fixture
def strictly_triton():
    with fastlora.backend("triton", strict=True):
        yield
    assert {backend for _, backend in fastlora.launches()} == {"triton"}


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
def test_small_tensors_whose_strides_span_more_than_two_to_the_31(transposed, whole_backend):
    """Few elements, far apart: row * pitch does not fit 32 bits even though every size is small."""
    if transposed and whole_backend == "cuda":
        pytest.skip("csrc/lora takes contiguous rows")
    rows, pitch = 1104, 2**21
    sea = torch.zeros(rows, pitch, device="cuda", dtype=BF16)
    assert (rows - 1) * pitch > 2**31

    def far_apart(height, width, column):
        shape = (width, height) if transposed else (height, width)
        view = sea[: shape[0], column : column + shape[1]].normal_()
        return view.t() if transposed else view

    # Transposed, the long dimension is the one that the products run over: x [64, 1104], W [72, 1104], ...
    m, k, n, r = (64, rows, 72, 8) if transposed else (rows, 64, rows, 8)
    x, w = far_apart(m, k, 0), far_apart(n, k, 4096)
    a, b = far_apart(r, k, 8192).div_(8), far_apart(n, r, 12288)
    dy = far_apart(m, n, 16384)
    assert_right(x, w, a, b, dy)


@pytest.mark.gpu
def test_kernels_of_other_methods_over_strides_that_span_more_than_two_to_the_31():
    triton = {name: importlib.import_module(f"fastlora.triton.{name}") for name in ("scale", "norms", "bottleneck")}  # fmt: skip
    rows, pitch, n, r = 1104, 2**21, 40, 8
    sea = torch.zeros(rows, pitch, device="cuda", dtype=torch.float16)
    z, rest, dy, h = (
        sea[:, i * 4096 : i * 4096 + width].copy_(
            integers(rows, width, low=-2, high=2, dtype=sea.dtype, device=sea.device)
        )
        for i, width in enumerate((n, n, n, r))
    )
    a, b, bias = (integers(*s, low=-2, high=2, dtype=sea.dtype, device=sea.device) for s in ((r, n), (n, r), (n,)))  # fmt: skip
    wide = lambda *tensors: [t.double() for t in tensors]  # noqa: E731
    magnitude = bias.float()

    y = triton["scale"].scale_columns(z, magnitude, None, rest)
    assert torch.equal(y.double(), reference.scale_columns(*wide(z, magnitude), None, rest.double()))  # fmt: skip
    got = triton["scale"].scale_columns_backward(dy, z, magnitude, None, True, True)
    true = reference.scale_columns_backward(*wide(dy, z, magnitude), None, True, True)
    for mine, exact in zip(got, true, strict=True):
        assert torch.equal(mine.double(), exact)
    norms, _ = triton["norms"].row_norms(z, a, h, None, 0.5)
    torch.testing.assert_close(norms.double(), reference.row_norms(*wide(z, a, h), None, 0.5)[0], rtol=1e-6, atol=0)  # fmt: skip
    made, _ = triton["bottleneck"].bottleneck_down(z, a, bias[:r], "relu", False)
    assert torch.equal(made.double(), reference.bottleneck_down(*wide(z, a, bias[:r]), "relu", False)[0])  # fmt: skip
    up = triton["bottleneck"].bottleneck_up(h, b, bias, rest)
    assert torch.equal(up.double(), reference.bottleneck_up(*wide(h, b, bias, rest)))


@pytest.mark.gpu
@pytest.mark.usefixtures("strictly_triton")
def test_mask_of_a_very_long_row():
    """2^28 columns need more blocks along a row than a grid's second axis has."""
    state, cols = torch.tensor([7, 8], device="cuda"), 2**28
    words = ops.mask(state, 2, cols, 40000)
    expected = reference.mask(state, 2, 4096, 40000)
    assert torch.equal(words[:, :512], expected)
    share = (words[:, -4096:].long() & 1).float().mean()
    assert 0.55 < share < 0.67 and not torch.equal(words[0, -128:], words[0, :128])


@pytest.mark.gpu
@pytest.mark.usefixtures("strictly_triton")
def test_dropout_over_a_very_long_row():
    x, w, a, b = operands(2, 2**27 + 8, 1, 1, BF16, "cuda")
    y, dx, *_ = step(x, torch.zeros_like(w), a, b, dropout_p=0.5)
    assert torch.isfinite(y).all() and 0.45 < (dx == 0).float().mean() < 0.55


@pytest.mark.huge
@pytest.mark.parametrize("k", [2**15 + 64, 2**15 + 65])
def test_norms_of_a_four_bit_weight_beyond_two_to_the_31_elements(k):
    """Rows before the 2^31st element and behind it, which with an odd length begin with either half of a byte."""
    norms = importlib.import_module("fastlora.triton.norms")
    n = 2**16 + 72
    assert n * k > 2**31
    codes = torch.randint(0, 256, ((n * k + 1) // 2,), dtype=torch.uint8, device="cuda")
    absmax = torch.rand(-(-n * k // 64), device="cuda") + 0.5
    a, b = torch.randn(4, k, device="cuda"), torch.randn(n, 4, device="cuda")
    got, _ = norms.nf4_row_norms(codes, [absmax], ops.Form(n, k, 64, 0, False), a, b, None, 0.5)
    for first in (0, 2**31 // k // 64 * 64, n - 72):  # whole blocks and bytes lie before these rows
        at, rows = first * k, 72
        end = at + rows * k
        part = codes[at // 2 : (end + 1) // 2], absmax[at // 64 : -(-end // 64)]
        w = reference.dequantize_nf4(*part, (rows, k), 64, torch.float32)
        true, _ = reference.row_norms(w.double(), a.double(), b[first : first + rows].double(), None, 0.5)  # fmt: skip
        torch.testing.assert_close(got[first : first + rows].double(), true, rtol=1e-6, atol=0)


@pytest.mark.huge
@pytest.mark.usefixtures("whole_backend")
@pytest.mark.parametrize(("m", "k"), [(2**20, 2048), (2**20 + 3, 2080)])
def test_dropout_beyond_two_to_the_31_elements(m, k):
    """numel exactly 2^31, and above: forward and backward must see the mask of its written definition."""
    x, w, a, b = operands(m, k, 16, 16, BF16, "cuda")
    keep = rng.keep_threshold(0.5)
    torch.manual_seed(9)
    state = rng.draw_state("cuda")
    torch.manual_seed(9)
    y, dx, _, _ = step(x, torch.zeros_like(w), a, b, dropout_p=0.5)
    top = reference.unpack_mask(reference.mask(state, 80, k, keep), 80, k)
    left = reference.unpack_mask(reference.mask(state, m, 32, keep), m, 32)
    # With W = 0, dX is zero exactly where x was dropped (and where bf16 made the product zero: never here).
    assert torch.equal(dx[:80] != 0, top)
    assert torch.equal(dx[-70:, :32] != 0, left[-70:])
    tail = torch.where(dx[-70:] != 0, x[-70:].double(), 0.0) * rng.keep_scale(keep)
    expected = 0.5 * tail @ a.double().t() @ b.double().t()
    torch.testing.assert_close(y[-70:].double(), expected, rtol=3e-2, atol=3e-2)


LONG = """
import sys, torch, fastlora
m, k, n = map(int, sys.argv[1:])
new = lambda *s: torch.randn(s, device="cuda", dtype=torch.bfloat16)
x, w, b = new(m, k).requires_grad_(), new(n, k), new(n, 1).requires_grad_()
a = new(1, k).requires_grad_()
try:
    with fastlora.backend("triton", strict=True):
        y = fastlora.lora_linear(x, w, a, b, 0.5)
        dx, db = torch.autograd.grad(y, (x, b), torch.ones_like(y))
    torch.cuda.synchronize()
except ValueError as refusal:  # a size beyond what the kernels can count is refused before any launch
    print("refused:", refusal)
    sys.exit()
def check(name, got, want):
    error = (got.double() - want).norm() / want.norm()
    assert error < 2e-2, (name, error)
with torch.no_grad():
    w_eff = lambda cols: w[cols].double() + 0.5 * b[cols].double() @ a.double()
    ends = lambda size: (slice(0, min(size, 300)), slice(max(size - 300, 0), size))
    if k == 1:
        for rows in ends(m):
            for cols in ends(n):
                check("y", y[rows, cols], x[rows].double() @ w_eff(cols).t())
    if n == 1:
        for rows in ends(m):
            for cols in ends(k):
                total = w[:, cols].double() + 0.5 * b.double() @ a[:, cols].double()
                check("dX", dx[rows, cols], total.expand(dx[rows, cols].shape))
    if m == 1 and k == 1:
        h = 0.5 * (x.double() @ a.double().t())
        for cols in ends(n):
            check("dB", db[cols], h.expand(db[cols].shape))
print("right")
"""


@pytest.mark.huge
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [(2**31 - 5, 1, 1), (2**31 + 8, 1, 1), (1, 1, 2**31 + 8), (1, 2**31 + 8, 1)],
)
def test_more_than_two_to_the_31_rows_or_columns(m, k, n):
    """Right, or refused by name; in a process of its own, since an illegal access would end this one's CUDA."""
    output = run_python(LONG, str(m), str(k), str(n), timeout=400)
    assert output == "right" or output.startswith("refused: "), output
