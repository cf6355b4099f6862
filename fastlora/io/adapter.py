"""``save_adapter`` and ``load_adapter``: PEFT's folder of two files, both ways.

    in the model (under base_model.model.)      in the file
    <m>.lora_A.<adapter>                        <m>.lora_A.weight
    <m>.lora_embedding_A.<adapter>              <m>.lora_embedding_A
    <m>.trainable_tokens_delta.<adapter>        <m>.token_adapter.trainable_tokens_delta
    <m>.modules_to_save.<adapter>.<p>           <m>.<p>
    <m>.bias of an adapted linear               <m>.base_layer.bias        (bias="all", "lora_only")
    <m>.bias of any other module                <m>.bias                   (bias="all")

The file's keys have the same prefix; those of prompt learning have base_model. alone, for PEFT puts no tuner around its
base, and the virtual tokens are prompt_embeddings, without a prefix.

An adapter that is not called "default" lives in a sub-folder of its name.

A folder that training goes on from (transformers' Trainer keeps such) has one file more where that takes one:

    adapter_training.safetensors    virtual tokens that a network makes: <key in the adapter's file>.<parameter>, the network
                                    and its embeddings, of which the adapter's file has the output alone
    adapter_model.safetensors       no tensors, where a method's own file has another name: Trainer looks for this one
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import AdapterLayer
from ..layers.adapter import AdapterTensor, check_adapter_name
from ..layers.embedding import LoRAEmbedding
from ..layers.fused import FusedLayer
from ..layers.inits import changes_base_weight
from ..layers.merging import is_sharded
from ..methods import PeftConfig
from ..methods.base import CONFIG_NAME
from ..models.entry import own_config, plan
from ..models.inject import Injection, set_trainable, trained_biases
from ..models.peft_model import PeftModel
from .files import (
    check_value,
    is_shadow,
    read_tensors,
    safetensors_size,
    tensor_writer,
    text_writer,
    write_together,
)
from .folder import WEIGHTS_NAME, find_folder, weights_file
from .subtraction import check_convertible, doubled, subtract

RECORD_NAME = "trainable_parameters.json"
TRAINING_NAME = "adapter_training.safetensors"
PREFIX = "base_model.model."
# How far the virtual tokens of a file may be from what the network beside them makes, which another device may have run.
_SAME_TOKENS = 1e-2


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    state_dict: Mapping[str, Tensor] | None = None,
    path_initial_model_for_weight_conversion: str | os.PathLike[str] | None = None,
    resumable: bool = False,
) -> None:
    """Write an adapter, for stock ``peft.PeftModel.from_pretrained`` or ``load_adapter``.

    Writes ``adapter_config.json``, ``adapter_model.safetensors`` and ``trainable_parameters.json``
    (which parameters are trained). Each file is complete under another name before any takes its
    place, so a full disk leaves the old ones.

    Args:
        model: a ``fastlora.PeftModel``.
        path: a folder; made if missing.
        adapter_name: the adapter; one not called "default" goes into ``path/adapter_name``.
        state_dict: values to write instead of the model's (keys as in ``model.state_dict()``).
        path_initial_model_for_weight_conversion: a PiSSA or OLoRA adapter as it was saved before training: what is written
            is then plain LoRA of twice the rank over the base as it was (see ``io/subtraction.py``).
        resumable: write as well what training goes on from, where that is more (see above). P-tuning's and prefix tuning's
            networks may be much larger than what they make.

    Raises:
        TypeError: ``model`` is no fastlora.PeftModel.
        ValueError: it has no such adapter, or no more (``merge_and_unload``); ``path`` is a file;
            ``state_dict`` lacks some of the adapter; or it cannot be converted.
        OSError: the files could not be written; what was there before is still there.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"model: got {type(model).__name__}; accepted is a fastlora.PeftModel. A stock peft "
            "model, accelerated or not, saves itself: model.save_pretrained(path)"
        )
    if adapter_name not in model.peft_config:
        raise ValueError(
            f"adapter_name: got {adapter_name!r}; this model has {sorted(model.peft_config)}"
        )
    folder = Path(path) if adapter_name == "default" else Path(path) / adapter_name
    if Path(path).is_file():
        raise ValueError(f"path: {path} is a file; accepted is a folder")
    entries = _entries(model, adapter_name)
    tensors = {key: entry.tensor for key, entry in entries.items()}
    if state_dict is not None:
        tensors = _values(entries, state_dict)
    config = model.peft_config[adapter_name]
    if path_initial_model_for_weight_conversion is not None:
        lora = check_convertible(config)
        initial = find_folder(Path(path_initial_model_for_weight_conversion), adapter_name)
        config, tensors = doubled(lora), subtract(tensors, read_tensors(initial / WEIGHTS_NAME))
    changes = config.file_fields(model.get_base_model(), adapter_name)
    files = {config.weights_name: tensors}
    if resumable and config.weights_name != WEIGHTS_NAME:
        files[WEIGHTS_NAME] = {}
    behind = _behind(model, entries, state_dict) if resumable else {}
    if behind:
        files[TRAINING_NAME] = behind
    texts = {RECORD_NAME: model.trainable_json(), CONFIG_NAME: config.to_json(**changes)}
    folder.mkdir(parents=True, exist_ok=True)
    write_together(
        {folder / name: tensor_writer(values) for name, values in files.items()}
        | {folder / name: text_writer(text) for name, text in texts.items()}
    )
    if not behind:  # of what was there before
        (folder / TRAINING_NAME).unlink(missing_ok=True)


def adapter_size(model: PeftModel, adapter_name: str = "default") -> int:
    """Bytes of the ``adapter_model.safetensors`` that ``save_adapter`` would write; the model may be on the meta device."""
    return safetensors_size({key: e.tensor for key, e in _entries(model, adapter_name).items()})


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    is_trainable: bool | None = None,
    autocast_adapter_dtype: bool = True,
    config: PeftConfig | None = None,
) -> PeftModel:
    """Read an adapter that fastlora or stock peft wrote.

    Args:
        model: a ``fastlora.PeftModel`` (if it has ``adapter_name`` already its values are replaced, otherwise it gets
            another adapter, which waits for ``set_adapter``), or a base model (adapters are put in as the file says,
            frozen and in eval mode unless ``is_trainable``).
        path: the folder with the two files, or the one above it where the adapter has a sub-folder
            of its name.
        adapter_name: the adapter to fill.
        is_trainable: whether it trains afterwards, if it is active; None: as before.
        autocast_adapter_dtype: of an adapter that is new here; see ``get_peft_model``.
        config: in place of the folder's (PEFT's own works as well).

    Returns:
        ``model``, or the PeftModel around it.

    Raises:
        TypeError: ``model`` is no module.
        FileNotFoundError: a file is missing; ``adapter_model.bin`` alone is not read (it would be
            unpickled).
        ValueError, NotImplementedError: a file is torn, or does not fit the model. The model is
            then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; accepted is a torch.nn.Module")
    folder = find_folder(Path(path), check_adapter_name(adapter_name))
    config = PeftConfig.from_pretrained(folder) if config is None else own_config(config)
    tensors = read_tensors(weights_file(folder, config))
    training = folder / TRAINING_NAME
    behind = read_tensors(training) if training.is_file() else {}
    if not isinstance(model, PeftModel):
        config.inference_mode = not is_trainable
        injection = plan(model, config, adapter_name, autocast_adapter_dtype)
        wrapped = _put_in(injection, tensors, behind)
        return wrapped if is_trainable else wrapped.eval()

    model.check_change("load_adapter")
    if adapter_name in model.peft_config:
        _check_same_method(model, adapter_name, config, folder)
        _fill(model, adapter_name, tensors, behind)
    else:
        config.inference_mode = True
        model.add_loaded(
            adapter_name,
            config,
            lambda: _fill(model, adapter_name, tensors, behind),
            autocast_adapter_dtype,
        )
    if is_trainable is not None and adapter_name in model.active_adapters:
        own = model.peft_config[adapter_name]
        set_trainable(model.get_base_model(), own, model.active_adapters, is_trainable)
    return model


def _put_in(
    injection: Injection[Any], tensors: dict[str, Tensor], behind: dict[str, Tensor]
) -> PeftModel:
    """The PeftModel around a base model, with the values of a file; the base as it was if they do not fit."""
    injection.apply()
    try:
        wrapped = injection.wrap()
        _fill(wrapped, injection.adapter_name, tensors, behind)
    except BaseException:
        injection.undo()
        raise
    return wrapped


def _values(
    entries: Mapping[str, AdapterTensor], state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What the file holds, from a state_dict."""
    plain = [entry.key for entry in entries.values() if entry.compute is None]
    absent = sorted(key for key in plain if key not in state_dict)
    if absent:
        raise ValueError(
            f"state_dict: lacks {len(absent)} of the adapter's parameters, {absent[0]!r} among them"
        )
    return {key: _value(entry, state_dict) for key, entry in entries.items()}


def _value(entry: AdapterTensor, state_dict: Mapping[str, Tensor]) -> Tensor:
    if entry.compute is not None:
        return entry.compute(_below(entry.key, state_dict))
    value = entry.turned(state_dict[entry.key])
    if entry.narrow is not None:
        return entry.narrow(value)
    # Of a slot for hot-swapping the adapter's own ranks.
    return value[tuple(map(slice, entry.tensor.shape))]


def _behind(
    model: PeftModel,
    entries: Mapping[str, AdapterTensor],
    state_dict: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """What the computed values of a file are made from, as TRAINING_NAME has it: the model's tensors, or others'."""
    return {
        f"{key}.{name}": value
        for key, entry in entries.items()
        if entry.compute is not None
        for name, value in (
            model.get_submodule(entry.key.removesuffix(".")).state_dict()
            if state_dict is None
            else _below(entry.key, state_dict)
        ).items()
    }


def _below(prefix: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}


# Keys.


def _file_prefix(model: PeftModel, adapter_name: str) -> str:
    """What PEFT's keys begin with: prompt learning has no tuner around the base."""
    return "base_model." if model.peft_config[adapter_name].is_prompt_learning else PREFIX


def layers_of(
    model: PeftModel, adapter_name: str
) -> Iterator[tuple[str, AdapterLayer, dict[str, AdapterTensor]]]:
    """(what its keys in a file begin with, layer, key in the file -> entry) for every layer that carries adapters."""
    prefix = _file_prefix(model, adapter_name)
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, AdapterLayer):
            continue
        at = f"{name}." if name else ""
        in_file = f"{module.saved_as}." if module.saved_as else f"{prefix}{at}"
        in_file = in_file if module.names_in_file else ""
        entries = {
            f"{in_file}{key}": entry._replace(key=f"{PREFIX}{at}{entry.key}")
            for key, entry in module.adapter_tensors(adapter_name).items()
        }
        yield in_file, module, entries


def biases_of(model: PeftModel, adapter_name: str) -> dict[str, AdapterTensor]:
    """Key in the file -> entry, for the biases of the base that one adapter trains."""
    base, entries = model.get_base_model(), {}
    adapted = {f"{name}.bias" for name, m in base.named_modules() if isinstance(m, FusedLayer) and m.adapters}  # fmt: skip
    for name, bias in trained_biases(base, model.peft_config[adapter_name]).items():
        in_file = f"{name.removesuffix('bias')}base_layer.bias" if name in adapted else name
        entries[f"{PREFIX}{in_file}"] = AdapterTensor(f"{PREFIX}{name}", bias)
    return entries


def _entries(model: PeftModel, adapter_name: str) -> dict[str, AdapterTensor]:
    """Key in the file -> entry, for everything that belongs to one adapter."""
    entries: dict[str, AdapterTensor] = {}
    for _, _, own in layers_of(model, adapter_name):
        entries |= own
    if not entries:  # trained biases outlast an unloading, and are no adapter
        raise ValueError(
            f"model: has nothing of adapter {adapter_name!r} left, for its adapters were merged and unloaded; save before "
            "merge_and_unload, and load into a model that get_peft_model made anew"
        )
    return entries | biases_of(model, adapter_name)


def embedding_entries(model: PeftModel, adapter_name: str) -> dict[str, AdapterTensor]:
    """Base weights that PEFT adds to the file of a transformers model: embeddings that were
    resized, or an adapted output layer's. They are read if they are there; ``save_adapter`` does
    not write them."""
    base, entries, prefix = model.get_base_model(), {}, _file_prefix(model, adapter_name)
    ends = [getattr(base, f"get_{end}_embeddings", None) for end in ("input", "output")]
    embeddings = [end() for end in ends if callable(end)]
    for name, module in base.named_modules():
        if any(module is embedding for embedding in embeddings):
            inner = "base_layer." if isinstance(module, (FusedLayer, LoRAEmbedding)) else ""
            for key, tensor in module._parameters.items():  # a TrainableCopy has none of its own
                if tensor is not None:
                    entries[f"{prefix}{name}.{inner}{key}"] = AdapterTensor(
                        f"{PREFIX}{name}.{key}", tensor
                    )
    return entries


def _check_same_method(
    model: PeftModel, adapter_name: str, config: PeftConfig, folder: Path
) -> None:
    """The values only mean the same with the same scaling; shapes say the rest."""
    own = model.peft_config[adapter_name]
    for field in ("peft_type", *own.meaning):
        ours, theirs = getattr(own, field, None), getattr(config, field, None)
        if ours != theirs:
            raise ValueError(
                f"{folder / CONFIG_NAME}: has {field}={theirs!r} where the model's adapter "
                f"{adapter_name!r} has {ours!r}; build the model with "
                "fastlora.PeftConfig.from_pretrained(path)"
            )
    inits = [getattr(one, "init_lora_weights", True) for one in (own, config)]
    if inits[0] != inits[1] and any(map(_splits_weight, inits)):
        raise ValueError(
            f"{folder / CONFIG_NAME}: has init_lora_weights={inits[1]!r} where the model's adapter {adapter_name!r} has "
            f"{inits[0]!r}, and one of them took its factors out of the base weight; load into the base model"
        )


def _splits_weight(init: bool | str) -> bool:
    return changes_base_weight(init) and init != "loftq"


# Reading: everything is checked before anything is copied.


def _fill(
    model: PeftModel,
    adapter_name: str,
    tensors: dict[str, Tensor],
    behind: Mapping[str, Tensor] = {},
) -> None:
    pairs = matching(model, adapter_name, tensors, behind)
    for entry, _ in pairs:
        if is_sharded(entry.tensor):
            raise ValueError(f"{entry.key}: is sharded; load the adapter before fully_shard")
        if entry.tensor.device.type == "meta":
            raise ValueError(
                f"{entry.key}: is on the meta device; give the model real parameters first "
                "(to_empty)"
            )
    check_ties(pairs)
    with torch.no_grad():
        for entry, value in pairs:
            entry.tensor.copy_(value)


def check_ties(pairs: list[tuple[AdapterTensor, Tensor]]) -> None:
    """ValueError where a file has two values for one Parameter, which two modules share (ensure_weight_tying)."""
    known: dict[Any, tuple[Tensor, Tensor]] = {}
    for entry, value in pairs:
        target = entry.tensor
        memory: Any = target.untyped_storage()  # its address, on the meta device, is nobody's
        other, kept = known.setdefault(memory._cdata, (target, value))
        same = (target.shape, target.stride()) == (other.shape, other.stride())
        if kept is value or not target.numel():
            continue
        if not torch.equal(value if same else value.t(), kept):
            raise ValueError(
                f"{entry.key}: differs in the file from the tensor that it shares its memory with (ensure_weight_tying); stock "
                "peft does not keep them the same over a base in 16 bits. With ensure_weight_tying false and all modules in "
                f"target_modules of {CONFIG_NAME} both are read as they are"
            )


def matching(
    model: PeftModel,
    adapter_name: str,
    tensors: dict[str, Tensor],
    behind: Mapping[str, Tensor] = {},
) -> list[tuple[AdapterTensor, Tensor]]:
    """Every tensor of an adapter in ``model``, and its value in a file's ``tensors``; nothing is changed.

    Args:
        behind: what TRAINING_NAME has beside that file.

    Raises:
        ValueError: keys, shapes or dtypes do not fit; or values that the model computes cannot be told from the files.
    """
    entries = _entries(model, adapter_name)
    own_keys = model.peft_config[adapter_name].own_keys
    tensors = dict(own_keys(tensors, set(entries), model.get_base_model(), adapter_name))
    entries |= {
        k: entry for k, entry in embedding_entries(model, adapter_name).items() if k in tensors
    }
    tensors = {k: v for k, v in tensors.items() if k in entries or not is_shadow(k, adapter_name)}
    _check_keys(entries, tensors, model)
    computed = {key: entry for key, entry in entries.items() if entry.compute is not None}
    for key, entry in entries.items():
        if entry.narrow is not None:
            raise ValueError(f"{key}: is a slot for hot-swapping here, wider than the adapter in it; hotswap_adapter fills it")  # fmt: skip
    for key, own in _behind(model, computed).items():
        if key not in behind:
            raise ValueError(
                f"{key.partition('.')[0]}: the file holds what a network made, which cannot be told from it, and adapter "
                f"{adapter_name!r} has that network, which {TRAINING_NAME} would hold: save_adapter(resumable=True) writes "
                "it. Without, load it frozen under a new name or into a base model, and set_adapter(name) then trains the "
                "values themselves"
            )
        entries[key], tensors[key] = AdapterTensor(key, own), behind[key]
    entries = {key: entry for key, entry in entries.items() if key not in computed}
    for key, entry in entries.items():
        value, target = tensors[key], entry.tensor
        if value.shape != target.shape:
            raise ValueError(
                f"{key}: has shape {tuple(value.shape)} in the file where the model needs "
                f"{tuple(target.shape)}; the adapter was made for another base model or rank"
            )
        if target.is_floating_point():
            check_value(key, value)
    for key, entry in computed.items():
        assert entry.compute is not None
        made, value = entry.compute(_below(f"{key}.", behind)).double(), tensors[key].double()
        if made.shape != value.shape or not (made - value).norm() <= _SAME_TOKENS * value.norm():
            raise ValueError(
                f"{TRAINING_NAME}: makes other values than {WEIGHTS_NAME} has; the two were not saved together. Save the adapter again, or "
                "delete the former and load the latter frozen"
            )
    return [(entry, tensors[key]) for key, entry in entries.items()]


def _check_keys(
    keys: Mapping[str, AdapterTensor], tensors: Mapping[str, Tensor], model: PeftModel
) -> None:
    missing, unexpected = sorted(set(keys) - set(tensors)), sorted(set(tensors) - set(keys))
    parts = [
        f"{word} {len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for word, names in (("lacks", missing), ("has unknown", unexpected))
        if names
    ]
    if parts:
        raise ValueError(
            f"{WEIGHTS_NAME}: {' and '.join(parts)} of the {len(keys)} tensors that this "
            f"{type(model.get_base_model()).__name__}'s adapter has; it was made for other "
            "modules, or is torn"
        )
