"""``merge_checkpoint``: an adapter's folder merged into a model's, layer by layer, as files.

The model is made without memory (on the meta device) with the adapter's layers in it; one of them at a time gets its weight and the
adapter's values, and writes W + s B A. So merging takes the memory of a layer and a shard, not of the model.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers import AdapterLayer, LoRALinear, QLoRALinear, TrainableCopy
from ..layers.fused import FusedLayer
from ..methods import LoraConfig, PeftConfig
from ..models.entry import plan
from ..models.merge import MergeReport
from ..models.peft_model import PeftModel
from ..quant import NF4Tensor
from ..quant.checkpoint import keys_of, open_checkpoint, quantized_names, read_weight, write_weight
from ..quant.conversion import Conversion, describe
from .adapter import PREFIX, WEIGHTS_NAME, find_folder, matching, read_tensors
from .checkpoint import replacing_directory
from .shards import SHARD_BYTES, Shards, copy_rest

_AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def merge_checkpoint(
    source: str | Path,
    adapter: str | Path,
    target: str | Path,
    keep_4bit: bool = False,
    device: torch.device | str = "cpu",
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[str, int, int], object] = lambda key, done, total: None,
) -> list[MergeReport]:
    """Write the transformers model in ``source`` with the adapter in ``adapter`` merged to ``target``.

    What comes out is a plain checkpoint: transformers loads it, and any engine. Sums are made in fp32 and rounded once to the
    weight's dtype; a base in 4 bits comes out in floats of the dtype that it was quantised from, or with ``keep_4bit`` in 4 bits
    again. Weights that the adapter does not touch are copied bit for bit.

    Args:
        source: folder with config.json and safetensors, in floats or pre-quantised in bitsandbytes' 4 bits.
        adapter: folder that fastlora or stock peft wrote.
        target: folder to write. It appears whole or not at all, in place of one that is there.
        keep_4bit: quantise merged 4-bit weights again; the report says what that costs.
        device: where a layer is merged.
        shard_bytes: about how large a file may become.
        progress: is told each stored key, how many are done, and of how many.

    Returns:
        A ``MergeReport(name, error, update)`` for each merged layer.

    Raises:
        FileNotFoundError: ``source`` or ``adapter`` is incomplete.
        ValueError, NotImplementedError: they do not belong together, one is damaged, the method does not merge, or transformers
            computes an adapted weight of several stored ones.
        ImportError: transformers is not installed.
    """
    source, target = Path(source), Path(target)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source}: no config.json there; give the folder of a model")
    folder = find_folder(Path(adapter), "default")
    config = _mergeable(PeftConfig.from_pretrained(folder))
    raw: dict[str, Any] = json.loads((source / "config.json").read_text())
    model = _on_meta(source, config, raw)
    conversion, tied = Conversion(model), _tied_keys(model)
    wrapped = _with_adapter(model, config)
    values = matching(wrapped, "default", read_tensors(folder / WEIGHTS_NAME))
    work = _Work(wrapped, {entry.key.removeprefix(PREFIX): value for entry, value in values})
    with ExitStack() as stack:
        where = open_checkpoint(source, stack, device)
        stored = _Stored(where, conversion, tied, work, keep_4bit)
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing_directory(target) as out:
            shards, reports = Shards(out, shard_bytes), []
            keys = stored.plain_keys()
            for done, key in enumerate(keys):
                progress(key, done, len(keys))
                tensors, report = stored.merged(key)
                shards.add(tensors)
                reports += report
            shards.add(stored.heads())
            tensors, report = stored.untied()
            if tensors:
                raw["tie_word_embeddings"] = False
                shards.add(tensors)
                reports += report
            shards.finish()
            if not keep_4bit:
                raw.pop("quantization_config", None)
            raw["architectures"] = [type(model).__name__]
            (out / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
            copy_rest(source, out)
    return reports


def _mergeable(config: PeftConfig) -> LoraConfig:
    """``config``, if what it adapts are weights of modules, as W + s B A."""
    other = None
    if not isinstance(config, LoraConfig):
        other = f"peft_type: is {config.peft_type}"
    else:
        for field in ("target_parameters", "trainable_token_indices"):
            if getattr(config, field):
                other = f"{field}: got {getattr(config, field)!r}"
    if other is not None:
        raise NotImplementedError(
            f"{other}; merged into files is LoRA of whole modules. What else can be merged is in a model: load_adapter, "
            "merge_and_unload() and save_pretrained"
        )
    assert isinstance(config, LoraConfig)
    return config


def _on_meta(source: Path, config: LoraConfig, raw: dict[str, Any]) -> nn.Module:
    import transformers

    of_model: Any = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
    if getattr(of_model, "quantization_config", None) is not None:
        del of_model.quantization_config
    named = getattr(transformers, (raw.get("architectures") or [""])[0], None)
    with torch.device("meta"):
        if config.task_type is None and named is not None:
            return named._from_config(of_model)
        auto = getattr(transformers, _AUTO[config.task_type or "CAUSAL_LM"])
        model: nn.Module = auto.from_config(of_model)
        return model


def _tied_keys(model: Any) -> tuple[str, str] | None:
    """The keys of an output layer's weight and of the embeddings' that it is, or None."""
    ends = model.get_output_embeddings(), model.get_input_embeddings()
    if None in ends or ends[0].weight is not ends[1].weight:
        return None
    names = {id(module): name for name, module in model.named_modules()}
    return f"{names[id(ends[0])]}.weight", f"{names[id(ends[1])]}.weight"


def _with_adapter(model: nn.Module, config: LoraConfig) -> PeftModel:
    config = copy.deepcopy(config)
    config.init_lora_weights = True  # no values are drawn; PiSSA would look for the weight's
    injection = plan(model, config)
    injection.apply()
    return injection.wrap()


class _Layer(NamedTuple):
    """An adapter layer on the meta device: its name in the model, and the keys of its base there."""

    name: str
    layer: AdapterLayer
    keys: tuple[str, ...]


class _Work:
    """What the adapter changes: layers to merge, and tensors that take the place of others (copies, trained biases)."""

    def __init__(self, wrapped: PeftModel, values: dict[str, Tensor]) -> None:
        base = wrapped.get_base_model()
        self.layers: dict[str, _Layer] = {}  # key of a base tensor -> its layer
        self.replaced: dict[str, Tensor] = {}
        inside: set[str] = set()
        self._values = values
        for name, layer in base.named_modules():
            if not isinstance(layer, AdapterLayer) or not layer.adapter_tensors("default"):
                continue
            tensors = layer.adapter_tensors("default")
            inside |= {f"{name}.{entry.key}" for entry in tensors.values()}
            if isinstance(layer, TrainableCopy):
                for key, entry in tensors.items():
                    self.replaced[f"{name}.{key}"] = values[f"{name}.{entry.key}"]
                continue
            found = _Layer(name, layer, tuple(_base_keys(name, layer, tensors)))
            self.layers |= dict.fromkeys(found.keys, found)
        self.replaced |= {
            key.replace(".base_layer.", "."): value
            for key, value in values.items()
            if key not in inside
        }

    def merge(
        self, found: _Layer, base: dict[str, Tensor | NF4Tensor]
    ) -> tuple[dict[str, Any], MergeReport]:
        """The base tensors of a layer with the adapter in them, given its base tensors."""
        name, layer, _ = found
        live, device = _alive(name, layer, base), base[f"{name}.weight"].device
        for entry in layer.adapter_tensors("default").values():
            value = entry.turned(self._values[f"{name}.{entry.key}"])
            _assign(live, entry.key, value.to(device))
        made = live.merged_weight()
        merged: dict[str, Any] = {**base, f"{name}.weight": made.weight}
        if f"{name}.bias" in base and isinstance(live, FusedLayer):
            merged[f"{name}.bias"] = live.merged_bias()
        return merged, MergeReport(name, made.error, made.update)


def _base_keys(name: str, layer: AdapterLayer, own: dict[str, Any]) -> Iterator[str]:
    adapter = {entry.key for entry in own.values()}
    for key in layer.state_dict():
        if key not in adapter:
            yield f"{name}.{key.removeprefix('base_layer.')}"


def _alive(name: str, layer: AdapterLayer, base: dict[str, Tensor | NF4Tensor]) -> AdapterLayer:
    """A copy of ``layer`` with real base tensors; over a 4-bit weight a QLoRALinear."""
    weight = base[f"{name}.weight"]
    if isinstance(weight, NF4Tensor):
        assert isinstance(layer, LoRALinear)
        live: AdapterLayer = QLoRALinear.from_quantized(weight, base.get(f"{name}.bias"), r=None)  # type: ignore[arg-type]
        for attribute in layer.by_adapter:
            setattr(live, attribute, copy.deepcopy(getattr(layer, attribute)))
        live.active_adapters = list(layer.active_adapters)
        return live
    live = copy.deepcopy(layer)
    inner = "base_layer." if hasattr(layer, "base_layer") else ""
    for key, value in base.items():
        assert isinstance(value, Tensor)
        _assign(live, f"{inner}{key.removeprefix(name + '.')}", value)
    return live


def _assign(module: nn.Module, key: str, value: Tensor) -> None:
    path, _, leaf = key.rpartition(".")
    owner = module.get_submodule(path) if path else module
    owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)


class _Stored:
    """The source's tensors, and what becomes of each."""

    def __init__(
        self,
        where: dict[str, Callable[[str], Tensor]],
        conversion: Conversion,
        tied: tuple[str, str] | None,
        work: _Work,
        keep_4bit: bool,
    ) -> None:
        self._where, self._work, self._keep_4bit = where, work, keep_4bit
        self._kinds = quantized_names(where)
        parts = {k for name, kind in self._kinds.items() for k in keys_of(name, kind)}
        weights = {f"{name}.weight" for name in self._kinds}
        self._keys = [key for key in where if key not in parts or key in weights]
        self._targets: dict[str, str] = {}  # the model's key -> the stored one
        touched = set(work.layers) | set(work.replaced)
        for key in self._keys:
            to, rule = conversion.target(key)
            if rule is None:
                self._targets[to] = key
            elif to in touched:
                raise ValueError(
                    f"{key}: transformers computes {to} of it and others ({describe(rule)}), and the adapter changes {to}; load the "
                    "model, save it with save_pretrained(save_original_format=False), and merge into that"
                )
        self._model_keys = {stored: to for to, stored in self._targets.items()}
        self._tied = tied if tied is not None and tied[0] not in self._targets else None
        unknown = sorted(set(work.layers) - set(self._targets) - set(self._tied or ()))
        if unknown:
            raise ValueError(
                f"{unknown[0]}: the adapter changes it, and the source lacks it; the adapter was made for another model"
            )
        self._merged: dict[str, dict[str, Any]] = {}

    def plain_keys(self) -> list[str]:
        """The stored keys, a 4-bit weight's parts under its first."""
        return self._keys

    def _stored(self, key: str) -> Tensor | None:
        return self._where[key](key) if key in self._where else None

    def _read(self, key: str) -> Tensor | NF4Tensor:
        name = key.removesuffix(".weight")
        if key.endswith(".weight") and name in self._kinds:
            return read_weight(self._stored, name, self._kinds[name])
        return self._where[key](key)

    def merged(self, key: str) -> tuple[dict[str, Tensor], list[MergeReport]]:
        """What is written for a stored key."""
        to, reports = self._model_keys.get(key), []
        found = self._work.layers.get(to) if to is not None else None
        if to in self._work.replaced and found is None:
            return {key: self._work.replaced[to].to(self._read(key).dtype)}, []
        if found is None or to is None:
            return self._written(key, self._read(key)), []
        if found.name not in self._merged:
            base = {k: self._read(self._targets[k]) for k in found.keys if k in self._targets}
            base |= {k: self._work.replaced[k] for k in base if k in self._work.replaced}
            if not self._keep_4bit:
                base = {
                    k: v.dequantize() if isinstance(v, NF4Tensor) else v for k, v in base.items()
                }
            made, report = self._work.merge(found, base)
            self._merged[found.name] = made
            reports.append(report)
        return self._written(key, self._merged[found.name].pop(to)), reports

    def heads(self) -> dict[str, Tensor]:
        """Modules trained whole that the source does not have at all: a classifier's head."""
        known = {*self._targets, *(self._tied or ())}
        return {key: value for key, value in self._work.replaced.items() if key not in known}

    def untied(self) -> tuple[dict[str, Tensor], list[MergeReport]]:
        """The weight of an output layer that the source does not hold, for it is the embeddings', where the adapter changes
        one of the two."""
        if self._tied is None:
            return {}, []
        head, embedding = self._tied
        touched = {*self._work.layers, *self._work.replaced}
        if not touched & {head, embedding}:
            return {}, []
        weight = self._read(self._targets[embedding])
        reports: list[MergeReport] = []
        if head in self._work.replaced:
            weight = self._work.replaced[head].to(weight.dtype)
        if head in self._work.layers:
            made, report = self._work.merge(self._work.layers[head], {head: weight})
            weight, reports = made[head], [report]
        return self._written(head, weight), reports

    def _written(self, key: str, value: Tensor | NF4Tensor) -> dict[str, Tensor]:
        if not isinstance(value, NF4Tensor):
            return {key: value.detach().cpu()}
        if self._keep_4bit:
            return write_weight(key.removesuffix(".weight"), value)
        return {key: value.dequantize().cpu()}
