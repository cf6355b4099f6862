"""``finetune(config)``: one whole run, from paths to an adapter, its curve and its log."""

from __future__ import annotations

import contextlib
import os
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..ops import backend as backend_of_choice
from . import base
from .blocks import Data, prepare_data
from .config import FinetuneConfig
from .display import Display
from .engine import engine_of
from .errors import InputError, RunError
from .output import OutputDirectory, run_facts
from .sample import encode_prompt
from .session import Session, Summary

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Summary", "finetune"]


def finetune(
    config: FinetuneConfig,
    console: Console | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Summary:
    """Fine-tune a local causal language model on a file; ``FinetuneConfig`` has the options.

    Writes to ``config.output``: the adapter in PEFT's layout, checkpoints, log, loss curve and
    summary. With ``resume`` it continues that directory's run from its newest valid checkpoint, to
    the losses the run would have had. ``overwrite`` replaces what an earlier run left there. Raises
    ``InputError`` before anything is written, ``RunError`` (``Interrupted`` for a signal) once it
    has begun; what was saved by then stays.
    """
    from rich.console import Console

    config.validate()
    device = base.pick_device(config.device)
    if device.type == "cpu":
        base.share_cpu()
    elif config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    display = Display(console or Console(), device)
    try:
        with _preferring(config.backend):
            return _run(config, device, display, resume, overwrite)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _out_of_memory(error):
            raise
        raise RunError(
            f"out of memory on {device}. Try a lower --batch-size (with more --grad-accumulation), a lower "
            "--seq-length, or --gradient-checkpointing; what was saved before stays"
        ) from error
    except OSError as error:
        raise RunError(
            f"writing to {config.output} failed: {error}. What was saved before stays; --resume continues from there"
        ) from error
    finally:
        display.stop()


def _preferring(backend: str) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if backend == "auto" else backend_of_choice(backend)


def _out_of_memory(error: RuntimeError) -> bool:
    # torch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _run(
    config: FinetuneConfig, device: torch.device, display: Display, resume: bool, overwrite: bool
) -> Summary:
    out = OutputDirectory(config.output)
    facts = run_facts(config)
    if resume:
        out.check_resumable(facts)
    else:
        out.check_free(overwrite)
    tokenizer = base.load_tokenizer(config.model)
    if config.sample_prompt is not None:
        encode_prompt(config.sample_prompt, tokenizer, chat=False)
    data = prepare_data(config, tokenizer, display)
    dtype, engine = base.pick_dtype(config.dtype, device), engine_of(config)
    display.say(
        f"data: {data.training_tokens:,} tokens in {len(data.training)} blocks to train on, "
        f"{data.held_out_tokens:,} in {len(data.held_out)} held out"
    )
    display.say(
        f"model: {config.model} in {str(dtype).removeprefix('torch.')} on {device}, "
        f"{engine.describe()}"
    )
    _seed(config.seed)
    model = engine.load(dtype, device)
    prepare_model(model, config, data)
    _seed(config.seed)  # loading may draw; the adapter's initial values depend on the seed alone
    lm = base.CausalLM(engine.enter(model, device, display.say), model, engine.cast_to(dtype))
    engine.begin(lm, data, base.pad_id(tokenizer))
    if data.shares_blocks and not base.keeps_documents_apart(lm, device):
        display.warn(
            f"{type(model).__name__} lets the documents packed into a block see those before them; "
            "--no-packing trains each by itself"
        )
    out.claim(facts, resume)
    return Session(config, device, dtype, display, out, tokenizer, data, lm, engine).go(resume)


def prepare_model(model: Any, config: FinetuneConfig, data: Data | None) -> None:
    """Check that data and options fit the model, and switch on the checkpointing that they ask for."""
    name = type(model).__name__
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    if data is not None and data.largest_id >= vocabulary:
        raise InputError(
            f"the tokenizer gives id {data.largest_id} but the model knows {vocabulary} tokens: they do not belong together"
        )
    longest = getattr(model.config, "max_position_embeddings", None)
    virtual = config.chosen("virtual_tokens") or 0
    if isinstance(longest, int) and config.seq_length + virtual > longest:
        with_them = f" with {virtual} virtual tokens" if virtual else ""
        raise InputError(
            f"--seq-length {config.seq_length}{with_them}: {name} takes at most {longest} tokens"
        )
    if config.gradient_checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise InputError(f"--gradient-checkpointing: {name} does not support it")
        # The reentrant kind needs an input that requires grad; a frozen embedding gives none.
        kind = {"use_reentrant": False}
        if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=kind)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kind)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
