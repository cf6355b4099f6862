"""What a configuration changes in a model: every change is computed first, then all are made, or none.

``Injection`` is what all methods share: modules that are replaced, copies of modules that are trained whole, freezing,
undoing. What a method puts where, its subclass says (``inject_lora.py``, ...); ``entry.py`` picks the subclass.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import nn

from ..layers import AdapterLayer, LoRALayer, TrainableCopy
from ..layers.adapter import check_adapter_name
from ..methods.base import PeftConfig
from ..methods.matching import (
    TASK_HEADS,
    base_view,
    is_excluded,
    is_target,
    is_transformers_model,
)
from ..quant import NF4Tensor
from .peft_model import PeftModel

Config = TypeVar("Config", bound=PeftConfig)

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


class Swap(NamedTuple):
    """An attribute of a module, or of the model's configuration, that gets another value."""

    owner: Any
    attribute: str
    old: Any
    new: Any


class Growth(NamedTuple):
    """An adapter layer that gets another adapter, and how."""

    layer: AdapterLayer
    add: Callable[[], None]


class Injection(Generic[Config]):
    """All changes that a configuration means for a model. Building it changes nothing; ``apply`` and ``undo`` do.

    Args:
        model: the base model, or one that has adapters of the same method already.
        config: what to do; it is this object's own from now on.
        adapter_name: the adapter's name.
        autocast_adapter_dtype: adapters of a base below fp32 are kept in fp32.
        device: where layers that are made anew go; None: where their base is.
        active: the adapters that are active in a model that has some: they stay that, and the new one is frozen. None:
            the model has none yet, and the new one acts and trains.
    """

    way_out: ClassVar[str] = (
        ", or use peft.get_peft_model"  # for a module that the method does not take here
    )

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        device: torch.device | str | None = None,
        active: list[str] | None = None,
    ) -> None:
        check_model(model, active is not None)
        self.model = model
        self.adapter_name = check_adapter_name(adapter_name)
        self.config = config
        self._widen, self._device, self._active = autocast_adapter_dtype, device, active
        self._swaps: list[Swap] = []
        self._growths: list[Growth] = []
        self._trained_before = [(p, p.requires_grad) for p in model.parameters()]
        with self._rebuilt():
            self._modules = base_view(model)
            self._owners = Counter(
                id(child) for m in self._modules.values() for child in m._modules.values()
            )
            self._users = Counter(id(p) for m in model.modules() for p in m._parameters.values())
            self._resolve_heads()
            self._resolve()
            self._plan_layers()
            self._plan_copies()

    @contextlib.contextmanager
    def _rebuilt(self) -> Iterator[None]:
        """The model as it is planned for: what ``_rebuild`` says is done within."""
        rebuilt = self._rebuild()
        self._swaps += rebuilt
        try:
            for swap in rebuilt:
                setattr(swap.owner, swap.attribute, swap.new)
            yield
        finally:
            for swap in reversed(rebuilt):
                setattr(swap.owner, swap.attribute, swap.old)
            self._restore_trained()  # layers freeze the weights they share: not before apply()

    # What a method says.

    def _rebuild(self) -> list[Swap]:
        """Changes of the model itself, before any layer goes in."""
        return []

    def _resolve(self) -> None:
        """Write what the model decides into the configuration: default targets, say."""
        raise NotImplementedError

    def _layer(self, name: str, module: nn.Module) -> AdapterLayer:
        """The layer that takes the place of ``module``, with the adapter in it."""
        raise NotImplementedError

    def _grow(self, name: str, layer: AdapterLayer) -> None:
        """Add the adapter to ``layer``, which this method made for another one."""
        raise NotImplementedError

    def _problem(self, name: str, module: nn.Module) -> str | None:
        """Why ``module`` cannot be adapted, beside what goes for every method."""
        raise NotImplementedError

    # The adapted layers.

    def _resolve_heads(self) -> None:
        config: Any = self.config
        model = self.model
        optional = TASK_HEADS.get(config.task_type or "", ())  # files name them all
        heads = [name for name in optional if name not in (config.modules_to_save or [])]
        self._optional_copies = set(optional)
        if heads:
            config.modules_to_save = [*(config.modules_to_save or []), *heads]
        name = getattr(model, "name_or_path", None)
        if isinstance(name, str) and name:
            config.base_model_name_or_path = name

    def _parent(self, name: str) -> nn.Module:
        return self._modules[name.rpartition(".")[0]]

    def _targets(self) -> list[str]:
        """The names of the modules that get the adapter."""
        config: Any = self.config
        names = [name for name in self._modules if name and is_target(config, name)]
        if not names:
            raise ValueError(self._no_match())
        if config.exclude_modules and not any(is_excluded(config, name) for name in self._modules):
            warnings.warn(
                f"exclude_modules={config.exclude_modules!r} matched no module", stacklevel=6
            )
        return names

    def _plan_layers(self) -> None:
        for name in self._targets():
            module = self._modules[name]
            self._check_target(name, module)
            with naming(name):
                if isinstance(module, AdapterLayer):
                    self._plan_growth(name, module)
                else:
                    self._swap_child(name, self._layer(name, module))

    def _plan_growth(self, name: str, layer: AdapterLayer) -> None:
        if isinstance(layer, TrainableCopy):
            raise ValueError("another adapter trains it whole (modules_to_save)")
        layer.check_change("add_adapter")
        self._growths.append(Growth(layer, lambda: self._grow(name, layer)))

    def _check_target(self, name: str, module: nn.Module) -> None:
        kind, weight = type(module).__name__, getattr(module, "weight", None)
        problem = self._problem(name, module)
        if problem is None and self._owners[id(module)] > 1:
            problem = "the same module is used in several places of the model (not supported)"
        if problem is None and type(weight).__name__ == "DTensor":
            problem = "its weight is sharded already; call get_peft_model before that"
        if problem is not None:
            raise ValueError(
                f"target_modules: matches {name!r} ({kind}), but {problem}. Exclude it{self.way_out}"
            )

    def _kinds(self) -> list[str]:
        """The ends of the names of modules that the method can adapt."""
        return sorted(
            {
                name.rpartition(".")[2]
                for name, module in self._modules.items()
                if name and self._problem(name, module) is None
            }
        )

    def _no_match(self) -> str:
        config: Any = self.config
        extra = "".join(
            f", {name}={getattr(config, name)!r}"
            for name in (
                "exclude_modules",
                "modules_to_save",
                "layers_to_transform",
                "layers_pattern",
            )
            if getattr(config, name, None) is not None
        )
        kinds = self._kinds()
        return (
            f"target_modules: {config.target_modules!r}{extra} matches no module of this "
            f"{type(self.model).__name__}; those that can be adapted end in "
            f"{kinds[:12]}{'...' if len(kinds) > 12 else ''}"
        )

    def _swap_child(self, name: str, new: nn.Module) -> None:
        parent, child = self._parent(name), name.rpartition(".")[2]
        self._swaps.append(Swap(parent, child, self._modules[name], new))

    def _set(self, owner: nn.Module, attribute: str, value: Any) -> None:
        """Plan another value for an attribute that is no adapter."""
        self._swaps.append(Swap(owner, attribute, getattr(owner, attribute), value))

    # The modules trained whole.

    def _plan_copies(self) -> None:
        wanted = getattr(self.config, "modules_to_save", None) or []
        matches = {
            part: [name for name in self._modules if name and name.endswith(part)]
            for part in wanted
        }
        for part, names in matches.items():
            if not names and part not in self._optional_copies:
                raise ValueError(
                    f"modules_to_save: {part!r} matches no module of this "
                    f"{type(self.model).__name__}"
                )
        chosen = sorted({name for names in matches.values() for name in names})
        for name in chosen:
            module, kind = self._modules[name], type(self._modules[name]).__name__
            if isinstance(module, TrainableCopy):
                self._growths.append(Growth(module, self._another_copy(module)))
                continue
            if any(isinstance(m, AdapterLayer) and m.adapters for m in module.modules()):
                raise ValueError(
                    f"modules_to_save: {name!r} has other adapters in it, which a copy of it would have too; leave it out, or "
                    "start from the base model"
                )
            if isinstance(module, _CONTAINERS):
                raise ValueError(
                    f"modules_to_save: matches {name!r}, a {kind}, which has no forward of its own "
                    "to train"
                )
            if any(isinstance(m, NF4Tensor) for m in module.modules()):
                raise ValueError(
                    f"modules_to_save: {name!r} holds 4-bit weights, which cannot be trained whole"
                )
            if any(name.startswith(other + ".") for other in chosen):
                raise ValueError(
                    f"modules_to_save: matches {name!r} inside another matched module; name one of "
                    "them"
                )
            if self._owners[id(module)] > 1:
                raise ValueError(
                    f"modules_to_save: {name!r} is used in several places of the model; that is "
                    "not supported"
                )
            self._warn_if_tied(name, module)
            self._swap_child(name, TrainableCopy(module, self.adapter_name))

    def _another_copy(self, copies: TrainableCopy) -> Callable[[], None]:
        return lambda: copies.add_adapter(self.adapter_name)

    def _warn_if_tied(self, name: str, module: nn.Module) -> None:
        own = {id(p) for p in module.parameters()}
        others = [n for n, m in self._modules.items() if n != name and not n.startswith(name + ".")]
        tied = [n for n in others if own & {id(p) for p in self._modules[n]._parameters.values()}]
        if tied:
            warnings.warn(
                f"modules_to_save: {name!r} shares weights with {tied}; its trained copy will not "
                "share them",
                stacklevel=5,
            )

    # Doing it.

    def _restore_trained(self) -> None:
        for parameter, trained in self._trained_before:
            parameter.requires_grad_(trained)

    def apply(self) -> None:
        """Make the changes: new layers, and all frozen but what the configuration trains."""
        for swap in self._swaps:
            setattr(swap.owner, swap.attribute, swap.new)
        for growth in self._growths:
            with torch.no_grad():
                growth.add()
        if self._active is None:
            self.model.requires_grad_(False)
            set_trainable(
                self.model, self.config, [self.adapter_name], not self.config.inference_mode
            )
            return
        self._restore_trained()
        for layer in self.model.modules():
            if isinstance(layer, AdapterLayer) and self.adapter_name in layer.adapters:
                layer.active_adapters = list(self._active)
                for parameter in layer.adapter_parameters(self.adapter_name):
                    parameter.requires_grad_(False)

    def undo(self) -> None:
        """The model as it was before ``apply``."""
        for growth in self._growths:
            growth.layer.delete_adapter(self.adapter_name)
        for swap in reversed(self._swaps):
            setattr(swap.owner, swap.attribute, swap.old)
        self._restore_trained()

    def wrap(self) -> PeftModel:
        """The PeftModel around the changed model."""
        kind = self._kind()
        return kind(self.model, {self.adapter_name: self.config}, self.adapter_name)

    def _kind(self) -> type[PeftModel]:
        if is_transformers_model(self.model):
            # Without peft the model trains in any loop of one's own, but Trainer does not see a
            # PEFT model.
            with contextlib.suppress(ImportError):
                from .hf import TransformersPeftModel

                return TransformersPeftModel
        return PeftModel


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Errors within say which module they are about."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if "module '" in str(error):
            raise
        raise type(error)(f"module {name!r}: {error}") from error


def set_trainable(model: nn.Module, config: Any, adapter_names: list[str], trainable: bool) -> None:
    """Activate ``adapter_names`` everywhere and let them (and the biases ``config.bias`` names) train,
    or freeze them."""
    for module in model.modules():
        if isinstance(module, AdapterLayer):
            module.set_adapter(adapter_names, trainable)
    for parameter in trained_biases(model, config).values():
        parameter.requires_grad_(trainable)


def trained_biases(model: nn.Module, config: Any) -> dict[str, nn.Parameter]:
    """The base biases that ``config.bias`` trains: parameter name in ``model`` -> parameter."""
    which = getattr(config, "bias", "none")
    if which == "none":
        return {}
    copies = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, TrainableCopy)
    )
    biases = {
        name: parameter
        for name, parameter in model.named_parameters()
        if (name == "bias" or name.endswith(".bias")) and not name.startswith(copies)
    }
    if which == "all":
        return biases
    adapted = {
        id(m.bias)
        for m in model.modules()
        if isinstance(m, LoRALayer) and getattr(m, "bias", None) is not None
    }
    return {name: parameter for name, parameter in biases.items() if id(parameter) in adapted}


def check_model(model: Any, has_adapters: bool = False) -> None:
    """TypeError or ValueError if adapters cannot be put into ``model`` (``has_adapters``: more of them)."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; accepted is a torch.nn.Module")
    if not has_adapters and (
        isinstance(model, PeftModel)
        or any(isinstance(m, AdapterLayer) and m.adapters for m in model.modules())
    ):
        raise ValueError("model: has fastlora adapters already; start from the base model")
    if sys.modules.get("peft") is not None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        theirs = (
            m for m in model.modules() if not isinstance(m, AdapterLayer)
        )  # hf.py registers ours
        if any(isinstance(m, BaseTunerLayer) for m in theirs):
            raise ValueError(
                "model: has PEFT adapters already; fastlora.accelerate(model) makes those fast"
            )
    wrappers = {
        "OptimizedModule": "torch.compile",
        "DistributedDataParallel": "DDP",
        "FullyShardedDataParallel": "FSDP",
    }
    if type(model).__name__ in wrappers:
        raise ValueError(
            f"model: is wrapped by {wrappers[type(model).__name__]} already; call get_peft_model "
            "first"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "model: is a TorchScript module, whose parts cannot be replaced; give the eager model"
        )
