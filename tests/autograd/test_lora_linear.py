"""lora_linear as an autograd function: what it saves, skips, refuses, and how it lives inside torch's machinery."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import reference

F64 = torch.float64


def operands(device="cpu", dtype=torch.float32, m=12, k=24, n=20, r=4):
    x, w, a, b = (torch.randn(s, device=device).to(dtype) for s in ((m, k), (n, k), (r, k), (n, r)))
    return x.requires_grad_(), w, a.requires_grad_(), b.requires_grad_()


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck_in_fp64(dropout_p, bias):
    x, w, a, b = operands(dtype=F64, m=5, k=7, n=6, r=3)
    extra = (torch.randn(6, dtype=F64, requires_grad=True),) if bias else ()

    def run(x, a, b, bias=None):
        torch.manual_seed(3)  # the same mask in every evaluation
        return fastlora.lora_linear(x, w, a, b, 0.7, bias, dropout_p)

    assert torch.autograd.gradcheck(run, (x, a, b, *extra))


@pytest.mark.parametrize(
    "needs", [(i, j, k, l) for i in (0, 1) for j in (0, 1) for k in (0, 1) for l in (0, 1)]
)
def test_only_what_is_asked_is_computed(device, needs):
    x, w, a, b = operands(device)
    bias = torch.randn(20, device=device)
    leaves = [
        t.detach().requires_grad_(bool(need))
        for t, need in zip((x, a, b, bias), needs, strict=True)
    ]
    y = fastlora.lora_linear(leaves[0], w, leaves[1], leaves[2], 0.5, leaves[3])
    assert y.requires_grad == any(needs)
    if not any(needs):
        return
    fastlora.reset_launches()
    y.sum().backward()
    ran = {op for op, _ in fastlora.launches()}
    need_x, need_a, need_b, _ = needs
    assert ("gemm" in ran) == bool(need_x)  # no dX where x needs none
    assert ("down" in ran) == bool(need_x or need_a)
    if need_a or need_b:  # a bias trained alone may be a plain sum
        assert "wgrad" in ran
    expected = [
        t.detach().requires_grad_(bool(need))
        for t, need in zip((x, a, b, bias), needs, strict=True)
    ]
    reference.lora_linear(
        expected[0], w, expected[1], expected[2], 0.5, expected[3]
    ).sum().backward()
    for ours, theirs in zip(leaves, expected, strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def saved(function):
    """Every tensor ``function`` saves for backward."""
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        result = function()
    return result, seen


def test_saved_for_backward_is_x_h_and_the_two_word_state(device):
    x, w, a, b = operands(device)
    _, seen = saved(lambda: fastlora.lora_linear(x, w, a, b, 0.5, dropout_p=0.1))
    known = {t.data_ptr() for t in (x, w, a, b)}
    others = [t for t in seen if t.data_ptr() not in known]
    assert sum(t.data_ptr() == x.data_ptr() for t in seen) == 1
    assert sorted(tuple(t.shape) for t in others) == [
        (2,),
        (12, 4),
    ]  # the state and h: no mask, no copy
    assert {t.dtype for t in others} == {torch.int64, x.dtype}


def test_one_x_is_saved_once_however_many_layers_share_it(device):
    x, w, a, b = operands(device)
    x3 = x.detach().view(3, 4, 24).requires_grad_()  # a batch: no reshaped copy either
    with torch.autocast(device.type, torch.bfloat16):  # nor a cast one
        _, seen = saved(lambda: [fastlora.lora_linear(x3, w, a, b, 0.5) for _ in range(3)])
    wide = [
        t
        for t in seen
        if t.numel() == x.numel() and t.shape[-1] == 24 and t.data_ptr() != w.data_ptr()
    ]
    assert len(wide) == 3 and {t.data_ptr() for t in wide} == {x3.data_ptr()}


def test_frozen_x_and_adapters_save_nothing_wide(device):
    x, w, a, b = operands(device)
    _, seen = saved(lambda: fastlora.lora_linear(x.detach(), w, a.detach(), b))
    assert {tuple(t.shape) for t in seen} == {(12, 4)}  # only B is trained: h is enough


def test_second_derivative_is_refused_and_says_what_to_do(device):
    x, w, a, b = operands(device)
    y = fastlora.lora_linear(x, w, a, b)
    with pytest.raises(RuntimeError, match=r"no second derivative.*reference\.lora_linear"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_saved_tensors_hooks_may_move_everything(device):
    x, w, a, b = operands(device)
    with torch.autograd.graph.save_on_cpu():
        y = fastlora.lora_linear(x, w, a, b, 0.5, dropout_p=0.2)
    torch.autograd.grad(y.sum(), (x, a, b))


def test_dropout_masks_dx_and_da_alike_and_only_in_training(device):
    x, w, a, b = operands(device, m=64, k=96)
    torch.manual_seed(5)
    y = fastlora.lora_linear(x, torch.zeros_like(w), a, b, dropout_p=0.5)
    (dx,) = torch.autograd.grad(y.sum(), x)
    dropped = dx == 0  # with W = 0, dX is exactly the masked low-rank term
    assert 0.4 < dropped.float().mean() < 0.6
    torch.manual_seed(5)
    hidden = fastlora.lora_linear(
        torch.where(dropped, 1e6, x.detach()), torch.zeros_like(w), a, b, dropout_p=0.5
    )
    torch.testing.assert_close(hidden, y)  # what was dropped never reaches y
    still = fastlora.lora_linear(x, w, a, b, dropout_p=0.5, training=False)
    torch.testing.assert_close(still, fastlora.lora_linear(x, w, a, b))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_recomputes_the_same_mask(device, use_reentrant):
    def grads(wrap):
        torch.manual_seed(0)
        x, w, a, b = operands(device)
        torch.manual_seed(1)
        y = wrap(lambda x: fastlora.lora_linear(x, w, a, b, 0.5, dropout_p=0.4), x)
        y.square().sum().backward()
        return [y.detach(), x.grad, a.grad, b.grad]

    plain = grads(lambda f, x: f(x))
    again = grads(lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant))
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


def test_gradients_accumulate(device):
    x, w, a, b = operands(device)
    for _ in range(3):
        fastlora.lora_linear(x, w, a, b, 0.5).sum().backward()
    once = operands(device)
    once = [t.detach().requires_grad_() for t in (x, a, b)]
    fastlora.lora_linear(once[0], w, once[1], once[2], 0.5).sum().backward()
    for three, one in zip((x, a, b), once, strict=True):
        torch.testing.assert_close(three.grad, 3 * one.grad)


def test_retain_graph_backward_twice_gives_the_same(device):
    x, w, a, b = operands(device)
    y = fastlora.lora_linear(x, w, a, b, 0.5, dropout_p=0.3).sum()
    first = torch.autograd.grad(y, (x, a, b), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y, (x, a, b))))


def test_autocast_casts_like_torchs_linear(device):
    x, w, a, b = operands(device)
    bias = torch.randn(20, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y = fastlora.lora_linear(x, w, a, b, 0.5, bias)
        same = reference.lora_linear(x.bfloat16(), w.bfloat16(), a, b, 0.5, bias.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, same, rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    assert x.grad.dtype == a.grad.dtype == b.grad.dtype == torch.float32


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_compiles_in_one_graph(device, dropout_p, dynamic):
    if dynamic and dropout_p and torch.__version__ < "2.12":
        pytest.skip("torch 2.11 cannot trace a symbolic float through an autograd.Function")
    x, w, a, b = operands(device)
    bias = torch.randn(20, device=device, requires_grad=True)

    def run(x, bias):
        return torch.nn.functional.gelu(fastlora.lora_linear(x, w, a, b, 0.5, bias, dropout_p))

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (12, 7):
        results = []
        for function in (run, compiled):
            torch.manual_seed(2)
            y = function(x[:rows], bias)
            results.append([y, *torch.autograd.grad(y.square().sum(), (x, a, b, bias))])
        for eager, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager)


def test_compiles_under_autocast_and_checkpointing(device):
    x, w, a, b = operands(device)

    def run(x):
        with torch.autocast(device.type, torch.bfloat16):
            return checkpoint(
                lambda x: fastlora.lora_linear(x, w, a, b, 0.5, dropout_p=0.2),
                x,
                use_reentrant=False,
            )

    torch._dynamo.reset()
    y = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    y.float().sum().backward()
    assert x.grad is not None and torch.isfinite(a.grad).all()


@pytest.mark.parametrize("form", ["function", "op"])
def test_exports(device, form):
    x, w, a, b = (t.detach() for t in operands(device))
    call = fastlora.lora_linear if form == "function" else torch.ops.fastlora.lora_linear

    class Layer(torch.nn.Module):
        def forward(self, x):
            return call(x, w, a, b, 0.5)

    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(Layer(), (x,), dynamic_shapes=({0: rows},))
    targets = {str(node.target) for node in program.graph.nodes}
    assert ("fastlora.lora_linear.default" in targets) == (form == "op")
    for count in (12, 5):
        torch.testing.assert_close(program.module()(x[:count]), call(x[:count], w, a, b, 0.5))


def test_an_exported_program_loads_in_another_process(tmp_path):
    x, w, a, b = (t.detach() for t in operands())

    class Layer(torch.nn.Module):
        def forward(self, x):
            return fastlora.lora_linear(x, w, a, b, 0.5)

    torch.export.save(torch.export.export(Layer(), (x,)), tmp_path / "layer.pt2")
    torch.save(x, tmp_path / "x.pt")
    program = (
        "import sys, torch, fastlora.functional\n"
        "x = torch.load(sys.argv[1] + '/x.pt', weights_only=True)\n"
        "y = torch.export.load(sys.argv[1] + '/layer.pt2').module()(x)\n"
        "torch.save(y, sys.argv[1] + '/y.pt')\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    got = torch.load(tmp_path / "y.pt", weights_only=True)
    torch.testing.assert_close(got, fastlora.lora_linear(x, w, a, b, 0.5))


def test_a_scaling_tensor_is_read_at_run_time(device):
    x, w, a, b = operands(device)
    scaling = torch.tensor(0.5, device=device)
    half = fastlora.lora_linear(x, w, a, b, scaling)
    torch.testing.assert_close(half, fastlora.lora_linear(x, w, a, b, 0.5))
    scaling.fill_(2.0)
    double = fastlora.lora_linear(x, w, a, b, scaling)
    torch.testing.assert_close(double, fastlora.lora_linear(x, w, a, b, 2.0))
    grads = torch.autograd.grad(double.sum(), (x, a, b))
    expected = torch.autograd.grad(reference.lora_linear(x, w, a, b, 2.0).sum(), (x, a, b))
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_batch_dimensions_and_vectors(device):
    x, w, a, b = operands(device)
    assert fastlora.lora_linear(x[0], w, a, b).shape == (20,)
    assert fastlora.lora_linear(x.view(2, 3, 2, 24), w, a, b).shape == (2, 3, 2, 20)
    assert fastlora.lora_linear(x[:0].view(2, 0, 24), w, a, b).shape == (2, 0, 20)


def test_vmap_and_func_are_refused_clearly():
    x, w, a, b = (t.detach() for t in operands())
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: fastlora.lora_linear(x, w, a, b).sum())(x)


def test_inputs_are_not_touched(device):
    x, w, a, b = operands(device)
    before = [copy.deepcopy(t.detach()) for t in (x, w, a, b)]
    dy = torch.randn(12, 20, device=device)
    kept = dy.clone()
    fastlora.lora_linear(x, w, a, b, 0.5, dropout_p=0.1).backward(dy)
    assert torch.equal(dy, kept)
    assert all(torch.equal(t.detach(), old) for t, old in zip((x, w, a, b), before, strict=True))


ONES = torch.ones
BAD = {
    "x is no tensor": (dict(x=[1.0]), TypeError, "x: got list"),
    "x of another width": (
        dict(x=ONES(3, 7)),
        ValueError,
        r"x: got shape \(3, 7\); accepted is \[..., 8\]",
    ),
    "x 0-d": (dict(x=torch.tensor(1.0)), ValueError, "x: got shape"),
    "x of another dtype": (
        dict(x=ONES(3, 8).half()),
        ValueError,
        "x: got torch.float16 where weight is",
    ),
    "integer x": (
        dict(x=ONES(3, 8).int(), weight=ONES(6, 8).int()),
        ValueError,
        "x: got torch.int32; accepted are",
    ),
    "weight 1-d": (dict(weight=ONES(8)), ValueError, "weight: got shape"),
    "trained weight": (
        dict(weight=ONES(6, 8, requires_grad=True)),
        RuntimeError,
        "weight: requires grad",
    ),
    "lora_a width": (
        dict(lora_a=ONES(2, 9)),
        ValueError,
        r"lora_a: got shape \(2, 9\); accepted is \[2, 8\]",
    ),
    "lora_b rank": (
        dict(lora_b=ONES(6, 3)),
        ValueError,
        r"lora_b: got shape \(6, 3\); accepted is \[6, 2\]",
    ),
    "lora_a dtype": (
        dict(lora_a=ONES(2, 8).half()),
        ValueError,
        "lora_a: got torch.float16; accepted are",
    ),
    "lora_b None": (dict(lora_b=None), TypeError, "lora_b: got NoneType"),
    "bias length": (dict(bias=ONES(5)), ValueError, "bias: got shape"),
    "rank 513": (
        dict(lora_a=ONES(513, 8), lora_b=ONES(6, 513)),
        ValueError,
        "rank 513; accepted are 0 to 512",
    ),
    "scaling text": (dict(scaling="1"), TypeError, "scaling: got str"),
    "scaling 1-d": (dict(scaling=ONES(1)), ValueError, "scaling: got a tensor of shape"),
    "trained scaling": (
        dict(scaling=torch.tensor(1.0, requires_grad=True)),
        ValueError,
        "needs no grad",
    ),
    "dropout 2": (dict(dropout_p=2.0), ValueError, "dropout_p: got 2.0"),
    "meta weight": (dict(weight=ONES(6, 8, device="meta")), ValueError, "weight: is on meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_by_name(name):
    changes, error, message = BAD[name]
    good = dict(x=ONES(3, 8), weight=ONES(6, 8), lora_a=ONES(2, 8), lora_b=ONES(6, 2))
    with pytest.raises(error, match=message):
        fastlora.lora_linear(**{**good, **changes})
