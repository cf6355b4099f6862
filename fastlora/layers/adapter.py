"""``AdapterLayer``: what every module that carries named adapters has in common, whatever the method."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

_NAME = re.compile(r"[A-Za-z0-9_-]+")
# Adapters are attributes of these, beside what such a module has itself.
_TAKEN = {
    *dir(nn.ParameterDict()),
    *dir(nn.ModuleDict()),
    "weight",
    "bias",
    "base_layer",
    "__base__",
}


def check_adapter_name(name: str) -> str:
    """``name`` if it can be both a parameter name and a folder name; ValueError otherwise."""
    valid = isinstance(name, str) and _NAME.fullmatch(name) and name not in _TAKEN
    if not valid:
        raise ValueError(
            f"adapter_name: got {name!r}; accepted are letters, digits, '_' and '-' (it becomes "
            "part of parameter and folder names), but for 'weight', 'bias', 'base_layer' and the "
            "methods of torch.nn.ParameterDict"
        )
    return name


class AdapterTensor(NamedTuple):
    """A tensor of an adapter: its key in the layer's state_dict, and the tensor itself.

    ``compute``: set where the file holds what is only computed from the adapter, and cannot be read back. ``key`` is then
    a prefix, and ``compute`` makes the value from what a state_dict has under it.

    ``narrow``: set where the tensor is a copy, of a part of the parameter that is no block at its beginning; gives that part.

    ``transposed``: ``tensor``, as the file has it, is a view of what is under ``key``.
    """

    key: str
    tensor: Tensor
    compute: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    narrow: Callable[[Tensor], Tensor] | None = None
    transposed: bool = False

    def turned(self, value: Tensor) -> Tensor:
        """A value in the file as the state_dict has it, or the other way round."""
        return value.t() if self.transposed else value


class AdapterLayer(nn.Module):
    """A module with any number of named adapters, some of them active.

    A subclass keeps what belongs to an adapter in mappings by adapter name, and lists them in ``by_adapter``: deleting
    and renaming is then the same for all.
    """

    # Attributes that map an adapter's name to a Parameter, a module or a setting of it. The first says who is here.
    by_adapter: ClassVar[tuple[str, ...]] = ()
    # Whether keys in the file begin with the module's name.
    names_in_file: ClassVar[bool] = True
    saved_as: str = ""  # the layer's own name in a file where that is not PEFT's
    mixed: Any = None  # the MixedBatch of the forward that is going on, if it is one

    def __init__(self) -> None:
        super().__init__()
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []
        self.adapters_enabled = True

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters that have something here, in the order they came."""
        return list(getattr(self, self.by_adapter[0]))

    def adapter_tensors(self, name: str) -> dict[str, AdapterTensor]:
        """What an adapter's file holds of this layer: key in the file, after the module's own name -> where it is here."""
        raise NotImplementedError

    def neutral_tensors(self, name: str) -> dict[str, Tensor]:
        """What a file would hold here of an adapter that changes nothing, for hot-swapping. {}: there is no such adapter."""
        return {}

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        """What trains of an adapter."""
        found: list[nn.Parameter] = []
        for attribute in self.by_adapter:
            mapping = getattr(self, attribute)
            value = mapping[name] if name in mapping else None  # noqa: SIM401 (ModuleDict has no get)
            if isinstance(value, nn.Parameter):
                found.append(value)
            elif isinstance(value, nn.Module):
                found += value.parameters()
        return found

    def merged_weight(self, dequantize: bool | torch.dtype = False) -> Any:
        """The base with the acting adapters in it (``layers.base.Merged``); nothing is changed.

        Raises:
            NotImplementedError: the method cannot be merged, or the base's weight is not fastlora's to write.
        """
        raise NotImplementedError(
            f"a {type(self).__name__} cannot be merged: what it computes is no weight of its base"
        )

    def without_adapters(self) -> nn.Module:
        """What takes the layer's place once its adapters are gone: its base, with nothing merged into it."""
        base: nn.Module = self.base_layer  # type: ignore[assignment]
        return base

    def check_change(self, what: str) -> None:
        """ValueError if adapters are merged: they cannot be changed then."""
        if self.merged_adapters:
            raise ValueError(
                f"{what}: adapters {self.merged_adapters} are merged into the weight; unmerge first "
                "(unmerge_adapter of the model, unmerge of a layer)"
            )

    def check_active(self, names: list[str]) -> None:
        """ValueError if ``names`` cannot be active at once."""

    def set_adapter(self, names: str | Iterable[str], trainable: bool = True) -> None:
        """Make exactly ``names`` active; they alone require grad (none does if not ``trainable``).
        Names that this layer does not have are skipped: an adapter need not be on every layer."""
        self.check_change("set_adapter")
        names = [names] if isinstance(names, str) else list(names)
        self.check_active(names)
        self.active_adapters = names
        for name in self.adapters:
            for parameter in self.adapter_parameters(name):
                parameter.requires_grad_(trainable and name in self.active_adapters)

    def enable_adapters(self, enabled: bool = True) -> None:
        """Switch all adapters on or off; off, the layer is its base."""
        self.adapters_enabled = enabled

    def acting_adapters(self) -> list[str]:
        """The adapters that act in forward: none while they are off or merged, or while a mixed batch names others."""
        if not self.adapters_enabled or self.merged_adapters or self.mixed is not None:
            return []
        present = self.adapters
        return [name for name in self.active_adapters if name in present]

    def delete_adapter(self, name: str) -> None:
        """Forget an adapter; nothing where this layer does not have it.

        Raises:
            ValueError: the layer's adapters cannot be changed now.
        """
        self.check_change("delete_adapter")
        for mapping in self._mappings():
            if name in mapping:
                del mapping[name]
        self.active_adapters = [other for other in self.active_adapters if other != name]

    def rename_adapter(self, old: str, new: str) -> None:
        """Give an adapter another name, its order among the others kept.

        Raises:
            ValueError: ``new`` is no name for an adapter, or taken; or the layer's adapters cannot be changed now.
        """
        self.check_change("rename_adapter")
        if check_adapter_name(new) in self.adapters:
            raise ValueError(f"new: adapter {new!r} exists already; choose another name")
        for mapping in self._mappings():
            if old in mapping:
                items = [(new if name == old else name, value) for name, value in mapping.items()]
                mapping.clear()
                for name, value in items:
                    mapping[name] = value
        self.active_adapters = [new if name == old else name for name in self.active_adapters]

    def _mappings(self) -> list[MutableMapping[str, Any]]:
        return [getattr(self, attribute) for attribute in self.by_adapter]
