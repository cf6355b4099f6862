"""The kernels by themselves: ``python -m benchmarks.bench_kernels [--rounds N] [--out DIR] [--device D]``.

The bare GEMM over torch's (cuBLAS on a GPU), both majors of W, and the share of the copy bandwidth that the skinny
products and the dequantisation of NF4 reach: bytes they must read and write, over the time, over what a copy of the same run moves, from caches that
hold nothing to write back. Launch included, caches flushed; every contender is held to fp64 before it is timed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import fastlora
from benchmarks.options import add_common
from fastlora import NF4Tensor, _library, ops
from fastlora.ops import raw, support
from fastlora.rng import KEEP_ALL
from fastlora.testing.compare import relative_error
from fastlora.testing.environment import environment
from fastlora.testing.timing import (
    Contender,
    DeviceClock,
    Interval,
    Rule,
    Timing,
    describe,
    measure,
    measure_ceilings,
    median_interval,
)

SHAPES = [(4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192), (8192, 28672)]  # K, N
SMALL = [(64, 96), (96, 64)]  # where there is no GPU, to see that it runs
RANK = 16


@dataclass(frozen=True)
class Row:
    """A contender in a case: us per round, its ratio to torch's GEMM, or its share of the copy bandwidth."""

    case: str
    contender: str
    times_us: list[float]
    ratio: Interval | None = None
    share: Interval | None = None
    error: str | None = None


class KernelBench:
    """All cases on one device, in bf16 (fp32 on a CPU)."""

    def __init__(self, device: torch.device, rule: Rule) -> None:
        self.device, self.rule = device, rule
        self.on_gpu = device.type == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.clock = DeviceClock(device)
        self.clean = DeviceClock(device, clean=True)
        self.ceilings = measure_ceilings(device, self.dtype, self.clock, rule)
        self.generator = torch.Generator(device).manual_seed(rule.seed)
        self.rows: list[Row] = []

    def random(self, *shape: int) -> Tensor:
        values = torch.randn(*shape, generator=self.generator, device=self.device)
        return (values * shape[-1] ** -0.5).to(self.dtype)

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
            self._time(f"gemm {name} {m}x{k}x{n}", contenders, truth)

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
        self._time(f"down {m}x{k}", contenders, (x.double() @ a.double().t(),), moved)

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
        self._time(f"wgrad {m}x{k}x{n}", contenders, truth, moved)

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
        self._time(f"dequantize {n}x{k}", contenders, (truth.double(),), moved)

    def _time(
        self,
        case: str,
        contenders: dict[str, Contender],
        truth: tuple[Tensor, ...],
        moved: int | None = None,
    ) -> None:
        """The first contender is the base: without it there are no ratios. ``moved``: bytes, where the share of the bandwidth is asked for."""
        wrong = {name: error for name, c in contenders.items() if (error := _error(c, truth))}
        right = {name: c for name, c in contenders.items() if name not in wrong}
        clock = self.clock if moved is None else self.clean
        timings = measure(right, next(iter(right)), clock, self.rule) if right else {}
        for name in contenders:
            timing = timings.get(name, Timing(error=wrong.get(name)))
            share = None
            if moved is not None and timing.times_us:
                bound_us = moved / self.ceilings.copy_bytes_per_s * 1e6
                share = median_interval([bound_us / us for us in timing.times_us], self.rule)
            ratio = timing.ratio if moved is None and next(iter(contenders)) in right else None
            self.rows.append(Row(case, name, timing.times_us, ratio, share, timing.error))
            print(f"{case:28} {name:16} {ratio or share or timing.error}", flush=True)

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
        for n, k in wide:
            self.dequantize(n, k)


def _error(contender: Contender, truth: tuple[Tensor, ...]) -> str | None:
    """What is wrong with its results: more than two roundings to bf16 off, over the norm of each."""
    try:
        with contender.around():
            result = contender.run()
    except Exception as error:  # whatever a contender raises is its result
        return describe(error)
    results = (result,) if isinstance(result, Tensor) else result
    assert isinstance(results, tuple)
    errors = [relative_error(got, true) for got, true in zip(results, truth, strict=True)]
    right = all(error < 2**-7 for error in errors)  # not so of NaN
    return None if right else f"wrong result: relative error {max(errors):.2g}"


def geometric_mean(rows: list[Row], contender: str) -> float | None:
    """Of the contender's ratios, over all GEMMs."""
    ratios = [row.ratio.median for row in rows if row.contender == contender and row.ratio]
    return float(torch.tensor(ratios).log().mean().exp()) if ratios else None


def as_dict(bench: KernelBench) -> dict[str, Any]:
    return {
        "schema": 1,
        "benchmark": "kernels",
        "environment": environment(bench.device),
        "rule": asdict(bench.rule),
        "flush_bytes": bench.clock.flush_bytes,
        "ceilings": asdict(bench.ceilings),
        "rows": [asdict(row) for row in bench.rows],
    }


def markdown(bench: KernelBench, where: dict[str, Any]) -> str:
    contenders = list(dict.fromkeys(row.contender for row in bench.rows))
    lines = [
        f"# Kernels on {where['device']}",
        "",
        f"{where['date']}, commit `{where['commit']}`, torch {where['torch']}, triton {where['triton']}. "
        f"{bench.rule.rounds} interleaved rounds, caches flushed, the host far ahead, a launch included. "
        f"Copy {bench.ceilings.copy_bytes_per_s / 1e12:.3g} TB/s (read + written). "
        "Written by `python -m benchmarks.bench_kernels`.",
        "",
    ]

    def table(title: str, cell: Callable[[Row], Interval | None]) -> None:
        found = {(row.case, row.contender): row for row in bench.rows if cell(row) or row.error}
        cases = list(dict.fromkeys(case for case, _ in found))
        named = [c for c in contenders if any(c == name for _, name in found)]
        lines.extend(
            [f"## {title}", "", f"| case | {' | '.join(named)} |", "|---" * (len(named) + 1) + "|"]
        )
        for case in cases:
            rows = [found.get((case, name)) for name in named]
            cells = [str(cell(row) or row.error) if row else "-" for row in rows]
            lines.append(f"| {case} | {' | '.join(cells)} |")
        lines.append("")

    table("gemm, m x k x n: time over torch's", lambda row: row.ratio)
    for name in contenders:
        if mean := geometric_mean(bench.rows, name):
            lines.append(f"- `{name}`: geometric mean {mean:.3f}")
    lines.append("")
    table(f"Share of the copy bandwidth, from clean caches, rank {RANK}", lambda row: row.share)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_kernels", description=__doc__)
    add_common(parser)
    options = parser.parse_args(arguments)
    _library.load(options.device)
    bench = KernelBench(options.device, Rule(rounds=options.rounds))
    bench.run()
    content = as_dict(bench)
    where = content["environment"]
    stem = "kernels-" + re.sub(r"[^a-z0-9]+", "-", where["device"].lower()).strip("-")
    options.out.mkdir(parents=True, exist_ok=True)
    for ending, text in (
        (".json", json.dumps(content, indent=1, allow_nan=False) + "\n"),
        (".md", markdown(bench, where)),
    ):
        path = options.out / (stem + ending)
        path.write_text(text)
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
