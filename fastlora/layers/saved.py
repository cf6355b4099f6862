"""``TrainableCopy``: a module that is trained whole beside the adapters (``modules_to_save``)."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from torch import Tensor, nn

from .adapter import AdapterTensor, check_adapter_name
from .standin import StandIn


class TrainableCopy(StandIn):
    """A module and a trained copy of it per adapter; the active adapter's acts, or the original.

    The frozen original stays as ``original_module``, so that disabling the adapter gives the base
    model back.

    Args:
        module: the module to train a copy of.
        adapter_name: the adapter that the copy belongs to.
        source: copies of another module over the same weight; they share it with these (``ensure_weight_tying``).
    """

    stands_for: ClassVar[str] = "original_module"
    by_adapter: ClassVar[tuple[str, ...]] = ("modules_to_save",)

    def __init__(
        self,
        module: nn.Module,
        adapter_name: str = "default",
        source: TrainableCopy | None = None,
    ) -> None:
        super().__init__()
        self.original_module = module
        self.source = (source,)  # in a tuple, so that it is no submodule
        self.modules_to_save = nn.ModuleDict()
        self.add_adapter(adapter_name)
        self.active_adapters = [adapter_name]
        self.training = module.training

    def add_adapter(self, name: str) -> None:
        """Another copy of the original, for another adapter.

        Raises:
            ValueError: the name is taken, or none.
        """
        if check_adapter_name(name) in self.modules_to_save:
            raise ValueError(f"name: adapter {name!r} exists already; choose another name")
        (source,), shared = self.source, {}
        if source is not None:
            shared = {id(self.original_module.weight): source.modules_to_save[name].weight}
        self.modules_to_save[name] = copy.deepcopy(self.original_module, shared)

    def adapter_tensors(self, name: str) -> dict[str, AdapterTensor]:
        if name not in self.modules_to_save:
            return {}
        return {
            key: AdapterTensor(f"modules_to_save.{name}.{key}", tensor)
            for key, tensor in self.modules_to_save[name].state_dict().items()
        }

    def neutral_tensors(self, name: str) -> dict[str, Tensor]:
        return dict(self.original_module.state_dict())

    def check_active(self, names: list[str]) -> None:
        """ValueError if more than one of ``names`` has a copy here."""
        present = [name for name in names if name in self.modules_to_save]
        if len(present) > 1:
            raise ValueError(
                f"names: got {present}, which all trained their own copy of this "
                f"{type(self.original_module).__name__}; accepted is one of them at a time"
            )

    def acting(self) -> nn.Module:
        """The module that computes now."""
        names = self.acting_adapters()
        return self.modules_to_save[names[0]] if names else self.original_module

    def without_adapters(self) -> nn.Module:
        """The module that computes now: what was trained whole stays that, as in PEFT."""
        return self.acting()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.acting()(*args, **kwargs)
