"""Where transformers puts what a checkpoint stores: version 5 renames keys, and makes one tensor of several or several of one.

The rules are transformers' own (``get_model_conversion_mapping``, which peft reads too); older ones have none, and their models
are called as their checkpoints.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor


class Conversion:
    """From a checkpoint's keys to those of ``model``, a transformers model as its configuration makes it (on meta, say)."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._own = model.state_dict()
        self._renamings: list[Any] = []
        self._converters: list[Any] = []
        self._loading: Any = None
        try:
            from transformers import core_model_loading
            from transformers.conversion_mapping import get_model_conversion_mapping
        except ImportError:
            return
        self._loading = core_model_loading
        for rule in get_model_conversion_mapping(self._model):
            converts = isinstance(rule, core_model_loading.WeightConverter)
            (self._converters if converts else self._renamings).append(rule)

    def target(self, key: str) -> tuple[str, Any]:
        """The model's key for a stored one (where it makes several, the first), and what has to be computed: None, or a
        rule that takes tensors together or apart."""
        found, pattern = self._rename(key, self._renamings, self._converters)
        if found not in self._own and key in self._own:
            found, pattern = self._rename(key, [], [])
        if pattern is None:
            return found, None
        return found, next(rule for rule in self._converters if pattern in rule.source_patterns)

    def _rename(self, key: str, renamings: list[Any], converters: list[Any]) -> tuple[str, Any]:
        if self._loading is None:
            return key, None
        prefix = self._model.base_model_prefix
        renamed: tuple[str, Any] = self._loading.rename_source_key(
            key, renamings, converters, prefix, self._own
        )
        return renamed

    def unknown(self, keys: Iterable[str]) -> list[str]:
        """The keys that belong to nothing in the model; those that transformers passes over in silence are not among them."""
        patterns = list(getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or ())
        for name, _ in self._model.named_buffers():  # once stored, now made
            if name.endswith(("rotary_emb.inv_freq", "position_ids")):
                patterns.append(rf"(^|\.){name.rpartition('.')[2]}$")
        found = ((key, self.target(key)[0]) for key in keys)
        return sorted(
            key
            for key, target in found
            if target not in self._own and not any(re.search(p, target) for p in patterns)
        )

    def read(self, keys: Iterable[str], get: Callable[[str], Tensor | None]) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
        """The model's keys and what belongs there, of all that is known among the stored ``keys``.

        Raises:
            ValueError: a key is stored twice, or tensors do not go together.
        """
        plain: dict[str, str] = {}
        computed: dict[str, tuple[Any, list[str]]] = {}
        for key in sorted(keys, key=_by_number):  # an expert's number is its place
            target, rule = self.target(key)
            if target not in self._own:
                continue
            if target in plain or (rule is None and target in computed):
                raise ValueError(f"{key}: {target} is stored already, as {plain.get(target)}")
            if rule is None:
                plain[target] = key
            else:
                computed.setdefault(target, (rule, []))[1].append(key)
        for target, key in plain.items():
            if (tensor := get(key)) is not None:
                yield target, tensor
        for target, (rule, stored) in computed.items():
            yield from self.compute(target, rule, stored, get).items()

    def makes(self, target: str, rule: Any) -> list[str]:
        """The model's keys that a rule of ``target`` makes of stored tensors, ``target`` first."""
        first, *others = rule.target_patterns
        return [target, *(target.replace(first, other) for other in others)]

    def compute(self, target: str, rule: Any, stored: list[str], get: Callable[[str], Tensor | None]) -> dict[str, Tensor]:  # fmt: skip
        """The model's tensors that ``rule`` makes of the ``stored`` ones.

        Raises:
            ValueError: these do not go together.
        """
        rule = copy.deepcopy(rule)
        for key in sorted(stored, key=_by_number):
            _, pattern = self._rename(key, self._renamings, self._converters)
            rule.add_tensor(target, key, pattern, partial(get, key))
        try:
            made = rule.convert(target, model=self._model, config=self._model.config)
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{stored[0]} and {len(stored) - 1} more: {target} cannot be made of them ({error}); the checkpoint is "
                "damaged or incomplete"
            ) from error
        return {k: v[0] if isinstance(v, list) else v for k, v in made.items()}

    def undo(self, values: dict[str, Tensor], stored: list[str]) -> dict[str, Tensor]:
        """The ``stored`` tensors that ``compute`` would make ``values`` of.

        Raises:
            ValueError: transformers does not tell.
        """
        try:
            made: dict[str, Tensor] = self._loading.revert_weight_conversion(self._model, values)
        except Exception as error:  # an operation without an inverse, say
            raise ValueError(f"{stored[0]}: {self._irreversible(values)} ({error})") from error
        if set(made) != set(stored):
            raise ValueError(f"{stored[0]}: {self._irreversible(values)}")
        return made

    def _irreversible(self, values: Iterable[str]) -> str:
        return (
            f"transformers computes {next(iter(values))} of it and others, and does not tell how to write a changed one; load "
            "the model, save it with save_pretrained(save_original_format=False), and merge into that"
        )


def describe(rule: Any) -> str:
    """What a rule of ``Conversion.target`` does, in transformers' words."""
    return ", ".join(type(operation).__name__ for operation in rule.operations)


def _by_number(key: str) -> list[tuple[int, int, str]]:
    parts = key.split(".")
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts]
