"""What the benchmarks of kernels and of 4-bit linears share: contenders held to the truth, timed, and written down."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.options import add_common
from fastlora import _library
from fastlora.testing.compare import relative_error
from fastlora.testing.environment import environment, file_stem
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


@dataclass(frozen=True)
class Row:
    """A contender in a case: us per round, its ratio to torch's GEMM, or its share of the copy bandwidth."""

    case: str
    contender: str
    times_us: list[float]
    ratio: Interval | None = None
    share: Interval | None = None
    error: str | None = None


class Bench:
    """Cases on one device, in bf16 (fp32 on a CPU). Subclasses say which: ``name``, ``title``, ``run``, ``tables``."""

    name = title = ""

    def __init__(self, device: torch.device, rule: Rule) -> None:
        self.device, self.rule = device, rule
        self.on_gpu = device.type == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.clock = DeviceClock(device)
        self.clean = DeviceClock(device, clean=True)
        self.ceilings = measure_ceilings(device, self.dtype, self.clock, rule)
        self.generator = torch.Generator(device).manual_seed(rule.seed)
        self.rows: list[Row] = []

    def run(self) -> None:
        """Every case, into ``rows``."""
        raise NotImplementedError

    def tables(self) -> list[tuple[str, Callable[[Row], Interval | None]]]:
        """Title and cell of each table of the report."""
        raise NotImplementedError

    def notes(self) -> list[str]:
        """Lines under the first table."""
        return []

    def random(self, *shape: int) -> Tensor:
        values = torch.randn(*shape, generator=self.generator, device=self.device)
        return (values * shape[-1] ** -0.5).to(self.dtype)

    def time(
        self,
        case: str,
        contenders: dict[str, Contender],
        truth: dict[str, tuple[Tensor, ...]] | tuple[Tensor, ...],
        moved: int | None = None,
        tolerance: float = 2**-7,
    ) -> None:
        """The first contender is the base: without it there are no ratios. ``moved``: bytes, where the share of the bandwidth is asked for."""
        wrong = {}
        for name, contender in contenders.items():
            true = truth[name] if isinstance(truth, dict) else truth
            if error := _error(contender, true, tolerance):
                wrong[name] = error
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
            print(f"{case:28} {name:22} {ratio or share or timing.error}", flush=True)

    def write(self, folder: Path) -> None:
        """``<name>-<device>.json`` and ``.md``."""
        where = environment(self.device)
        content = {
            "schema": 1,
            "benchmark": self.name,
            "environment": where,
            "rule": asdict(self.rule),
            "flush_bytes": self.clock.flush_bytes,
            "ceilings": asdict(self.ceilings),
            "rows": [asdict(row) for row in self.rows],
        }
        lines = [
            f"# {self.title} on {where['device']}",
            "",
            f"{where['date']}, commit `{where['commit']}`, torch {where['torch']}, triton {where['triton']}. "
            f"{self.rule.rounds} interleaved rounds, caches flushed, the host far ahead, a launch included. "
            f"Copy {self.ceilings.copy_bytes_per_s / 1e12:.3g} TB/s (read + written). "
            f"Written by `python -m benchmarks.bench_{self.name}`.",
            "",
        ]
        for i, (title, cell) in enumerate(self.tables()):
            lines += [*_table(self.rows, title, cell), *(self.notes() if i == 0 else ()), ""]
        stem = file_stem(self.name, where)
        folder.mkdir(parents=True, exist_ok=True)
        for ending, text in (
            (".json", json.dumps(content, indent=1, allow_nan=False) + "\n"),
            (".md", "\n".join(lines)),
        ):
            path = folder / (stem + ending)
            path.write_text(text)
            print(path)


def _table(rows: list[Row], title: str, cell: Callable[[Row], Interval | None]) -> list[str]:
    found = {(row.case, row.contender): row for row in rows if cell(row) or row.error}
    cases = list(dict.fromkeys(case for case, _ in found))
    named = [
        c for c in dict.fromkeys(row.contender for row in rows) if any(c == n for _, n in found)
    ]
    lines = [f"## {title}", "", f"| case | {' | '.join(named)} |", "|---" * (len(named) + 1) + "|"]
    for case in cases:
        these = [found.get((case, name)) for name in named]
        cells = [str(cell(row) or row.error) if row else "-" for row in these]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return [*lines, ""]


def _error(contender: Contender, truth: tuple[Tensor, ...], tolerance: float) -> str | None:
    """What is wrong with its results: further off than ``tolerance``, over the norm of each."""
    try:
        with contender.around():
            result = contender.run()
    except Exception as error:  # whatever a contender raises is its result
        return describe(error)
    results = (result,) if isinstance(result, Tensor) else result
    assert isinstance(results, tuple)
    errors = [relative_error(got, true) for got, true in zip(results, truth, strict=True)]
    right = all(error < tolerance for error in errors)  # not so of NaN
    return None if right else f"wrong result: relative error {max(errors):.2g}"


def main(kind: type[Bench], arguments: list[str] | None = None) -> int:
    """The command line of a benchmark."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.bench_{kind.name}")
    add_common(parser)
    options = parser.parse_args(arguments)
    _library.load(options.device)
    bench = kind(options.device, Rule(rounds=options.rounds))
    bench.run()
    bench.write(options.out)
    return 0
