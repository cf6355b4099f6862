"""Hot-swapping: another adapter takes the place of one that is there, in the same memory.

No tensor, shape or setting that a compiled model or a CUDA graph has seen changes but for values. LoRA's factors are copied into
slots of a fixed rank, zeros where the adapter's own ends, and its scaling is a number on the device; what else an adapter has
(magnitudes, biases, copies, rows, vectors, norms, virtual tokens) is of one size, and is copied.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..layers import LoRALayer
from ..layers.adapter import AdapterTensor
from ..layers.inits import changes_base_weight
from ..methods import LoraConfig, PeftConfig
from ..methods.checks import check_rank
from ..methods.matching import pattern_value
from ..models.peft_model import PeftModel
from .adapter import (
    PREFIX,
    biases_of,
    check_ties,
    embedding_entries,
    layers_of,
    matching,
)
from .files import check_value, is_shadow, read_tensors
from .folder import find_folder, weights_file

# Fields by which a model was built, beside those that a configuration calls the meaning of its tensors.
_BUILT_IN = (
    "lora_dropout",
    "dropout",
    "use_dora",
    "lora_bias",
    "bias",
    "target_parameters",
    "ensure_weight_tying",
)
# Of that meaning: what is swapped with the tensors.
_SWAPPED = ("lora_alpha", "use_rslora", "alpha_pattern")

Write = Callable[[], None]
Pair = tuple[AdapterTensor, Tensor]  # where a value goes, and the value


def prepare_hotswap(model: PeftModel, target_rank: int, adapter_name: str = "default") -> None:
    """Widen a LoRA adapter's parameters so that adapters of up to ``target_rank`` can take its place.

    Call it before ``torch.compile``, the optimizer and CUDA graphs: it makes new Parameters, once. The adapter computes and
    trains as before (the zeros that are added get gradients of zero), and is saved at its own rank. Other methods need no
    preparation.

    Raises:
        TypeError: ``model`` is no fastlora.PeftModel.
        ValueError: there is no such adapter, it is not LoRA or has larger ranks, or adapters are merged. The model is then
            as it was.
    """
    config = _config(model, adapter_name)
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"adapter_name: {adapter_name!r} is {config.peft_type}; LoRA adapters alone have ranks, others are hot-swapped as "
            "they are"
        )
    check_rank("target_rank", target_rank)
    model.check_parameters("prepare_hotswap")
    layers = {
        name: layer
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoRALayer) and adapter_name in layer.r
    }
    for name, layer in layers.items():
        if layer.lora_A[adapter_name].is_meta:
            raise ValueError(
                f"model: {name!r} is on the meta device; give it real parameters first (to_empty)"
            )
        own = layer.slot_rank(adapter_name)
        if own > target_rank:
            raise ValueError(
                f"target_rank: got {target_rank}; the adapter has rank {own} at {name!r}; accepted is that or more"
            )
    for layer in layers.values():
        layer.widen_slot(adapter_name, target_rank)


def hotswap_adapter(
    model: PeftModel, path: str | os.PathLike[str], adapter_name: str = "default"
) -> None:
    """Put the adapter in the folder ``path`` in the place of ``adapter_name``, whose parameters keep their memory.

    Of LoRA its ranks may be anything up to those of the parameters (see ``prepare_hotswap``), its scaling anything. Modules
    that it does not adapt are left to the base. Whether it is active and trains stays as it is.

    Args:
        model: a ``fastlora.PeftModel``.
        path: a folder that fastlora or stock peft wrote.
        adapter_name: the adapter to replace.

    Raises:
        TypeError: ``model`` is no fastlora.PeftModel.
        FileNotFoundError: a file is missing.
        ValueError, NotImplementedError: a file is torn, or the adapter does not fit: another method, other modules or sizes, a
            larger rank, another dropout. The model is then as it was.
    """
    own = _config(model, adapter_name)
    model.check_parameters("hotswap_adapter")
    folder = find_folder(Path(path), adapter_name)
    config = PeftConfig.from_pretrained(folder)
    _check_fields(own, config, folder)
    tensors = read_tensors(weights_file(folder, config))
    for write in _writes(model, adapter_name, config, tensors):
        write()
    for field in ("inference_mode", *own.unsaved):
        setattr(config, field, getattr(own, field))
    model.peft_config[adapter_name] = config


def _config(model: PeftModel, adapter_name: str) -> PeftConfig:
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
    return config


def _check_fields(own: PeftConfig, config: PeftConfig, folder: Path) -> None:
    """ValueError if the two adapters are not of one make."""
    if own.peft_type != config.peft_type:
        raise ValueError(
            f"peft_type: {folder} has {config.peft_type}, the adapter in its place {own.peft_type}; load_adapter it into a model "
            "of its own"
        )
    for one in (own, config):
        init = getattr(one, "init_lora_weights", True)
        if changes_base_weight(init):
            raise ValueError(
                f"init_lora_weights: {init!r} means a base weight of its own, which is not swapped; convert the adapter first "
                "(save_pretrained's path_initial_model_for_weight_conversion)"
            )
    fields = {*own.meaning, *_BUILT_IN, *(["task_type"] if own.is_prompt_learning else [])}
    for field in sorted(fields - set(_SWAPPED)):
        ours, theirs = (_plain(getattr(one, field, None)) for one in (own, config))
        if ours != theirs:
            raise ValueError(
                f"{field}: {folder} has {theirs!r}, the adapter in its place {ours!r}; accepted is the same, which a compiled "
                "model has built in"
            )


def _plain(value: Any) -> Any:
    """Names in any order; numbers (rows, runs of layers) mean something else in another."""
    names = isinstance(value, (list, set)) and all(isinstance(one, str) for one in value)
    return sorted(value) if names else value


# Everything is checked before anything is written.


def _writes(
    model: PeftModel, adapter_name: str, config: PeftConfig, tensors: dict[str, Tensor]
) -> list[Write]:
    """What puts a file's ``tensors`` in the place of an adapter's.

    Raises:
        ValueError: they do not fit.
    """
    if config.is_prompt_learning:
        pairs = matching(model, adapter_name, tensors)
        return [_copying(pair) for pair in pairs]
    layers = [item for item in layers_of(model, adapter_name) if adapter_name in item[1].adapters]
    known = {key for _, _, entries in layers for key in entries}
    left = dict(config.own_keys(tensors, known, model.get_base_model(), adapter_name))
    if not left:
        raise ValueError(f"{config.weights_name}: has no tensors; the file is torn")
    slots: list[Pair] = []
    places: list[Pair] = []
    writes = []
    for prefix, layer, entries in layers:
        if isinstance(layer, LoRALayer):
            assert isinstance(config, LoraConfig)
            pairs, write = _into_slot(prefix, layer, adapter_name, config, left)
            slots += pairs
            writes.append(write)
        else:
            neutral = {f"{prefix}{k}": v for k, v in layer.neutral_tensors(adapter_name).items()}
            places += _into_place(entries, left, neutral)
    places += _into_place(biases_of(model, adapter_name), left, {})
    check_ties([*slots, *places])
    writes += map(_copying, places)
    for key, entry in embedding_entries(model, adapter_name).items():
        if key in left and torch.equal(left[key].to(entry.tensor), entry.tensor):
            del left[key]  # PEFT stores the base's embeddings beside adapters of them
    left = {key: value for key, value in left.items() if not is_shadow(key, adapter_name)}
    if left:
        raise ValueError(
            f"{config.weights_name}: has {sorted(left)[:3]} ({len(left)} in all), for which adapter {adapter_name!r} has no "
            "place; load_adapter it beside the others instead"
        )
    return writes


def _into_place(
    entries: Mapping[str, AdapterTensor], tensors: dict[str, Tensor], neutral: Mapping[str, Tensor]
) -> list[Pair]:
    """A file's tensors and where they go, taken out of ``tensors``; ``neutral`` ones where the file has none of these."""
    values = tensors if any(key in tensors for key in entries) else dict(neutral)
    pairs = []
    for key, entry in entries.items():
        value = values.pop(key, None)
        if value is None:
            raise ValueError(f"{key}: is missing; the file is torn, or the adapter another")
        _check(key, value, entry.tensor.shape, entry.tensor.is_floating_point())
        pairs.append((entry, value))
    return pairs


def _into_slot(
    prefix: str, layer: LoRALayer, adapter_name: str, config: LoraConfig, tensors: dict[str, Tensor]
) -> tuple[list[Pair], Write]:
    """A and B for LoRA's slot in ``layer``, and what fills it; they are taken out of ``tensors``."""
    slot_a, slot_b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    keys = [f"{prefix}{key}" for key in layer.factor_keys]
    a, b = (tensors.pop(key, None) for key in keys)
    name = layer.pattern_name(prefix.removeprefix(PREFIX).removesuffix("."))
    alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
    more: dict[str, Tensor] = {}
    if a is None and b is None:  # the adapter leaves this module alone: rank 0
        a, b = slot_a[:0], slot_b[:, :0]
    elif a is None or b is None:
        raise ValueError(f"{keys[a is not None]}: is missing; the file is torn")
    else:
        ranks, most = a.shape[0], layer.slot_rank(adapter_name)
        fits = a.shape[1:] == slot_a.shape[1:] and b.shape == (slot_b.shape[0], ranks)
        if not fits or ranks % layer.stacked or ranks > slot_a.shape[0]:
            many = f" times {layer.stacked}" if layer.stacked > 1 else ""
            raise ValueError(
                f"{keys[0]}: is {list(a.shape)}, beside {list(b.shape)}; accepted are [r, {slot_a.shape[1]}] and "
                f"[{slot_b.shape[0]}, r] with r up to {most}{many}: prepare_hotswap(model, target_rank) makes room for more"
            )
        for key, value in zip(keys, (a, b), strict=True):
            check_value(key, value)
        for key, slot in layer.more_tensors(adapter_name).items():
            found = tensors.pop(f"{prefix}{key}", None)
            if found is None:
                raise ValueError(f"{prefix}{key}: is missing; the file is torn")
            _check(f"{prefix}{key}", found, slot.shape, True)
            more[key] = found
    factors = a, b
    slots = (AdapterTensor(key, slot) for key, slot in zip(keys, (slot_a, slot_b), strict=True))
    return list(zip(slots, factors, strict=True)), lambda: layer.fill_slot(
        adapter_name, *factors, alpha, config.use_rslora, more
    )


def _check(key: str, value: Tensor, shape: torch.Size, is_float: bool) -> None:
    if value.shape != shape:
        raise ValueError(
            f"{key}: is {list(value.shape)}; accepted is {list(shape)}, as the adapter in its place has"
        )
    if is_float:
        check_value(key, value)


def _copying(pair: Pair) -> Write:
    def write() -> None:
        with torch.no_grad():
            pair[0].tensor.copy_(pair[1])

    return write
