"""How bottleneck adapters enter a model: sublayers become ``BottleneckLayer``, and norms tell them their input."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..layers import AdapterLayer
from ..layers.bottleneck import BottleneckLayer, StreamTap
from ..layers.wrapper import linear_features
from ..methods.bottleneck import BottleneckConfig
from ..methods.matching import is_excluded, resolve_targets
from .bottleneck_places import KINDS, Place, find_places, is_sandwiched, stream_problem
from .inject_small import WrappingInjection

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


class BottleneckInjection(WrappingInjection[BottleneckConfig]):
    """Bottlenecks at attention and feed-forward sublayers, or at modules by name."""

    kind = BottleneckLayer

    way_out = ""  # stock peft has no such method

    def _resolve(self) -> None:
        config = self.config
        self._places: dict[str, Place] = {}
        self._taps: list[tuple[nn.Module, StreamTap]] = []
        self._handles: list[RemovableHandle] = []
        if config.target_modules is not None:
            config.target_modules = resolve_targets(config, self.model)
            return
        if not (config.mh_adapter or config.output_adapter):
            raise ValueError(
                "mh_adapter, output_adapter: both are False, and there is no target_modules; nothing would be adapted"
            )
        places = find_places(self.model, self._modules, config.mh_adapter, config.output_adapter)
        if not places:
            kind = self._model_type()
            raise ValueError(
                f"target_modules: not given, and fastlora does not know where the sublayers of "
                f"{'a plain torch model' if kind is None else repr(kind)} are (it knows {', '.join(sorted(KINDS))}); name the "
                "modules to adapt"
            )
        self._check_model(places)
        unknown = sorted(set(config.leave_out) - {place.layer for place in places})
        if unknown:
            raise ValueError(
                f"leave_out: got {unknown}; this model's layers are 0 to {max(p.layer for p in places)}"
            )
        self._places = {
            place.module: place
            for place in places
            if place.layer not in config.leave_out and not is_excluded(config, place.module)
        }
        if not self._places:
            raise ValueError("leave_out, exclude_modules: leave no layer to adapt")

    def _check_model(self, places: list[Place]) -> None:
        """What the library's options mean depends on where the model has its norms."""
        config, settings = self.config, self.config.settings()
        sequential_sum = settings.original_ln_before and not settings.is_parallel
        if any(place.norm is None for place in places):
            return
        problem = stream_problem(self.model)
        if settings.needs_stream and problem is not None:
            name = "is_parallel" if settings.is_parallel else "original_ln_before"
            raise ValueError(f"{name}: {problem}, so that its adapters cannot read the residual")
        if sequential_sum and is_sandwiched(self.model):
            raise ValueError(
                "original_ln_before: this model has norms of its own between a sublayer and the sum; use False"
            )
        if sequential_sum and config.residual_before_ln == "post_add":
            raise ValueError(
                "residual_before_ln: 'post_add' is for models with a norm behind the sum, as BERT; use True or False"
            )
        if not config.original_ln_after:
            raise ValueError(
                "original_ln_after: got False; this model's layers add the residual themselves, accepted is True"
            )
        about = getattr(self.model, "config", None)
        if getattr(about, "slow_but_exact", False) and getattr(about, "pretraining_tp", 1) > 1:
            raise ValueError(
                "model: with slow_but_exact it reads the weights of its linears past them: an adapter would idle"
            )

    def _targets(self) -> list[str]:
        return list(self._places) if self._places else super()._targets()

    def _problem(self, name: str, module: nn.Module) -> str | None:
        kind = type(module).__name__
        if isinstance(module, _CONTAINERS):
            return f"a {kind} has no output to adapt"
        if isinstance(self._parent(name), nn.MultiheadAttention):
            return "torch.nn.MultiheadAttention reads its weight past it: an adapter would idle"
        if self._features(name, module) is None:
            return f"fastlora cannot tell how wide the output of a {kind} is"
        return None

    def _features(self, name: str, module: nn.Module) -> tuple[int, int] | None:
        """(width of what a parallel adapter reads, width of the output)."""
        if isinstance(module, BottleneckLayer):
            return module.in_features, module.out_features
        width = getattr(getattr(self.model, "config", None), "hidden_size", None)
        width = (width, width) if isinstance(width, int) else None
        return width if name in self._places else linear_features(module) or width

    def _add(self, name: str, layer: BottleneckLayer) -> None:
        config, settings = self.config, self.config.settings()
        width = layer.in_features if settings.is_parallel else layer.out_features
        place = self._places.get(name)
        r = config.width(width, None if place is None else place.layer)
        device, dtype = self._device_dtype(name, layer.base_layer)
        layer.add_adapter(self.adapter_name, r, settings, device, dtype)

    def _device_dtype(self, name: str, module: nn.Module) -> tuple[torch.device, torch.dtype]:
        """Of the adapter: fp32 over a base below it, unless it is to be the base's."""
        for owner in (module, self._parent(name), self.model):
            for part in owner.modules():
                weight: Any = getattr(part, "weight", None)
                dtype = getattr(weight, "dtype", None)
                if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
                    widened = torch.promote_types(dtype, torch.float32)
                    return weight.device, widened if self._widen else dtype
        return torch.device("cpu"), torch.float32

    def _layer(self, name: str, module: nn.Module) -> BottleneckLayer:
        features, place = self._features(name, module), self._places.get(name)
        assert features is not None
        stream = "input" if place is None else "block" if place.norm is None else "tap"
        layer = BottleneckLayer(module, *features, stream, place.saved_as if place else name)
        self._add(name, layer)
        if place is not None and place.norm is not None:
            self._taps.append((self._modules[place.norm], StreamTap(layer)))
        return layer

    def _grow(self, name: str, layer: AdapterLayer) -> None:
        assert isinstance(layer, BottleneckLayer)
        self._add(name, layer)

    def _plan_growth(self, name: str, layer: AdapterLayer) -> None:
        if isinstance(layer, BottleneckLayer):
            named = layer.stream == "input"
            if named == (name in self._places):
                other = "target_modules" if named else "mh_adapter and output_adapter"
                raise ValueError(
                    f"target_modules: the adapters {layer.adapters} were placed here by {other}; place this one alike"
                )
            self.config.width(1, self._places[name].layer if name in self._places else None)
        super()._plan_growth(name, layer)

    def apply(self) -> None:
        self._handles = [
            norm.register_forward_pre_hook(tap, with_kwargs=True) for norm, tap in self._taps
        ]
        super().apply()

    def undo(self) -> None:
        for handle in self._handles:
            handle.remove()
        super().undo()
