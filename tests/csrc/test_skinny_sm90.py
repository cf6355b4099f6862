"""fastlora::_down_sm90 and _wgrad_sm90 on a Hopper GPU against fp64, exactly where the numbers are integers."""

import pytest
import torch

from fastlora import _library, ops, reference
from fastlora.testing.compare import assert_accurate

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KEEP = 62256


def _missing() -> bool:
    if not torch.cuda.is_available():
        return False  # the gpu marker skips these with its own reason
    return torch.cuda.get_device_capability() != (9, 0) or not _library.has_kernel("_down_sm90")


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_missing(), reason="no Hopper GPU, or a library without sm_90a code"),
]


def matrix(rows, cols, dtype=BF16, integers=False, scale=1.0):
    """A matrix whose rows are 16-byte aligned; the padding is NaN and must not be read."""
    values = torch.randn(rows, cols, device="cuda") * scale
    if integers:
        values = torch.randint(-4, 5, (rows, cols), device="cuda").float()
    wide = torch.full((rows, (cols + 7) // 8 * 8 + 8), torch.nan, device="cuda", dtype=dtype)
    wide[:, :cols] = values.to(dtype)
    return wide[:, :cols]


def state():
    return torch.tensor([3, 4], device="cuda")


def down(x, l, scale=0.5, scaling=None, rng_state=None, emit=0, cast=None):
    run = torch.ops.fastlora._down_sm90
    return run(x, l, scaling, scale, rng_state, KEEP, emit, cast)


SHAPES = [(1, 8, 1), (77, 72, 8), (1000, 4104, 16), (129, 1000, 24), (300, 520, 80), (64, 200, 512)]


@pytest.mark.parametrize(("m", "k", "r"), SHAPES)
@pytest.mark.parametrize("layout", ["rows", "columns", "float32", "odd"])
@pytest.mark.parametrize("dropped", [False, True])
def test_down_is_exact_on_integers(m, k, r, layout, dropped):
    x = matrix(m, k, integers=True)
    l = matrix(r, k, FP32 if layout == "float32" else BF16, integers=True)
    if layout == "columns":
        l = matrix(k, r, integers=True).t()
    elif layout == "odd":  # no dimension is contiguous
        l = l.repeat_interleave(2, 1)[:, ::2]
    words = reference.mask(state(), m, k, KEEP) if dropped else None
    h, nothing, _ = down(x, l, rng_state=state() if dropped else None)
    expected = reference.down(x.double(), l.double(), None, 0.5, words).to(BF16)
    assert torch.equal(h[:, :r], expected)
    assert h.shape == (m, (r + 7) // 8 * 8) and not h[:, r:].any() and nothing.numel() == 0


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("m", "k", "r"), [*SHAPES, (8192, 4096, 16), (2048, 14336, 64)])
def test_down_is_no_worse_than_twice_torchs_error(m, k, r, dtype):
    x, l = matrix(m, k, dtype), matrix(r, k, dtype, scale=k**-0.5)
    h = down(x, l)[0]
    assert_accurate(
        "h",
        h[:, :r],
        reference.down(x, l, None, 0.5),
        reference.down(x.double(), l.double(), None, 0.5),
    )
    for _ in range(5):
        assert torch.equal(h, down(x, l)[0])  # a race would differ now and then


@pytest.mark.parametrize(
    ("m", "k", "cols"), [(1, 8, 8), (77, 72, 1000), (1000, 520, 4100), (256, 4096, 136)]
)
def test_down_leaves_the_mask_of_another_matrix(m, k, cols):
    x, l = matrix(m, k, integers=True), matrix(16, k, integers=True)
    h, words, _ = down(x, l, rng_state=state(), emit=cols)
    assert torch.equal(h, down(x, l)[0])  # x itself is taken whole
    assert torch.equal(words, reference.mask(state(), m, cols, KEEP))


def test_down_reads_a_scale_from_the_device_and_rounds_a_matrix_on_the_side():
    x, l = matrix(200, 136, integers=True), matrix(16, 136, integers=True)
    factor = torch.randn(300, 20, device="cuda")
    scaling = torch.tensor(2.0, device="cuda")
    h, _, rounded = down(x, l, scaling=scaling, cast=factor)
    assert torch.equal(h, reference.down(x.double(), l.double(), None, 1.0).to(BF16))
    assert torch.equal(rounded[:, :20], factor.to(BF16)) and not rounded[:, 20:].any()


def wgrad(x, g, dy, h, words, r, wide=(True, True), bias=False):
    return torch.ops.fastlora._wgrad_sm90(x, g, dy, h, words, r, *wide, bias)


@pytest.mark.parametrize(("m", "k", "n", "r"), [(1, 8, 8, 1), (77, 72, 1000, 8), (1000, 520, 136, 24), (300, 4104, 64, 80), (129, 200, 72, 512)])  # fmt: skip
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("wide", [(True, True), (False, True), (True, False)])
def test_wgrad_is_exact_on_integers(m, k, n, r, masked, wide):
    x, dy = matrix(m, k, integers=True), matrix(m, n, integers=True)
    g, h = matrix(m, r, integers=True), matrix(m, r, integers=True)
    words = reference.mask(state(), m, k, KEEP) if masked else None
    if masked:  # what is dropped is not even looked at
        x[~reference.unpack_mask(words, m, k)] = float("inf")
    got = wgrad(x, g, dy, h, words, r, wide, bias=True)
    clean = x.double().nan_to_num(posinf=0)
    types = [FP32 if each else BF16 for each in wide]
    expected = reference.wgrad(clean, g.double(), dy.double(), h.double(), None, *types, BF16)
    for name, ours, truth in zip(("dA", "dB", "dbias"), got, expected, strict=True):
        assert torch.equal(ours, truth), name
    for product in range(2):  # one product alone
        pair = (x, g, None, None) if product == 0 else (None, None, dy, h)
        alone = wgrad(*pair, words if product == 0 else None, r, wide)
        assert torch.equal(alone[product], got[product]) and alone[1 - product].numel() == 0


@pytest.mark.parametrize(("m", "k", "n", "r"), [(8192, 4096, 4096, 16), (2048, 4096, 14336, 64)])
def test_wgrad_is_no_worse_than_twice_torchs_error(m, k, n, r):
    x, dy, g, h = (matrix(m, cols) for cols in (k, n, r, r))
    got = wgrad(x, g, dy, h, None, r)
    # Tensor cores cut what they add to fp32 sums: the yardstick is torch's product by the same.
    same = (torch.mm(u.t(), v, out_dtype=FP32) for u, v in ((g, x), (dy, h)))
    truth = reference.wgrad(*(t.double() for t in (x, g, dy, h)), None, torch.float64, torch.float64, None)  # fmt: skip
    for name, ours, torchs, exact in zip(("dA", "dB"), got, same, truth, strict=False):
        assert_accurate(name, ours, torchs, exact)
    for _ in range(5):
        assert all(map(torch.equal, got, wgrad(x, g, dy, h, None, r)))


def test_a_graph_replays_a_whole_backward():
    x, dy, w = matrix(300, 520), matrix(300, 264), matrix(264, 520)
    a, b = matrix(16, 520), matrix(264, 16)

    def chain():
        g = down(dy, b.t())[0]
        dx = ops.gemm(dy, w.t(), g, a.t())
        return dx, *wgrad(x, g, dy, down(x, a)[0], None, 16)

    expected = chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain()
    graph.replay()
    for ours, truth in zip(got, expected, strict=True):
        assert torch.equal(ours, truth)


def test_what_they_do_not_take_is_named():
    x, l = matrix(64, 72), matrix(16, 72)
    with pytest.raises((ValueError, RuntimeError), match="takes bfloat16 and float16"):
        down(x.float(), l)
    with pytest.raises((ValueError, RuntimeError), match="as many columns"):
        down(x, l[:, :-8])
    with pytest.raises((ValueError, RuntimeError), match="contiguous along its rows"):
        down(x.t().contiguous().t(), l)
    with pytest.raises((ValueError, RuntimeError), match="x comes with g"):
        wgrad(x, None, None, None, None, 16)
    with pytest.raises((ValueError, RuntimeError), match="words must be"):
        wgrad(
            x, matrix(64, 16), None, None, torch.zeros(8, 8, device="cuda", dtype=torch.int32), 16
        )
