"""What state a model's adapters are in: PEFT's ``get_layer_status`` and ``get_model_status``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import nn

from ..layers import AdapterLayer, TiedTokens
from ..quant import NF4Tensor
from .peft_model import PeftModel

Irregular = Literal["irregular"]
Value = TypeVar("Value")

# Weights of bitsandbytes' -> what PEFT calls them.
_BITSANDBYTES = {"Params4bit": "bnb 4bit", "Int8Params": "bnb 8bit"}


@dataclass
class TunerLayerStatus:
    """One module with adapters. ``requires_grad`` and ``devices`` are by adapter."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """A whole model; "irregular" is what its modules do not agree on."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of every module with adapters, under its name in ``model`` (of a PeftModel, in its ``base_model``).

    Raises:
        ValueError: there is none.
    """
    inside = model.base_model if isinstance(model, PeftModel) else model
    found = [
        _layer_status(name, layer)
        for name, layer in inside.named_modules()
        if isinstance(layer, AdapterLayer) and layer.adapters and not isinstance(layer, TiedTokens)
    ]
    if not found:
        raise ValueError("model: has no adapter layers; get_peft_model or load_adapter makes some")
    return found


def _layer_status(name: str, layer: AdapterLayer) -> TunerLayerStatus:
    parameters = {adapter: layer.adapter_parameters(adapter) for adapter in layer.adapters}
    return TunerLayerStatus(
        name=name,
        module_type=type(layer).__name__,
        enabled=layer.adapters_enabled,
        active_adapters=list(layer.active_adapters),
        merged_adapters=list(layer.merged_adapters),
        requires_grad={
            adapter: _agreed([p.requires_grad for p in own]) for adapter, own in parameters.items()
        },
        available_adapters=sorted(parameters),
        devices={a: sorted({p.device.type for p in own}) for a, own in parameters.items()},
        quantization_backend=_quantization(layer),
    )


def _quantization(layer: AdapterLayer) -> str | None:
    """What holds the base: "nf4" or "fp4" of fastlora's, else bitsandbytes' by the names that PEFT gives it."""
    base = getattr(layer, "base_layer", layer)
    weight = getattr(base, "weight", None)
    return weight.quant_type if isinstance(weight, NF4Tensor) else _BITSANDBYTES.get(type(weight).__name__)  # fmt: skip


def get_model_status(model: PeftModel) -> TunerModelStatus:
    """The state of the whole model.

    Raises:
        ValueError: it has no adapters left.
    """
    layers = get_layer_status(model)
    trainable, total = model.get_nb_trainable_parameters()
    available = sorted({name for layer in layers for name in layer.available_adapters})
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    partly = any(set(layer.available_adapters) & set(merged) - set(layer.merged_adapters) for layer in layers)  # fmt: skip
    return TunerModelStatus(
        base_model_type=type(model.get_base_model()).__name__,
        adapter_model_type=type(model.base_model).__name__,
        peft_types={name: config.peft_type for name, config in model.peft_config.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_agreed([layer.enabled for layer in layers]),
        active_adapters=_agreed([layer.active_adapters for layer in layers]),
        merged_adapters="irregular" if partly else merged,
        requires_grad={
            name: _agreed([s.requires_grad[name] for s in layers if name in s.requires_grad])
            for name in available
        },
        available_adapters=available,
        devices={
            name: sorted({device for s in layers for device in s.devices.get(name, [])})
            for name in available
        },
        quantization_backend=_agreed([layer.quantization_backend for layer in layers]),
    )


def _agreed(values: Iterable[Value]) -> Value | Irregular:
    first, *others = values
    return first if all(other == first for other in others) else "irregular"
