"""``ExchangeLayer``: a layer over a module whose merge puts another module in its place, until ``unmerge``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .adapter import AdapterLayer
from .base import Merged

if TYPE_CHECKING:
    from typing_extensions import Self


class ExchangeLayer(AdapterLayer):
    """Adapters over ``base_layer``, which is kept as it is. A subclass says what the base is with an adapter in it.

    Attributes that this module lacks (``weight``, a norm's epsilon) are the base's.
    """

    # While adapters are merged: the module that is not in use, the original as a rule. In a tuple, so that it is no
    # submodule: the state_dict is that of the module in use.
    _shelf: tuple[nn.Module, ...] = ()

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
            dequantize: a 4-bit weight comes as floats; see ``FusedLayer.merged_weight``.

        Raises:
            ValueError: a parameter is sharded or on the meta device, or what comes out is not finite.
            NotImplementedError: the base's weight is not fastlora's to write.
        """
        for parameter in self.parameters():
            if parameter.is_meta or type(parameter).__name__ == "DTensor":
                place = "on the meta device" if parameter.is_meta else "sharded"
                raise ValueError(f"weight: is {place}; merge where it is whole")
        with plain_mode(self):
            made = self._merged(dequantize)
        for name, parameter in made.weight.named_parameters():
            if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
                raise ValueError(
                    f"{name}: with adapters {self.acting_adapters()} in it, it overflows {parameter.dtype} or holds NaN or "
                    "infinity; look for the step that did it"
                )
        return made

    def merge(self) -> Merged:
        """Put the acting adapters into the base until ``unmerge``; while merged nothing trains here.

        Raises:
            ValueError: merged already, no adapter acts, or as ``merged_weight``.
        """
        self.check_change("merge")
        if not self.acting_adapters():
            raise ValueError("merge: no adapter acts here; set_adapter or enable_adapters first")
        made = self.merged_weight()
        self.use_merged(made.weight)
        return made

    def use_merged(self, module: nn.Module) -> None:
        """Go on with ``module``, which holds the acting adapters, until ``unmerge``."""
        self._shelf, self.merged_adapters = (module,), self.acting_adapters()
        self._exchange()

    def unmerge(self) -> None:
        """The base that there was before ``merge``, the module itself; nothing where nothing is merged.

        Raises:
            ValueError: it was sharded since.
        """
        if self.merged_adapters:
            if self.adapters_enabled:
                self._exchange()
            self._shelf, self.merged_adapters = (), []

    def enable_adapters(self, enabled: bool = True) -> None:
        """Switch all adapters on or off, merged ones too; off, the layer is its base.

        Raises:
            ValueError: adapters were merged, and the base was sharded since.
        """
        if self.merged_adapters and enabled != self.adapters_enabled:
            self._exchange()
        super().enable_adapters(enabled)

    def check_exchange(self, enabled: bool, sharded: bool = False) -> None:
        """ValueError if ``enable_adapters(enabled)`` would exchange a base that is sharded, or said to be."""
        if not self.merged_adapters or enabled == self.adapters_enabled:
            return
        parameters = (*self.base_layer.parameters(), *self._shelf[0].parameters())
        if sharded or any(type(parameter).__name__ == "DTensor" for parameter in parameters):
            raise ValueError(
                f"adapters {self.merged_adapters} were merged before the weight was sharded; unmerge before fully_shard"
            )

    def _exchange(self) -> None:
        self.check_exchange(not self.adapters_enabled)
        (shelf,) = self._shelf
        self._shelf, self.base_layer = (self.base_layer,), shelf

    def as_base(self, module: nn.Module) -> nn.Module:
        """``merged_weight``'s module is the layer without adapters."""
        return module.train(self.training)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        for shelf in self._shelf:  # moved and cast as one
            shelf._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_layer" not in self.__dict__.get("_modules", {}):
                raise  # not built yet (unpickling): nothing to read from
            return getattr(self.base_layer, name)


@contextlib.contextmanager
def plain_mode(module: nn.Module) -> Iterator[None]:
    """No autograd, no autocast, and tensors that can be trained on later, whatever is around the call."""
    device = next((p.device.type for p in module.parameters()), "cpu")
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device, enabled=False),
    ):
        yield


def distances(pairs: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[float, float]:
    """(error, update) of ``Merged`` over (base, exact, kept) triples."""
    total, update, error = (
        float(sum(torch.linalg.vector_norm(t, dtype=torch.float64) ** 2 for t in of)) ** 0.5
        for of in zip(*[(e, e - b, k.to(e.dtype) - e) for b, e, k in pairs], strict=True)
    )
    return error / (total or 1.0), update / (total or 1.0)
