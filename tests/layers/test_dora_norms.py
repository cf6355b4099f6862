"""DoRA's parts: norms from factors against fp64, on rows that cancel above all, and the column scale's gradients."""

import pytest
import torch

from fastlora import NF4Tensor, QLoRALinear
from fastlora.autograd import ColumnScaleFunction
from fastlora.layers import dora as dora_module
from fastlora.layers.dora import exact_row_norms, row_norms, rows_of
from fastlora.training.footprint import Footprint

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
N, K, R = 24, 40, 4


def exact_norms(w, a, b, s):
    return torch.linalg.vector_norm(w.double() + s * (b.double() @ a.double()), dim=1)


def factors(n=N, k=K, r=R, dtype=FP32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (n, k), (r, k), (n, r)
    return [torch.randn(shape, generator=generator, dtype=FP64).to(dtype) for shape in shapes]


# Norms.


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64])
@pytest.mark.parametrize(("n", "k", "r"), [(24, 40, 4), (24, 40, 1), (1, 1, 1), (7, 3, 5), (0, 8, 2), (3, 0, 2)])  # fmt: skip
def test_norms_of_every_shape_and_dtype(dtype, n, k, r):
    w, a, b = factors(n, k, r, dtype)
    a, b = a.to(torch.promote_types(dtype, FP32)), b.to(torch.promote_types(dtype, FP32))
    got = row_norms(rows_of(w), a, b, 0.7)
    assert got.dtype == a.dtype and not got.requires_grad
    tight = 1e-13 if dtype == FP64 else 5e-7
    torch.testing.assert_close(got.double(), exact_norms(w, a, b, 0.7), rtol=tight, atol=0)


@pytest.mark.parametrize("dtype", [FP32, FP64])
@pytest.mark.parametrize("left", [1e-1, 1e-3, 1e-5, 1e-7, 0.0])
def test_rows_that_cancel_are_done_again(dtype, left):
    """W = -s B A + left * E in half of the rows: what the factors give has no digits there."""
    w, a, b = factors(dtype=dtype)
    e = torch.randn_like(w)
    w[::2] = (-0.5 * (b.double() @ a.double()) + left * e.double()).to(dtype)[::2]
    got = row_norms(rows_of(w), a, b, 0.5)
    torch.testing.assert_close(
        got.double(), exact_norms(w, a, b, 0.5), rtol=1e-13 if dtype == FP64 else 1e-6, atol=1e-300
    )
    if 0 < left < 1e-2 and dtype == FP32:  # the point of it: the factors alone are far off
        squares = w.square().sum(1) + 2 * 0.5 * ((w @ a.t()) * b).sum(1)
        naive = (squares + 0.25 * ((b @ (a @ a.t())) * b).sum(1)).clamp_min(0).sqrt()
        exact = exact_norms(w, a, b, 0.5)
        assert ((naive - exact) / exact).abs()[::2].max() > 1e-5


def test_factors_that_cancel_in_themselves():
    """B A = 0 of large B and A (orthogonal initialisation, scaled up): W's own norm must come out."""
    w, _, _ = factors()
    q = torch.linalg.qr(torch.randn(R, R, dtype=FP64))[0]
    a = (torch.randn(K, R // 2, dtype=FP64) @ q[0::2]).t() * 1e4
    b = torch.randn(N, R // 2, dtype=FP64) @ q[1::2] * 1e4
    a, b = a.float(), b.float()
    got = row_norms(rows_of(w), a, b, 3.0)
    torch.testing.assert_close(got.double(), exact_norms(w, a, b, 3.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scaling", [1e-30, 1e12, 1e18, -2.0, torch.tensor(1e18)])
def test_no_scaling_overflows(scaling):
    w, a, b = factors()
    got = row_norms(rows_of(w), a, b, scaling)
    assert got.isfinite().all()
    torch.testing.assert_close(
        got.double(), exact_norms(w, a, b, float(scaling)), rtol=1e-6, atol=0
    )


def test_the_accelerators_choice_of_rows_is_as_good(monkeypatch):
    """Where nothing may be asked of the device, a fixed number of the worst rows is done again."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    w, a, b = factors()
    w[::3] = (-0.5 * (b.double() @ a.double())).float()[::3] + 1e-5
    got = row_norms(rows_of(w), a, b, 0.5)
    torch.testing.assert_close(got.double(), exact_norms(w, a, b, 0.5), rtol=1e-6, atol=0)


def test_strides_slabs_and_autocast_change_nothing(monkeypatch):
    w, a, b = factors()
    whole = row_norms(rows_of(w), a, b, 0.5)
    monkeypatch.setattr(dora_module, "_SLAB", 3 * K)
    strided = w.t().contiguous().t()
    with torch.autocast("cpu", dtype=BF16):
        slabs = row_norms(rows_of(strided), a, b, 0.5)
    torch.testing.assert_close(slabs, whole, rtol=3e-7, atol=0)
    exact = exact_row_norms(rows_of(strided), a, b, 0.5)
    torch.testing.assert_close(exact, exact_norms(w, a, b, 0.5), rtol=1e-14, atol=0)


@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(24, 128), (6, 40), (130, 64)])
def test_norms_over_four_bits(shape, double_quant, block_size, monkeypatch):
    monkeypatch.setattr(dora_module, "_SLAB", 5 * shape[1])
    w, a, b = factors(*shape)
    q = NF4Tensor.quantize(w, block_size, double_quant)
    read, whole = q.row_reader(FP32), q.dequantize(FP32)
    assert torch.equal(read(slice(2, 5)), whole[2:5])
    assert torch.equal(read(torch.tensor([3, 0, 3])), whole[[3, 0, 3]])
    layer = QLoRALinear.from_quantized(q, r=None)
    got = row_norms(layer._base_rows(), a, b, 0.5)
    torch.testing.assert_close(got.double(), exact_norms(whole, a, b, 0.5), rtol=1e-6, atol=0)


def test_norms_over_four_bits_make_nothing_of_the_weights_size_for_a_kernel():
    """On the meta device, which stands for CUDA: what an estimate of memory sees."""
    q = NF4Tensor.empty((4096, 512), BF16, device="meta")
    a, b = (torch.empty(shape, device="meta") for shape in ((R, 512), (4096, R)))
    layer, step = QLoRALinear.from_quantized(q, r=None), Footprint("meta")
    with step:
        norms = row_norms(layer._base_rows(), a, b, 0.5)
    assert norms.shape == (4096,) and norms.dtype == FP32
    assert 0 < step.peak < q.nbytes / 10 and step.flops == 2 * 4096 * 512 * (R + 1)


# The column scale.


@pytest.mark.parametrize("rest", ["none", "bias", "whole"])
def test_gradcheck_of_the_column_scale(rest):
    z = torch.randn(2, 5, N, dtype=FP64, requires_grad=True)
    m = torch.randn(N, dtype=FP64, requires_grad=True)
    norm = torch.rand(N, dtype=FP64) + 0.5
    shape = {"none": None, "bias": (N,), "whole": (2, 5, N)}[rest]
    more = None if shape is None else torch.randn(shape, dtype=FP64, requires_grad=True)
    torch.autograd.gradcheck(lambda *t: ColumnScaleFunction.apply(t[0], t[1], norm, more), (z, m))
    if more is not None:
        torch.autograd.gradcheck(
            lambda t: ColumnScaleFunction.apply(z.detach(), m.detach(), norm, t), (more,)
        )


def test_dm_in_low_precision_is_summed_in_fp32():
    z = (torch.rand(4096, N) + 0.5).to(BF16)
    m, norm = torch.ones(N, requires_grad=True), torch.full((N,), 2.0)
    dy = torch.ones(4096, N, dtype=BF16)
    ColumnScaleFunction.apply(z, m, norm, None).backward(dy)
    torch.testing.assert_close(m.grad.double(), z.double().sum(0) / 2, rtol=1e-5, atol=0)


def test_a_frozen_magnitude_saves_nothing_of_the_outputs_size():
    saved = []
    z = torch.randn(64, N, requires_grad=True)
    for trained in (False, True):
        saved.clear()
        m = torch.ones(N, requires_grad=trained)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t.numel()) or t, lambda t: t
        ):
            ColumnScaleFunction.apply(z * 1, m, torch.ones(N), None)
        assert (max(saved) == z.numel()) == trained
        assert sum(saved) == 2 * N + trained * z.numel()
