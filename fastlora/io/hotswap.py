"""Hot-swapping: another adapter takes the place of one that is there, in the same memory.

No tensor, shape or setting that a compiled model or a CUDA graph has seen changes but for values: factors are copied into slots
of a fixed rank, zeros where the adapter's own ends, and its scaling is a number on the device.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..layers import AdapterLayer, LoRALayer
from ..layers.inits import changes_base_weight
from ..methods import LoraConfig
from ..methods.checks import check_rank
from ..methods.matching import pattern_value
from ..models.peft_model import PeftModel
from .adapter import PREFIX, WEIGHTS_NAME, check_value, find_folder
from .files import read_tensors

_FACTORS = {"lora_A.weight", "lora_B.weight"}


class _Swap(NamedTuple):
    layer: LoRALayer
    a: Tensor
    b: Tensor
    lora_alpha: float


def prepare_hotswap(model: PeftModel, target_rank: int, adapter_name: str = "default") -> None:
    """Widen a LoRA adapter's parameters so that adapters of up to ``target_rank`` can take its place.

    Call it before ``torch.compile``, the optimizer and CUDA graphs: it makes new Parameters, once. The adapter computes and
    trains as before (the zeros that are added get gradients of zero), and is saved at its own rank.

    Raises:
        TypeError: ``model`` is no fastlora.PeftModel.
        ValueError: there is no such adapter, it is not LoRA or has larger ranks, or adapters are merged. The model is then
            as it was.
    """
    _lora_config(model, adapter_name)
    check_rank("target_rank", target_rank)
    model.check_parameters("prepare_hotswap")
    layers = _layers(model, adapter_name)
    for name, layer in layers.items():
        if layer.lora_A[adapter_name].is_meta:
            raise ValueError(
                f"model: {name!r} is on the meta device; give it real parameters first (to_empty)"
            )
        own = layer.lora_A[adapter_name].shape[0]
        if own > target_rank:
            raise ValueError(
                f"target_rank: got {target_rank}; the adapter has rank {own} at {name!r}; accepted is that or more"
            )
    for layer in layers.values():
        layer.widen_slot(adapter_name, target_rank)


def hotswap_adapter(
    model: PeftModel, path: str | os.PathLike[str], adapter_name: str = "default"
) -> None:
    """Put the LoRA adapter in the folder ``path`` in the place of ``adapter_name``, whose parameters keep their memory.

    Its ranks may be anything up to those of the parameters (see ``prepare_hotswap``), its scaling anything; modules that it
    does not adapt are left to the base. Whether it is active and trains stays as it is.

    Args:
        model: a ``fastlora.PeftModel``.
        path: a folder that fastlora or stock peft wrote.
        adapter_name: the adapter to replace.

    Raises:
        TypeError: ``model`` is no fastlora.PeftModel.
        FileNotFoundError: a file is missing.
        ValueError, NotImplementedError: a file is torn, or the adapter does not fit: no LoRA, other modules, a larger rank,
            another dropout, more than A and B. The model is then as it was.
    """
    own = _lora_config(model, adapter_name)
    model.check_parameters("hotswap_adapter")
    folder = find_folder(Path(path), adapter_name)
    config = LoraConfig.from_pretrained(folder)
    for init in (own.init_lora_weights, config.init_lora_weights):
        if changes_base_weight(init):
            raise ValueError(
                f"init_lora_weights: {init!r} means a base weight of its own, which is not swapped; convert the adapter first "
                "(save_pretrained's path_initial_model_for_weight_conversion)"
            )
    if config.lora_dropout != own.lora_dropout:
        raise ValueError(
            f"lora_dropout: {folder} has {config.lora_dropout}, the adapter in its place {own.lora_dropout}; accepted is the "
            "same, which a compiled model has built in"
        )
    tensors = read_tensors(folder / WEIGHTS_NAME)
    layers = _layers(model, adapter_name)
    swaps = [_plan(name, layer, adapter_name, config, tensors) for name, layer in layers.items()]
    if tensors:
        raise ValueError(
            f"{WEIGHTS_NAME}: has {sorted(tensors)[:3]} ({len(tensors)} in all), for which adapter {adapter_name!r} has no place; "
            "load_adapter it beside the others instead"
        )
    for layer, a, b, lora_alpha in swaps:
        layer.fill_slot(adapter_name, a, b, lora_alpha, config.use_rslora)
    config.inference_mode = own.inference_mode
    model.peft_config[adapter_name] = config


def _plan(
    name: str, layer: LoRALayer, adapter_name: str, config: LoraConfig, tensors: dict[str, Tensor]
) -> _Swap:
    """What goes into ``layer``; it is taken out of ``tensors``."""
    slot_a, slot_b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    keys = [f"{PREFIX}{name}.{part}.weight" for part in ("lora_A", "lora_B")]
    a, b = (tensors.pop(key, None) for key in keys)
    alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
    if a is None and b is None:  # the adapter leaves this module alone: rank 0
        return _Swap(layer, slot_a[:0], slot_b[:, :0], alpha)
    if a is None or b is None:
        raise ValueError(f"{keys[a is not None]}: is missing; the file is torn")
    for key, value in zip(keys, (a, b), strict=True):
        check_value(key, value)
    r = a.shape[0]
    if a.shape[1:] != slot_a.shape[1:] or b.shape != (slot_b.shape[0], r) or r > slot_a.shape[0]:
        raise ValueError(
            f"{keys[0]}: is {list(a.shape)}, beside {list(b.shape)}; accepted are [r, {slot_a.shape[1]}] and "
            f"[{slot_b.shape[0]}, r] with r up to {slot_a.shape[0]}: prepare_hotswap(model, target_rank) makes room for more"
        )
    return _Swap(layer, a, b, alpha)


def _lora_config(model: PeftModel, adapter_name: str) -> LoraConfig:
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"model: got {type(model).__name__}; accepted is a fastlora.PeftModel. A stock peft model, accelerated or not, has "
            "peft.utils.hotswap"
        )
    config = model.peft_config.get(adapter_name)
    if config is None:
        raise ValueError(
            f"adapter_name: got {adapter_name!r}; this model has {sorted(model.peft_config)}"
        )
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"adapter_name: {adapter_name!r} is {config.peft_type}; only LoRA adapters are hot-swapped"
        )
    return config


def _layers(model: PeftModel, adapter_name: str) -> dict[str, LoRALayer]:
    """Name in the base model -> layer, of those that have the adapter; refused where it is more than A and B."""
    layers: dict[str, LoRALayer] = {}
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, AdapterLayer) or adapter_name not in layer.adapters:
            continue
        more = set(layer.adapter_tensors(adapter_name)) - _FACTORS
        if not isinstance(layer, LoRALayer) or not layer.is_linear or more:
            raise ValueError(
                f"adapter_name: {adapter_name!r} has more than A and B at {name!r}, a {type(layer).__name__}; load_adapter it "
                "beside the others instead"
            )
        layers[name] = layer
    return layers
