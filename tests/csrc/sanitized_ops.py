"""The program that test_lora_sm90.py runs under compute-sanitizer: the library's Hopper ops at awkward shapes."""

import torch

from fastlora import _library

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KEEP = 62256
# (m, n, k, r): ragged everywhere, and a few tiles each way
SHAPES = [(1, 136, 72, 8), (300, 520, 264, 16), (77, 1000, 136, 80), (513, 264, 520, 24)]
# (m, n, k)
NF4_SHAPES = [
    (1, 32, 64),
    (13, 100, 192),
    (40, 33, 1280),
    (64, 300, 256),
    (64, 5, 71),
    (130, 136, 512),
    (300, 130, 768),
]


def run(m: int, n: int, k: int, r: int, dtype: torch.dtype) -> None:
    """Every op once or twice."""
    ops = torch.ops.fastlora
    x, dy = (torch.randn(m, cols, device="cuda").to(BF16) for cols in (k, n))
    w = torch.randn(n, k, device="cuda").to(BF16)
    a, b = torch.randn(r, k, device="cuda").to(dtype), torch.randn(n, r, device="cuda").to(dtype)
    bias, state = torch.randn(n, device="cuda").to(BF16), torch.tensor([1, 2], device="cuda")
    wide = dtype == FP32
    h, _, cast = ops._down_sm90(x, a, None, 0.5, state, KEEP, 0, b if wide else None)
    ops._gemm_sm90(x, w, h, cast if wide else b, bias, None, None)
    for drop in (None, state):
        emit = 0 if drop is None else k
        g, words, _ = ops._down_sm90(dy, b.t(), None, 0.5, drop, KEEP, emit, None)
        mask = None if drop is None else words
        ops._gemm_sm90(dy, w.t(), g, a.to(BF16).t(), None, mask, None)
        ops._wgrad_sm90(x, g, dy, h, mask, r, wide, wide, True)
    for config in ([128, 1, 1], [64, 2, 1], [64, 1, 2], [128, 2, 4]) if r <= 64 else ():
        if config[2] <= -(-k // 64):
            ops._lora_few_sm90(x, w, a, b, bias, None, 0.5, False, config)
        if config[2] <= -(-n // 64):
            ops._lora_few_sm90(dy, w, a, b, None, None, 0.5, True, config)
    for drop in (None, state) if r <= 64 else (None,):
        _, h = ops._lora_forward_sm90(x, w, a, b, bias, None, 0.5, drop, KEEP, None)
        ops._lora_backward_sm90(dy, w, a, b, x, h, None, 0.5, drop, KEEP, True, True, None)
    columns = torch.rand(n, device="cuda")
    for with_z in (True, False):
        ops._lora_scaled_sm90(x, w, a, b, bias, None, 0.5, columns, with_z, None)


def run_nf4(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    """The ops over a 4-bit weight, whole and in a part, aligned and not."""
    ops = torch.ops.fastlora
    weight = torch.randn(n, k, device="cuda").to(dtype)
    codes, absmax = ops._nf4_quantize(weight, 64)
    code = torch.linspace(-1, 1, 256, device="cuda")
    scales, nested = ops._nf4_quantize_scales(absmax, code, 256)
    offset = torch.zeros(1, device="cuda")
    for begin, count in ((0, n * k), (6, n * k - 7)):
        out = torch.empty(count, dtype=dtype, device="cuda")
        ops._nf4_dequantize(codes, absmax, None, None, None, 64, 1, False, begin, out)
        ops._nf4_dequantize(codes, scales, nested, code, offset, 64, 256, True, begin, out)
    if k % 64 or dtype == FP32:
        return
    few, gemm = m <= 64, k % 256 == 0
    x, bias = torch.randn(m, k, device="cuda").to(dtype), torch.randn(n, device="cuda").to(dtype)
    for fp4 in (False, True):
        plain = codes, absmax, None, None, None, n, 64, 1, fp4
        double = codes, scales, nested, code, offset, n, 64, 256, fp4
        for r, factors in ((16, dtype), (5, FP32)):
            a, b = (torch.randn(s, device="cuda").to(factors) for s in ((r, k), (n, r)))
            g, room = (torch.randn(m, c, device="cuda").to(dtype) for c in (r, -(-n // 8) * 8))
            dy, back = room[:, :n], (codes, absmax, None, None, None, k, 64, 1, fp4)
            if few:
                for shared in (None, 99 * 1024):
                    ops._nf4_linear_sm80(x, *plain, a, b, None, bias, None, 0.5, shared)
            for rows in (16, 64, 256) if gemm else ():
                ops._nf4_linear_sm90(x, *plain, a, b, None, bias, None, 0.5, [rows, k // 256])
            for rows in (16, 64, 256):
                ops._nf4_dx_sm90(dy, *back, a, g, [rows, min(2, -(-n // 64))])
        back = codes, scales, nested, code, offset, k, 64, 256, fp4
        ops._nf4_dx_sm90(dy, *back, None, None, None)
        if few:
            ops._nf4_linear_sm80(x, *double, None, None, None, None, None, 1.0, None)
        if gemm:
            ops._nf4_linear_sm90(x, *double, None, None, None, None, None, 1.0, None)
        for r in (0, 5, 40):  # an h that is given
            b, h = (torch.randn(s, r, device="cuda").to(dtype) for s in (n, m))
            if few:
                ops._nf4_linear_sm80(x, *double, None, b, h, bias, None, 1.0, 163 * 1024)
            if gemm:
                ops._nf4_linear_sm90(x, *double, None, b, h, bias, None, 1.0, None)


if __name__ == "__main__":
    assert _library.load(torch.device("cuda", 0))
    for shape in SHAPES:
        for dtype in (BF16, FP32):
            run(*shape, dtype)
    for shape in NF4_SHAPES:
        for dtype in (BF16, FP16, FP32):
            run_nf4(*shape, dtype)
    torch.cuda.synchronize()
    print("ran all")
