"""``fastlora quantize``: a model's folder in 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..training.errors import InputError
from .app import told_errors
from .options import checkpoint_folder


def quantize_command(
    model: Annotated[str, typer.Argument(help="Local transformers directory, with safetensors.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")
    ],
    block_size: Annotated[
        int, typer.Option("--block-size", help="Elements that share a scale: 32, 64, ... 4096.")
    ] = 64,
    double_quant: Annotated[
        bool, typer.Option("--double-quant/--no-double-quant", help="Quantise the scales too.")
    ] = True,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Write a model in NF4 (bitsandbytes' layout): transformers and fastlora.load_quantized read it."""
    with told_errors(debug):
        directory = checkpoint_folder(model, output)
        from rich.console import Console

        from ..io.quantize import quantize_checkpoint
        from ..training import base

        console = Console(stderr=True)
        try:
            with base.quiet_transformers(), console.status("quantising") as status:
                names = quantize_checkpoint(
                    directory,
                    output,
                    block_size,
                    double_quant,
                    base.pick_device(device),
                    progress=lambda name: status.update(f"quantising {name}"),
                )
        except (FileNotFoundError, ValueError) as error:
            raise InputError(str(error)) from error
        before, after = (sum(f.stat().st_size for f in Path(d).glob("*.safetensors")) for d in (directory, output))  # fmt: skip
        typer.echo(f"{output}: {len(names)} linears in NF4, {before / 2**20:,.1f} -> {after / 2**20:,.1f} MiB")  # fmt: skip
