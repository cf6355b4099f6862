"""lora_linear_segments: against fp64, against lora_linear per segment, what it saves, skips and refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import NF4Tensor, reference, rng
from fastlora.ops import segments as segment_ops
from fastlora.ops import support
from fastlora.testing.compare import assert_accurate, assert_same_bits

F16, F32, F64 = torch.float16, torch.float32, torch.float64
UNEVEN = [2, 3, 3, 30, 34, 66]  # of 70: one row, none, many; rows of nobody at both ends
NAMES = ("y", "dX", "dA", "dB")


def operands(device, m=70, k=40, n=36, r=8, count=5, dtype=F32, factors=None, scale=0.3):
    make = lambda *s: (torch.randn(s, device=device) * scale).to(dtype)  # noqa: E731
    x, w, a, b = make(m, k), make(n, k), make(count, r, k), make(count, n, r)
    leaves = (t.to(factors or dtype).requires_grad_() for t in (a, b))
    return x.requires_grad_(), w, *leaves


def offsets_of(values, device):
    return torch.tensor(values, device=device)


def step(function, x, w, a, b, offsets, *args, dy=None, leaves=None, **kwargs):
    """[y, dX, dA, dB, ...]."""
    y = function(x, w, a, b, offsets, *args, **kwargs)
    dy = torch.randn_like(y) if dy is None else dy
    grads = torch.autograd.grad(y, leaves or (x, a, b), dy.to(y.dtype), allow_unused=True)
    zeros = (torch.zeros_like(t) for t in leaves or (x, a, b))
    return [y, *(z if g is None else g for g, z in zip(grads, zeros, strict=True))]


def by_formula(dtype, x, w, a, b, offsets, *args, dy, **kwargs):
    """The reference's results in another dtype."""
    cast = [None if t is None else t.detach().to(dtype) for t in (x, w, a, b)]
    leaves = [cast[i].requires_grad_() for i in (0, 2, 3)]
    args = [t.to(dtype) if isinstance(t, torch.Tensor) else t for t in args]
    return step(
        reference.lora_linear_segments, *cast, offsets, *args, dy=dy, leaves=leaves, **kwargs
    )


@pytest.mark.parametrize(
    ("dtype", "factors", "r", "values"),
    [
        (F32, F32, 16, UNEVEN),
        (F16, F16, 8, UNEVEN),
        (F16, F32, 40, UNEVEN),
        (F16, F32, 1, [0, 70]),
        (F32, F32, 64, [0, 35, 70]),
        (F16, F16, 16, [*range(64), 70]),
    ],
    ids=str,
)
def test_against_fp64(strict_backend, device, dtype, factors, r, values):
    tensors = operands(device, r=r, count=len(values) - 1, dtype=dtype, factors=factors)
    offsets = offsets_of(values, device)
    bias = torch.randn(36, device=device).to(dtype)
    dy = torch.randn(70, 36, device=device).to(dtype)
    got = step(fastlora.lora_linear_segments, *tensors, offsets, 0.7, bias, dy=dy)
    same = by_formula(dtype, *tensors, offsets, 0.7, bias, dy=dy)
    truth = by_formula(F64, *tensors, offsets, 0.7, bias, dy=dy)
    assert [t.dtype for t in got] == [dtype, dtype, factors, factors]
    for name, ours, torchs, true in zip(NAMES, got, same, truth, strict=True):
        assert_accurate(name, ours, torchs, true)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("four_bit", [False, True])
def test_of_many_rows_each_product_is_one_launch(
    strict_backend, device, monkeypatch, dropout_p, four_bit
):
    """The same results, and on Triton no second pass over y or dX."""
    monkeypatch.setattr(segment_ops, "_FEWEST_FUSED_ROWS", 140)
    monkeypatch.setattr(segment_ops, "_FEWEST_ROWS_A_SEGMENT", 1)
    values = [2, 3, 3, 100, 104, 136]
    x, w, a, b = operands(device, m=140, k=64, dtype=F16, factors=F32)
    if four_bit:
        weight = NF4Tensor.quantize(w)
        w = weight.dequantize()
    else:
        weight = w
    offsets, bias = offsets_of(values, device), torch.randn(36, device=device).to(F16)
    dy = torch.randn(140, 36, device=device).to(F16)
    torch.manual_seed(5)
    drop = {}
    if dropout_p:
        mask, keep = mask_of(rng.draw_state(device), 140, 64, dropout_p)
        drop = dict(mask=mask, keep=keep)
    torch.manual_seed(5)
    fastlora.reset_launches()
    got = step(fastlora.lora_linear_segments, x, weight, a, b, offsets, 0.7, bias, dropout_p, dy=dy)
    ran = {op for op, _ in fastlora.launches()} - {"mask", "dequantize"}
    products = {"segment_gemm"} if strict_backend == "triton" else {"gemm", "segment_up"}
    assert ran == {"segment_bounds", "segment_down", "segment_wgrad"} | products
    same = by_formula(F16, x, w, a, b, offsets, 0.7, bias, dy=dy, **drop)
    truth = by_formula(F64, x, w, a, b, offsets, 0.7, bias, dy=dy, **drop)
    for name, ours, torchs, true in zip(NAMES, got, same, truth, strict=True):
        assert_accurate(name, ours, torchs, true)


def test_integers_are_exact(strict_backend, device):
    integer = lambda t: t.detach().mul(10).round().clamp(-1, 1).requires_grad_(t.requires_grad)  # noqa: E731
    tensors = [integer(t) for t in operands(device)]
    offsets, dy = offsets_of(UNEVEN, device), torch.ones(70, 36, device=device)
    got = step(fastlora.lora_linear_segments, *tensors, offsets, 0.5, dy=dy)
    truth = by_formula(F64, *tensors, offsets, 0.5, dy=dy)
    for name, ours, true in zip(NAMES, got, truth, strict=True):
        assert_same_bits(name, ours, true.to(F32))


def test_each_segment_is_a_lora_linear_of_its_own(strict_backend, device):
    x, w, a, b = operands(device)
    offsets, dy = offsets_of(UNEVEN, device), torch.randn(70, 36, device=device)
    scalings = torch.tensor([0.5, 1.0, 2.0, -1.0, 0.25], device=device)
    got = step(fastlora.lora_linear_segments, x, w, a, b, offsets, scalings, dy=dy)
    close = dict(rtol=1e-4, atol=1e-5)
    for e, (begin, end) in enumerate(itertools.pairwise(UNEVEN)):
        x_e = x.detach()[begin:end].requires_grad_()
        a_e, b_e = (t.detach()[e].requires_grad_() for t in (a, b))
        y = fastlora.lora_linear(x_e, w, a_e, b_e, scalings[e])
        expected = torch.autograd.grad(y, (x_e, a_e, b_e), dy[begin:end])
        torch.testing.assert_close(got[0][begin:end], y, **close)
        torch.testing.assert_close(got[1][begin:end], expected[0], **close)
        torch.testing.assert_close(got[2][e], expected[1], **close)
        torch.testing.assert_close(got[3][e], expected[2], **close)
        if begin == end:
            assert not got[2][e].any() and not got[3][e].any()
    for rows in (slice(0, UNEVEN[0]), slice(UNEVEN[-1], None)):  # of nobody
        torch.testing.assert_close(got[0][rows], x[rows] @ w.t(), **close)
        torch.testing.assert_close(got[1][rows], dy[rows] @ w, **close)


def test_without_a_weight_y_is_the_update_alone(strict_backend, device):
    x, _, a, b = operands(device)
    offsets, dy = offsets_of(UNEVEN, device), torch.randn(70, 36, device=device)
    alone = step(fastlora.lora_linear_segments, x, None, a, b, offsets, 0.5, dy=dy)
    truth = by_formula(F64, x, None, a, b, offsets, 0.5, dy=dy)
    for ours, true in zip(alone, truth, strict=True):
        torch.testing.assert_close(ours, true.float(), rtol=1e-4, atol=1e-5)
    assert not alone[0][:2].any() and not alone[1][66:].any()
    assert {op for op, _ in fastlora.launches()} == set(support.SEGMENT_OPS)


def test_over_a_4_bit_weight(strict_backend, device):
    x, w, a, b = operands(device, k=64)
    offsets, dy = offsets_of(UNEVEN, device), torch.randn(70, 36, device=device)
    weight = NF4Tensor.quantize(w)
    bias = torch.randn(36, device=device)
    got = step(fastlora.lora_linear_segments, x, weight, a, b, offsets, 0.5, bias, dy=dy)
    expected = by_formula(F64, x, weight.dequantize(), a, b, offsets, 0.5, bias, dy=dy)
    for ours, true in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, true.float(), rtol=1e-4, atol=1e-4)


def mask_of(state, m, k, p):
    keep = rng.keep_threshold(p)
    return reference.unpack_mask(reference.mask(state, m, k, keep), m, k), keep


def test_dropout_is_the_mask_of_lora_linear_forward_and_backward(strict_backend, device):
    tensors = operands(device)
    offsets, dy = offsets_of(UNEVEN, device), torch.randn(70, 36, device=device)
    torch.manual_seed(5)
    mask, keep = mask_of(rng.draw_state(device), 70, 40, 0.3)
    torch.manual_seed(5)
    got = step(fastlora.lora_linear_segments, *tensors, offsets, 0.5, dropout_p=0.3, dy=dy)
    truth = by_formula(F64, *tensors, offsets, 0.5, mask=mask, keep=keep, dy=dy)
    for ours, true in zip(got, truth, strict=True):
        torch.testing.assert_close(ours, true.float(), rtol=1e-4, atol=1e-5)
    x, w, a, b = tensors
    torch.manual_seed(5)
    whole = fastlora.lora_linear(x, w, a[0], b[0], 0.5, dropout_p=0.3)
    torch.manual_seed(5)
    one = fastlora.lora_linear_segments(
        x, w, a[:1], b[:1], offsets_of([0, 70], device), 0.5, dropout_p=0.3
    )
    torch.testing.assert_close(one, whole, rtol=1e-4, atol=1e-5)
    still = fastlora.lora_linear_segments(*tensors, offsets, dropout_p=0.3, training=False)
    assert_same_bits("y", still, fastlora.lora_linear_segments(*tensors, offsets))
    dropped = step(fastlora.lora_linear_segments, *tensors, offsets, dropout_p=1.0, dy=dy)
    torch.testing.assert_close(dropped[0], x @ w.t(), rtol=1e-4, atol=1e-5)
    assert not dropped[2].any() and not dropped[3].any()


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("based", [True, False])
def test_gradcheck_in_fp64(dropout_p, based):
    x, w, a, b = operands("cpu", m=7, k=5, n=4, r=2, count=3, dtype=F64, scale=1.0)
    bias = torch.randn(4, dtype=F64, requires_grad=True) if based else None

    def run(x, a, b, bias=None):
        torch.manual_seed(3)  # the same mask in every evaluation
        return fastlora.lora_linear_segments(
            x, w if based else None, a, b, torch.tensor([1, 3, 3, 6]), 0.7, bias, dropout_p
        )

    assert torch.autograd.gradcheck(run, (x, a, b, *([bias] if based else [])))


@pytest.mark.parametrize(
    ("m", "k", "n", "r", "count"),
    [(0, 40, 36, 8, 3), (6, 40, 36, 0, 3), (6, 0, 36, 8, 3), (6, 40, 0, 8, 3), (6, 40, 36, 8, 0)],
)
@pytest.mark.parametrize("based", [True, False])
def test_empty_shapes(strict_backend, device, m, k, n, r, count, based):
    x, w, a, b = operands(device, m, k, n, r, count)
    offsets = offsets_of([0] * count + [m], device)
    got = step(fastlora.lora_linear_segments, x, w if based else None, a, b, offsets)
    for ours, like in zip(got[1:], (x, a, b), strict=True):
        assert ours.shape == like.shape
    assert got[0].shape == (m, n)
    if r == 0 or count == 0:
        torch.testing.assert_close(got[0], x @ w.t() if based else torch.zeros_like(got[0]))


def test_rows_of_a_batch_are_taken_in_order(strict_backend, device):
    x, w, a, b = operands(device)
    offsets = offsets_of(UNEVEN, device)
    flat = step(
        fastlora.lora_linear_segments, x, w, a, b, offsets, dy=torch.ones(70, 36, device=device)
    )
    x3 = x.detach().view(2, 5, 7, 40).requires_grad_()
    batch = step(
        fastlora.lora_linear_segments,
        x3,
        w,
        a,
        b,
        offsets,
        dy=torch.ones(2, 5, 7, 36, device=device),
    )
    assert batch[0].shape == (2, 5, 7, 36) and batch[1].shape == x3.shape
    for one, other in zip(flat, batch, strict=True):
        assert_same_bits("output", other.reshape(one.shape), one)
    vector = fastlora.lora_linear_segments(x[5], w, a, b, offsets_of([0, 0, 1, 1, 1, 1], device))
    torch.testing.assert_close(vector, fastlora.lora_linear(x[5], w, a[1], b[1]))


def test_strided_inputs_give_the_same(strict_backend, device):
    x, w, a, b = (t.detach() for t in operands(device))
    plain = [x, a, b]
    strange = [x.t().contiguous().t(), a.transpose(1, 2).contiguous().transpose(1, 2), b.clone()[:]]
    wide = torch.zeros(2 * len(offsets_of(UNEVEN, device)), device=device, dtype=torch.int64)
    wide[::2] = offsets_of(UNEVEN, device)
    results = []
    for tensors, offsets in ((plain, offsets_of(UNEVEN, device)), (strange, wide[::2])):
        leaves = [t.requires_grad_() for t in tensors]
        dy = torch.ones(36, 70, device=device).t()
        results.append(
            step(fastlora.lora_linear_segments, leaves[0], w, *leaves[1:], offsets, 0.5, dy=dy)
        )
    for name, one, other in zip(NAMES, *results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5, msg=name)


def test_scalings_are_read_at_run_time(strict_backend, device):
    tensors, offsets = operands(device), offsets_of(UNEVEN, device)
    scalings = torch.full((5,), 0.5, device=device)
    half = fastlora.lora_linear_segments(*tensors, offsets, scalings)
    torch.testing.assert_close(half, fastlora.lora_linear_segments(*tensors, offsets, 0.5))
    scalings[3] = 2.0
    changed = fastlora.lora_linear_segments(*tensors, offsets, scalings)
    same = torch.ones(70, dtype=torch.bool, device=device)
    same[30:34] = False
    assert torch.equal(changed[same], half[same]) and not torch.equal(changed, half)
    grads = torch.autograd.grad(changed.sum(), tensors[2:])
    truth = by_formula(F64, *tensors, offsets, scalings, dy=torch.ones(70, 36, device=device))
    for ours, true in zip(grads, truth[2:], strict=True):
        torch.testing.assert_close(ours, true.float(), rtol=1e-4, atol=1e-5)


def test_a_hundred_runs_give_the_same_bits(strict_backend, device):
    tensors = operands(device, m=33, k=16, n=16, r=4, count=3)
    offsets, dy = offsets_of([1, 5, 5, 30], device), torch.randn(33, 16, device=device)
    runs = 100 if device.type == "cuda" or strict_backend == "torch" else 3  # the interpreter
    first = None
    for _ in range(runs):
        torch.manual_seed(1)
        got = step(fastlora.lora_linear_segments, *tensors, offsets, dropout_p=0.1, dy=dy)
        first = first or got
        for name, ours, before in zip(NAMES, got, first, strict=True):
            assert_same_bits(name, ours, before)


@pytest.mark.parametrize("need", range(4))
def test_only_what_is_asked_is_computed(strict_backend, device, need):
    x, w, a, b = (t.detach() for t in operands(device))
    bias = torch.randn(36, device=device)
    leaf = (x, a, b, bias)[need].requires_grad_()
    offsets, dy = offsets_of(UNEVEN, device), torch.randn(70, 36, device=device)
    y = fastlora.lora_linear_segments(x, w, a, b, offsets, 0.5, bias)
    fastlora.reset_launches()
    y.backward(dy)
    ran = {op for op, _ in fastlora.launches()}
    expected = ({"segment_down", "gemm", "segment_up"}, {"segment_down", "segment_wgrad"}, {"segment_wgrad"})  # fmt: skip
    if need < 3:
        assert ran == expected[need]
        truth = by_formula(F64, x, w, a, b, offsets, 0.5, dy=dy)
        torch.testing.assert_close(leaf.grad, truth[1 + need].float(), rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(leaf.grad, dy.sum(0), rtol=1e-4, atol=1e-5)


def test_saved_are_x_h_bounds_and_the_two_word_state(device):
    x, w, a, b = operands(device)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        fastlora.lora_linear_segments(x, w, a, b, offsets_of(UNEVEN, device), dropout_p=0.1)
    known = {t.data_ptr() for t in (x, w, a, b)}
    others = [(tuple(t.shape), t.dtype) for t in seen if t.data_ptr() not in known]
    assert sorted(others, key=str) == [
        ((2,), torch.int64),
        ((6,), torch.int32),
        ((70, 8), torch.float32),
    ]


def test_offsets_may_change_before_backward(strict_backend, device):
    """Backward goes by the rows of its own forward."""
    x, w, a, b = operands(device)
    offsets = offsets_of(UNEVEN, device)
    dy = torch.randn(70, 36, device=device)
    expected = step(fastlora.lora_linear_segments, x, w, a, b, offsets, dy=dy)
    y = fastlora.lora_linear_segments(x, w, a, b, offsets)
    offsets.zero_()
    for ours, true in zip(torch.autograd.grad(y, (x, a, b), dy), expected[1:], strict=True):
        assert_same_bits("gradient", ours, true)


def test_autocast_casts_like_lora_linear(device):
    x, w, a, b = operands(device)
    offsets = offsets_of([0, 70], device)
    with torch.autocast(device.type, torch.bfloat16):
        y = fastlora.lora_linear_segments(x, w, a[:1], b[:1], offsets, 0.5)
        same = fastlora.lora_linear(x, w, a[0], b[0], 0.5)
        alone = fastlora.lora_linear_segments(x, None, a[:1], b[:1], offsets, 0.5)
    assert y.dtype == same.dtype == alone.dtype == torch.bfloat16
    torch.testing.assert_close(y, same, rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    assert x.grad.dtype == a.grad.dtype == b.grad.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_recomputes_the_same_mask(device, use_reentrant):
    tensors, offsets = operands(device), offsets_of(UNEVEN, device)
    x, w, a, b = tensors

    def run(x):
        return fastlora.lora_linear_segments(x, w, a, b, offsets, 0.5, dropout_p=0.4)

    results = []
    for wrap in (run, lambda x: checkpoint(run, x, use_reentrant=use_reentrant)):
        for t in (x, a, b):
            t.grad = None
        torch.manual_seed(1)
        y = wrap(x)
        y.square().sum().backward()
        results.append([y.detach(), *(t.grad.clone() for t in (x, a, b))])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("based", [True, False])
def test_compiles_in_one_graph(device, based):
    x, w, a, b = operands(device)

    def run(x, offsets):
        y = fastlora.lora_linear_segments(x, w if based else None, a, b, offsets, 0.5, None, 0.25)
        return torch.nn.functional.gelu(y)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for values in (UNEVEN, [0, 10, 20, 20, 21, 70]):
        results = []
        for function in (run, compiled):
            torch.manual_seed(2)
            y = function(x, offsets_of(values, device))
            results.append([y, *torch.autograd.grad(y.square().sum(), (x, a, b))])
        for eager, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager)


def test_second_derivative_is_refused_and_says_what_to_do(device):
    x, w, a, b = operands(device)
    y = fastlora.lora_linear_segments(x, w, a, b, offsets_of(UNEVEN, device))
    with pytest.raises(
        RuntimeError, match=r"no second derivative.*reference\.lora_linear_segments"
    ):
        torch.autograd.grad(y.sum(), x, create_graph=True)


ONES = torch.ones
BAD = {
    "x is no tensor": (dict(x=[1.0]), TypeError, "x: got list"),
    "x width": (dict(x=ONES(3, 7)), ValueError, r"x: got shape \(3, 7\); accepted is \[..., 8\]"),
    "x 0-d": (dict(x=torch.tensor(1.0)), ValueError, "x: got shape"),
    "x 0-d, no weight": (dict(x=torch.tensor(1.0), weight=None), ValueError, "x: got shape"),
    "x fp64 over 4 bits": (
        dict(x=ONES(3, 8).double(), weight=NF4Tensor.quantize(ONES(6, 8))),
        ValueError,
        "x: got torch.float64",
    ),
    "weight 1-d": (dict(weight=ONES(8)), ValueError, "weight: got shape"),
    "weight list": (dict(weight=[1]), TypeError, "weight: got list"),
    "trained": (dict(weight=ONES(6, 8, requires_grad=True)), RuntimeError, "weight: requires grad"),
    "meta weight": (dict(weight=ONES(6, 8, device="meta")), ValueError, "weight: is on meta"),
    "lora_a not stacked": (
        dict(lora_a=ONES(2, 8)),
        ValueError,
        r"lora_a: got shape \(2, 8\); accepted is \[E, r, 8\]",
    ),
    "lora_b count": (
        dict(lora_b=ONES(3, 6, 2)),
        ValueError,
        r"lora_b: got shape \(3, 6, 2\); accepted is \[2, 6, 2\]",
    ),
    "lora_b not stacked": (dict(lora_b=ONES(6, 2), weight=None), ValueError, r"\[E, N, r\]"),
    "lora_b None": (dict(lora_b=None, weight=None), ValueError, "lora_b: got NoneType"),
    "rank 513": (
        dict(lora_a=ONES(2, 513, 8), lora_b=ONES(2, 6, 513)),
        ValueError,
        "rank 513; accepted are 0 to 512",
    ),
    "offsets list": (dict(offsets=[0, 1, 3]), TypeError, "offsets: got list"),
    "offsets float": (dict(offsets=ONES(3)), ValueError, "offsets: got torch.float32 of shape"),
    "offsets 2-d": (dict(offsets=torch.zeros(3, 1).long()), ValueError, r"shape \(3, 1\)"),
    "offsets count": (
        dict(offsets=torch.tensor([0, 3])),
        ValueError,
        r"offsets: got shape \(2,\); accepted are int64 or int32 of shape \(2 \+ 1,\)",
    ),
    "offsets meta": (
        dict(offsets=torch.zeros(3, device="meta").long()),
        ValueError,
        "offsets: is on meta",
    ),
    "offsets too large": (
        dict(offsets=torch.tensor([0, 1, 4])),
        ValueError,
        r"offsets: got \[0, 1, 4\] for 3 rows",
    ),
    "offsets negative": (dict(offsets=torch.tensor([-1, 1, 3])), ValueError, "never decrease"),
    "offsets decreasing": (dict(offsets=torch.tensor([0, 2, 1])), ValueError, "never decrease"),
    "scalings 0-d": (dict(scalings=torch.tensor(1.0)), ValueError, "scalings: got a tensor of"),
    "scalings count": (
        dict(scalings=ONES(3)),
        ValueError,
        r"scalings: got .* tensor of shape \(2,",
    ),
    "trained scalings": (dict(scalings=ONES(2, requires_grad=True)), ValueError, "needs no grad"),
    "scalings text": (dict(scalings="1"), TypeError, "scalings: got str"),
    "bias alone": (dict(weight=None, bias=ONES(6)), ValueError, "bias: got one where weight"),
    "dropout 2": (dict(dropout_p=2.0), ValueError, "dropout_p: got 2.0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_by_name(name):
    changes, error, message = BAD[name]
    good = dict(
        x=ONES(3, 8),
        weight=ONES(6, 8),
        lora_a=ONES(2, 2, 8),
        lora_b=ONES(2, 6, 2),
        offsets=torch.tensor([0, 1, 3]),
    )
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        fastlora.lora_linear_segments(**{"dropout_p": 0.5, **good, **changes})
    assert torch.equal(torch.get_rng_state(), state)  # refused before a mask was drawn
