"""DoRA in one layer: norms from factors against fp64, the column scale's gradients, and the layer against stock PEFT."""

import copy
import pickle

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora import LoRALinear, NF4Tensor, QLoRALinear, reference
from fastlora.autograd import ColumnScaleFunction
from fastlora.layers import LoRAWrapper
from fastlora.layers import dora as dora_module
from fastlora.layers.dora import row_norms, rows_of

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


@pytest.mark.parametrize("kind", ["plain", "dropout"])
def test_gradcheck_of_the_layer_with_its_norm_held(kind, monkeypatch):
    """The norm is a constant of backward, so that it is held while finite differences are taken."""
    linear = nn.Linear(7, 5, dtype=FP64)
    layer = LoRALinear.from_linear(linear, r=2, use_dora=True, lora_dropout=0.4 * (kind != "plain"))
    a, b, m = layer.lora_A["default"], layer.lora_B["default"], layer.lora_magnitude_vector["default"]  # fmt: skip
    nn.init.normal_(b)
    held = layer._row_norms("default")
    monkeypatch.setattr(layer, "_row_norms", lambda name: held)
    x = torch.randn(3, 7, dtype=FP64, requires_grad=True)

    def run(*inputs):
        torch.manual_seed(3)
        return torch.func.functional_call(
            layer,
            dict(zip(("lora_A.default", "lora_B.default", "lora_magnitude_vector.default"), inputs[1:])),
            (inputs[0],),
        )  # fmt: skip

    torch.autograd.gradcheck(run, (x, a, b, m))


def test_dm_in_low_precision_is_summed_in_fp32(monkeypatch):
    from fastlora.autograd import column_scale

    monkeypatch.setattr(column_scale, "_SLAB", 7 * N)
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


# The layer.


def trained(kind=LoRALinear, dtype=FP32, n=N, k=K, bias=True, seed=0, scale=0.3, **settings):
    """A layer whose adapter is not what it began as."""
    torch.manual_seed(seed)
    settings = {"r": R, "lora_alpha": 6, "use_dora": True, **settings}
    linear = nn.Linear(k, n, bias=bias, dtype=dtype)
    layer = kind.from_linear(linear, **settings) if kind is not LoRAWrapper else kind(linear, **settings)  # fmt: skip
    generator = torch.Generator().manual_seed(seed + 1)
    for name in layer.adapters:
        for p in layer.adapter_parameters(name):
            p.data += torch.randn(p.shape, generator=generator).to(p) * scale
    return layer


def oracle(layer, x, dtype=FP64, name="default", **dropout):
    """The layer by reference.dora_linear in ``dtype``, with leaves to take gradients of."""
    w = layer.weight.dequantize(FP32) if isinstance(layer, QLoRALinear) else layer.weight
    leaves = [
        t.detach().to(dtype).requires_grad_()
        for t in (x, layer.lora_A[name], layer.lora_B[name], layer.lora_magnitude_vector[name])
    ]
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    x, a, b, m = leaves
    s = layer.scaling[name]
    return reference.dora_linear(x, w.detach().to(dtype), a, b, m, s, bias, **dropout), leaves


def compare(layer, x, rule=2.0):
    """Outputs and gradients against fp64, within ``rule`` times the error of the same formula in torch in x's dtype."""
    x = x.detach().requires_grad_()
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    p = [x, layer.lora_A["default"], layer.lora_B["default"], layer.lora_magnitude_vector["default"]]  # fmt: skip
    own = [y.detach(), *(t.grad for t in p)]
    results = []
    for dtype in (FP64, x.dtype):
        out, leaves = oracle(layer, x, dtype)
        out.backward(dy.to(dtype))
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert own[0].dtype == x.dtype
    for got, exact, torchs in zip(own, *results, strict=True):
        error = (got.double() - exact).norm()
        allowed = (torchs.double() - exact).norm()
        floor = torch.finfo(x.dtype).eps * exact.norm() / (0.25 if x.dtype == FP64 else 32)
        assert error <= rule * allowed + floor, (error / exact.norm(), allowed / exact.norm())


@pytest.mark.parametrize("kind", [LoRALinear, QLoRALinear])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_within_the_accuracy_rule(kind, dtype, bias):
    layer = trained(kind, dtype, k=64, bias=bias)
    compare(layer, torch.randn(3, 17, 64).to(dtype))


def test_outputs_and_gradients_in_fp64():
    compare(trained(dtype=FP64), torch.randn(9, K, dtype=FP64))


@pytest.mark.parametrize("kind", [LoRALinear, QLoRALinear, LoRAWrapper])
@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_a_new_adapter_is_the_base(kind, scale):
    torch.manual_seed(0)
    linear = nn.Linear(64, N)
    layer = LoRAWrapper(linear, r=R, use_dora=True) if kind is LoRAWrapper else kind.from_linear(linear, r=R, use_dora=True)  # fmt: skip
    x = torch.randn(5, 64)
    with torch.no_grad():
        layer.lora_B["default"].add_(scale)
    base = copy.deepcopy(layer)
    base.enable_adapters(False)
    assert torch.allclose(layer(x), base(x), rtol=1e-6, atol=1e-6) == (scale == 0)


@pytest.mark.parametrize("training", [False, True])
def test_rows_of_zeros_stay_finite(training):
    """Padded rows of an output layer: m = 0 and norm = 0, where PEFT's result is NaN."""
    linear = nn.Linear(K, N)
    linear.weight.data[3:6] = 0
    layer = LoRALinear.from_linear(linear, r=R, use_dora=True, lora_dropout=0.2).train(training)
    x = torch.randn(8, K, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    for p in layer.adapter_parameters("default"):
        assert p.grad.isfinite().all()
    torch.testing.assert_close(y[:, 3:6], linear.bias[3:6].expand(8, 3))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_nothing_of_the_weights_size_is_made(dropout):
    class Sizes(TorchDispatchMode):
        def __init__(self, weight):
            super().__init__()
            self.weight, self.made = weight, []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                shared = isinstance(t, torch.Tensor) and (
                    t.untyped_storage().data_ptr() == self.weight.untyped_storage().data_ptr()
                )
                if isinstance(t, torch.Tensor) and not shared:
                    self.made.append((t.numel(), func))
            return out

    layer = trained(n=96, k=112, lora_dropout=dropout).train()
    x = torch.randn(2, 112, requires_grad=True)
    with Sizes(layer.weight) as sizes:
        layer(x).sum().backward()
    assert len(sizes.made) > 20
    assert max(sizes.made, key=lambda item: item[0])[0] < 96 * 112 // 4


def stock(layer, **settings):
    """Stock PEFT's layer over the same base with the same adapters."""
    base = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=layer.weight.dtype)  # fmt: skip
    base.weight.data = layer.weight.data.clone()
    if layer.bias is not None:
        base.bias.data = layer.bias.data.clone()
    first, *others = layer.adapters
    config = {
        name: peft.LoraConfig(
            r=layer.r[name],
            lora_alpha=layer.lora_alpha[name],
            lora_dropout=layer.lora_dropout[name],
            use_dora=name in layer.lora_magnitude_vector,
            lora_bias=name in layer.lora_bias,
            target_modules=["0"],
        )
        for name in layer.adapters
    }
    model = peft.get_peft_model(nn.Sequential(base), config[first], adapter_name=first)
    for name in others:
        model.add_adapter(name, config[name])
    theirs = model.base_model.model[0]
    model.base_model.set_adapter(list(layer.active_adapters))
    with torch.no_grad():
        for name in layer.adapters:
            theirs.lora_A[name].weight.copy_(layer.lora_A[name])
            theirs.lora_B[name].weight.copy_(layer.lora_B[name])
            if name in layer.lora_bias:
                theirs.lora_B[name].bias.copy_(layer.lora_bias[name])
            if name in layer.lora_magnitude_vector:
                theirs.lora_magnitude_vector[name].weight.copy_(layer.lora_magnitude_vector[name])
    return theirs.train(layer.training)


def grads_of_peft(theirs, name):
    return [
        theirs.lora_A[name].weight.grad,
        theirs.lora_B[name].weight.grad,
        theirs.lora_magnitude_vector[name].weight.grad,
    ]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_pefts(training, dropout, bias):
    """With dropout too: both draw the same mask from one seed."""
    layer = trained(bias=bias, lora_dropout=dropout).train(training)
    theirs = stock(layer)
    results = []
    for module in (layer, theirs):
        x = torch.randn(6, K, generator=torch.Generator().manual_seed(1), requires_grad=True)
        torch.manual_seed(4)
        y = module(x)
        y.square().sum().backward()
        grads = grads_of_peft(module, "default") if module is theirs else [p.grad for p in layer.adapter_parameters("default")]  # fmt: skip
        results.append([y.detach(), x.grad, *grads])
    for ours, peft_s in zip(*results, strict=True):
        torch.testing.assert_close(ours, peft_s, rtol=2e-5, atol=2e-5)


def test_dropout_by_an_exported_mask():
    layer = trained(lora_dropout=0.25).train()
    x = torch.randn(6, K)
    torch.manual_seed(9)
    y = layer(x)
    torch.manual_seed(9)
    mask = F.dropout(torch.ones_like(x), 0.25) > 0
    exact, _ = oracle(layer, x, mask=mask, keep=fastlora.rng.keep_threshold(0.25))
    assert not mask.all()
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


STACKS = {
    "lora, dora": (False, True),
    "dora, lora": (True, False),
    "dora, dora": (True, True),
}


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("stack", STACKS)
def test_stacked_adapters_are_pefts(stack, dropout):
    first, second = STACKS[stack]
    layer = trained(use_dora=first, lora_dropout=dropout)
    layer.add_adapter("second", 3, 5.0, dropout, use_dora=second)
    for p in layer.adapter_parameters("second"):
        p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(8)) * 0.2
    layer.set_adapter(["default", "second"])
    x = torch.randn(6, K)
    for training in (True, False):
        layer.train(training)
        results = []
        for module in (layer, stock(layer)):
            torch.manual_seed(4)
            results.append(module(x))
        torch.testing.assert_close(*results, rtol=2e-5, atol=2e-5)
    layer.merge()
    torch.testing.assert_close(layer(x), results[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_a_wrapper_does_what_the_fused_layer_does(dropout):
    fused = trained(lora_dropout=dropout).train()
    wrapped = LoRAWrapper(nn.Linear(K, N), r=R, lora_alpha=6, lora_dropout=dropout, use_dora=True)
    wrapped.base_layer.load_state_dict({"weight": fused.weight, "bias": fused.bias})
    adapters = {k: v for k, v in fused.state_dict().items() if k.startswith("lora_")}
    wrapped.train().load_state_dict(adapters, strict=False)
    x = torch.randn(6, K)
    torch.manual_seed(5)
    y = fused(x)
    torch.manual_seed(5)
    torch.testing.assert_close(wrapped(x), y, rtol=2e-5, atol=2e-5)


def test_a_wrapper_over_a_conv1d_reads_its_transposed_weight():
    from transformers.pytorch_utils import Conv1D

    base = Conv1D(N, K)
    layer = LoRAWrapper(base, r=R, use_dora=True)
    norms = base.weight.detach().norm(dim=0)
    torch.testing.assert_close(layer.lora_magnitude_vector["default"].detach(), norms)


def test_a_wrapper_over_what_cannot_be_read_is_refused():
    base = nn.Linear(K, N)
    base.weight = nn.Parameter(torch.zeros(N, K, dtype=torch.int8), requires_grad=False)
    with pytest.raises(NotImplementedError, match="use_dora"):
        LoRAWrapper(base, r=R, use_dora=True)


# Merging, copies.


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64])
def test_merging_is_the_formula_and_unmerging_exact(dtype):
    layer = trained(dtype=dtype).eval()
    before, x = layer.weight.detach().clone(), torch.randn(5, K, dtype=dtype)
    y = layer(x)
    w, s = layer.weight.double(), layer.scaling["default"]
    whole = w + s * layer.lora_B["default"].double() @ layer.lora_A["default"].double()
    m = layer.lora_magnitude_vector["default"].double()
    exact = m[:, None] * whole / whole.norm(dim=1, keepdim=True)
    merged = layer.merge()
    eps = torch.finfo(dtype).eps
    assert (layer.weight.double() - exact).abs().max() <= 4 * max(eps, 1e-7) * exact.abs().max()
    assert merged.update > 0.05 and merged.error < 4 * eps
    torch.testing.assert_close(layer(x), y, rtol=0.02 if dtype == BF16 else 1e-5, atol=0.05 if dtype == BF16 else 1e-5)  # fmt: skip
    layer.unmerge()
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer(x), y)


def test_merging_into_four_bits_reports_its_error():
    layer = trained(QLoRALinear, k=64)
    exact = layer.merged_weight(FP32)
    assert exact.error < 1e-6
    x = torch.randn(5, 64)
    torch.testing.assert_close(
        F.linear(x, exact.weight, layer.bias), layer(x), rtol=1e-5, atol=1e-5
    )
    codes = layer.weight.codes.clone()
    merged = layer.merge()
    measured = (layer.weight.dequantize(FP32) - exact.weight).norm() / exact.weight.norm()
    assert merged.error == pytest.approx(float(measured), rel=1e-3)
    layer.unmerge()
    assert torch.equal(layer.weight.codes, codes)


def test_scale_and_tensor_scalings_reach_the_norm():
    layer = trained()
    x = torch.randn(5, K)
    layer.set_scale("default", 3.0)
    layer.scaling["default"] = torch.tensor(layer.scaling["default"])
    exact, _ = oracle(layer, x)
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-5)
    layer.set_scale("default", 0.5)
    exact, _ = oracle(layer, x)
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-5)


def test_writes_that_no_version_counter_sees_are_seen():
    """Why norms are not kept from one forward to the next."""
    layer = trained()
    x = torch.randn(5, K)
    layer(x)
    for p in (layer.weight, layer.lora_A["default"], layer.lora_B["default"]):
        p.data.mul_(1.5)
        exact, _ = oracle(layer, x)
        torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-5)


def test_copies_pickles_renames_and_deletes():
    layer = trained().eval()
    x = torch.randn(5, K)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    layer.rename_adapter("default", "other")
    assert torch.equal(layer(x), y)
    assert set(layer.adapter_tensors("other")) == {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"}  # fmt: skip
    layer.delete_adapter("other")
    assert not list(layer.lora_magnitude_vector) and torch.equal(layer(x), layer._base(x, layer.bias))  # fmt: skip


def test_meta_and_reset():
    layer = LoRALinear(K, N, r=R, use_dora=True, device="meta")
    assert layer.lora_magnitude_vector["default"].shape == (N,)
    layer.to_empty(device="cpu").reset_parameters()
    x = torch.randn(5, K)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("kind", [LoRALinear, QLoRALinear])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_autocast_and_checkpointing(kind, dropout):
    from torch.utils.checkpoint import checkpoint

    layer = trained(kind, k=64, lora_dropout=dropout).train()
    x = torch.randn(6, 64, requires_grad=True)
    grads = []
    for run in ("plain", "reentrant", "not"):
        layer.zero_grad()
        torch.manual_seed(2)
        with torch.autocast("cpu", dtype=BF16):
            y = layer(x) if run == "plain" else checkpoint(layer, x, use_reentrant=run == "reentrant")  # fmt: skip
        assert y.dtype == BF16
        y.float().square().sum().backward()
        grads.append([p.grad.clone() for p in layer.adapter_parameters("default")])
    for other in grads[1:]:
        for left, right in zip(grads[0], other, strict=True):
            assert torch.equal(left, right)
    if dropout == 0:
        exact, _ = oracle(layer, x)
        torch.testing.assert_close(y.double(), exact, rtol=0.05, atol=0.05)


# lora_bias.


@pytest.mark.parametrize("kind", [LoRALinear, QLoRALinear, LoRAWrapper])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_lora_bias_is_scaled_and_trained(kind, bias, dtype):
    layer = trained(kind, dtype, k=64, bias=bias, use_dora=False, lora_bias=True)
    x = torch.randn(6, 64).to(dtype)
    y = layer(x)
    y.float().sum().backward()
    w = layer.weight.dequantize(dtype) if kind is QLoRALinear else layer.weight
    base = F.linear(x.double(), w.double(), layer.bias.double() if bias else None)
    a, b, beta = (layer.lora_A["default"], layer.lora_B["default"], layer.lora_bias["default"])
    s = layer.scaling["default"]
    exact = base + s * F.linear(F.linear(x.double(), a.double()), b.double(), beta.double())
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == FP32 else {"rtol": 0.03, "atol": 0.05}
    torch.testing.assert_close(y.double(), exact, **close)
    torch.testing.assert_close(beta.grad, torch.full((N,), 6 * s))
    assert set(layer.adapter_tensors("default")) == {"lora_A.weight", "lora_B.weight", "lora_B.bias"}  # fmt: skip


@pytest.mark.parametrize("kind", [LoRALinear, QLoRALinear])
def test_merging_takes_lora_bias_along_and_back(kind):
    layer = trained(kind, k=64, use_dora=False, lora_bias=True)
    x, bias = torch.randn(6, 64), layer.bias
    before, y = bias.detach().clone(), layer(x)
    exact = layer.merged_weight(FP32).weight
    torch.testing.assert_close(F.linear(x, exact, layer.merged_bias()), y, rtol=1e-5, atol=1e-5)
    layer.merge()
    torch.testing.assert_close(layer(x), layer._base(x, bias + 1.5 * layer.lora_bias["default"]), rtol=1e-5, atol=1e-5)  # fmt: skip
    layer.enable_adapters(False)
    assert layer.bias is bias
    layer.enable_adapters(True)
    assert layer.bias is not bias
    layer.unmerge()
    assert layer.bias is bias and torch.equal(bias, before) and torch.equal(layer(x), y)


def test_lora_bias_without_a_base_bias_cannot_be_merged():
    layer = trained(bias=False, use_dora=False, lora_bias=True)
    with pytest.raises(ValueError, match="lora_bias"):
        layer.merge()
    assert not layer.merged_adapters


def test_lora_bias_stacked_below_dora_merges_as_it_acts():
    layer = trained(use_dora=False, lora_bias=True).eval()
    layer.add_adapter("second", 3, 5.0, use_dora=True)
    for p in layer.adapter_parameters("second"):
        p.data += torch.randn(p.shape) * 0.2
    layer.set_adapter(["default", "second"])
    x = torch.randn(6, K)
    y = layer(x)
    torch.testing.assert_close(stock(layer)(x), y, rtol=2e-5, atol=2e-5)
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=2e-5, atol=2e-5)
