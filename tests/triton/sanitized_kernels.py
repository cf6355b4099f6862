"""The program that test_sanitizer.py runs under compute-sanitizer: Triton's kernels of mixed batches, DoRA and bottlenecks at
awkward shapes."""

import torch

import fastlora
from fastlora import ops
from fastlora.ops import segments as segment_ops

FP16, FP32 = torch.float16, torch.float32
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# (m, n, k, r): ragged everywhere; descriptors can name the first. Small, for racecheck and Triton's interpreter.
SHAPES = [(260, 264, 136, 16), (140, 131, 77, 5)] if GPU else [(70, 72, 40, 16)]


def randn(*shape: int, dtype: torch.dtype = FP16) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def segments(m: int, n: int, k: int, r: int, factors: torch.dtype, fewest: tuple[int, int]) -> None:
    """Forward and backward with every way to y: terms as more of K, added to a product's tiles, and to y."""
    segment_ops._FEWEST_SPREAD_ROWS_A_SEGMENT, segment_ops._FEWEST_ROWS_A_SEGMENT = fewest
    count = 9
    x, w = randn(m, k).requires_grad_(), randn(n, k)
    a, b = (randn(*s, dtype=factors).requires_grad_() for s in ((count, r, k), (count, n, r)))
    cuts = torch.randint(0, m + 1, (count + 1,), generator=torch.Generator().manual_seed(m))
    hostile = torch.tensor(
        [-5, 3, 2, 2**40, 1, 7, 7, -1, m, m + 1]
    )  # refused on a CPU, clamped on a GPU
    for offsets in (cuts.sort().values, *([hostile] if GPU else [])):
        for dropout_p in (0.0, 0.1):
            y = fastlora.lora_linear_segments(x, w, a, b, offsets.to(DEVICE), 0.5, None, dropout_p)
            torch.autograd.grad(y, (x, a, b), torch.ones_like(y))
    with torch.no_grad():  # an adapter that overflowed
        b[1, 0, 0] = torch.inf
        fastlora.lora_linear_segments(x, w, a, b, cuts.sort().values.to(DEVICE), 0.5)


def columns(m: int, n: int, k: int, r: int, factors: torch.dtype) -> None:
    x, w, z = randn(m, k), randn(n, k), randn(m, n)
    a, b = randn(r, k, dtype=factors), randn(n, r, dtype=factors)
    magnitude = randn(n, dtype=FP32)
    q = fastlora.NF4Tensor.quantize(w, 64)
    ops.nf4_row_norms(q.codes, q.scales, q.form, a, b, 0.5)
    scaling = torch.tensor(0.5, device=DEVICE)
    norm, factor = ops.row_norms(w, a, b, scaling, magnitude)
    for rest in (None, z[0], z):
        ops.scale_columns(z, magnitude, norm, rest)
    ops.scale_columns_backward(z, z, magnitude, norm, True, True)
    h, _ = ops.down(x, a)
    ops.scaled_gemm(x, w, h, b, z[0], factor)


def bottlenecks(m: int, k: int, r: int, factors: torch.dtype) -> None:
    from fastlora.autograd.bottleneck import bottleneck

    x = randn(m, k).requires_grad_()
    shapes = (r, k), (r,), (k, r), (k,)
    weights = [randn(*s, dtype=factors).requires_grad_() for s in shapes]
    y = bottleneck(x, x, *weights, "gelu")
    torch.autograd.grad(y, (x, *weights), torch.ones_like(y))


if __name__ == "__main__":
    segment_ops._FEWEST_FUSED_ROWS = 1
    with fastlora.backend("triton", strict=True):
        for m, n, k, r in SHAPES:
            for factors in (FP16, FP32):
                for fewest in ((0, 1 << 40), (1 << 40, 0), (1 << 40, 1 << 40)):
                    segments(m, n, k, r, factors, fewest)
                columns(m, n, k, r, factors)
                for width in (r, 130):
                    bottlenecks(m, k, width, factors)
    if GPU:
        torch.cuda.synchronize()
    print("ran all", sorted(op for op, _ in fastlora.launches()))
