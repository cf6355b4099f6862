"""How (IA)^3 and LN tuning enter a model: linears become ``IA3Layer``, norms ``TunedNorm``."""

from __future__ import annotations

from typing import ClassVar, TypeVar

import torch
from torch import nn

from ..layers import AdapterLayer, IA3Layer, TrainableCopy, TunedNorm
from ..layers.wrapper import linear_features
from ..methods.base import TargetedConfig
from ..methods.ia3 import IA3_TARGETS, IA3Config
from ..methods.ln_tuning import NORMS, LNTuningConfig
from ..methods.matching import resolve_targets, shortest_names
from ..quant import NF4Tensor
from .inject import Injection

Config = TypeVar("Config", bound=TargetedConfig)


class WrappingInjection(Injection[Config]):
    """A method whose layer takes any module as its base, an adapter layer that has no adapters too (a 4-bit linear, say)."""

    kind: ClassVar[type[AdapterLayer]]

    def _plan_growth(self, name: str, layer: AdapterLayer) -> None:
        if isinstance(layer, (self.kind, TrainableCopy)):
            super()._plan_growth(name, layer)
        else:
            self._swap_child(name, self._layer(name, layer))

    def _model_type(self) -> str | None:
        return getattr(getattr(self.model, "config", None), "model_type", None)

    def _no_default(self, field: str) -> str:
        kind = self._model_type()
        return (
            f"{field}: not given, and there is no default for "
            f"{'a plain torch model' if kind is None else repr(kind)}; give a list of module names or a regular expression"
        )

    def _resolve_names(self) -> None:
        """A list or "all-linear" as it goes into the file."""
        config = self.config
        asked = config.target_modules
        config.target_modules = targets = resolve_targets(config, self.model)
        if isinstance(asked, str) and isinstance(targets, list):
            config.target_modules = shortest_names(targets, self._modules)


class IA3Injection(WrappingInjection[IA3Config]):
    """Vectors at linear modules."""

    kind = IA3Layer

    def _resolve(self) -> None:
        config, defaults = self.config, IA3_TARGETS.get(self._model_type() or "")
        if config.target_modules is None:
            if defaults is None:
                raise ValueError(self._no_default("target_modules"))
            config.target_modules = list(defaults[0])
        if config.feedforward_modules is None:
            if defaults is None:
                raise ValueError(f"{self._no_default('feedforward_modules')}, [] for none")
            config.feedforward_modules = list(defaults[1])
        self._resolve_names()

    def _problem(self, name: str, module: nn.Module) -> str | None:
        if isinstance(self._parent(name), nn.MultiheadAttention):
            return "torch.nn.MultiheadAttention reads its weight past it: an adapter would idle"
        if linear_features(module) is None:
            kind = type(module).__name__
            return f"a {kind} is not a linear map with a known size; fastlora's (IA)^3 scales linear modules"
        return None

    def _adapter_dtype(self, module: nn.Module) -> torch.dtype | None:
        """Of the vectors; None: the layer's own choice, fp32 over a base below it."""
        dtype = getattr(getattr(module, "weight", None), "dtype", None)
        is_float = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        return dtype if is_float and not self._widen else None

    def _layer(self, name: str, module: nn.Module) -> IA3Layer:
        self.config.fan_in_fan_out = type(module).__name__ == "Conv1D"  # as peft corrects it
        return IA3Layer(
            module,
            self.config.is_feedforward(name),
            self.config.init_ia3_weights,
            self._adapter_dtype(module),
            self.adapter_name,
        )

    def _plan_growth(self, name: str, layer: AdapterLayer) -> None:
        wanted = self.config.is_feedforward(name)
        if isinstance(layer, IA3Layer) and layer.adapters and layer.is_feedforward != wanted:
            scaled = "input" if layer.is_feedforward else "output"
            raise ValueError(
                f"feedforward_modules: the adapters {layer.adapters} scale this module's {scaled}; all adapters of a module "
                "must scale the same"
            )
        super()._plan_growth(name, layer)

    def _grow(self, name: str, layer: AdapterLayer) -> None:
        assert isinstance(layer, IA3Layer)
        layer.is_feedforward = self.config.is_feedforward(name)
        layer.add_adapter(
            self.adapter_name, self.config.init_ia3_weights, self._adapter_dtype(layer)
        )


class LNTuningInjection(WrappingInjection[LNTuningConfig]):
    """Trained copies of norms."""

    kind = TunedNorm

    def _resolve(self) -> None:
        if self.config.target_modules is None:
            names = NORMS.get(self._model_type() or "")
            if names is None:
                raise ValueError(self._no_default("target_modules"))
            self.config.target_modules = list(names)
        self._resolve_names()

    def _problem(self, name: str, module: nn.Module) -> str | None:
        kind = type(module).__name__
        if isinstance(module, TunedNorm):
            return None
        if next(module.parameters(), None) is None:
            return f"a {kind} has no parameters to train"
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            return f"a {kind} has no forward of its own"
        if any(isinstance(m, NF4Tensor) for m in module.modules()):
            return "it holds 4-bit weights, which cannot be trained whole"
        if any(isinstance(m, AdapterLayer) for m in module.modules()):
            return "it holds adapter layers"
        return None

    def _kinds(self) -> list[str]:
        return sorted({n.rpartition(".")[2] for n in self._modules if "norm" in n.lower()})

    def _targets(self) -> list[str]:
        names = super()._targets()
        for name in names:
            outer = [other for other in names if name.startswith(f"{other}.")]
            if outer:
                raise ValueError(
                    f"target_modules: matches {name!r} inside {outer[0]!r}, which it matches as well; name one of them"
                )
        return names

    def _layer(self, name: str, module: nn.Module) -> TunedNorm:
        return TunedNorm(module, self.adapter_name)

    def _grow(self, name: str, layer: AdapterLayer) -> None:
        assert isinstance(layer, TunedNorm)
        layer.add_adapter(self.adapter_name)
