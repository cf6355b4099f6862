"""Compiles the launches of one op for one architecture, without a GPU: run by test_compile.py in a process of its own,
because there Triton must not interpret. Prints a line per kernel: name, rank, shared memory and spills in bytes."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.activations import KINDS
from fastlora.ops import Form
from fastlora.triton import (
    bottleneck_down,
    bottleneck_down_backward,
    bottleneck_up,
    down,
    gemm,
    launch,
    nf4_linear,
    norms,
    scale_columns,
    scale_columns_backward,
    scaled_gemm,
    segment_bounds,
    segment_down,
    segment_gemm,
    segment_linear,
    segment_up,
    segment_wgrad,
    wgrad,
)

NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
CAPABILITY = int(sys.argv[2])


def signature(argument: Any) -> str:
    if isinstance(argument, torch.Tensor):
        return f"*{NAMES[argument.dtype]}"
    if isinstance(argument, TensorDescriptor):
        return f"tensordesc<{NAMES[argument.base.dtype]}{argument.block_shape}>"
    if argument is None or argument == 1:
        return "constexpr"
    return "fp32" if isinstance(argument, float) else "i32"


def compile_instead(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    warps: int,
    stages: int,
) -> None:
    constants = {**constants, "CHAIN": CAPABILITY >= 90}
    names = kernel.arg_names
    kinds = dict(zip(names, map(signature, arguments), strict=False))
    fixed = {n: a for n, a in zip(names, arguments, strict=False) if kinds[n] == "constexpr"}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, a in enumerate(arguments)
        if isinstance(a, torch.Tensor) or (type(a) is int and a % 16 == 0)
    }
    source = ASTSource(
        kernel, kinds | dict.fromkeys(constants, "constexpr"), fixed | constants, aligned
    )
    options = {"num_warps": warps, "num_stages": stages}
    built = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options)
    rank = arguments[names.index("R")] if "R" in names else 0
    print(kernel.__name__, rank, built.metadata.shared, spilled(built.asm["ptx"]))


def spilled(ptx: str) -> int:
    """Bytes ptxas spills, by its own report."""
    ptxas = get_ptxas(CAPABILITY).path  # Triton's choice: TRITON_PTXAS_PATH's where torch set one
    suffix = "a" if CAPABILITY >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        cubin = Path(folder, "kernel.cubin")  # not /dev/null, where several at once fail
        command = [ptxas, "-v", f"-arch=sm_{CAPABILITY}{suffix}", file, "-o", cubin]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"ptxas: {done.returncode}\n{done.stdout}{done.stderr}")
    return sum(int(size) for size in re.findall(r"(\d+) bytes spill stores", done.stderr))


def main() -> None:
    launch.capability = lambda device: divmod(CAPABILITY, 10)  # type: ignore[assignment]
    launch.multiprocessors = lambda device: 132  # type: ignore[assignment]
    launch.run = compile_instead
    op, dtype = sys.argv[1], getattr(torch, sys.argv[3])
    m, k, n = 8192, 4096, 4096
    empty = torch.empty
    state, words = empty(2, dtype=torch.int64), empty(m, k // 32, dtype=torch.int32)
    x, w = empty(m, k, dtype=dtype), empty(n, k, dtype=dtype)
    codes, fp32 = empty(n * k // 2, dtype=torch.uint8), torch.float32
    counts = n * k // 64, n * k // 2**14, 256, 1
    scales = [empty(c, dtype=fp32 if i else torch.uint8) for i, c in enumerate(counts)]
    for r, factors in ((16, dtype), (64, dtype), (64, torch.float32), (256, torch.float32)):
        a, b = empty(r, k, dtype=factors), empty(n, r, dtype=factors)
        h = empty(m, r, dtype=dtype)
        if op == "down":
            down(x, a, None, 0.5, None, 65536, 0)
            down(x, a, None, 0.5, state, 62256, 0)
            down(x, b.t(), None, 0.5, state, 62256, k)
        elif op == "gemm":
            gemm(x, w, h, b, None, None)
            gemm(x, w.t(), h, a.t(), None, words)
            scaled_gemm(x, w, h, b, None, empty(n))
        elif op == "bottleneck":
            a_small, bias = a[:, :256], empty(r, dtype=factors)
            for rows in (x, x[:32]):  # one launch, and K split in two
                bottleneck_down(rows, a, bias, "gelu", True)
                bottleneck_down_backward(rows, b.t(), h[: len(rows)], "gelu_tanh", True)
                bottleneck_up(h[: len(rows)], b, empty(n, dtype=factors), rows)
            bottleneck_up(h, a.t(), None, x)
            bottleneck_up(h, a.t(), None, None)
            for kind in KINDS if r == 16 and CAPABILITY == 80 else ():  # once
                bottleneck_down(x[:, :256], a_small, bias, kind, False)
                bottleneck_down_backward(x[:, :256], a_small, h, kind, False)
        elif op == "norms":
            if r == 16:
                norms.row_norms(w, a.double(), b.double(), None, 0.5)
            for weight in (w, w[:100, :200]):
                rows, cols = weight.shape
                norms.row_norms(weight, a[:, :cols], b[:rows], None, 0.5)
                norms.row_norms(weight, a[:, :cols], b[:rows], None, 0.5, empty(rows))
            for nested, cols in ((0, k), (256, k), (0, 4098), (256, 4097)):
                weight = codes, scales if nested else scales[1:2], Form(n, cols, 64, nested, False)
                norms.nf4_row_norms(*weight, empty(r, cols, dtype=factors), b, None, 0.5)
        elif op == "nf4":
            for nested, rows in ((0, 16), (256, 64)):
                weight = codes, scales if nested else scales[1:2], Form(n, k, 64, nested, False)
                nf4_linear.forward(x[:rows], *weight, h[:rows], b, None)
                nf4_linear.dx(x[:rows], *weight, h[:rows], a)
            # rows of 2 times an odd number: a scale is shared by 2 neighbours, in tiles that wgmma multiplies
            weight = codes, scales[1:2], Form(n, 4098, 64, 0, False)
            odd = empty(128, 4098, dtype=dtype)
            nf4_linear.forward(odd, *weight, h[:128], b, None)
            nf4_linear.dx(x[:128], *weight, h[:128], empty(r, 4098, dtype=factors))
        elif op == "segments":
            count = 64
            offsets, scalings = empty(count + 1, dtype=torch.int64), empty(count, dtype=fp32)
            bounds = empty(count + 1, dtype=torch.int32)
            segment_bounds(offsets, m)
            a, b = (f.expand(count, *f.shape) for f in (a, b))
            segment_down(x, a, bounds, scalings, 0.5, None, 65536)
            segment_down(x, b.transpose(1, 2), bounds, None, 0.5, None, 65536)
            segment_down(x, a, bounds, None, 0.5, state, 62256)
            segment_up(h, b, bounds, None, x)
            segment_up(h, b, bounds, None, None)
            segment_up(h, a.transpose(1, 2), bounds, words, x)
            if dtype != torch.float32:  # which is composed
                segment_gemm(x, w, h, b, bounds, None, None)
                segment_gemm(x, w.t(), h, a.transpose(1, 2), bounds, None, None)
                segment_gemm(x, w.t(), h, a.transpose(1, 2), bounds, None, words)
                segment_linear(x, w, a, b, bounds, None, 0.5, None, 65536, None)
                segment_linear(x, w, a, b, bounds, None, 0.5, state, 62256, None)
                b_t, a_t = b.transpose(1, 2), a.transpose(1, 2)
                segment_linear(x, w.t(), b_t, a_t, bounds, None, 0.5, None, 65536, None)
            segment_wgrad(x, h, x, h, bounds, None, factors, factors)
            segment_wgrad(x, h, None, None, bounds, words, factors, factors)
        else:
            wgrad(x, h, x, h, words, factors, factors, None)
            wgrad(x, h, x, h, None, factors, factors, factors)
    if op == "norms":  # beside them what no rank is in
        for z in (x, x[:100, :200]):
            magnitude, norm = empty(z.shape[1]), empty(z.shape[1])
            for rest in (None, z, z[0]):
                scale_columns(z, magnitude, norm, rest)
            scale_columns_backward(z, z, magnitude, norm, True, False)
            scale_columns_backward(z, None, magnitude, None, True, True)
    if op == "segments":
        few = x[:32], a, bounds, scalings, 0.5, None, 65536
        segment_down(*few)
        segment_up(h[:32], b, bounds, None, x[:32])
        if dtype != torch.float32:
            segment_gemm(x[:512], w, h[:512], b, bounds, None, None)
    if op == "gemm":
        gemm(x, w, None, None, None, None)
        for rows in (1, 64, 256):  # the few-row tiles
            gemm(x[:rows], w, h[:rows], b, None, None)


main()
