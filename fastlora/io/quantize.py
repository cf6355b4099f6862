"""``quantize_checkpoint``: a model's folder in bitsandbytes' 4 bits, written tensor by tensor."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..methods import LoraConfig
from ..methods.matching import describe_experts, expert_parameters, quantizable
from ..quant import NF4Tensor
from ..quant.checkpoint import open_checkpoint, write_weight
from ..quant.conversion import Conversion, describe
from .checkpoint import replacing_directory
from .shards import SHARD_BYTES, Shards, copy_rest


def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    block_size: int = 64,
    double_quant: bool = True,
    device: torch.device | str = "cpu",
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[str], object] = lambda name: None,
) -> list[str]:
    """Write the transformers causal language model in ``source`` to ``target`` with its linears in NF4.

    Every nn.Linear but the output layer is quantised, one at a time; the rest is copied as it is, tokenizer and all. Experts
    that the model keeps in one tensor are no linears, and stay in floats: a warning says how much that is. What
    comes out is a pre-quantised checkpoint: transformers with bitsandbytes loads it, and ``fastlora.load_quantized``.

    Args:
        source: folder with config.json and safetensors.
        target: folder to write. It appears whole or not at all, in place of one that is there.
        block_size, double_quant: see ``NF4Tensor.quantize``.
        device: where a weight is quantised.
        shard_bytes: about how large a file may become.
        progress: is told the name of every module quantised.

    Returns:
        The names of the modules quantised.

    Raises:
        FileNotFoundError: ``source`` is incomplete.
        ValueError: it is quantised already, damaged, has no linear to quantise, or holds one in a form that could not be
            read again.
        ImportError: transformers is not installed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source, target = Path(source), Path(target)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source}: no config.json there; give the folder of a model")
    raw: dict[str, Any] = json.loads((source / "config.json").read_text())
    if raw.get("quantization_config"):
        raise ValueError(f"{source}: is quantised already; give the original")
    config = AutoConfig.from_pretrained(source, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with ExitStack() as stack:
        where = open_checkpoint(source, stack, device)
        stored = _stored_linears(source, model, where)
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing_directory(target) as folder:
            shards = Shards(folder, shard_bytes)
            for key, read in where.items():
                if key in stored:
                    weight = NF4Tensor.quantize(read(key), block_size, double_quant)
                    shards.add(write_weight(key.removesuffix(".weight"), weight))
                    progress(stored[key])
                else:
                    shards.add({key: read(key).cpu()})
            shards.finish()
            raw["quantization_config"] = _how(config, double_quant)
            (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
            copy_rest(source, folder)
    return list(stored.values())


def _stored_linears(source: Path, model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Key of a weight to quantise -> the name of its module.

    Raises:
        ValueError: there is none, or one that could not be read again.
    """
    conversion, linears = Conversion(model), set(quantizable(LoraConfig(), model))
    unknown = conversion.unknown(keys)
    if unknown:
        raise ValueError(
            f"{source}: {unknown[:5]} belong to nothing in a {type(model).__name__}, so that load_quantized would refuse what "
            "is written; is config.json another model's?"
        )
    stored = {}
    for key in keys:
        target, rule = conversion.target(key)
        name, _, part = target.rpartition(".")
        if part != "weight" or name not in linears:
            continue
        if rule is not None or not key.endswith(".weight"):
            how = "renames it" if rule is None else f"computes {target} of it ({describe(rule)})"
            raise ValueError(
                f"{key}: transformers {how}, which nothing does with 4 bits; load the model, save it with save_pretrained("
                "save_original_format=False), and quantise that"
            )
        stored[key] = name
    if not stored:
        raise ValueError(
            f"{source}: a {type(model).__name__} has no nn.Linear but its output layer; only those are quantised"
        )
    experts = expert_parameters(model)
    if experts:
        warnings.warn(f"{source}: {describe_experts(experts)}", stacklevel=3)
    return stored


def _how(config: Any, double_quant: bool) -> dict[str, Any]:
    """The ``quantization_config`` by which transformers knows such a checkpoint."""
    dtype = getattr(config, "dtype", None) or torch.bfloat16
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }
