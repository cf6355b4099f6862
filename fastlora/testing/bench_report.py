"""A benchmark report as files and as a terminal table. JSON is the record; Markdown and the chart are read from it."""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from .environment import file_stem
from .linear_bench import Report, Row
from .providers import BASE

_OURS, _PEERS = "#ee8866", "#77aadd"
_CHART_RANGE = 0.9, 2.0  # of the ratio; a bar that leaves it is cut and still says how long it is


def stem(report: Report) -> str:
    """File name without ending: ``linear-nvidia-h200``."""
    return file_stem("linear", report.environment)


def save_json(report: Report, directory: Path) -> Path:
    """Write the JSON file, whole or not at all; called after every case, so that an interrupted run keeps what it has."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{stem(report)}.json"
    partial = path.with_suffix(".json.partial")
    content = report.as_dict()
    rows = ",\n  ".join(json.dumps(row, allow_nan=False) for row in content.pop("rows"))
    head = json.dumps(content, indent=1, allow_nan=False).removesuffix("\n}")
    partial.write_text(
        f'{head},\n "rows": [\n  {rows}\n ]\n}}\n'
    )  # a row a line: a diff stays readable
    os.replace(partial, path)
    return path


def save_all(report: Report, directory: Path) -> list[Path]:
    """Write JSON, Markdown and, where anything was timed, the chart; returns the paths written."""
    paths = [save_json(report, directory), directory / f"{stem(report)}.md"]
    paths[1].write_text(markdown(report))
    if any(row.ratio for row in report.rows):
        paths.append(directory / f"{stem(report)}.png")
        chart(report, paths[2])
    return paths


def _timed(report: Report, direction: str) -> dict[str, dict[str, Row]]:
    """Rows of one pass: case -> provider -> row."""
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in report.rows:
        if row.direction == direction:
            found[row.case][row.provider] = row
    return found


# ---- Markdown ------------------------------------------------------------------------------------------------


def markdown(report: Report) -> str:
    """The report for a reader: ratios with intervals, host loops, roofline, kernels, and what did not run."""
    rule, where = report.rule, report.environment
    lines = [f"# LoRA linear on {where['device']}", ""]
    if where["device"].startswith("CPU"):
        lines += [
            "**CPU figures: they show that the benchmark runs, and say nothing about a GPU.**",
            "",
        ]
    lines += [
        f"{where['date']}, commit `{where['commit']}`, {report.seconds:.0f} s. "
        + ", ".join(
            f"{key} {where[key]}"
            for key in ("torch", "triton", "peft", "cuda", "driver")
            if key in where
        ),
        "",
        f"Contenders interleaved in {rule.rounds} rounds of shuffled order, {report.flush_bytes / 2**20:.0f} MiB "
        "written before each timed call to flush the caches, the host far ahead. A cell is the median of the per-round ratios to "
        f"`{BASE}` with its bootstrap {rule.confidence:.0%} interval. Written by `python -m benchmarks.bench_linear`.",
        "",
    ]
    for dtype, ceiling in report.ceilings.items():
        lines += [
            f"Measured ceilings, {dtype}: GEMM {ceiling.gemm_flops_per_s / 1e12:.4g} TFLOP/s, copy "
            f"{ceiling.copy_bytes_per_s / 1e12:.3g} TB/s (read + written).",
            "",
        ]
    lines += ["| provider | what it is |", "|---|---|"]
    lines += [f"| `{name}` | {about} |" for name, about in report.providers.items()] + [""]
    for direction in ("fwd+bwd", "fwd"):
        rows = _timed(report, direction)
        lines += _pivot(
            report,
            f"{direction}: time over the frozen GEMMs",
            rows,
            lambda row: row.ratio,
            base=True,
        )
        title = f"{direction}: host loop (100 calls back to back, host time included) over the frozen GEMMs"
        lines += _pivot(report, title, rows, lambda row: row.loop_ratio)
        title = f"{direction}: percent of the roofline at the measured ceilings"
        lines += _pivot(
            report, title, rows, lambda row: row.roofline_percent and f"{row.roofline_percent:.0f}"
        )
    return "\n".join(lines + _kernel_lines(report) + _missing_lines(report)) + "\n"


def _pivot(
    report: Report, title: str, rows: dict[str, dict[str, Row]], cell: Any, base: bool = False
) -> list[str]:
    """One table, cases down and providers across; providers without any value are left to the list of what is missing."""
    names = [
        name
        for name in report.providers
        if any(name in by and cell(by[name]) for by in rows.values())
    ]
    names = [name for name in names if name != BASE]
    cases = [
        case for case, by in rows.items() if any(name in by and cell(by[name]) for name in names)
    ]
    if not cases:
        return []
    head = ["case"] + ([f"{BASE}, us"] if base else []) + names
    lines = [f"## {title}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for case in cases:
        cells = [case]
        if base:
            cells.append(_microseconds(rows[case].get(BASE)))
        cells += [
            str(cell(rows[case][name]) or "-") if name in rows[case] else "-" for name in names
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _microseconds(row: Row | None) -> str:
    return "-" if row is None or row.median_us is None else f"{row.median_us:.1f}"


def _kernel_lines(report: Report) -> list[str]:
    rows = [row for row in report.rows if row.launches or row.kernels]
    if not rows:
        return []
    lines = [
        "## What fastlora launched",
        "",
        "| case | pass | provider | launches | kernels (us in one call) |",
    ]
    lines += ["|---|---|---|---|---|"]
    for row in rows:
        launches = ", ".join(f"{op} x{count}" for op, count in row.launches.items())
        kernels = ", ".join(
            f"`{_short(k['name'])}` x{k['count']} ({k['us']:.1f})" for k in row.kernels
        )
        lines.append(
            f"| {row.case} | {row.direction} | {row.provider} | {launches} | {kernels or '-'} |"
        )
    return [*lines, ""]


def _short(kernel: str) -> str:
    """A kernel's name without its template and argument lists."""
    name = re.split(r"[<(]", kernel.removeprefix("void "), maxsplit=1)[0].strip()
    return (name or kernel)[:60].replace("|", "/")


def _missing_lines(report: Report) -> list[str]:
    grouped: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row in report.rows:
        if row.status != "ok":
            cases = grouped[row.provider, row.status, row.reason or ""]
            if row.case not in cases:
                cases.append(row.case)
    if not grouped and not report.left_out:
        return []
    lines = ["## What did not run", ""]
    lines += [f"- {case}: left out: {reason}" for case, reason in report.left_out.items()]
    for (provider, status, reason), cases in grouped.items():
        which = "all cases" if len(cases) == len(report.cases) > 1 else ", ".join(cases)
        lines.append(f"- `{provider}`, {which}: {status}: {reason}")
    return [*lines, ""]


# ---- terminal ------------------------------------------------------------------------------------------------


def print_table(report: Report) -> None:
    """Median ratios, one line per case and pass, with rich; intervals stand in the files and the progress lines."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    names = [name for name in report.providers if name != BASE]
    names = [
        name for name in names if any(row.ratio for row in report.rows if row.provider == name)
    ]
    table = Table(title=f"time over the frozen GEMMs, {report.environment['device']}")
    table.add_column("case", no_wrap=True)
    table.add_column("pass")
    table.add_column(f"{BASE}, us", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for direction in ("fwd+bwd", "fwd"):
        for case, rows in _timed(report, direction).items():
            cells = [_cell(rows.get(name)) for name in names]
            table.add_row(case, direction, _microseconds(rows.get(BASE)), *cells)
    console.print(table)
    for line in _missing_lines(report)[2:-1]:
        console.print(line, markup=False, highlight=False)


def _cell(row: Row | None) -> str:
    if row is None or row.status == "unsupported":
        return "-"
    return row.status if row.ratio is None else f"{row.ratio.median:.3f}"


# ---- chart ---------------------------------------------------------------------------------------------------


def chart(report: Report, path: Path) -> None:
    """What LoRA adds to the frozen GEMMs, one panel a case: bars from 1.00 to the median ratio, with its interval.

    Forward + backward where it was timed, forward for the rest.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {**_timed(report, "fwd"), **_timed(report, "fwd+bwd")}
    names = [name for name in report.providers if name != BASE]
    names = [
        name for name in names if any(row.ratio for row in report.rows if row.provider == name)
    ]
    columns = min(4, len(panels))
    height = math.ceil(len(panels) / columns)
    size = (3.3 * columns + 1.4, (0.21 * len(names) + 0.8) * height + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(height, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (case, rows) in zip(grid.flat, panels.items(), strict=False):
        for place, name in enumerate(names):
            _bar(axes, place, name, rows.get(name))
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_title(f"{case}, {next(iter(rows.values())).direction}", fontsize=8)
        axes.set_xlim(*_CHART_RANGE)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].invert_yaxis()
    device = report.environment["device"]
    figure.suptitle(
        f"LoRA linear on {device}: time over the frozen GEMMs alone (1.00 costs nothing)",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def _bar(axes: Any, place: int, name: str, row: Row | None) -> None:
    low_end, high_end = _CHART_RANGE
    label = "" if row is None else row.status
    if row is not None and row.ratio is not None:
        ratio, label = row.ratio, f"{row.ratio.median:.3f}"
        shown = min(max(ratio.median, low_end), high_end)
        axes.barh(
            place,
            shown - 1.0,
            left=1.0,
            height=0.7,
            color=_OURS if name.startswith("fastlora") else _PEERS,
        )
        if low_end < ratio.low and ratio.high < high_end:
            spread = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
            axes.errorbar(shown, place, xerr=spread, color="black", linewidth=1, capsize=2)
    axes.text(
        0.99,
        place,
        label,
        fontsize=7,
        va="center",
        ha="right",
        transform=axes.get_yaxis_transform(),
    )
