"""LoRA's adapters on parts of modules: single Parameters (``target_parameters``) and rows (``trainable_token_indices``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..layers import AdapterLayer, LoRAParameter, TrainableTokens
from ..layers.parameter import parameter_problem
from ..layers.tokens import tokens_problem
from ..methods import LoraConfig
from .inject import Growth, Injection, naming


class PartsInjection(Injection[LoraConfig]):
    """What ``target_parameters`` and ``trainable_token_indices`` change."""

    def _settings(self, name: str, weight: Any) -> dict[str, Any]:
        """Of the adapter called ``name`` in patterns, as ``LoRALayer.add_adapter`` takes them."""
        raise NotImplementedError

    def _is_replaced(self, module: nn.Module) -> bool:
        """Whether another module takes its place by now."""
        return any(swap.old is module for swap in self._swaps)

    def _is_copied(self, name: str) -> bool:
        """Whether ``modules_to_save`` names it, or a module around it."""
        wanted = self.config.modules_to_save or []
        around = [name, *(n for n in self._modules if n and name.startswith(f"{n}."))]
        return any(n.endswith(part) for n in around for part in wanted)

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
        weight = getattr(self._modules[first], "weight", None)
        return [
            name
            for name, module in self._modules.items()
            if name != first and isinstance(weight, torch.Tensor) and getattr(module, "weight", None) is weight
        ]  # fmt: skip

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
