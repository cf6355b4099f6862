"""``accelerate`` and ``restore``: a stock PEFT model computes through ``lora_linear``.

A layer is adopted by giving it a subclass of its own class (``models/peft_linear.py``); nothing
else changes, so its parameters, state_dict keys, hooks and PEFT's own methods stay, and ``restore``
is the exact inverse.
"""

from __future__ import annotations

import sys
from typing import NamedTuple, TypeVar

from torch import nn

from .peft_model import PeftModel

Model = TypeVar("Model", bound=nn.Module)


class LayerReport(NamedTuple):
    """One PEFT layer: its name, whether its next forward is fast, and if not, why."""

    name: str
    accelerated: bool
    reason: str


def accelerate(model: Model) -> Model:
    """Let a stock PEFT model's LoRA layers, over nn.Linear or bitsandbytes' Linear4bit, run on
    fastlora's kernels, in place; idempotent.

    Outputs and gradients stay within fastlora's accuracy rule, state_dict keys the same. A layer
    decides at every forward; where there is no fast path (merged, disabled, several adapters at
    once, mixed batches, hooks on its parts, ...) it runs PEFT's own forward. Layers that never have
    one (DoRA, convolutions, embeddings, 8-bit bases, ...) are left as they are;
    ``fastlora.acceleration_report(model)`` names each with its reason.

    Args:
        model: a ``peft.PeftModel``, or any module with PEFT layers in it. A ``fastlora.PeftModel``
            is fast already.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has no PEFT LoRA layer.
    """
    _check(model)
    if isinstance(model, PeftModel):
        return model
    layers = _lora_layers(model)
    if not layers:
        raise ValueError(
            f"model: this {type(model).__name__} has no PEFT LoRA layer; put adapters in first, "
            "with peft.get_peft_model, or use fastlora.get_peft_model"
        )
    from . import peft_linear

    for _, layer in layers:
        peft_linear.adopt(layer)
    return model


def restore(model: Model) -> Model:
    """Undo ``accelerate``: every layer has PEFT's own class again. Idempotent too.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a layer's class was changed again since (torch's fully_shard does); nothing is
            undone then.
    """
    _check(model)
    layers = _lora_layers(model)
    if layers:
        from . import peft_linear

        stuck = [name for name, layer in layers if peft_linear.is_stuck(layer)]
        if stuck:
            raise ValueError(
                f"model: {stuck[0]!r} and {len(stuck) - 1} more layers were given another class "
                "after accelerate (by fully_shard, say), which cannot be taken off; restore the "
                "model before that"
            )
        for _, layer in layers:
            peft_linear.release(layer)
    return model


def acceleration_report(model: nn.Module) -> list[LayerReport]:
    """Every PEFT LoRA layer as (name, accelerated, reason), for the state it is in now.

    Raises:
        TypeError: ``model`` is no module.
    """
    _check(model)
    layers = _lora_layers(model)
    if not layers:
        return []
    from . import peft_linear

    reasons = [(name, peft_linear.obstacle(layer)) for name, layer in layers]
    return [LayerReport(name, reason is None, reason or "") for name, reason in reasons]


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; accepted is a torch.nn.Module")


def _lora_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if sys.modules.get("peft") is None:
        return []  # whoever built a PEFT model has imported peft
    from peft.tuners.lora import LoraLayer

    modules: list[tuple[str, nn.Module]] = list(model.named_modules())
    return [(name, module) for name, module in modules if isinstance(module, LoraLayer)]
