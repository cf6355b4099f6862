"""fastlora::_gemm_sm90 on a Hopper GPU against fp64, exactly where the numbers are integers."""

import pytest
import torch

from fastlora import _library, ops, reference
from fastlora.testing.compare import assert_accurate
from tests.csrc.common import needs_hopper

BF16, FP16 = torch.bfloat16, torch.float16
TILES = [
    (rows, cols, 3, *cluster, 1, 16)
    for rows, cols in ((128, 256), (256, 128), (128, 192), (128, 128), (64, 256), (64, 128))
    for cluster in ((1, 1), (2, 1), (1, 2))
]
# (m, n, k, r, w is MN-major, bias, mask)
SHAPES = [
    (128, 256, 64, 0, False, False, False),
    (128, 256, 64, 16, True, True, True),
    (1, 136, 8, 8, False, True, False),
    (77, 1000, 72, 24, True, False, False),
    (1000, 1008, 80, 64, False, True, True),
    (129, 136, 4104, 80, True, True, True),
    (513, 4104, 136, 200, False, False, True),
    (300, 520, 1000, 512, True, False, False),
]


pytestmark = needs_hopper("gemm")


def problem(m, n, k, r, mn_major, bias, mask, dtype=BF16, integers=False, device="cuda"):
    """The arguments of gemm; a padded pitch holds NaN, which must not be read."""

    def matrix(rows, cols, scale=1.0):
        values = torch.randn(rows, cols, device=device) * scale
        values = torch.randint(-4, 5, (rows, cols), device=device) if integers else values
        wide = torch.full((rows, (cols + 7) // 8 * 8 + 8), torch.nan, device=device, dtype=dtype)
        wide[:, :cols] = values.to(dtype)
        return wide[:, :cols]

    x = matrix(m, k)
    w = matrix(k, n, k**-0.5).t() if mn_major else matrix(n, k, k**-0.5)
    h = matrix(m, r) if r else None
    l = None if not r else (matrix(r, n, r**-0.5).t() if mn_major else matrix(n, r, r**-0.5))
    b = matrix(1, n)[0].contiguous() if bias else None
    words = ops.mask(torch.tensor([5, 6], device=device), m, n, 40000) if mask and r else None
    return x, w, h, l, b, words


def truth(x, w, h, l, b, words):
    wide = [None if t is None else t.double() for t in (x, w, h, l, b)]
    return reference.gemm(*wide, words)


def call(arguments, config=None):
    return torch.ops.fastlora._gemm_sm90(*arguments, None if config is None else list(config))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("config", [None, *TILES])
def test_integers_are_exact(config, shape):
    arguments = problem(*shape, integers=True)
    got, expected = call(arguments, config), truth(*arguments).to(BF16)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("shape", [*SHAPES, (2048, 4096, 4096, 16, True, True, True)])
def test_no_worse_than_twice_torchs_error(shape, dtype):
    arguments = problem(*shape, dtype=dtype)
    got = call(arguments)
    assert_accurate("y", got, reference.gemm(*arguments), truth(*arguments))
    for _ in range(5):
        assert torch.equal(got, call(arguments))  # a race would differ now and then


def test_empty_outputs():
    x, w, *_ = problem(8, 16, 8, 0, False, False, False)
    assert call((x[:0], w, None, None, None, None)).shape == (0, 16)
    assert call((x, w[:0], None, None, None, None)).shape == (8, 0)


def test_a_graph_replays_it():
    arguments = problem(300, 520, 200, 16, True, True, True)
    call(arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(arguments)
    arguments[0].neg_()
    graph.replay()
    assert_accurate("y", y, reference.gemm(*arguments), truth(*arguments))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda a: (a[0].float(), *a[1:]), "x must be bfloat16 or float16"),
        (lambda a: (a[0], a[1][:, :-8], *a[2:]), "w must be"),
        (lambda a: (a[0], a[1][:-3], a[2], a[3][:-3], None, None), "n must be a multiple of 8"),
        (lambda a: (a[0].t().contiguous().t(), *a[1:]), "x must be contiguous"),
        (lambda a: (*a[:2], None, *a[3:]), "h and l come together"),
        (lambda a: (*a[:4], a[4][::2], a[5]), "bias must be"),
        (lambda a: (*a[:5], a[5][:-1]), "words must be"),
    ],
)
def test_what_it_does_not_take_is_named(change, named):
    arguments = problem(64, 128, 72, 16, False, True, True)
    with pytest.raises((ValueError, RuntimeError), match=f"(_gemm_sm90|gemm_sm90): {named}"):
        call(change(arguments))


@pytest.mark.parametrize("config", [(128, 256, 3, 2, 2, 1, 16), (128, 256, 3, 1, 1, 2, 16), (7,)])
def test_bad_configs_are_refused(config):
    with pytest.raises((ValueError, RuntimeError)):
        call(problem(64, 128, 72, 16, False, True, True), config)


def test_strict_cuda_runs_it_and_says_why_not():
    import fastlora

    x, w, h, l, b, words = problem(64, 128, 72, 16, False, True, True)
    with fastlora.backend("cuda", strict=True):
        ops.gemm(x, w, h, l, b, words)
        assert fastlora.launches()["gemm", "cuda"] >= 1
        with pytest.raises(RuntimeError, match="multiple of 8"):
            ops.gemm(x, w[:-3], None, None, None, None)
        with pytest.raises(RuntimeError, match="float32 beside"):
            ops.gemm(x, w, h, l.float(), None, None)
    assert _library.has_kernel("_gemm_sm90")
