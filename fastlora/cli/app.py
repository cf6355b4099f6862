"""The typer application: its commands, and how errors leave it."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator
from typing import Annotated

import typer

app = typer.Typer(
    name="fastlora",
    help="Low-rank adaptation at the price of the frozen linear.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@contextlib.contextmanager
def told_errors(debug: bool) -> Iterator[None]:
    """Turn errors into one message on stderr and an exit code; ``debug`` shows tracebacks."""
    from ..training.errors import FineTuneError

    try:
        yield
    except FineTuneError as error:
        if debug:
            raise
        _tell(str(error))
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        if debug:
            raise
        _tell("interrupted; what was saved before stays")
        raise typer.Exit(130) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug:
            raise
        _tell(f"{type(error).__name__}: {error} (--debug shows where)")
        raise typer.Exit(1) from None


def _tell(message: str) -> None:
    typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"fastlora {importlib.metadata.version('fastlora')}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def doctor() -> None:
    """Print versions, what was compiled, what this machine can run; test every op."""
    from .doctor import doctor_command  # imports torch, which --help can do without

    doctor_command()


def _register() -> None:
    from .bench import bench_app
    from .compare import compare_command
    from .estimate import estimate_command
    from .finetune import finetune_command
    from .generate import generate_command
    from .merge import merge_command
    from .quantize import quantize_command

    app.command("finetune")(finetune_command)
    app.command("compare")(compare_command)
    app.command("estimate")(estimate_command)
    app.command("generate")(generate_command)
    app.command("merge")(merge_command)
    app.command("quantize")(quantize_command)
    app.add_typer(bench_app, name="bench")


_register()
