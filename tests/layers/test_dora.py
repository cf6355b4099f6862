"""DoRA in one layer: against its formula in fp64 and stock PEFT, merged, copied, compiled."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora import LoRALinear, QLoRALinear, reference
from fastlora.layers import LoRAWrapper, fused
from fastlora.ops import scale as scale_ops
from fastlora.ops import support
from fastlora.testing.compare import assert_accurate
from tests.layers.common import BF16, FP16, FP32, FP64, K, N, R, stock, trained


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


@pytest.mark.parametrize("kind", ["plain", "dropout"])
def test_gradcheck_of_the_layer_with_its_norm_held(kind, monkeypatch):
    """The norm is a constant of backward, so that it is held while finite differences are taken."""
    linear = nn.Linear(7, 5, dtype=FP64)
    layer = LoRALinear.from_linear(linear, r=2, use_dora=True, lora_dropout=0.4 * (kind != "plain"))
    a, b, m = layer.lora_A["default"], layer.lora_B["default"], layer.lora_magnitude_vector["default"]  # fmt: skip
    nn.init.normal_(b)
    held = layer._row_norms("default")
    monkeypatch.setattr(layer, "_row_norms", lambda name: held)
    monkeypatch.setattr(fused, "column_factors", lambda *args: (held, args[-1].detach() / held))
    x = torch.randn(3, 7, dtype=FP64, requires_grad=True)

    def run(*inputs):
        torch.manual_seed(3)
        return torch.func.functional_call(
            layer,
            dict(zip(("lora_A.default", "lora_B.default", "lora_magnitude_vector.default"), inputs[1:])),
            (inputs[0],),
        )  # fmt: skip

    torch.autograd.gradcheck(run, (x, a, b, m))


@pytest.mark.parametrize("kind", [LoRALinear, QLoRALinear])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_compiled_graph_and_an_exported_program(kind, dropout):
    layer = trained(kind, k=64, lora_dropout=dropout).train()
    x = torch.randn(5, 64)
    results = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        torch.manual_seed(3)
        run(x).square().sum().backward()
        results.append([p.grad.clone() for p in layer.adapter_parameters("default")])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
    if kind is LoRALinear:
        program = torch.export.export(layer.eval(), (x,)).module()
        torch.testing.assert_close(program(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scaling", ["float", "tensor"])
def test_without_gradients_many_rows_are_scaled_in_the_product(device, monkeypatch, scaling, bias):
    """Triton's; with one leaf that wants a gradient z is kept, in another launch."""
    if support.miss("scaled_gemm", "triton", device, FP16, R) is not None:
        pytest.skip("Triton runs on a GPU or in its interpreter")
    monkeypatch.setattr(scale_ops, "_FEWEST_SCALED_ROWS", 51)
    layer = trained(LoRALinear, FP16, n=32, k=64, bias=bias).to(device)
    if scaling == "tensor":
        layer.scaling["default"] = torch.tensor(1.5, device=device)
    x = torch.randn(3, 17, 64, device=device).to(FP16)
    with fastlora.backend("triton", strict=True), torch.no_grad():
        for rows, product in ((x, True), (x[:2], False), (x.float(), False)):
            fastlora.reset_launches()
            if rows.dtype == FP32:
                layer = layer.float()
            y = layer(rows)
            ran = {op for op, _ in fastlora.launches()}
            assert ("scaled_gemm" in ran, "scale_columns" in ran) == (product, not product)
            exact, _ = oracle(layer, rows)
            same, _ = oracle(layer, rows, rows.dtype)
            assert_accurate("y", y, same, exact)
    with fastlora.backend("triton", strict=True):
        fastlora.reset_launches()
        layer.half()(x)
        assert "scaled_gemm" not in {op for op, _ in fastlora.launches()}
    monkeypatch.setattr(support.switches, "_OFF", frozenset({"one_launch"}))
    with fastlora.backend("triton", strict=True), torch.no_grad():
        fastlora.reset_launches()
        layer(x)
        assert "scaled_gemm" not in {op for op, _ in fastlora.launches()}


@pytest.mark.parametrize("width", [40, 80])
def test_rows_of_a_wrong_width_are_refused_in_the_scaled_product_too(device, monkeypatch, width):
    """Kernels would read what lies behind the rows, or behind the factors."""
    if support.miss("scaled_gemm", "triton", device, FP16, R) is not None:
        pytest.skip("Triton runs on a GPU or in its interpreter")
    monkeypatch.setattr(scale_ops, "_FEWEST_SCALED_ROWS", 1)
    layer = trained(LoRALinear, FP16, n=32, k=64).to(device)
    with (
        fastlora.backend("triton", strict=True),
        torch.no_grad(),
        pytest.raises(ValueError, match=r"accepted is \[..., 64\]"),
    ):
        layer(torch.randn(3, width, device=device).to(FP16))


@pytest.mark.parametrize("kind", [LoRALinear, QLoRALinear])
@pytest.mark.parametrize(
    ("wrong", "change", "message"),
    [
        ("lora_A", lambda t: t[:, :-1], "lora_a: got shape"),
        ("lora_B", lambda t: t[:-1], "lora_b: got shape"),
        ("lora_magnitude_vector", lambda t: t[:1], "magnitude: got shape"),
        ("lora_magnitude_vector", lambda t: t[:, None], "magnitude: got shape"),
        ("scaling", lambda s: torch.full((N,), s), "scaling: got a tensor of shape"),
    ],
)
def test_wrong_shapes_are_named_before_anything_is_computed(kind, wrong, change, message, device, monkeypatch):  # fmt: skip
    layer = trained(kind, k=64).to(device)
    held = getattr(layer, wrong)
    made = change(held["default"])
    held["default"] = nn.Parameter(made.detach().clone()) if wrong != "scaling" else made.to(device)
    monkeypatch.setattr(fused, "column_factors", lambda *args: pytest.fail("reads W"))
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(3, 64, device=device))


@pytest.mark.parametrize("kind", [LoRALinear, QLoRALinear])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64)])
def test_the_caller_may_change_y_in_place(kind, dropout, shape, device):
    layer, x = trained(kind, k=64, lora_dropout=dropout).to(device).train(), torch.randn(shape)
    grads = []
    for in_place in (False, True):
        layer.zero_grad()
        torch.manual_seed(3)
        y = layer(x.to(device))
        y = y.mul_(2) if in_place else y * 2
        y.square().sum().backward()
        grads.append([p.grad.clone() for p in layer.adapter_parameters("default")])
    assert all(map(torch.equal, *grads))


def test_explain_names_the_norm_and_the_scale(monkeypatch):
    lines = fastlora.explain(trained(), torch.randn(5, K)).splitlines()
    assert [line.split()[0] for line in lines].count("DoRA") == 2
    if support.miss("scale_columns", "triton", torch.device("cpu"), FP16, 0) is None:
        monkeypatch.setattr(scale_ops, "_FEWEST_SCALED_ROWS", 5)
        layer, x = trained(LoRALinear, FP16), torch.randn(5, K).half()
        for rows, product in ((x, True), (x[:4], False)):
            with fastlora.backend("triton"):
                line = fastlora.explain(layer, rows).splitlines()[2]
            assert "-> triton" in line and ("in z's own launch" in line) == product
        dropping = trained(LoRALinear, FP16, lora_dropout=0.1).train()
        with fastlora.backend("triton"):
            assert "own launch" not in fastlora.explain(dropping, x)
            assert "own launch" in fastlora.explain(dropping.eval(), x)
    plain = trained(use_dora=False)
    assert "DoRA" not in fastlora.explain(plain, torch.randn(5, K))
