"""``fastlora generate``: the base model and the adapted one side by side, from the same seed."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..training.config import BACKENDS, DTYPES
from ..training.errors import InputError
from .app import told_errors

if TYPE_CHECKING:
    from ..training.sample import Sampling


def generate_command(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Local transformers directory, or a .gguf file.")
    ],
    adapter: Annotated[
        str, typer.Option("--adapter", "-a", help="Adapter directory (PEFT's layout).")
    ],
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="The text to continue, or with --chat to answer.")
    ],
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt through the chat template.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="Tokens to generate.")
    ] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Below 1 is more cautious.")
    ] = 0.8,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Share of probability to draw from.")
    ] = 0.95,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Both samples are drawn from it.")] = 0,
    dtype: Annotated[str, typer.Option("--dtype", help=f"{', '.join(DTYPES)}.")] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    backend: Annotated[str, typer.Option("--backend", help=f"{', '.join(BACKENDS)}.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Sample with the base model and with the adapter, side by side."""
    with told_errors(debug):
        for name, value, allowed in (("dtype", dtype, DTYPES), ("backend", backend, BACKENDS)):
            if value not in allowed:
                raise InputError(f"--{name} {value!r} is not one of {', '.join(allowed)}")
        from ..training.sample import Sampling

        sampling = Sampling(max_new_tokens, temperature, top_p, greedy, seed)
        sampling.validate()
        base_text, adapted_text = _sample_both(
            model, adapter, prompt, chat, sampling, dtype, device, backend
        )
        if as_json:
            typer.echo(json.dumps({"prompt": prompt, "base": base_text, "adapter": adapted_text}))
        else:
            _print_both(prompt, base_text, adapted_text)


def _sample_both(
    model_path: str,
    adapter: str,
    prompt: str,
    chat: bool,
    sampling: Sampling,
    dtype: str,
    device: str,
    backend: str,
) -> tuple[str, str]:
    from ..io import load_adapter
    from ..ops import backend as backend_of_choice
    from ..training import base
    from ..training.sample import encode_prompt, generate

    if not (Path(adapter) / "adapter_config.json").is_file():
        raise InputError(
            f"--adapter {adapter} holds no adapter_config.json: give a directory written by PEFT or fastlora"
        )
    where = base.pick_device(device)
    if where.type == "cpu":
        base.share_cpu()
    tokenizer = base.load_tokenizer(model_path)
    ids = encode_prompt(prompt, tokenizer, chat)
    model = base.load_model(model_path, base.pick_dtype(dtype, where), where)
    with contextlib.nullcontext() if backend == "auto" else backend_of_choice(backend):
        base_text = generate(model, tokenizer, ids, sampling)
        try:
            adapted = load_adapter(model, adapter)
        except (ValueError, NotImplementedError, OSError) as error:
            raise InputError(
                f"--adapter {adapter} does not fit --model {model_path}: {error}"
            ) from error
        return base_text, generate(adapted, tokenizer, ids, sampling)


def _print_both(prompt: str, base_text: str, adapted_text: str) -> None:
    from rich.columns import Columns
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        typer.echo(
            f"prompt: {prompt}\n\n=== base ===\n{base_text}\n\n=== adapter ===\n{adapted_text}"
        )
        return
    console.print(Panel(Text(prompt), title="prompt"))
    width = console.width // 2 - 1
    console.print(
        Columns(
            [
                Panel(Text(base_text), title="base", width=width),
                Panel(Text(adapted_text), title="adapter", width=width),
            ]
        )
    )
