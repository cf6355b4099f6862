"""``fastlora bench``: the project's benchmark on the user's own machine, by the project's own timing rule."""

from __future__ import annotations

import functools
import re
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

bench_app = typer.Typer(
    no_args_is_help=True, help="Time fastlora against torch and peft on this machine."
)

_GPU_SHAPES = ["8192x4096x4096", "8192x4096x14336", "8192x14336x4096"]
_CPU_SHAPES = ["256x512x512"]


class Dtype(str, Enum):
    """Dtypes by the names people type."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class BackendName(str, Enum):
    """Backends of ``fastlora.backend``."""

    torch = "torch"
    triton = "triton"
    cuda = "cuda"


_DTYPE_NAMES = {Dtype.bf16: "bfloat16", Dtype.fp16: "float16", Dtype.fp32: "float32"}


@bench_app.callback()
def _group() -> None:
    # A sub-app of a single command would swallow the command's name; with a callback it stays a group.
    pass


def parse_shape(text: str) -> tuple[int, int, int]:
    """``"8192x4096x14336"`` -> (M, K, N).

    Raises:
        typer.BadParameter: anything but three positive integers joined by x.
    """
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", text):
        raise typer.BadParameter(
            f"got {text!r}; accepted is MxKxN, rows x in_features x out_features, as in 8192x4096x14336",
            param_hint="--shape",
        )
    m, k, n = map(int, text.split("x"))
    return m, k, n


@bench_app.command()
def linear(
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="MxKxN", help="Rows x in x out features; may be repeated."),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, max=512)] = 16,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Default: bf16 on a GPU, fp32 on a CPU.")
    ] = None,
    dropout: Annotated[float, typer.Option(min=0.0, max=0.99, help="On the low-rank path.")] = 0.0,
    backend: Annotated[
        list[BackendName] | None,
        typer.Option(help="fastlora backends to time; may be repeated. Default: all."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=15, help="Timed rounds of each contender.")] = 25,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", file_okay=False, help="Write JSON, Markdown and a chart here."),
    ] = None,
) -> None:
    """Forward and forward + backward of one LoRA linear, as ratios to the frozen GEMMs alone.

    Contenders: plain torch, peft (default, 16-bit, compiled), matmul + addmm_, and fastlora on each backend.
    Ends with code 1 when no fastlora backend could be timed.
    """
    import torch

    from ..testing.bench_report import print_table, save_all, save_json
    from ..testing.linear_bench import LinearBench, Report
    from ..testing.providers import Case, all_providers
    from ..testing.timing import Rule

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        typer.echo("No GPU: these are figures of this CPU; they say nothing about a GPU.")
    name = _DTYPE_NAMES[dtype or (Dtype.bf16 if on_gpu else Dtype.fp32)]
    cases = [
        Case(*parse_shape(text), r=rank, dtype=name, dropout=dropout)
        for text in dict.fromkeys(shape or (_GPU_SHAPES if on_gpu else _CPU_SHAPES))
    ]
    wanted = {f"fastlora-{each.value}" for each in backend or BackendName}
    if not backend:
        wanted.add("fastlora")
    providers = {
        label: provider
        for label, provider in all_providers().items()
        if not provider.ours or label in wanted
    }

    def save(report: Report) -> None:
        if output is not None:
            save_json(report, output)

    bench = LinearBench(
        torch.device("cuda" if on_gpu else "cpu"),
        providers,
        Rule(rounds=rounds),
        progress=functools.partial(print, flush=True),
    )
    report = bench.run(cases, save=save)
    print_table(report)
    for path in save_all(report, output) if output is not None else ():
        typer.echo(str(path))
    if not any(row.ratio for row in report.rows if row.provider in wanted):
        raise typer.Exit(1)
