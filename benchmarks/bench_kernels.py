"""The kernels by themselves: ``python -m benchmarks.bench_kernels [--rounds N] [--out DIR] [--device D]``.

The bare GEMM over torch's (cuBLAS on a GPU), both majors of W, and the share of the copy bandwidth that the skinny
products and the dequantisation of NF4 reach: bytes they must read and write, over the time, over what a copy of the same run moves, from caches that
hold nothing to write back. Launch included, caches flushed; every contender is held to fp64 before it is timed.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

import fastlora
from benchmarks import bench
from benchmarks.bench import Bench, Row
from fastlora import NF4Tensor, _library, ops
from fastlora.ops import raw, support
from fastlora.rng import KEEP_ALL
from fastlora.testing.timing import Contender

SHAPES = [(4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192), (8192, 28672)]  # K, N
SMALL = [(64, 96), (96, 64)]  # where there is no GPU, to see that it runs
RANK, SEGMENTS = 16, 64


class KernelBench(Bench):
    """All cases on one device."""

    name, title = "kernels", "Kernels"

    def backends(self, op: str) -> list[str]:
        """Of ours, those that run ``op`` here; torch's is the yardstick, or all there is."""
        ours = [b for b in ("cuda", "triton") if not self._miss(op, b)] if self.on_gpu else []
        return ours or ["torch"]

    def _miss(self, op: str, backend: str) -> str | None:
        return support.miss(op, backend, self.device, self.dtype, RANK)

    def gemm(self, m: int, k: int, n: int) -> None:
        """y = x W^T, then dX = dY W: W as it lies."""
        w = self.random(n, k)
        for name, x, w_read in (("y", self.random(m, k), w), ("dX", self.random(m, n), w.t())):
            contenders = {"torch": Contender(functools.partial(torch.mm, x, w_read.t()))}
            contenders["torch-again"] = contenders["torch"]
            for backend in self.backends("gemm"):
                contenders[f"fastlora-{backend}"] = Contender(
                    functools.partial(raw.gemm, x, w_read, None, None, None, None),
                    functools.partial(fastlora.backend, backend, strict=True),
                )
            truth = (x.double() @ w_read.double().t(),)
            self.time(f"gemm {name} {m}x{k}x{n}", contenders, truth)

    def down(self, m: int, k: int) -> None:
        """h = x A^T."""
        x, a = self.random(m, k), self.random(RANK, k)
        contenders = {
            f"fastlora-{backend}": Contender(
                lambda: raw.down(x, a)[:1],
                functools.partial(fastlora.backend, backend, strict=True),
            )
            for backend in self.backends("down")
        }
        if self.on_gpu and _library.has_kernel("_down_sm90"):
            run = torch.ops.fastlora._down_sm90
            contenders["fastlora-cuda"] = Contender(
                lambda: run(x, a, None, 1.0, None, KEEP_ALL, 0, None)[:1]
            )
        moved = x.element_size() * (m * k + RANK * k + m * RANK)
        self.time(f"down {m}x{k}", contenders, (x.double() @ a.double().t(),), moved)

    def wgrad(self, m: int, k: int, n: int) -> None:
        """dA = g^T x and dB = dY^T h."""
        x, g, dy, h = (self.random(m, width) for width in (k, RANK, n, RANK))
        contenders = {
            f"fastlora-{backend}": Contender(
                lambda: raw.wgrad(x, g, dy, h, None, self.dtype, self.dtype, None)[:2],
                functools.partial(fastlora.backend, backend, strict=True),
            )
            for backend in self.backends("wgrad")
        }
        if self.on_gpu and _library.has_kernel("_wgrad_sm90"):
            run = torch.ops.fastlora._wgrad_sm90
            contenders["fastlora-cuda"] = Contender(
                lambda: run(x, g, dy, h, None, RANK, False, False, False)[:2]
            )
        moved = x.element_size() * (m * (k + n + 2 * RANK) + RANK * (k + n))
        truth = (g.double().t() @ x.double(), dy.double().t() @ h.double())
        self.time(f"wgrad {m}x{k}x{n}", contenders, truth, moved)

    def segments(self, m: int, k: int, n: int) -> None:
        """The ops of lora_linear_segments, rows cut at random into ``SEGMENTS``: y and dX over torch's frozen ones."""
        x, dy, w = self.random(m, k), self.random(m, n), self.random(n, k)
        a, b = self.random(SEGMENTS, RANK, k), self.random(SEGMENTS, n, RANK)
        up, h = a.transpose(1, 2), self.random(m, RANK)
        cuts = torch.randint(1, m, (SEGMENTS - 1,), generator=torch.Generator().manual_seed(0))
        edges = [0, *cuts.sort().values.tolist(), m]
        bounds = torch.tensor(edges, device=self.device, dtype=torch.int32)

        def down(x: Tensor, a: Tensor) -> tuple[Tensor, ...]:
            return (ops.segment_down(x, a, bounds),)

        def onto(h: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            return (ops.segment_up(h, b, bounds),)

        def wgrad(x: Tensor, dy: Tensor, h: Tensor) -> tuple[Tensor, ...]:
            return ops.segment_wgrad(x, h, dy, h, bounds, None, x.dtype, x.dtype)

        def gemm(x: Tensor, w: Tensor, h: Tensor, l: Tensor) -> tuple[Tensor, ...]:
            return (ops.segment_gemm(x, w, h, l, bounds),)

        def numel(*tensors: Tensor) -> int:
            return sum(t.numel() for t in tensors)

        size = f"{m}x{k}x{n}"
        for op, run, given, moved in (
            ("segment_down", down, (x, a), numel(x, a, h)),
            ("segment_up", onto, (h, b), numel(h, b, dy)),
            ("segment_wgrad", wgrad, (x, dy, h), numel(x, dy, h, h, a, b)),
        ):
            ours, truth = self.segment_op(op, run, *given)
            self.time(f"{op} {size}", ours, truth, x.element_size() * moved)
        for case, given in (("y", (x, w, h, b)), ("dX", (dy, w.t(), h, up))):
            ours, truth = self.segment_op("segment_gemm", gemm, *given)
            frozen = {"torch": Contender(functools.partial(torch.mm, given[0], given[1].t()))}
            truths = dict.fromkeys(ours, truth)
            truths["torch"] = (given[0].double() @ given[1].double().t(),)
            self.time(f"segment_gemm {case} {size}", frozen | ours, truths)

    def segment_op(
        self, op: str, run: Callable[..., tuple[Tensor, ...]], *given: Tensor
    ) -> tuple[dict[str, Contender], tuple[Tensor, ...]]:
        """Who runs an op with segments here, and its results in fp64."""
        ours = {
            f"fastlora-{backend}": Contender(
                functools.partial(run, *given),
                functools.partial(fastlora.backend, backend, strict=True),
            )
            for backend in self.backends(op)
        }
        with fastlora.backend("torch", strict=True):
            return ours, run(*(t.double() for t in given))

    def dequantize(self, n: int, k: int) -> None:
        """A 4-bit weight in the compute dtype, its scales quantised."""
        weight = NF4Tensor.quantize(self.random(n, k))
        contenders = {
            f"fastlora-{backend}": Contender(
                weight.dequantize, functools.partial(fastlora.backend, backend, strict=True)
            )
            for backend in self.backends("dequantize")
        }
        if self.on_gpu and importlib.util.find_spec("bitsandbytes"):
            from bitsandbytes.functional import dequantize_4bit

            param = weight.to_bitsandbytes()
            contenders["bitsandbytes"] = Contender(
                lambda: dequantize_4bit(param.data, param.quant_state)
            )
        moved = weight.nbytes + n * k * self.dtype.itemsize
        codes, scales = weight.codes.cpu(), [t.cpu() for t in weight.scales]
        with fastlora.backend("torch"):
            truth = ops.dequantize(codes, scales, weight.form, self.dtype).to(self.device)
        self.time(f"dequantize {n}x{k}", contenders, (truth.double(),), moved)

    def run(self) -> None:
        rows = (8192, 2048) if self.on_gpu else (128,)
        shapes = SHAPES if self.on_gpu else SMALL
        for m in rows:
            for k, n in shapes:
                self.gemm(m, k, n)
        wide = shapes[:3] if self.on_gpu else shapes
        for k in sorted({k for k, _ in wide}):
            self.down(rows[0], k)
        for k, n in wide:
            self.wgrad(rows[0], k, n)
        for k, n in wide:
            self.segments(rows[0], k, n)
        for n, k in wide:
            self.dequantize(n, k)

    def tables(self):  # type: ignore[no-untyped-def]
        return [
            (
                f"gemm, m x k x n: time over torch's; segment_gemm of {SEGMENTS} segments likewise",
                lambda row: row.ratio,
            ),
            (f"Share of the copy bandwidth, from clean caches, rank {RANK}", lambda row: row.share),
        ]

    def notes(self) -> list[str]:
        contenders = dict.fromkeys(row.contender for row in self.rows)
        means = {name: geometric_mean(self.rows, name) for name in contenders}
        return [f"- `{name}`: geometric mean {mean:.3f}" for name, mean in means.items() if mean]


def geometric_mean(rows: list[Row], contender: str) -> float | None:
    """Of the contender's ratios, over all GEMMs."""
    gemms = (row for row in rows if row.case.startswith("gemm "))
    ratios = [row.ratio.median for row in gemms if row.contender == contender and row.ratio]
    return float(torch.tensor(ratios).log().mean().exp()) if ratios else None


def main(arguments: list[str] | None = None) -> int:
    return bench.main(KernelBench, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
