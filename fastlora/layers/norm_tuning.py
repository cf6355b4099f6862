"""``TunedNorm``: a norm, and a trained copy of it per adapter (LN tuning, arXiv 2312.11420)."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .adapter import AdapterTensor, check_adapter_name
from .exchange import ExchangeLayer, distances
from .merging import Merged


class TunedNorm(ExchangeLayer):
    """The active adapter's copy acts, or the original. Copies have the original's dtype, as in peft.

    Args:
        base_layer: the norm (any module with parameters).
        adapter_name: the first adapter.
    """

    by_adapter: ClassVar[tuple[str, ...]] = ("ln_tuning_layers",)

    def __init__(self, base_layer: nn.Module, adapter_name: str = "default") -> None:
        super().__init__(base_layer)
        self.ln_tuning_layers = nn.ModuleDict()
        self.add_adapter(adapter_name)
        self.active_adapters = [adapter_name]

    def add_adapter(self, name: str) -> None:
        """A copy of the original for another adapter.

        Raises:
            ValueError: the name is taken, or none; or an adapter is merged.
        """
        self.check_change("add_adapter")
        if check_adapter_name(name) in self.ln_tuning_layers:
            raise ValueError(f"name: adapter {name!r} exists already; choose another name")
        self.ln_tuning_layers[name] = copy.deepcopy(self.base_layer)

    def adapter_tensors(self, name: str) -> dict[str, AdapterTensor]:
        if name not in self.ln_tuning_layers:
            return {}
        state = self.ln_tuning_layers[name].state_dict()
        return {
            f"ln_tuning_layers.{key}": AdapterTensor(f"ln_tuning_layers.{name}.{key}", tensor)
            for key, tensor in state.items()
        }

    def neutral_tensors(self, name: str) -> dict[str, Tensor]:
        state = self.base_layer.state_dict()
        return {f"ln_tuning_layers.{key}": tensor for key, tensor in state.items()}

    def check_active(self, names: list[str]) -> None:
        """ValueError if more than one of ``names`` has a copy here."""
        present = [name for name in names if name in self.ln_tuning_layers]
        if len(present) > 1:
            raise ValueError(
                f"names: got {present}, which each have their own copy of this {type(self.base_layer).__name__}; accepted is "
                "one of them at a time"
            )

    def acting(self) -> nn.Module:
        """The module that computes now."""
        names = self.acting_adapters()
        return self.ln_tuning_layers[names[0]] if names else self.base_layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.acting()(*args, **kwargs)

    def _merged(self, dequantize: bool | torch.dtype) -> Merged:
        tuned = self.acting()
        if tuned is self.base_layer:
            return Merged(tuned, 0.0, 0.0)
        made = copy.deepcopy(tuned).requires_grad_(False)
        pairs = [
            (before.detach().double(), after.detach().double(), after.detach())
            for before, after in zip(self.base_layer.parameters(), made.parameters(), strict=True)
        ]
        return Merged(made, *distances(pairs))
