"""fastlora/triton/segments.py, segment_wgrad.py and segment_gemm below the ops: how rows are cut, in every tile, and what is left alone.
In Triton's interpreter where there is no GPU."""

import dataclasses
import importlib

import pytest
import torch

from fastlora import reference
from fastlora.ops import support
from fastlora.testing.compare import assert_accurate, assert_same_bits
from fastlora.testing.inputs import integers

segments = pytest.importorskip("fastlora.triton.segments")
bounds_module = importlib.import_module("fastlora.triton.bounds")
gemm = importlib.import_module("fastlora.triton.gemm")
segment_wgrad = importlib.import_module("fastlora.triton.segment_wgrad")
launch = importlib.import_module("fastlora.triton.launch")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GPU = torch.cuda.is_available()
DTYPES = [FP32, FP16, BF16] if GPU else [FP32, FP16]
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
missing = support.miss("segment_down", "triton", DEVICE, FP16, 16)
pytestmark = pytest.mark.skipif(missing is not None, reason=f"not here: {missing}")


def small(*shape, dtype):
    return integers(*shape, low=-1, high=1, dtype=dtype, device=DEVICE)


def bounds_of(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def random_bounds(m, count, seed):
    """Uneven ones, some empty, with and without rows of nobody at the ends."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, m + 1, (count + 1,), generator=generator).sort().values
    values[count // 2] = values[count // 2 + 1] if seed % 2 else values[count // 2]
    if seed % 3 == 0:
        values[0], values[-1] = 0, m
    return values.to(DEVICE, torch.int32)


@pytest.mark.parametrize(
    ("m", "count", "seed"),
    [
        (1, 1, 0),
        (1, 40, 2),
        (31, 3, 0),
        (32, 3, 1),
        (33, 40, 2),
        (64, 1, 1),
        (96, 40, 0),
        (200, 3, 1),
    ],
)
def test_every_row_is_in_one_item(m, count, seed):
    """With A and x of ones, h counts how many sums reach a row's adapter: each row is summed exactly once."""
    bounds = random_bounds(m, count, seed)
    x = torch.ones(m, 8, device=DEVICE)
    a = torch.arange(1.0, count + 1, device=DEVICE)[:, None, None].expand(count, 1, 8)
    h = segments.down(x, a, bounds, None, 1.0, None, 65536)
    y = torch.zeros(m, 1, device=DEVICE)
    segments.up(torch.ones_like(h), torch.ones(count, 1, 1, device=DEVICE), bounds, None, y)
    edges, expected = bounds.tolist(), torch.zeros(m)
    for e in range(count):
        expected[edges[e] : edges[e + 1]] = e + 1
    assert torch.equal(h[:, 0].cpu(), 8 * expected)
    assert torch.equal(y[:, 0].cpu(), (expected > 0).float())


@pytest.mark.parametrize(
    ("values", "ctas", "masked"),
    [
        ([0, 200], 1, False),
        ([0, 200], 12, True),
        ([0, 100, 200], 12, False),
        ([0, 32, 64, 200], 100, False),
        ([63, 65, 200], 100, True),
        *(
            ([17, 17, 150, 151, 199], ctas, masked)
            for ctas in (1, 12, 100)
            for masked in (False, True)
        ),
    ],
    ids=str,
)
def test_partials_of_long_segments_add_up(values, ctas, masked):
    """However rows are cut: into one block, some, or as many as there are tiles."""
    m, k, n, r = 200, 40, 24, 8
    x, dy, g, h = (small(m, width, dtype=FP16) for width in (k, n, r, r))
    words = reference.mask(torch.tensor([3, 4]), m, k, 20000).to(DEVICE) if masked else None
    tile = segment_wgrad.tile_for(r, FP16, DEVICE)
    tile = dataclasses.replace(tile, bm=32, ctas=ctas)
    bounds = bounds_of(values)
    got = segment_wgrad.wgrad(x, g, dy, h, bounds, words, FP32, FP32, tile)
    wide = [t.double() for t in (x, g, dy, h)]
    truth = reference.segment_wgrad(*wide, bounds, words, FP32, FP32)
    for name, ours, true in zip(("dA", "dB"), got, truth, strict=True):
        assert_same_bits(name, ours, true)


@pytest.mark.parametrize("splits", [1, 3])
def test_runs_of_k_add_up(splits):
    m, k, r, count = 40, 130, 5, 3
    x, a = small(m, k, dtype=FP16), small(count, r, k, dtype=FP16)
    bounds = bounds_of([2, 9, 33, 38])
    tile = segments.down_tile(m, k, r, count, (FP16, FP16), False, DEVICE)
    tile = dataclasses.replace(tile, bk=32, splits=splits)
    h = segments.down(x, a, bounds, None, 0.5, None, 65536, tile)
    truth = reference.segment_down(x.double(), a.double(), bounds, None, 0.5)
    assert_same_bits("h", h, truth.to(FP16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [8, 64])
def test_against_fp64(dtype, r):
    """Within the accuracy rule of torch's own results; with fp32 factors over 16-bit rows too."""
    m, k, n, count = (4096, 1024, 1000, 20) if GPU else (70, 96, 66, 4)
    bounds = random_bounds(m, count, 2)
    x, dy = torch.randn(m, k, device=DEVICE).to(dtype), torch.randn(m, n, device=DEVICE).to(dtype)
    a = (torch.randn(count, r, k, device=DEVICE) / k**0.5).to(FP32 if r == 8 else dtype)
    b = torch.randn(count, n, r, device=DEVICE).to(a.dtype)
    h = reference.segment_down(x, a, bounds, None, 0.5)
    y = torch.randn(m, n, device=DEVICE).to(dtype)
    wide = [t.double() for t in (x, a, b, dy, h, y)]

    def by_torch(x, a, b, dy, h, y):
        outputs = [reference.segment_down(x, a, bounds, None, 0.5)]
        outputs += [reference.segment_up(h, b, bounds, None, y.clone())]
        return [*outputs, *reference.segment_wgrad(x, h, dy, h, bounds, None, a.dtype, a.dtype)]

    same, true = by_torch(x, a, b, dy, h, y), by_torch(*wide)
    ours = [
        segments.down(x, a, bounds, None, 0.5, None, 65536),
        segments.up(h, b, bounds, None, y.clone()),
        *segment_wgrad.wgrad(x, h, dy, h, bounds, None, a.dtype, a.dtype),
    ]
    for name, got, torchs, truth in zip(("h", "y", "dA", "dB"), ours, same, true, strict=True):
        assert_accurate(name, got, torchs, truth)


M = 70  # three blocks of the interpreter's 32 rows
EDGES = {
    "one": [0, M],
    "straddling": [0, 20, 45, M],
    "on block edges": [0, 32, 64, M],
    "one row each": list(range(29, 36)),
    "empty ones amid": [0, 0, 31, 31, 31, 33, 33, M, M],
    "nobody at both ends": [5, 33, 60],
    "nobody's blocks": [33, 40],
    "all empty": [7] * 4,
    "more than are looked at together": [min(e // 20, M) for e in range(1300)],
}


def gemm_operands(m, k, n, r, count, dtype, dx):
    """x, w, h, l and a bias of integers whose every sum is exact; with ``dx``, w and l lie as W^T and A^T do."""
    x, h, bias = small(m, k, dtype=dtype), small(m, r, dtype=dtype), small(n, dtype=dtype)
    if dx:
        return (
            x,
            small(k, n, dtype=dtype).t(),
            h,
            small(count, r, n, dtype=dtype).transpose(1, 2),
            bias,
        )
    return x, small(n, k, dtype=dtype), h, small(count, n, r, dtype=dtype), bias


def gemm_truth(x, w, h, l, bounds, bias, words):
    """In fp64, of whatever is given: no tile, no fused anything."""
    wide = [t.double() for t in (x, w, h, l)]
    y = reference.gemm(*wide[:2], None, None, None if bias is None else bias.double())
    return reference.segment_up(*wide[2:], bounds, words, y)


@pytest.mark.parametrize("dx", [False, True], ids=["y", "dX"])
@pytest.mark.parametrize("name", EDGES)
def test_a_gemm_with_segments_is_exact_on_integers(name, dx):
    """Wherever segments begin, with a mask in dX; 72 columns go through descriptors where there are any."""
    bounds = bounds_of(EDGES[name])
    x, w, h, l, bias = gemm_operands(M, 40, 72, 16, len(EDGES[name]) - 1, FP16, dx)
    words = reference.mask(torch.tensor([3, 4]), M, 72, 20000).to(DEVICE) if dx else None
    y = gemm.segment_gemm(x, w, h, l, bounds, bias, words)
    assert_same_bits("y", y, gemm_truth(x, w, h, l, bounds, bias, words).to(FP16))


@pytest.mark.parametrize(
    ("m", "k", "n", "r"),
    [(1, 8, 8, 1), (33, 40, 66, 1), (64, 24, 64, 40), (95, 40, 130, 64), (100, 7, 9, 16)],
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dx", [False, True], ids=["y", "dX"])
def test_a_gemm_with_segments_of_any_size(m, k, n, r, dtype, dx):
    """Ranks of several blocks, edges no tile divides, and pointers where no descriptor can name y."""
    bounds = random_bounds(m, 3, 2)
    x, w, h, l, _ = gemm_operands(m, k, n, r, 3, dtype, dx)
    words = reference.mask(torch.tensor([3, 4]), m, n, 20000).to(DEVICE) if dx else None
    l = l.float() if dx else l  # factors in fp32 beside 16-bit rows
    y = gemm.segment_gemm(x, w, h, l, bounds, None, words)
    truth = gemm_truth(x, w, h, l, bounds, None, words).to(dtype)
    assert_same_bits("y", y, truth)
    assert_same_bits("again", gemm.segment_gemm(x, w, h, l, bounds, None, words), y)


def test_a_gemm_with_segments_in_every_tile_a_plan_can_pick():
    bounds = bounds_of([2, 20, 45, 60])
    x, w, h, l, _ = gemm_operands(M, 40, 72, 20, 3, FP16, False)
    truth = gemm_truth(x, w, h, l, bounds, None, None).to(FP16)
    for bm, bn, br in ((64, 64, 16), (64, 128, 32), (32, 64, 32)):
        tile = gemm.GemmTile(bm, bn, 32, warps=4, stages=2, group=1, br=br)
        y = gemm.segment_gemm(x, w, h, l, bounds, None, None, tile)
        assert_same_bits(f"{bm}x{bn}, rank block {br}", y, truth)


def test_a_gemm_of_no_segments_or_no_rank_is_the_plain_one():
    x, w, h, l, bias = gemm_operands(M, 40, 72, 8, 3, FP16, False)
    plain = gemm.gemm(x, w, None, None, bias, None)
    bounds = bounds_of([2, 20, 45, 60])
    assert torch.equal(gemm.segment_gemm(x, w, h, l[:0], bounds[:1], bias, None), plain)
    none = gemm.segment_gemm(x, w, h[:, :0], l[:, :, :0], bounds, bias, None)
    assert torch.equal(none, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [8, 64])
def test_a_gemm_with_segments_against_fp64(dtype, r):
    m, k, n, count = (4096, 1024, 1000, 20) if GPU else (70, 96, 72, 4)
    bounds = random_bounds(m, count, 2)
    x, h = torch.randn(m, k, device=DEVICE).to(dtype), torch.randn(m, r, device=DEVICE).to(dtype)
    w = (torch.randn(n, k, device=DEVICE) / k**0.5).to(dtype)
    l = (torch.randn(count, n, r, device=DEVICE) / r**0.5).to(FP32 if r == 8 else dtype)
    bias = torch.randn(n, device=DEVICE).to(dtype)
    y = gemm.segment_gemm(x, w, h, l, bounds, bias, None)
    same = reference.segment_up(h, l, bounds, None, reference.gemm(x, w, None, None, bias))
    assert_accurate("y", y, same, gemm_truth(x, w, h, l, bounds, bias, None))


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_an_adapter_that_overflowed_spoils_its_own_rows_alone(bad):
    """Others' rows share its tiles, and must not meet it even times zero."""
    x, w, h, l, _ = gemm_operands(M, 40, 72, 8, 3, FP16, False)
    bounds = bounds_of([2, 20, 45, 60])
    h[:] = 1
    truth = gemm_truth(x, w, h, l, bounds, None, None).to(FP16)
    l[1] = bad
    h[50] = bad  # and a row its own outputs
    y = gemm.segment_gemm(x, w, h, l, bounds, None, None)
    spoilt = torch.zeros(M, dtype=torch.bool, device=DEVICE)
    spoilt[20:45] = spoilt[50] = True
    assert not y[20:45].isfinite().any()
    assert torch.equal(y[~spoilt], truth[~spoilt])


def linear_of(x, w, a, b, bounds, *args):
    """``segments.linear`` where it takes them, wherever that is."""
    made = segments.linear(x, w, a, b, bounds, None, 1.0, None, 65536, *(args or (None,)))
    if made is None:
        assert not GPU or launch.capability(DEVICE) < (9, 0)
        pytest.skip("more of K is for descriptors")
    return made


def linear_operands(m, k, n, r, count, dtype, dx):
    x, w, _, b, bias = gemm_operands(m, k, n, r, count, dtype, dx)
    return x, w, small(count, r, k, dtype=dtype), b, bias


@pytest.mark.parametrize("dx", [False, True], ids=["y", "dX"])
@pytest.mark.parametrize("r", [1, 16, 20])  # 4, 2 and 1 segments a group
@pytest.mark.parametrize("name", [*EDGES][:-1])
def test_terms_that_are_more_of_k_are_exact_on_integers(name, r, dx):
    """h too, which is spread besides: wherever segments begin, whether the factors lie as they should or not."""
    bounds, count = bounds_of(EDGES[name]), len(EDGES[name]) - 1
    x, w, a, b, bias = linear_operands(M, 8, 72, r, count, FP16, dx)
    y, h = linear_of(x, w, a, b, bounds, bias)
    true = reference.segment_down(x.double(), a.double(), bounds, None, 1.0)
    assert torch.equal(h, true.to(FP16))
    assert_same_bits("y", y, gemm_truth(x, w, h, b, bounds, bias, None).to(FP16))


def test_too_many_segments_or_ranks_are_not_spread():
    for r, count in ((65 if GPU else 33, 2), (8, 512), (8, 0), (0, 3)):
        x, w, a, b, _ = linear_operands(M, 8, 72, max(r, 1), max(count, 1), FP16, False)
        bounds = bounds_of([0] * (count + 1))
        args = bounds, None, 1.0, None, 65536, None
        assert segments.linear(x, w, a[:count, :r], b[:count, :, :r], *args) is None


def test_fp32_factors_are_rounded_on_the_way():
    bounds = bounds_of([2, 20, 45, 60])
    x, w, a, b, _ = linear_operands(M, 40, 72, 8, 3, FP16, False)
    y, h = linear_of(x, w, a.float(), b.float(), bounds)
    assert_same_bits("y", y, gemm_truth(x, w, h, b, bounds, None, None).to(FP16))


@pytest.mark.parametrize("dx", [False, True], ids=["y", "dX"])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 1e30])
@pytest.mark.parametrize("r", [4, 16])
def test_more_of_k_keeps_an_adapter_that_overflowed_to_its_rows(bad, r, dx):
    """Zeros that stand in for others' ranks must not be multiplied by it; 1e30 is finite until it is rounded."""
    x, w, a, b, _ = linear_operands(M, 40, 72, r, 3, FP16, dx)
    bounds = bounds_of([2, 20, 45, 60])
    a[:] = a.abs()
    a[:, :, 0] += 1
    x = x.abs() + 1
    y, h = linear_of(x, w, a, b, bounds)
    assert (h[2:60] != 0).all()
    spoilt = torch.zeros(M, 72, dtype=torch.bool, device=DEVICE)
    spoilt[20:45, 7] = True
    b = b.float()
    b[1, 7, 0] = bad
    got, _ = linear_of(x, w, a, b, bounds)
    assert not got[spoilt].isfinite().any()
    assert torch.equal(got[~spoilt], y[~spoilt])
    x[50] = bad  # and a row its own outputs
    got, _ = linear_of(x, w, a, b, bounds)
    spoilt[50] = True
    assert torch.equal(got[~spoilt], y[~spoilt]) and not got[50].isfinite().all()


@pytest.mark.parametrize("r", [3, 12])
def test_an_infinity_in_a_row_of_x_is_one_in_y(r):
    """Ranks that x_more and w_more have beyond r are zero in both, where inf * 0 would make all of the row NaN."""
    x, w, a, b, _ = linear_operands(M, 40, 72, r, 3, FP16, False)
    x, w, a, b = (t.abs() + 1 for t in (x, w, a, b))
    x[5, 3] = torch.inf
    y, _ = linear_of(x, w, a, b, bounds_of([2, 20, 45, 60]))
    assert y[5].isinf().all() and y[torch.arange(M, device=DEVICE) != 5].isfinite().all()


def test_infinite_rows_stay_in_their_own_segment():
    """Rows of others share a tile: what they hold must not be multiplied by zero, which would be NaN."""
    m, k, n, r = 64, 32, 24, 4
    x, dy, g = (small(m, width, dtype=FP32) for width in (k, n, r))
    bounds = bounds_of([3, 20, 40])
    for t in (x, dy, g):
        t[:3] = t[40:] = torch.inf
    x[5], bad = torch.nan, 5
    a, b = small(2, r, k, dtype=FP32), small(2, n, r, dtype=FP32)
    h = segments.down(x, a, bounds, None, 1.0, None, 65536)
    assert h[bad].isnan().all() and h[torch.arange(m, device=DEVICE) != bad].isfinite().all()
    y = segments.up(g, b, bounds, None, None)
    assert y.isfinite().all() and not y[:3].any() and not y[40:].any()
    d_a, d_b = segment_wgrad.wgrad(x, g, dy, g, bounds, None, FP32, FP32)
    assert d_a[0].isnan().any() and d_a[1].isfinite().all() and d_b.isfinite().all()


def test_launches_and_workspace_do_not_depend_on_offsets(monkeypatch):
    """What a CUDA graph needs: the same grids, constants and sizes for any bounds."""
    m, k, n, r, count = 200, 40, 24, 8, 5
    seen = []

    def record(kernel, grid, device, arguments, constants, warps, stages):
        bases = [getattr(t, "base", t) for t in arguments]  # of descriptors
        kinds = [(t.shape, t.dtype) if isinstance(t, torch.Tensor) else t for t in bases]
        seen.append((kernel, grid, kinds, constants))

    monkeypatch.setattr(launch, "run", record)
    x, dy, h = (torch.zeros(m, width, device=DEVICE) for width in (k, n, r))
    a, b = torch.zeros(count, r, k, device=DEVICE), torch.zeros(count, n, r, device=DEVICE)
    runs = []
    for values in ([0] * 6, [0, 0, 0, 0, 0, 200], [1, 2, 3, 100, 150, 199]):
        seen.clear()
        offsets = bounds_of(values)
        bounds_module.bounds(offsets, m)
        segments.down(x, a, offsets, None, 1.0, None, 65536)
        segments.up(h, b, offsets, None, dy)
        gemm.segment_gemm(x, b[0].new_zeros(n, k), h, b, offsets, None, None)
        segments.linear(x, b[0].new_zeros(n, k), a, b, offsets, None, 1.0, None, 65536, None)
        segment_wgrad.wgrad(x, h, dy, h, offsets, None, FP32, FP32)
        runs.append(list(seen))
    assert len(runs[0]) >= 8 and runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize(("m", "k", "n", "count"), [(2**22, 8, 8, 64), (8, 2**20, 2**20, 64)])
def test_grids_stay_within_what_a_gpu_takes(monkeypatch, m, k, n, count):
    grids = []
    monkeypatch.setattr(launch, "run", lambda kernel, grid, *_: grids.append(grid))

    def zeros(*shape):
        return torch.zeros((1,) * len(shape), device=DEVICE).expand(shape)

    bounds = torch.zeros(count + 1, dtype=torch.int32, device=DEVICE)
    segments.down(zeros(m, k), zeros(count, 4, k), bounds, None, 1.0, None, 65536)
    segments.up(zeros(m, 4), zeros(count, n, 4), bounds, None, None)
    rank = zeros(m, 4)
    segment_wgrad.wgrad(zeros(m, k), rank, zeros(m, n), rank, bounds, None, FP32, FP32)
    assert len(grids) >= 3
    for grid in grids:
        assert all(0 < extent < 2**31 for extent in grid), grid
        assert all(extent <= 65535 for extent in grid[1:]), grid
