"""``fastlora merge``: an adapter merged into a model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..training.errors import InputError
from .app import told_errors
from .options import checkpoint_folder


def merge_command(
    model: Annotated[str, typer.Argument(help="Local transformers directory, with safetensors.")],
    adapter: Annotated[str, typer.Argument(help="Folder of an adapter, fastlora's or PEFT's.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")
    ],
    keep_4bit: Annotated[
        bool,
        typer.Option("--keep-4bit", help="Quantise the merged weights of a 4-bit model again."),
    ] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Write a plain checkpoint with the adapter in its weights, layer by layer; transformers loads it."""
    with told_errors(debug):
        directory = checkpoint_folder(model, output)
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        from ..io.merge import merge_checkpoint
        from ..training import base

        columns = TextColumn("merging"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")  # fmt: skip
        console = Console(stderr=True)
        with base.quiet_transformers(), Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("")
            try:
                reports = merge_checkpoint(
                    directory,
                    adapter,
                    output,
                    keep_4bit,
                    base.pick_device(device),
                    progress=lambda key, done, total: bar.update(
                        task, completed=done, total=total, description=key
                    ),
                )
            except (FileNotFoundError, ValueError, NotImplementedError) as error:
                raise InputError(str(error)) from error
        worst = max(reports, key=lambda r: r.error, default=None)
        lost = (
            ""
            if worst is None
            else f"; rounding took at most {worst.error:.2e} of a weight, in {worst.name}"
        )
        typer.echo(f"{output}: {len(reports)} layers merged{lost}")
