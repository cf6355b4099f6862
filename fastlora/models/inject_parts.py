"""LoRA's adapters on parts of modules: single Parameters (``target_parameters``) and rows (``trainable_token_indices``); and on
modules that share their weight (``ensure_weight_tying``)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..layers import (
    AdapterLayer,
    LoRAEmbedding,
    LoRAParameter,
    TiedLoRALinear,
    TrainableCopy,
    TrainableTokens,
)
from ..layers.parameter import parameter_problem
from ..layers.plain import is_plain_linear
from ..layers.tokens import tokens_problem
from ..methods import LoraConfig
from .inject import Growth, Injection, naming

# Names by which PEFT knows that a model's ends are meant.
_ENDS = ("embed_tokens", "lm_head")


class PartsInjection(Injection[LoraConfig]):
    """What ``target_parameters``, ``trainable_token_indices`` and ``ensure_weight_tying`` change."""

    # Modules over the weight of the input embeddings that share the adapter, or the trained copy, of those.
    _tied_targets: list[str]
    _tied_copies: list[str]

    def _settings(self, name: str, weight: Any) -> dict[str, Any]:
        """Of the adapter called ``name`` in patterns, as ``LoRALayer.add_adapter`` takes them."""
        raise NotImplementedError

    def _check_split(self, name: str, module: nn.Module) -> None:
        """ValueError if the initialisation would change a weight that another module shares."""
        raise NotImplementedError

    def _is_replaced(self, module: nn.Module) -> bool:
        """Whether another module takes its place by now."""
        return any(swap.old is module for swap in self._swaps)

    def _is_copied(self, name: str) -> bool:
        """Whether ``modules_to_save`` names it, or a module around it."""
        wanted = self.config.modules_to_save or []
        around = [name, *(n for n in self._modules if n and name.startswith(f"{n}."))]
        return any(n.endswith(part) for n in around for part in wanted)

    # Modules that share their weight.

    def _resolve_ties(self) -> None:
        """What ``ensure_weight_tying`` ties. As in PEFT, one end that is named stands for both, and goes into the file as the
        input embeddings' whole name."""
        self._tied_targets, self._tied_copies = [], []
        config = self.config
        if not config.ensure_weight_tying:
            return
        first = self._input_embeddings()
        tied = self._sharing(first) if first in self._modules else []
        if not tied:
            warnings.warn(
                "ensure_weight_tying: no other module has the weight of the input embeddings; nothing is tied",
                stacklevel=7,
            )
        elif any(name.rpartition(".")[2] in _ENDS for name in config.modules_to_save or []):
            config.modules_to_save = _first_alone(config.modules_to_save or [], first, tied)
            self._tied_copies = tied
        elif isinstance(config.target_modules, str):
            if any(re.fullmatch(config.target_modules, name) for name in _ENDS):
                config.target_modules = rf"(?:{config.target_modules}|^{re.escape(first)}$)"
                self._tied_targets = tied
        elif any(name.rpartition(".")[2] in _ENDS for name in config.target_modules or []):
            config.target_modules = _first_alone(list(config.target_modules or []), first, tied)
            self._tied_targets = tied
        if tied and not (self._tied_targets or self._tied_copies or config.trainable_token_indices):
            warnings.warn(
                f"ensure_weight_tying: neither of {', '.join(_ENDS)} is in target_modules or modules_to_save; nothing is tied",
                stacklevel=7,
            )

    def _plan_ties(self) -> None:
        """The adapter of the input embeddings for the modules over the same weight too.

        Raises:
            ValueError: a module that is no plain nn.Linear, or is not tied for the adapters that there are.
        """
        for name in self._tied_targets:
            module, source = self._modules[name], self._layer_of(self._input_embeddings())
            settings = self._settings(name, getattr(module, "weight", None))
            with naming(name):
                self._check_split(name, module)
                if isinstance(module, TiedLoRALinear):
                    module.check_change("add_adapter")
                    self._growths.append(Growth(module, self._another_tied(module, settings)))
                    continue
                if (
                    not is_plain_linear(module)
                    or self._is_copied(name)
                    or self._is_replaced(module)
                ):
                    raise ValueError(
                        f"ensure_weight_tying: it has the weight of the input embeddings, and is a {type(module).__name__}; "
                        "accepted is a plain nn.Linear without other adapters. Leave ensure_weight_tying False, or start from "
                        "the base model"
                    )
                if not isinstance(source, LoRAEmbedding) or source.adapters != [self.adapter_name]:
                    raise ValueError(
                        "ensure_weight_tying: the input embeddings have adapters that it is not tied to; start from the base model"
                    )
                assert isinstance(module, nn.Linear)
                layer = TiedLoRALinear(module, source, self.adapter_name, **settings)
                self._swap_child(name, layer)

    def _another_tied(self, layer: TiedLoRALinear, settings: dict[str, Any]) -> Callable[[], None]:
        return lambda: layer.add_adapter(self.adapter_name, **settings)

    def _layer_of(self, name: str) -> nn.Module:
        """What is at ``name`` once the changes are made."""
        module = self._modules[name]
        return next((swap.new for swap in self._swaps if swap.old is module), module)

    def _plan_copies(self) -> None:
        super()._plan_copies()
        copies = (growth.layer for growth in self._growths)
        if any(isinstance(layer, TrainableCopy) and layer.source[0] for layer in copies):
            raise ValueError(
                "modules_to_save: the output layer shares the copies of the input embeddings (ensure_weight_tying), and can have "
                "no other; set ensure_weight_tying here too"
            )
        for name in self._tied_copies:
            module, source = self._modules[name], self._layer_of(self._input_embeddings())
            with naming(name):
                if isinstance(module, TrainableCopy) and module.source[0] is source:
                    self._growths.append(Growth(module, self._another_copy(module)))
                    continue
                if isinstance(module, AdapterLayer) or self._is_replaced(module):
                    raise ValueError(
                        "ensure_weight_tying: it has other adapters, and cannot share the copy of the input embeddings; start "
                        "from the base model"
                    )
                assert isinstance(source, TrainableCopy)
                if source.adapters != [self.adapter_name]:
                    raise ValueError(
                        "ensure_weight_tying: the input embeddings have copies that it does not share; start from the base model"
                    )
                self._swap_child(name, TrainableCopy(module, self.adapter_name, source))

    def _warn_if_tied(self, name: str, module: nn.Module) -> None:
        if not self._tied_copies:
            super()._warn_if_tied(name, module)

    # Parameters.

    def _target_parameters(self) -> dict[str, tuple[str, str]]:
        """What ``target_parameters`` matches, in the modules' order: name of the Parameter -> that of its module, and its own.

        Raises:
            ValueError: a name matches nothing.
        """
        wanted = self.config.target_parameters or []
        found, used = {}, set()
        for module_name, module in self._modules.items():
            inner = module.module if isinstance(module, LoRAParameter) else module
            for own in inner._parameters:
                name = f"{module_name}.{own}"
                matches = {w for w in wanted if name == w or name.endswith(f".{w}")}
                if matches:
                    found[name] = module_name, own
                    used |= matches
        if unused := [w for w in wanted if w not in used]:
            raise ValueError(
                f"target_parameters: {unused} match no Parameter of this {type(self.model).__name__}; accepted are names "
                "such as 'mlp.experts.gate_up_proj'"
            )
        return found

    def _plan_parameters(self) -> None:
        """A LoRAParameter for each that ``target_parameters`` matches, around one another where they are of one module.

        Raises:
            ValueError, TypeError: one that cannot have adapters.
        """
        by_module: dict[str, dict[str, str]] = {}
        for name, (module_name, own) in self._target_parameters().items():
            by_module.setdefault(module_name, {})[own] = name
        if by_module and self.config.fan_in_fan_out:
            raise ValueError(
                "fan_in_fan_out: is True with target_parameters; accepted is False, as in PEFT"
            )
        for module_name, parameters in by_module.items():
            module = self._modules[module_name]
            with naming(module_name):
                self._check_parameters(module_name, module, list(parameters))
                if isinstance(module, LoRAParameter):
                    self._grow_parameters(module, parameters)
                    continue
                layer = module
                for own, name in parameters.items():
                    settings = self._settings(name, module._parameters[own])
                    layer = LoRAParameter(layer, own, self.adapter_name, **settings)
                self._swap_child(module_name, layer)

    def _check_parameters(self, module_name: str, module: nn.Module, parameters: list[str]) -> None:
        problem = None
        inner = module.module if isinstance(module, LoRAParameter) else module
        if not module_name:
            problem = "it is the model itself, which cannot be replaced"
        elif isinstance(inner, AdapterLayer) or self._is_replaced(inner):
            problem = "the module has adapters as a whole (target_modules); exclude it there, or give target_modules=[]"
        elif self._is_copied(module_name):
            problem = "modules_to_save names the module as well"
        elif self._owners[id(module)] > 1:
            problem = "the same module is used in several places of the model (not supported)"
        for own in parameters:
            problem = problem or parameter_problem(inner, own)
            if problem:
                raise ValueError(f"target_parameters: matches {own!r}, but {problem}")

    def _grow_parameters(self, outermost: LoRAParameter, parameters: dict[str, str]) -> None:
        chain = {layer.parameter_name: layer for layer in outermost.chain()}
        if set(chain) != set(parameters):
            raise ValueError(
                f"target_parameters: matches {sorted(parameters)} where adapters {outermost.adapters} have {sorted(chain)}; "
                "accepted are the same, for their order is in the files' names"
            )
        for own, name in parameters.items():
            layer = chain[own]
            layer.check_change("add_adapter")
            settings = self._settings(name, layer.weight)

            def add(layer: LoRAParameter = layer, settings: dict[str, Any] = settings) -> None:
                layer.add_adapter(self.adapter_name, **settings)

            self._growths.append(Growth(layer, add))

    # Rows.

    def _plan_tokens(self) -> None:
        """A TrainableTokens where ``trainable_token_indices`` says so, and a TiedTokens for each module with the same weight.

        As in PEFT the weight is shared if it is that of the input embeddings and no other rows are named for another module
        that has it.

        Raises:
            ValueError: a name that matches nothing, or a module of which rows cannot be trained alone.
        """
        given = self.config.trainable_token_indices
        if given is None:
            return
        first = self._input_embeddings()
        if not isinstance(given, dict):
            given = {first: given}
        rows: dict[str, list[int]] = {}
        for key, indices in given.items():
            names = [name for name in self._modules if name and name.endswith(key)]
            if not names:
                raise ValueError(
                    f"trainable_token_indices: {key!r} matches no module of this {type(self.model).__name__}"
                )
            rows.update(dict.fromkeys(names, indices))
        tied = self._sharing(first) if first in rows else []
        if any(rows.get(name, rows[first]) != rows[first] for name in tied):
            if self.config.ensure_weight_tying:
                raise ValueError(
                    f"trainable_token_indices: gives {[first, *tied]}, which share their weight, different rows; accepted with "
                    "ensure_weight_tying are the same"
                )
            tied = []
        for name in tied:
            rows.pop(name, None)
        for name, indices in rows.items():
            with naming(name):
                self._plan_rows(name, indices, tied if name == first else [])

    def _input_embeddings(self) -> str:
        """The name of the model's input embeddings; PEFT's guess where it does not say."""
        ask = getattr(self.model, "get_input_embeddings", None)
        embeddings = ask() if callable(ask) else None
        names = (name for name, module in self._modules.items() if module is embeddings)
        return next(names, "embed_tokens")

    def _sharing(self, first: str) -> list[str]:
        """The names of the other modules over the weight of the module ``first``."""
        weight = _weight(self._modules[first])
        return [
            name
            for name, module in self._modules.items()
            if name != first and weight is not None and _weight(module) is weight
        ]

    def _plan_rows(self, name: str, indices: list[int], tied: list[str]) -> None:
        module = self._modules[name]
        dtype = self._settings(name, getattr(module, "weight", None))["adapter_dtype"]
        if isinstance(module, TrainableTokens):
            module.check_change("add_adapter")
            kept = {id(layer) for layer in module.tied}
            if {id(self._modules[other]) for other in tied} != kept:
                raise ValueError(
                    "trainable_token_indices: another adapter has other rows for the modules that share this weight"
                )
            module.check_rows(indices)

            def add() -> None:
                module.add_adapter(self.adapter_name, indices, dtype)

            self._growths.append(Growth(module, add))
            return
        self._check_rows(name)
        layer = TrainableTokens(module, indices, self.adapter_name, dtype)
        self._swap_child(name, layer)
        for other in tied:
            with naming(other):
                self._check_rows(other)
                self._swap_child(other, layer.tie(self._modules[other]))

    def _check_rows(self, name: str) -> None:
        module = self._modules[name]
        problem = None
        if isinstance(module, AdapterLayer) or self._is_replaced(module):
            problem = "the module has adapters already; exclude it from target_modules"
        elif self._is_copied(name):
            problem = "modules_to_save names the module as well"
        elif self._owners[id(module)] > 1:
            problem = "the same module is used in several places of the model (not supported)"
        problem = problem or tokens_problem(module)
        if problem:
            raise ValueError(f"trainable_token_indices: {problem}")


def _weight(module: nn.Module) -> torch.Tensor | None:
    """A module's weight, of one with trained copies that of the original."""
    weight = getattr(getattr(module, "original_module", module), "weight", None)
    return weight if isinstance(weight, torch.Tensor) else None


def _first_alone(names: list[str], first: str, tied: list[str]) -> list[str]:
    """``names`` with the input embeddings, and without what names the modules tied to them."""
    kept = [*names, *([first] if first not in names else [])]
    for other in tied:
        found = (name for name in kept if re.match(rf"(^|.*\.){name}($|\..*)", other))
        if (name := next(found, None)) is not None:
            kept.remove(name)
    return kept
