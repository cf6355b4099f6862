"""``finetune(config)``: one whole run, from paths to an adapter, its curve and its log."""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..methods import LoraConfig
from ..methods.budget import rank_for_share
from ..models import PeftModel, get_peft_model
from ..ops import backend as backend_of_choice
from . import base
from .blocks import Data, prepare_data
from .config import FinetuneConfig
from .display import Display
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
    dtype = base.pick_dtype(config.dtype, device)
    display.say(
        f"data: {data.training_tokens:,} tokens in {len(data.training)} blocks to train on, "
        f"{data.held_out_tokens:,} in {len(data.held_out)} held out"
    )
    display.say(
        f"model: {config.model} in {str(dtype).removeprefix('torch.')} on {device}, "
        f"{config.method} {_rank(config)} alpha={config.alpha:g} on {config.target_modules}"
    )
    _seed(config.seed)
    # What is quantised is loaded on the CPU: in full precision it need not fit on the GPU.
    first = torch.device("cpu") if config.method == "qlora" else device
    model = base.load_model(config.model, dtype, first)
    lm = base.CausalLM(_adapt(model, config, data, device, display), model)
    if data.shares_blocks and not base.keeps_documents_apart(lm, device):
        display.warn(
            f"{type(model).__name__} lets the documents packed into a block see those before them; "
            "--no-packing trains each by itself"
        )
    out.claim(facts, resume)
    return Session(config, device, dtype, display, out, tokenizer, data, lm).go(resume)


def _adapt(
    model: Any, config: FinetuneConfig, data: Data, device: torch.device, display: Display
) -> PeftModel:
    """Check that data and options fit the model, and add the adapter, on ``device``."""
    name = type(model).__name__
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    if data.largest_id >= vocabulary:
        raise InputError(
            f"the tokenizer gives id {data.largest_id} but the model knows {vocabulary} tokens: they do not belong together"
        )
    longest = getattr(model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and config.seq_length > longest:
        raise InputError(f"--seq-length {config.seq_length}: {name} takes at most {longest} tokens")
    if config.gradient_checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise InputError(f"--gradient-checkpointing: {name} does not support it")
        # The reentrant kind needs an input that requires grad; a frozen embedding gives none.
        kind = {"use_reentrant": False}
        if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=kind)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kind)
    _seed(config.seed)  # loading may draw; the adapter's initial values depend on the seed alone
    try:
        lora = LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=_target_modules(config.target_modules, model),
            use_rslora=config.method == "rslora",
            quantize="nf4" if config.method == "qlora" else None,
            task_type="CAUSAL_LM",
            base_model_name_or_path=str(Path(config.model).resolve()),
        )
        if config.trainable_share is not None:
            lora.r = rank_for_share(model, lora, config.trainable_share)
            display.say(f"rank {lora.r} trains at most {config.trainable_share:.2%} of the model")
        adapted = get_peft_model(model, lora, device=device)
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"the adapter cannot be added to {config.model}: {error}") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # an optimizer's small steps vanish in 16 bits
    return adapted


def _rank(config: FinetuneConfig) -> str:
    if config.trainable_share is None:
        return f"r={config.r}"
    return f"r for {config.trainable_share:.2%}"


def _target_modules(wanted: str, model: torch.nn.Module) -> str | list[str]:
    """``--target-modules`` as LoraConfig takes it; every name must exist: no typo is ignored."""
    if wanted == "all-linear":
        return wanted
    if wanted.startswith("regex:"):
        return wanted.removeprefix("regex:")
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    modules = dict(model.named_modules())
    unknown = [n for n in names if not any(m == n or m.endswith(f".{n}") for m in modules)]
    if unknown:
        linears = {
            name.rsplit(".", 1)[-1] for name, m in modules.items() if isinstance(m, torch.nn.Linear)
        }
        raise InputError(
            f"--target-modules: the model has no module {', '.join(unknown)}; its linear layers are "
            f"{', '.join(sorted(linears))} (or give all-linear, or regex:PATTERN)"
        )
    return names


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
