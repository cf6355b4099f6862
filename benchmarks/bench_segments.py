"""Rows of one batch with different adapters: ``python -m benchmarks.bench_segments [--rounds N] [--out DIR] [--device D]``.

A batch of 8192 rows is cut at random into contiguous segments, each with a LoRA adapter of rank 16 of its own. Ratios are to
the frozen GEMMs of the same run, x W^T and, with backward, dY W, and in the second table to fastlora with one adapter for all
rows: 1.00 would be a mixed batch at the price of an unmixed one. "loop" composes torch's own linears per segment, as PEFT's
mixed batches do, but of slices and one concatenation rather than of index lists. Contenders are held to the formula in fp64
before they are timed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

import fastlora
from benchmarks import bench
from benchmarks.bench import Bench, Row
from fastlora import reference
from fastlora.testing.timing import Contender, Interval, median_interval

SHAPE, COUNTS = (8192, 4096, 4096), (1, 8, 64)  # M, K, N
SHAPE_CPU, COUNTS_CPU = (64, 64, 96), (1, 4)
RANK, SCALING = 16, 2.0
FROZEN, ONE, SEGMENTS, LOOP = "frozen", "fastlora one adapter", "fastlora segments", "loop"


class SegmentsBench(Bench):
    """Forward, and forward + backward, of batches cut into more and more segments."""

    name, title = "segments", "Linears whose rows have different adapters"

    def run(self) -> None:
        shape, counts = (SHAPE, COUNTS) if self.on_gpu else (SHAPE_CPU, COUNTS_CPU)
        for train, count in itertools.product((False, True), counts):
            self.segments(*shape, count, train)

    def segments(self, m: int, k: int, n: int, count: int, train: bool) -> None:
        """y, or y and the gradients of x and of every A and B."""
        w, dy = self.random(n, k), self.random(m, n)
        leaves = [self.random(m, k), self.random(count, RANK, k), self.random(count, n, RANK)]
        single = [leaves[0], leaves[1][0].clone(), leaves[2][0].clone()]
        for leaf in (*leaves, *single):
            leaf.requires_grad_(train)
        edges = self.edges(m, count)
        offsets = torch.tensor(edges, device=self.device)

        def call(run: Callable[..., Tensor], leaves: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:  # fmt: skip
            def forward() -> tuple[Tensor, ...]:
                with torch.no_grad():
                    return (run(*leaves),)

            def both() -> tuple[Tensor, ...]:
                y = run(*leaves)
                return (y, *torch.autograd.grad(y, leaves, dy.to(y.dtype)))

            return both if train else forward

        def frozen() -> tuple[Tensor, ...]:
            y = leaves[0].detach() @ w.t()
            return (y, dy @ w) if train else (y,)

        def loop(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            spans = enumerate(itertools.pairwise(edges))
            low = [linear(linear(x[i:j], a[e]), b[e]) * SCALING for e, (i, j) in spans]
            return linear(x, w) + torch.cat(low)

        def ours(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return fastlora.lora_linear_segments(x, w, a, b, offsets, SCALING)

        contenders = {
            FROZEN: Contender(frozen),
            ONE: Contender(call(lambda x, a, b: fastlora.lora_linear(x, w, a, b, SCALING), single)),
            SEGMENTS: Contender(call(ours, leaves)),
            LOOP: Contender(call(loop, leaves)),
        }
        if self.on_gpu:
            within = functools.partial(fastlora.backend, "triton", strict=True)
            contenders["fastlora-triton segments"] = Contender(call(ours, leaves), within)
        wide = w.double()
        mixed = call(
            lambda x, a, b: reference.lora_linear_segments(x, wide, a, b, offsets, SCALING),
            _exact(leaves, train),
        )()
        truth = dict.fromkeys(contenders, mixed)
        truth[ONE] = call(
            lambda x, a, b: reference.lora_linear(x, wide, a, b, SCALING), _exact(single, train)
        )()
        base = leaves[0].detach().double() @ wide.t()
        truth[FROZEN] = (base, dy.double() @ wide) if train else (base,)
        pieces = "1 segment" if count == 1 else f"{count} segments"
        case = f"{'f+b' if train else 'fwd'} {m}x{k}x{n} {pieces}"
        self.time(case, contenders, truth, tolerance=2**-6)

    def edges(self, m: int, count: int) -> list[int]:
        """0, cuts drawn uniformly, m: segments as uneven as intervals between random arrivals are."""
        cuts = torch.randint(
            1, m, (count - 1,), generator=torch.Generator().manual_seed(self.rule.seed)
        )
        return [0, *cuts.sort().values.tolist(), m]

    def over_one(self, row: Row) -> Interval | None:
        """Time over that of one adapter for all rows, round by round."""
        one = next(r for r in self.rows if (r.case, r.contender) == (row.case, ONE))
        if not row.times_us or not one.times_us:
            return None
        pairs = zip(row.times_us, one.times_us, strict=True)
        return median_interval([ours / theirs for ours, theirs in pairs], self.rule)

    def tables(self):  # type: ignore[no-untyped-def]
        return [
            ("m x k x n: time over the frozen GEMMs", lambda row: row.ratio),
            ("m x k x n: time over fastlora with one adapter for all rows", self.over_one),
        ]


def _exact(leaves: list[Tensor], train: bool) -> list[Tensor]:
    return [t.detach().double().requires_grad_(train) for t in leaves]


def main(arguments: list[str] | None = None) -> int:
    return bench.main(SegmentsBench, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
