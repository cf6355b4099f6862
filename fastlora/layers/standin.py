"""``StandIn``: an adapter layer that keeps the module whose place it takes, and answers for it."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from .adapter import AdapterLayer


class StandIn(AdapterLayer):
    """An adapter layer around a module. Attributes that it lacks are read from the module that acts.

    A subclass says under which name it keeps the module.
    """

    stands_for: ClassVar[str]

    def acting(self) -> nn.Module:
        """The module that computes now."""
        module: nn.Module = self._modules[self.stands_for]  # type: ignore[assignment]
        return module

    def without_adapters(self) -> nn.Module:
        module: nn.Module = self._modules[self.stands_for]  # type: ignore[assignment]
        return module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if self.stands_for not in self.__dict__.get("_modules", {}):
                raise  # not built yet (unpickling): nothing to read from
            return getattr(self.acting(), name)
