"""What an adapter changes in a checkpoint: layers that are made alive one at a time, to be merged, and tensors in others' place."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..layers import (
    AdapterLayer,
    IA3Layer,
    LoRALayer,
    LoRALinear,
    LoRAParameter,
    QLoRALinear,
    TiedTokens,
    TrainableCopy,
)
from ..layers.exchange import ExchangeLayer
from ..layers.fused import FusedLayer
from ..layers.inits import changes_base_weight
from ..layers.merging import Mergeable
from ..models.merge import MergeReport
from ..models.peft_model import PeftModel
from ..quant import NF4Tensor


class Unit(NamedTuple):
    """What is merged at once: an adapter layer on the meta device, its name in the model, and the model's keys of its base."""

    name: str
    layer: Mergeable
    keys: tuple[str, ...]


class Work:
    """What the adapter changes: layers to merge, and tensors that take the place of others (copies, trained biases).

    Args:
        values: the adapter's, by their keys in the model.
        init: how LoRA's factors began: some took them out of the base weight, which then is without.
    """

    def __init__(self, wrapped: PeftModel, values: dict[str, Tensor], init: bool | str) -> None:
        base = wrapped.get_base_model()
        self.units: dict[str, Unit] = {}  # key of a base tensor -> what is merged there
        self.replaced: dict[str, Tensor] = {}
        self.follows: set[str] = (
            set()
        )  # keys that go on being the same tensor as those they are tied to
        inside: set[str] = set()
        self._values, self._init = values, init
        for name, layer in base.named_modules():
            if isinstance(layer, TiedTokens):
                self.follows.add(f"{name}.weight")
            if not isinstance(layer, AdapterLayer) or not layer.adapter_tensors("default"):
                continue
            tensors = layer.adapter_tensors("default")
            inside |= {f"{name}.{entry.key}" for entry in tensors.values()}
            if isinstance(layer, TrainableCopy):
                for key, entry in tensors.items():
                    self.replaced[f"{name}.{key}"] = values[f"{name}.{entry.key}"]
                continue
            if not isinstance(layer, Mergeable):
                raise NotImplementedError(
                    f"module {name!r}: a {type(layer).__name__} leaves its base as it is; merge with stock peft"
                )
            found = Unit(name, layer, tuple(_base_keys(name, layer)))
            self.units |= dict.fromkeys(found.keys, found)
        self.replaced |= {
            key.replace(".base_layer.", "."): value
            for key, value in values.items()
            if key not in inside
        }

    @property
    def touched(self) -> set[str]:
        """The model's keys of all that the adapter changes."""
        return {*self.units, *self.replaced}

    def merge(self, unit: Unit, base: dict[str, Any]) -> tuple[dict[str, Any], MergeReport]:
        """The base tensors of a layer with the adapter in them, given its base tensors."""
        name, layer, keys = unit
        live, device = _alive(unit, base), base[keys[0]].device
        for entry in layer.adapter_tensors("default").values():
            value = entry.turned(self._values[f"{name}.{entry.key}"])
            _assign(live, entry.key, value.to(device))
        if isinstance(live, LoRALayer) and live.is_linear and changes_base_weight(self._init):
            live.take_factors_out("default", self._init)
        made = live.merged_weight()
        if isinstance(live, ExchangeLayer):
            after = _state(made.weight)
        else:
            after = {keys[0].rpartition(".")[2]: made.weight}
        if isinstance(live, FusedLayer) and live.bias is not None:
            after["bias"] = live.merged_bias()
        merged = dict(base)
        for key in base:
            made_of = after.get(_inner(unit, key))
            if made_of is not None:
                own = isinstance(made_of, NF4Tensor)
                merged[key] = made_of if own else made_of.to(base[key].dtype)
        return merged, MergeReport(name, made.error, made.update)


def _base_keys(name: str, layer: Mergeable) -> Iterator[str]:
    if isinstance(layer, LoRAParameter):  # the others of its module are other layers', or nobody's
        yield f"{name.replace('.base_layer', '')}.{layer.parameter_name}"
        return
    own = {entry.key for entry in layer.adapter_tensors("default").values()}
    for key in layer.state_dict():
        if key not in own:
            yield f"{name}.{key.removeprefix(_prefix(layer))}"


def _prefix(layer: nn.Module) -> str:
    """What the keys of a layer's base begin with in its own state_dict."""
    return next((f"{n}." for n in ("base_layer", "original_module") if n in layer._modules), "")


def _inner(unit: Unit, key: str) -> str:
    """A key of a unit's, within the base module."""
    return key.removeprefix(f"{unit.name.replace('.base_layer', '')}.")


def _state(module: nn.Module) -> dict[str, Any]:
    """A module's tensors; a weight in 4 bits as the one that it stands for."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    return {"weight": weight, "bias": bias} if isinstance(weight, NF4Tensor) else module.state_dict()  # fmt: skip


def _alive(unit: Unit, base: dict[str, Any]) -> Mergeable:
    """A copy of a unit's layer with real base tensors; a 4-bit weight is a QLoRALinear's."""
    layer = unit.layer
    values = {_inner(unit, key): value for key, value in base.items()}
    weight = values.get("weight")
    if isinstance(weight, NF4Tensor):
        live: Any = QLoRALinear.from_quantized(weight, values.get("bias"), r=None)
        if isinstance(layer, IA3Layer):
            made = copy.deepcopy(layer)
            made.base_layer = live
            return made
        assert isinstance(layer, LoRALinear)
        for attribute in layer.by_adapter:
            setattr(live, attribute, copy.deepcopy(getattr(layer, attribute)))
        live.active_adapters = list(layer.active_adapters)
        return live
    live = copy.deepcopy(layer)
    if isinstance(live, LoRAParameter):
        _assign(live.module, live.parameter_name, base[unit.keys[0]])
        return live
    for key, value in values.items():
        _assign(live, f"{_prefix(layer)}{key}", value)
    return live


def _assign(module: nn.Module, key: str, value: Tensor) -> None:
    path, _, leaf = key.rpartition(".")
    owner = module.get_submodule(path) if path else module
    if leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
