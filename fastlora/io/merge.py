"""``merge_checkpoint``: an adapter's folder merged into a model's, layer by layer, as files.

The model is made without memory (on the meta device) with the adapter's layers in it; one of them at a time gets its weight and the
adapter's values, and writes what they come to. So merging takes the memory of a layer and a shard, not of the model. Tensors that
transformers makes of others (stacked experts of single ones) are made for a moment, and written as they were stored.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..methods import LoraConfig, PeftConfig
from ..models.entry import plan
from ..models.merge import MergeReport
from ..models.peft_model import PeftModel
from ..quant import NF4Tensor
from ..quant.checkpoint import keys_of, open_checkpoint, quantized_names, read_weight, write_weight
from ..quant.conversion import Conversion, describe
from .adapter import PREFIX, check_ties, matching
from .checkpoint import replacing_directory
from .files import read_tensors
from .folder import find_folder, weights_file
from .merge_units import Unit, Work
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
            computes an adapted weight of stored ones and does not tell how to undo that.
        ImportError: transformers is not installed.
    """
    source, target = Path(source), Path(target)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source}: no config.json there; give the folder of a model")
    folder = find_folder(Path(adapter), "default")
    config = _mergeable(PeftConfig.from_pretrained(folder))
    raw: dict[str, Any] = json.loads((source / "config.json").read_text())
    _check_target(target, source, folder)
    model = _on_meta(source, config, raw)
    conversion, tied = Conversion(_on_meta(source, config, raw)), _tied_keys(model)
    wrapped = _with_adapter(model, config)
    values = matching(wrapped, "default", read_tensors(weights_file(folder, config)))
    check_ties(values)
    named = {entry.key.removeprefix(PREFIX): value for entry, value in values}
    work = Work(wrapped, named, getattr(config, "init_lora_weights", True))
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
            if stored.is_untied:
                raw["tie_word_embeddings"] = False
                tensors, report = stored.untied()
                shards.add(tensors)
                reports += report
            shards.finish()
            if not keep_4bit:
                raw.pop("quantization_config", None)
            raw["architectures"] = [type(model).__name__]
            (out / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
            copy_rest(source, out)
    return reports


def _check_target(target: Path, source: Path, adapter: Path) -> None:
    """ValueError where writing ``target`` would take away what is merged there, but for a source that the result replaces."""
    whole = target.resolve()
    for folder in (source.resolve(), adapter.resolve()):
        if whole in folder.parents or whole == adapter.resolve():
            raise ValueError(
                f"target: {target} is, or holds, {folder}, which is merged, and would be replaced; give another folder"
            )


def _mergeable(config: PeftConfig) -> PeftConfig:
    """``config``, if what it trains can be put into weights of the source."""
    if getattr(config, "layer_replication", None):
        raise NotImplementedError(
            "layer_replication: layers that occur again, each with an adapter of its own, are not in the source. Load both "
            "(fastlora.load_adapter), and save what merge_and_unload() gives, as docs/lora.md says"
        )
    why = None
    if config.is_prompt_learning:
        why = "virtual tokens are input to the model, and no change of its weights"
    elif config.peft_type == "BOTTLENECK":
        why = "there is an activation between its two projections, which no weight of the model can hold"
    if why is not None:
        raise NotImplementedError(
            f"peft_type: is {config.peft_type}, which cannot be merged: {why}. Keep the adapter beside the base"
        )
    return config


def _on_meta(source: Path, config: PeftConfig, raw: dict[str, Any]) -> nn.Module:
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


def _with_adapter(model: nn.Module, config: PeftConfig) -> PeftModel:
    config = copy.deepcopy(config)
    if isinstance(config, LoraConfig):
        config.init_lora_weights = True  # no values are drawn; PiSSA would look for the weight's
    injection = plan(model, config)
    injection.apply()
    return injection.wrap()


class _Group(NamedTuple):
    """Stored tensors of which transformers makes others, that the adapter changes."""

    first: str  # of the model's keys that it makes
    rule: Any
    stored: list[str]
    makes: list[str]


class _Stored:
    """The source's tensors, and what becomes of each."""

    def __init__(
        self,
        where: dict[str, Callable[[str], Tensor]],
        conversion: Conversion,
        tied: tuple[str, str] | None,
        work: Work,
        keep_4bit: bool,
    ) -> None:
        self._where, self._work, self._keep_4bit = where, work, keep_4bit
        self._conversion, self._tied = conversion, tied
        self._kinds = quantized_names(where)
        parts = {k for name, kind in self._kinds.items() for k in keys_of(name, kind)}
        weights = {f"{name}.weight" for name in self._kinds}
        self._keys = [key for key in where if key not in parts or key in weights]
        self._plain: dict[str, str] = {}  # the model's key -> the stored one
        rules: dict[str, tuple[Any, list[str]]] = {}
        for key in self._keys:
            to, rule = conversion.target(key)
            if rule is None:
                self._plain[to] = key
            else:
                rules.setdefault(to, (rule, []))[1].append(key)
        self._groups: dict[str, _Group] = {}  # by the keys that they make
        for to, (rule, stored) in rules.items():
            group = _Group(to, rule, stored, conversion.makes(to, rule))
            if work.touched & set(group.makes):
                self._check_group(group)
                self._groups |= dict.fromkeys(group.makes, group)
        self._model_keys = {stored: to for to, stored in self._plain.items()}
        self._model_keys |= {k: g.first for g in self._groups.values() for k in g.stored}
        here = {*self._plain, *self._groups}
        if tied is not None and tied[0] in work.follows and tied[0] in here:
            self._keys.remove(self._plain.pop(tied[0]))  # the model ties it again
            here.discard(tied[0])
        self.is_untied = tied is not None and bool(
            work.touched & set(tied) and tied[0] not in work.follows
        )
        unknown = sorted(set(work.units) - here - set(tied or ()))
        if unknown:
            raise ValueError(
                f"{unknown[0]}: the adapter changes it, and the source lacks it; the adapter was made for another model"
            )
        self._ready: dict[str, Any] = {}  # what was made beside something else, by stored keys
        self._reports: list[MergeReport] = []

    def _check_group(self, group: _Group) -> None:
        if self._keep_4bit and any(k.removesuffix(".weight") in self._kinds for k in group.stored):
            raise ValueError(
                f"keep_4bit: {group.stored[0]} is in 4 bits, and transformers computes {group.first} of it and others "
                f"({describe(group.rule)}), which the adapter changes; merge into floats"
            )

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

    def _floats(self, key: str) -> Tensor:
        value = self._read(key)
        return value.dequantize() if isinstance(value, NF4Tensor) else value

    def merged(self, key: str) -> tuple[dict[str, Tensor], list[MergeReport]]:
        """What is written for a stored key."""
        to = self._model_keys.get(key)
        if key not in self._ready and (to in self._work.touched or to in self._groups):
            assert to is not None
            self._make(to)
        value = self._ready.pop(key) if key in self._ready else self._read(key)
        reports, self._reports = self._reports, []
        return self._written(key, value), reports

    def _make(self, key: str) -> None:
        """Everything that has to be made together with the model's ``key``, for ``_ready``."""
        groups, units = self._together(key)
        made: dict[str, Any] = {}
        for group in groups:
            made |= self._conversion.compute(group.first, group.rule, group.stored, self._floats)
        for unit in units:
            for k in unit.keys:
                if k not in made and k in self._plain:
                    made[k] = self._read(self._plain[k]) if self._keep_4bit else self._floats(self._plain[k])  # fmt: skip
        if not units and not groups:
            made[key] = self._floats(self._plain[key])
        for k, value in made.items():
            if k in self._work.replaced:
                made[k] = self._work.replaced[k].to(value.device, value.dtype)
        for unit in units:
            merged, report = self._work.merge(unit, {k: made[k] for k in unit.keys if k in made})
            made |= merged
            self._reports.append(report)
        for group in groups:
            parts = {k: made.pop(k) for k in group.makes}
            self._ready |= self._conversion.undo(parts, group.stored)
        self._ready |= {self._plain[k]: value for k, value in made.items()}

    def _together(self, key: str) -> tuple[list[_Group], list[Unit]]:
        """The groups and units that ``key`` belongs to, and those that share a tensor with one of them."""
        groups: dict[str, _Group] = {}
        units: dict[str, Unit] = {}
        todo = [key]
        while todo:
            k = todo.pop()
            group, unit = self._groups.get(k), self._work.units.get(k)
            if group is not None and group.first not in groups:
                groups[group.first] = group
                todo += group.makes
            if unit is not None and unit.name not in units:
                units[unit.name] = unit
                todo += unit.keys
        return list(groups.values()), list(units.values())

    def heads(self) -> dict[str, Tensor]:
        """Modules trained whole that the source does not have at all: a classifier's head."""
        known = {*self._plain, *self._groups, *(self._tied or ())}
        return {key: value for key, value in self._work.replaced.items() if key not in known}

    def untied(self) -> tuple[dict[str, Tensor], list[MergeReport]]:
        """The weight of an output layer that the source does not hold, for it is the embeddings', where the adapter changes
        one of the two."""
        assert self._tied is not None
        head, embedding = self._tied
        if head in self._plain:
            return {}, []
        weight: Any = self._read(self._plain[embedding])
        reports: list[MergeReport] = []
        if head in self._work.replaced:
            weight = self._work.replaced[head].to(weight.dtype)
        if head in self._work.units:
            made, report = self._work.merge(self._work.units[head], {head: weight})
            weight, reports = made[head], [report]
        return self._written(head, weight), reports

    def _written(self, key: str, value: Tensor | NF4Tensor) -> dict[str, Tensor]:
        if not isinstance(value, NF4Tensor):
            return {key: value.detach().cpu()}
        if self._keep_4bit:
            return write_weight(key.removesuffix(".weight"), value)
        return {key: value.dequantize().cpu()}
