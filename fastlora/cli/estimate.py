"""``fastlora estimate``: will it fit, how big is the adapter, how long does it take."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..training.config import FinetuneConfig
from ..training.errors import InputError
from ..training.methods import METHOD_OPTIONS, METHODS
from .app import told_errors
from .finetune import chosen_share, finetune_command
from .options import borrow

if TYPE_CHECKING:
    from ..training.estimate import Estimate

GIB = 2**30
_FROM_FINETUNE = {
    *("model", "data", "eval_data", "eval_fraction", "eval_tokens", "loss_on", "packing", "method"),
    *("seq_length", "batch_size", "grad_accumulation", "epochs", "max_steps", "seed", "dtype"),
    "gradient_checkpointing",
    *METHOD_OPTIONS,
} - {"alpha", "init", "prompt_text"}  # which change no shape


@borrow(finetune_command, _FROM_FINETUNE)
def estimate_command(
    card: Annotated[
        float | None,
        typer.Option("--card", help="GiB of the card: does it fit, beside the CUDA context?"),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="H100, A100, RTX 4090, ...: for the time. Else this machine."),
    ] = None,
    tokens_per_second: Annotated[
        float | None,
        typer.Option("--tokens-per-second", help="For the time, where the speed is known."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    **options: Any,
) -> None:
    """Tell what a run of finetune takes: memory, the adapter's size, time. Reads config.json, no weights.

    Memory is a GPU's, within a few per cent of what was measured. With --data the number of steps is known, and so the time
    of the whole run.
    """
    with told_errors(debug):
        options["trainable_share"] = chosen_share(options["trainable_share"])
        if options["model"] is None:
            raise InputError("--model is missing")
        options["data"] = options["data"] or ""
        config = FinetuneConfig(**options)
        from ..training.estimate import estimate

        made = estimate(config, card, gpu, tokens_per_second)
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(made)))
        else:
            _print(made, options["model"])


def _print(made: Estimate, model: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_header=False, title=None)
    for row in rows(made):
        table.add_row(*row)
    rank = "" if made.rank is None else f" r={made.rank}"
    console = Console()
    console.print(
        f"{model}: {made.method}{rank}, {made.batch_size} x {made.seq_length} tokens, {made.dtype}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    console.print(table)


def rows(made: Estimate) -> list[tuple[str, str]]:
    """What the table says."""
    from ..training.display import clock
    from ..training.estimate import CONTEXT_GIB

    held = made.weights_bytes + made.optimizer_bytes
    lines = [
        (
            "parameters trained",
            f"{made.trained_parameters:,} of {made.total_parameters:,} "
            f"({made.trained_parameters / made.total_parameters:.2%})",
        ),
        (
            "model file" if METHODS[made.method].configuration is None else "adapter file",
            f"{made.saved_bytes / 2**20:,.1f} MiB",
        ),
        ("weights", f"{made.weights_bytes / GIB:.2f} GiB"),
        ("optimizer", f"{made.optimizer_bytes / GIB:.2f} GiB"),
        (
            "activations, gradients",
            f"{(made.peak_allocated_bytes - held) / GIB:.2f} GiB at the peak",
        ),
        ("peak allocated", f"{made.peak_allocated_bytes / GIB:.2f} GiB"),
        ("peak reserved", f"{made.peak_reserved_bytes / GIB:.2f} GiB"),
    ]
    if made.card_bytes is not None:
        room = made.card_bytes / GIB - CONTEXT_GIB
        verdict = "fits" if made.fits else "does not fit"
        lines.append(
            (
                f"card of {made.card_bytes / GIB:g} GiB",
                f"{verdict}: {room:.2f} GiB beside the CUDA context",
            )
        )
    lines.append(("operations", f"{made.flops_per_token / 1e9:,.2f} GFLOP a token"))
    if made.tokens_per_second is None or made.step_seconds is None:
        lines.append(("time", "not known: give --gpu or --tokens-per-second"))
        return lines
    lines.append(("speed", f"{made.tokens_per_second:,.0f} tokens/s ({made.rate_from})"))
    lines.append(("step", f"{made.step_seconds:.3g} s"))
    if made.steps is not None and made.seconds is not None:
        lines.append((f"{made.steps:,} steps", clock(made.seconds)))
    return lines
