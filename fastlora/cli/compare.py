"""``fastlora compare``: methods side by side on the same data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..training.config import FinetuneConfig
from ..training.errors import InputError
from ..training.methods import METHODS, names
from .app import told_errors
from .finetune import chosen_share, finetune_command
from .options import borrow, on_the_command_line

if TYPE_CHECKING:
    from ..training.compare import Row

# Not what a comparison decides itself, nor a limit that would give each method other steps.
_OWN = {"context", "method", "output", "max_minutes", "sample_prompt", "sample_tokens"}
_OWN |= {"resume", "overwrite", "debug"}
_FROM_FINETUNE = {field.name for field in dataclasses.fields(FinetuneConfig)} - _OWN


@borrow(finetune_command, _FROM_FINETUNE)
def compare_command(
    context: typer.Context,
    methods: Annotated[
        str, typer.Option("--methods", help=f"all, or some of {names(METHODS)}, split by commas.")
    ] = "lora,qlora,full",
    learning_rates: Annotated[
        str | None,
        typer.Option(
            "--learning-rates",
            help="METHOD=RATE, split by commas. Else --learning-rate is LoRA's, and others' rates stand to it as their defaults "
            "do: full takes a tenth.",
        ),
    ] = None,
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", help="Directory for the table, the plot, and a run of each method."
        ),
    ] = "fastlora-compare",
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue the comparison in --output; finished runs are kept."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the comparison in --output.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    **options: Any,
) -> None:
    """Train by several methods, full fine-tuning among them, on the same data and steps, and print a table of them.

    Trained share, size of what is saved, time of a step, peak memory, perplexity on the task and (with --watch FILE) on
    general text, before and after, and on a GPU the energy. Leaves compare.json, compare.md, compare.png and each run in
    --output.
    """
    given = {name for name in options if on_the_command_line(context, name)}
    with told_errors(debug):
        if resume and overwrite:
            raise InputError("--resume and --overwrite exclude each other")
        options["trainable_share"] = chosen_share(options["trainable_share"])
        chosen = [name.strip() for name in methods.split(",") if name.strip()]
        chosen = list(METHODS) if chosen == ["all"] else chosen
        rates = _rates(learning_rates)
        from ..training.compare import Comparison, compare

        if resume:
            saved = Comparison(output).read()
            config = FinetuneConfig.from_json({**saved["config"], "method": FinetuneConfig.method})
            config = dataclasses.replace(config, **{name: options[name] for name in given})
            if not on_the_command_line(context, "methods"):
                chosen = saved["methods"]
            rates = saved.get("learning_rates", {}) if rates is None else rates
        else:
            for name in ("model", "data"):
                if options[name] is None:
                    raise InputError(f"--{name} is missing")
            config = FinetuneConfig(**options)
        config = dataclasses.replace(config, output=output)
        rows = compare(config, chosen, rates, resume=resume, overwrite=overwrite)
        _print(rows, Path(output))


def _rates(text: str | None) -> dict[str, float] | None:
    """--learning-rates: method -> rate."""
    if text is None:
        return None
    rates = {}
    for part in text.split(","):
        method, _, rate = part.partition("=")
        try:
            rates[method.strip()] = float(rate)
        except ValueError:
            raise InputError(f"--learning-rates {part!r} is not METHOD=RATE") from None
    return rates


def _print(rows: list[Row], output: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from ..training.compare import Comparison, notes

    table = Table(*rows[0].cells(), box=box.SIMPLE)
    for row in rows:
        table.add_row(*row.cells().values())
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table)
    out = Comparison(output)
    for line in (*notes(rows), "", f"table: {out.table}", f"plot:  {out.plot}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
