"""``TrainableCopy``: a module that is trained whole beside the adapters (``modules_to_save``)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from .base import check_adapter_name


class TrainableCopy(nn.Module):
    """A module and a trained copy of it per adapter; the active adapter's acts, or the original.

    The frozen original stays as ``original_module``, so that disabling the adapter gives the base
    model back. Attributes that this module lacks (``weight`` of an output layer, say) are read from
    the module that acts.

    Args:
        module: the module to train a copy of.
        adapter_name: the adapter that the copy belongs to.
    """

    def __init__(self, module: nn.Module, adapter_name: str = "default") -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict(
            {check_adapter_name(adapter_name): copy.deepcopy(module)}
        )
        self.active_adapters: list[str] = [adapter_name]
        self.adapters_enabled = True
        self.training = module.training

    def set_adapter(self, names: str | Iterable[str], trainable: bool = True) -> None:
        """Make ``names`` active; at most one of them can be an adapter with a copy here."""
        wanted = [names] if isinstance(names, str) else list(names)
        present = [name for name in wanted if name in self.modules_to_save]
        if len(present) > 1:
            raise ValueError(
                f"names: got {present}, which all trained their own copy of this "
                f"{type(self.original_module).__name__}; accepted is one of them at a time"
            )
        self.active_adapters = wanted
        for name, module in self.modules_to_save.items():
            module.requires_grad_(trainable and name in wanted)

    def enable_adapters(self, enabled: bool = True) -> None:
        """Switch the copies on or off."""
        self.adapters_enabled = enabled

    def acting(self) -> nn.Module:
        """The module that computes now."""
        if self.adapters_enabled:
            for name in self.active_adapters:
                if name in self.modules_to_save:
                    return self.modules_to_save[name]
        return self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.acting()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original_module" not in self.__dict__.get("_modules", {}):
                raise  # not built yet (unpickling): nothing to read from
            return getattr(self.acting(), name)
