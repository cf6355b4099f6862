"""``load_quantized``: a causal language model that transformers saved in bitsandbytes' 4 bits, without bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import QLoRALinear
from ..layers.wrapper import linear_features
from ..quant.checkpoint import keys_of, open_checkpoint, quantized_names, read_weight
from ..quant.conversion import Conversion, describe


def load_quantized(directory: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """A transformers causal language model from a folder of a pre-quantised checkpoint.

    Its 4-bit linears become ``fastlora.QLoRALinear`` without an adapter; ``fastlora.get_peft_model`` puts adapters over
    them, sharing their memory. Everything else has the checkpoint's dtype. All of it is frozen.

    Args:
        directory: config.json and safetensors, as transformers' ``save_pretrained`` writes them with load_in_4bit.
        device: where the tensors are read to, one by one.

    Raises:
        FileNotFoundError: there is no config.json, or a file that the index names is missing.
        ValueError: the checkpoint is not quantised, damaged, or does not belong to the model; or it holds in 4 bits what
            transformers takes together or apart.
        ImportError: transformers or accelerate is not installed.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(directory)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json there; give the folder of a checkpoint")
    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    how = getattr(config, "quantization_config", None)
    how = how if isinstance(how, dict) or how is None else how.to_dict()
    if not how or how.get("quant_method") != "bitsandbytes" or not how.get("load_in_4bit"):
        raise ValueError(
            f"{folder}: its config.json has no bitsandbytes 4-bit quantization_config; load it with transformers and use "
            "LoraConfig(quantize='nf4')"
        )
    del config.quantization_config
    with ExitStack() as stack:
        where = open_checkpoint(folder, stack, device)
        kinds = quantized_names(where)

        def get(key: str) -> Tensor | None:
            return where[key](key) if key in where else None

        with init_empty_weights(include_buffers=False):
            model: Any = AutoModelForCausalLM.from_config(config)
        conversion = Conversion(model)
        _place(model, get, kinds, conversion)
        rest = set(where) - {key for name, kind in kinds.items() for key in keys_of(name, kind)}
        _fill(model, get, rest - {f"{name}.bias" for name in kinds}, conversion, folder)
    return model.requires_grad_(False).eval().to(device)


def _place(
    model: nn.Module,
    get: Callable[[str], Tensor | None],
    kinds: dict[str, str],
    conversion: Conversion,
) -> None:
    """A QLoRALinear for every 4-bit weight."""
    modules = dict(model.named_modules())
    for stored, kind in kinds.items():
        key, rule = conversion.target(f"{stored}.weight")
        if rule is not None:
            raise ValueError(
                f"{stored}.weight: is in 4 bits, and transformers makes {key} of it and others ({describe(rule)}), which is "
                "no linear: quantise the original model anew"
            )
        name = key.removesuffix(".weight")
        linear = modules.get(name)
        # transformers stores a Conv1D's weight as a linear's
        if type(linear) is not nn.Linear and type(linear).__name__ != "Conv1D":
            raise ValueError(f"{stored}.weight: the model has no nn.Linear {name!r}")
        assert linear is not None
        features = linear_features(linear)
        assert features is not None
        weight = read_weight(get, stored, kind)
        if weight.shape != features[::-1]:
            raise ValueError(
                f"{stored}.weight: has shape {tuple(weight.shape)}, the model's is {features[::-1]}"
            )
        bias = get(f"{stored}.bias")
        if (bias is None) != (linear.bias is None):
            raise ValueError(
                f"{stored}.bias: {'missing' if bias is None else 'the model has none'}"
            )
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, QLoRALinear.from_quantized(weight, bias, r=None))


def _fill(
    model: Any,
    get: Callable[[str], Tensor | None],
    keys: set[str],
    conversion: Conversion,
    folder: Path,
) -> None:
    """Everything else, as it is in the checkpoint."""
    quantized = {name for name, m in model.named_modules() if isinstance(m, QLoRALinear)}
    unexpected = conversion.unknown(keys)
    try:
        state = dict(conversion.read(keys, get))
        result = model.load_state_dict(state, strict=False, assign=True)
    except (RuntimeError, ValueError) as error:  # a tensor of another shape
        raise ValueError(f"{folder}: {error}") from error
    unexpected += result.unexpected_keys
    model.tie_weights()
    missing = [
        key
        for key in result.missing_keys
        if not any(key.startswith(f"{name}.") for name in quantized) and _is_meta(model, key)
    ]
    if missing or unexpected:
        raise ValueError(
            f"{folder}: does not belong to a {type(model).__name__}: missing {missing[:5]}, unexpected {unexpected[:5]}"
        )


def _is_meta(model: nn.Module, key: str) -> bool:
    """Whether the parameter under ``key`` is still without data (tied ones got it from another)."""
    parent, _, name = key.rpartition(".")
    return bool(getattr(model.get_submodule(parent), name).is_meta)
