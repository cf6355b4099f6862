"""Gradients that real libraries got wrong while their forward was right."""

from __future__ import annotations

import itertools

import pytest
import torch

import fastlora
from fastlora import reference, rng
from tests.faults.common import NAMES, assert_close, operands, step, truth


def test_dx_and_da_see_the_mask_of_forward(strict_backend, device):
    m, k, keep = 33, 70, rng.keep_threshold(0.4)
    tensors = operands(m, k, 24, 6, device=device)
    dy = torch.randn(m, 24, device=device)
    torch.manual_seed(11)
    words = reference.mask(rng.draw_state(device).cpu(), m, k, keep)
    mask = reference.unpack_mask(words, m, k).to(device)
    torch.manual_seed(11)
    got = step(*tensors, dy, dropout_p=0.4)
    assert_close(got, truth(*tensors, dy, mask=mask, keep=keep), 2e-6)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_every_gradient_is_linear_in_the_upstream_one(strict_backend, device, dropout_p):
    """An upstream gradient taken for 1, or dropped, passes every test that calls ``sum().backward()``."""
    tensors = operands(device=device)
    dy = torch.randn(12, 20, device=device)
    results = []
    for factor in (1.0, -4.0):
        torch.manual_seed(2)
        results.append(step(*tensors, factor * dy, dropout_p=dropout_p)[1:])
    for once, scaled in zip(*results):
        assert once.abs().max() > 0 and torch.equal(-4.0 * once, scaled)


def test_one_element_of_the_upstream_gradient_reaches_its_row_alone(strict_backend, device):
    """Read as a scalar, or from the wrong row, dY would reach other rows of dX and dB."""
    x, w, a, b = operands(m=40, device=device)
    for row, col in ((0, 0), (37, 3), (39, 19)):
        dy = torch.zeros(40, 20, device=device)
        dy[row, col] = 2.0
        _, dx, _, db = step(x, w, a, b, dy)
        torch.testing.assert_close(dx[row], 2.0 * w[col] + b[col] @ a)
        assert set(dx.nonzero()[:, 0].tolist()) == {row}
        assert set(db.nonzero()[:, 0].tolist()) == {col}


def test_one_upstream_buffer_for_two_consumers(strict_backend, device):
    """y1 + y2 hands the same memory to both backwards: whoever writes into it spoils the other."""
    x, w, a, b = (t.requires_grad_() for t in operands(n=24, device=device))
    w.requires_grad_(False)
    dy = torch.randn(12, 24, device=device)
    kept = dy.clone()
    first = fastlora.lora_linear(x, w, a, b, 0.5)
    second = fastlora.lora_linear(x, w, a, b, 0.5)
    total = first + second + x  # x itself gets dY, unchanged, as well
    grads = torch.autograd.grad(total, (x, a, b), dy)
    _, *single = truth(x, w, a, b, dy)
    assert torch.equal(dy, kept)
    expected = [2 * single[0] + dy.double(), 2 * single[1], 2 * single[2]]
    assert_close([first, *grads], [first, *expected], 2e-6)


def test_an_existing_grad_is_added_to_not_written_over(strict_backend, device):
    x, w, a, b = (t.requires_grad_() for t in operands(device=device))
    w.requires_grad_(False)
    before = [torch.randn_like(t) for t in (x, a, b)]
    for leaf, grad in zip((x, a, b), before):
        leaf.grad = grad.clone()
    dy = torch.randn(12, 20, device=device)
    fastlora.lora_linear(x, w, a, b, 0.5).backward(dy)
    expected = truth(x, w, a, b, dy)
    got = [expected[0], *(t.grad - old for t, old in zip((x, a, b), before))]
    assert_close(got, expected, 1e-5)


def test_sums_over_rows_are_kept_in_fp32(strict_backend, device):
    """2305 ones: an fp16 sum stops at 2048, a bf16 one at 256."""
    m, k, n, dtype = 2305, 8, 8, torch.float16
    x, w = (
        torch.ones(m, k, device=device, dtype=dtype),
        torch.ones(n, k, device=device, dtype=dtype),
    )
    a, b = torch.full((2, k), 1 / 8, device=device), torch.full((n, 2), 1 / 8, device=device)
    bias = torch.zeros(n, device=device)
    _, _, da, db, dbias = step(x, w, a, b, None, 1.0, bias)
    for name, grad in (("dA", da), ("dB", db), ("dbias", dbias)):
        assert grad.dtype == torch.float32
        assert torch.equal(grad, torch.full_like(grad, m)), name


@pytest.mark.parametrize(
    "needs", [n for n in itertools.product((0, 1), repeat=4) if 0 < sum(n) < 4]
)
def test_what_is_saved_is_enough_for_every_subset(strict_backend, device, needs):
    """Saving guarded on the wrong optional shows only where one of them needs no gradient."""
    tensors = operands(m=20, device=device)
    bias, scaling = torch.randn(20, device=device), torch.tensor(0.75, device=device)
    dy = torch.randn(20, 20, device=device)
    torch.manual_seed(4)
    everything = step(*tensors, dy, scaling, bias, dropout_p=0.3)[1:]
    leaves = [
        t.detach().requires_grad_(bool(need))
        for t, need in zip((tensors[0], *tensors[2:], bias), needs)
    ]
    torch.manual_seed(4)
    x, a, b, bias = leaves
    fastlora.lora_linear(x, tensors[1], a, b, scaling, bias, 0.3).backward(dy)
    for name, leaf, expected in zip(NAMES[1:], leaves, everything):
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, expected, msg=name)
        else:
            assert leaf.grad is None, name


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_forward_without_gradients_is_the_same_forward(strict_backend, device, context):
    tensors = operands(device=device)
    expected = step(*tensors)[0]
    leaves = [t.requires_grad_(i != 1) for i, t in enumerate(tensors)]
    with context():
        y = fastlora.lora_linear(*leaves, 0.5)
    assert not y.requires_grad and torch.equal(y, expected)


def test_changing_y_in_place_is_seen_by_backward(strict_backend, device):
    x, w, a, b = operands(device=device)
    dy = torch.randn(3, 4, 20, device=device)
    batch = x.view(3, 4, 24).requires_grad_()
    y = fastlora.lora_linear(batch, w, a, b, 0.5)
    y[:, 1:, :7] *= 3.0
    y.relu_()
    exact = batch.detach().double().requires_grad_()
    z = reference.lora_linear(exact, w.double(), a.double(), b.double(), 0.5)
    factor = torch.ones_like(z)
    factor[:, 1:, :7] = 3.0
    z = (z * factor).relu()
    expected = torch.autograd.grad(z, exact, dy.double())
    assert_close([y, *torch.autograd.grad(y, batch, dy)], [z, *expected], 2e-6)


@pytest.mark.parametrize("which", ["x", "lora_a", "lora_b", "weight"])
def test_changing_an_input_between_forward_and_backward_is_noticed(device, which):
    """An optimiser step in between, say: a loud error instead of a gradient of something else."""
    x, w, a, b = operands(device=device)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    inner = [t * 1.0 for t in leaves]
    y = fastlora.lora_linear(inner[0], w, inner[1], inner[2], 0.5)
    with torch.no_grad():
        {"x": inner[0], "lora_a": inner[1], "lora_b": inner[2], "weight": w}[which].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_come_where_their_inputs_are():
    """On the meta device, as pipeline parallelism traces shapes: nothing lands on another device."""
    leaves = [t.to("meta").requires_grad_(i != 1) for i, t in enumerate(operands())]
    y = fastlora.lora_linear(*leaves, 0.5, dropout_p=0.1)
    y.sum().backward()
    assert y.shape == (12, 20)
    for t in (leaves[0], *leaves[2:]):
        assert t.grad.device.type == "meta" and t.grad.shape == t.shape
