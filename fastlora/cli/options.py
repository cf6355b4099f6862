"""What several commands share: options, declared once by ``fastlora finetune``, and folders that are read and written."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import typer

from ..training.errors import InputError


def borrow(source: Callable[..., None], names: Collection[str]) -> Callable[..., Any]:
    """Decorator: a command's ``**options`` are these of ``source``'s options, with their help and defaults."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())
        theirs = inspect.signature(source, eval_str=True).parameters
        borrowed = [p for name, p in theirs.items() if name in names]
        taken = [p for p in own if p.kind is not p.VAR_KEYWORD]
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [p.replace(kind=p.KEYWORD_ONLY) for p in (*taken, *borrowed)]
        )
        return command

    return decorate


def on_the_command_line(context: typer.Context, name: str) -> bool:
    """Whether an option was given, rather than left at its default."""
    # By name: which click holds the enum, typer's own or the package, depends on the version.
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def checkpoint_folder(model: str, output: Path) -> Path:
    """The folder of ``model``'s safetensors, which are written anew to ``output``; ``InputError`` if one of them cannot be."""
    from ..training import base

    if output.exists():
        raise InputError(f"--output {output} exists already; give another folder")
    directory, gguf = base.locate(model)
    if gguf is not None:
        raise InputError(f"{model} is a .gguf file; give a folder with safetensors")
    return directory
