"""``fastlora finetune``: options to a configuration, a configuration to a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from ..training.config import (
    BACKENDS,
    DTYPES,
    LOSS_ON,
    SCHEDULES,
    FinetuneConfig,
)
from ..training.errors import InputError
from ..training.methods import METHODS, having_told, names
from .app import told_errors
from .options import on_the_command_line

_ADAPTER, _DATA, _TRAINING, _MACHINE = "Adapter", "Data", "Training", "Machine and files"


def _option(*names: str, group: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=group, help=help, **more)


def _of_method(name: str, *flags: str, help: str) -> Any:
    """An option that some methods have: the help says which, and what it is where it is not given."""
    return _option(*flags, group=_ADAPTER, help=f"{help} Of {having_told(name)}")


_RATES = ", ".join(f"{name} {kind.learning_rate:g}" for name, kind in METHODS.items())


def finetune_command(
    context: typer.Context,
    model: Annotated[
        str | None,
        _option(
            "--model", "-m", group=_DATA, help="Local transformers directory, or a .gguf file."
        ),
    ] = None,
    data: Annotated[
        str | None,
        _option(
            "--data",
            "-d",
            group=_DATA,
            help='.txt, or .jsonl with {"prompt","completion"}, {"messages"} or {"text"} on each line.',
        ),
    ] = None,
    output: Annotated[
        str,
        _option(
            "--output",
            "-o",
            group=_DATA,
            help="Directory for the adapter (or model), checkpoints, log and curve.",
        ),
    ] = FinetuneConfig.output,
    eval_data: Annotated[
        str | None,
        _option(
            "--eval-data", group=_DATA, help="Held-out file (else a part of --data is held out)."
        ),
    ] = None,
    eval_fraction: Annotated[
        float,
        _option(
            "--eval-fraction", group=_DATA, help="Share of --data to hold out, chosen by --seed."
        ),
    ] = FinetuneConfig.eval_fraction,
    eval_tokens: Annotated[
        int, _option("--eval-tokens", group=_DATA, help="Evaluate on at most this many tokens.")
    ] = FinetuneConfig.eval_tokens,
    loss_on: Annotated[
        str,
        _option(
            "--loss-on",
            group=_DATA,
            help=f"{' or '.join(LOSS_ON)}: what of a prompt or chat is trained on.",
        ),
    ] = FinetuneConfig.loss_on,
    packing: Annotated[
        bool | None,
        _option(
            "--packing/--no-packing",
            group=_DATA,
            help="Fill blocks of --seq-length with several documents; as a rule, but with virtual tokens.",
        ),
    ] = None,
    seq_length: Annotated[
        int, _option("--seq-length", group=_DATA, help="Tokens in a block.")
    ] = FinetuneConfig.seq_length,
    method: Annotated[
        str,
        _option(
            "--method",
            group=_ADAPTER,
            help=f"{names(METHODS)} (which trains all weights, without an adapter). docs/ has a page on each.",
        ),
    ] = FinetuneConfig.method,
    r: Annotated[int | None, _of_method("r", "--r", "--rank", "-r", help="Rank.")] = None,
    trainable_share: Annotated[
        str | None,
        _of_method(
            "trainable_share",
            "--trainable-share",
            help="Instead of --r: the largest rank that trains no more than this share; 1% or 0.01.",
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        _of_method("alpha", "--alpha", help="Scaling is alpha / r (rslora: alpha / sqrt r)."),
    ] = None,
    dropout: Annotated[
        float | None,
        _of_method("dropout", "--dropout", help="Dropout on the adapter's path."),
    ] = None,
    target_modules: Annotated[
        str | None,
        _of_method(
            "target_modules",
            "--target-modules",
            help="all-linear, names split by commas, or regex:PATTERN; else the places that the architecture is known for.",
        ),
    ] = None,
    init: Annotated[
        str | None,
        _of_method(
            "init",
            "--init",
            help="How the factors begin, else A at random and B at zero: gaussian, orthogonal, eva (from the data), pissa or "
            "olora (not in 4 bits), loftq (in 4 bits).",
        ),
    ] = None,
    loraplus_ratio: Annotated[
        float | None,
        _of_method(
            "loraplus_ratio",
            "--loraplus-ratio",
            help="LoRA+: how many times faster B learns than A; 16, say, with a lower --learning-rate.",
        ),
    ] = None,
    reduction_factor: Annotated[
        float | None,
        _of_method(
            "reduction_factor",
            "--reduction-factor",
            help="The model's width over the bottleneck's.",
        ),
    ] = None,
    activation: Annotated[
        str | None,
        _of_method(
            "activation",
            "--activation",
            help=f"In the bottleneck: {names(METHODS['houlsby'].options['activation'].values)}.",
        ),
    ] = None,
    virtual_tokens: Annotated[
        int | None, _of_method("virtual_tokens", "--virtual-tokens", help="How many.")
    ] = None,
    encoder: Annotated[
        str | None,
        _of_method(
            "encoder",
            "--encoder",
            help="The network that makes virtual tokens in training: none or mlp (prefix_tuning), mlp or lstm (p_tuning).",
        ),
    ] = None,
    encoder_hidden_size: Annotated[
        int | None,
        _of_method(
            "encoder_hidden_size",
            "--encoder-hidden-size",
            help="Its hidden width, else that of a token.",
        ),
    ] = None,
    prompt_text: Annotated[
        str | None,
        _of_method(
            "prompt_text",
            "--prompt-text",
            help="Begin with this text's tokens, repeated or cut; else with some drawn from the vocabulary.",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        _option(
            "--learning-rate",
            "--lr",
            group=_TRAINING,
            help=f"Peak learning rate of AdamW. Default by method, since virtual tokens need a far larger one: {_RATES}.",
        ),
    ] = None,
    schedule: Annotated[
        str,
        _option(
            "--schedule", group=_TRAINING, help=f"{' or '.join(SCHEDULES)}, after the warm-up."
        ),
    ] = FinetuneConfig.schedule,
    warmup: Annotated[
        float, _option("--warmup", group=_TRAINING, help="Share of the run to warm up.")
    ] = FinetuneConfig.warmup,
    weight_decay: Annotated[
        float, _option("--weight-decay", group=_TRAINING, help="AdamW's.")
    ] = FinetuneConfig.weight_decay,
    grad_clip: Annotated[
        float,
        _option("--grad-clip", group=_TRAINING, help="Largest gradient norm; 0 does not clip."),
    ] = FinetuneConfig.grad_clip,
    batch_size: Annotated[
        int, _option("--batch-size", "-b", group=_TRAINING, help="Blocks at once.")
    ] = FinetuneConfig.batch_size,
    grad_accumulation: Annotated[
        int, _option("--grad-accumulation", group=_TRAINING, help="Batches per optimizer step.")
    ] = FinetuneConfig.grad_accumulation,
    epochs: Annotated[
        float,
        _option("--epochs", group=_TRAINING, help="Passes over the data; parts of one are fine."),
    ] = FinetuneConfig.epochs,
    max_steps: Annotated[
        int | None, _option("--max-steps", group=_TRAINING, help="Stop after so many steps.")
    ] = None,
    max_minutes: Annotated[
        float | None,
        _option(
            "--max-minutes",
            group=_TRAINING,
            help="Stop after so many minutes of training; the schedule fits.",
        ),
    ] = None,
    eval_every: Annotated[
        int,
        _option(
            "--eval-every",
            group=_TRAINING,
            help="Evaluate every N steps too; 0: before and after only.",
        ),
    ] = FinetuneConfig.eval_every,
    watch: Annotated[
        str | None,
        _option(
            "--watch",
            group=_DATA,
            help="General text whose perplexity is reported beside the task's: what is forgotten.",
        ),
    ] = None,
    unfreeze_over: Annotated[
        float,
        _option(
            "--unfreeze-over",
            group=_TRAINING,
            help="Share of the run over which layers begin to train, last one first; 0: all at once.",
        ),
    ] = FinetuneConfig.unfreeze_over,
    gradient_checkpointing: Annotated[
        bool,
        _option(
            "--gradient-checkpointing",
            group=_TRAINING,
            help="Recompute activations: less memory, slower.",
        ),
    ] = FinetuneConfig.gradient_checkpointing,
    seed: Annotated[
        int, _option("--seed", group=_TRAINING, help="Of data order, split, adapter and dropout.")
    ] = (FinetuneConfig.seed),
    dtype: Annotated[
        str, _option("--dtype", group=_MACHINE, help=f"{', '.join(DTYPES)}: of the frozen model.")
    ] = FinetuneConfig.dtype,
    device: Annotated[
        str, _option("--device", group=_MACHINE, help="auto, cpu, cuda, cuda:1, ...")
    ] = FinetuneConfig.device,
    backend: Annotated[
        str,
        _option(
            "--backend",
            group=_MACHINE,
            help=f"{', '.join(BACKENDS)}: fastlora's kernels to prefer.",
        ),
    ] = FinetuneConfig.backend,
    deterministic: Annotated[
        bool,
        _option(
            "--deterministic/--no-deterministic",
            group=_MACHINE,
            help="Ask torch for repeatable kernels too.",
        ),
    ] = FinetuneConfig.deterministic,
    save_every: Annotated[
        int,
        _option(
            "--save-every", group=_MACHINE, help="Checkpoint every N steps; 0: at the end only."
        ),
    ] = FinetuneConfig.save_every,
    keep_last: Annotated[
        int, _option("--keep-last", group=_MACHINE, help="Checkpoints to keep.")
    ] = FinetuneConfig.keep_last,
    sample_prompt: Annotated[
        str | None,
        _option(
            "--sample-prompt", group=_MACHINE, help="Continue this text before and after training."
        ),
    ] = None,
    sample_tokens: Annotated[
        int, _option("--sample-tokens", group=_MACHINE, help="Tokens of that sample.")
    ] = FinetuneConfig.sample_tokens,
    resume: Annotated[
        bool,
        _option(
            "--resume",
            group=_MACHINE,
            help="Continue the run in --output; its options are those it began with.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, _option("--overwrite", group=_MACHINE, help="Replace the run in --output.")
    ] = False,
    debug: Annotated[bool, _option("--debug", group=_MACHINE, help="Show tracebacks.")] = False,
) -> None:
    """Fine-tune a local causal language model on text or JSONL.

    Prints held-out perplexity before and after, and leaves the adapter (PEFT's layout) or the model, checkpoints
    to --resume from, a loss curve and a JSON log in --output.
    """
    options = dict(context.params)
    for flag in ("resume", "overwrite", "debug"):
        options.pop(flag)
    given = {name for name in options if on_the_command_line(context, name)}
    with told_errors(debug):
        if resume and overwrite:
            raise InputError("--resume and --overwrite exclude each other")
        options["trainable_share"] = chosen_share(trainable_share)
        config = _resumed(output, options, given) if resume else _fresh(options)
        config.validate()
        from ..training import finetune

        finetune(config, resume=resume, overwrite=overwrite)


def chosen_share(text: str | None) -> float | None:
    """--trainable-share, "1%" or "0.01", as a number."""
    if text is None:
        return None
    try:
        return float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise InputError(f"--trainable-share {text} is no number; give 1% or 0.01") from None


def _fresh(options: dict[str, Any]) -> FinetuneConfig:
    for name in ("model", "data"):
        if options[name] is None:
            raise InputError(f"--{name} is missing")
    return FinetuneConfig(**options)


def _resumed(output: str, options: dict[str, Any], given: set[str]) -> FinetuneConfig:
    """The run's own options, and over them those given now; the engine refuses what is fixed."""
    from ..training.output import read_run

    saved = FinetuneConfig.from_json(read_run(Path(output))["config"])
    return dataclasses.replace(
        saved, output=output, **{name: options[name] for name in given - {"output"}}
    )
