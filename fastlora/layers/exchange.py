"""``ExchangeLayer``: a layer over a module whose merge puts another module in its place, until ``unmerge``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .merging import Mergeable, Merged, plain_mode


class ExchangeLayer(Mergeable):
    """Adapters over ``base_layer``, which is kept as it is. A subclass says what the base is with an adapter in it.

    Attributes that this module lacks (``weight``, a norm's epsilon) are the base's.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training

    def _merged(self, dequantize: bool | torch.dtype) -> Merged:
        """A module that computes what the base and the acting adapters do, and how exactly."""
        raise NotImplementedError

    def merged_weight(self, dequantize: bool | torch.dtype = False) -> Merged:
        """The base with the acting adapters in it, as a module of its own; nothing is changed.

        Args:
            dequantize: a 4-bit weight comes as floats; see ``MergeableLayer.merged_weight``.

        Raises:
            ValueError: a parameter is sharded or on the meta device, or what comes out is not finite.
            NotImplementedError: the base's weight is not fastlora's to write.
        """
        self.check_whole()
        with plain_mode(next((p.device.type for p in self.parameters()), "cpu")):
            made = self._merged(dequantize)
        for name, parameter in made.weight.named_parameters():
            if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
                raise ValueError(
                    f"{name}: with adapters {self.acting_adapters()} in it, it overflows {parameter.dtype} or holds NaN or "
                    "infinity; look for the step that did it"
                )
        return made

    def _on_shelf(self, merged: nn.Module) -> nn.Module:
        return merged

    def _take(self, shelf: nn.Module) -> nn.Module:
        before, self.base_layer = self.base_layer, shelf
        return before

    def weight_holders(self) -> list[nn.Module]:
        """The layer and its base, whose weight it shows."""
        return [self, self.base_layer]

    def as_base(self, module: nn.Module) -> nn.Module:
        """``merged_weight``'s module is the layer without adapters."""
        return module.train(self.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_layer" not in self.__dict__.get("_modules", {}):
                raise  # not built yet (unpickling): nothing to read from
            return getattr(self.base_layer, name)


def distances(pairs: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[float, float]:
    """(error, update) of ``Merged`` over (base, exact, kept) triples."""
    total, update, error = (
        float(sum(torch.linalg.vector_norm(t, dtype=torch.float64) ** 2 for t in of)) ** 0.5
        for of in zip(*[(e, e - b, k.to(e.dtype) - e) for b, e, k in pairs], strict=True)
    )
    return error / (total or 1.0), update / (total or 1.0)
