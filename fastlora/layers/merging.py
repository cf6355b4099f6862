"""``MergeableLayer``: a layer whose adapters can go into its weight, and come out again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..quant import NF4Tensor
from .adapter import AdapterLayer

if TYPE_CHECKING:
    from typing_extensions import Self


class Merged(NamedTuple):
    """A base weight with adapters in it, and how far that is from the exact W + sum of s B A.

    ``error`` is ||weight - exact|| / ||exact||, ``update`` is ||exact - W|| / ||exact||, in Frobenius norms: an error as
    large as the update means that the update is lost in the rounding.
    """

    weight: Any  # Tensor or NF4Tensor; of an ExchangeLayer a module
    error: float
    update: float


class Mergeable(AdapterLayer):
    """A layer whose adapters can go into its base, and come out again. A subclass says what is exchanged for what."""

    # While adapters are merged: what holds the base that is not in use, the original as a rule. In a tuple, so that it
    # is no submodule: the state_dict is that of the base in use.
    _shelf: tuple[nn.Module, ...] = ()

    def _on_shelf(self, merged: Any) -> nn.Module:
        """The module that holds ``merged``, which is ``merged_weight().weight``."""
        raise NotImplementedError

    def _take(self, shelf: nn.Module) -> nn.Module:
        """Go on with what ``shelf`` holds; returns the module that holds what was in use."""
        raise NotImplementedError

    def as_base(self, merged: Any) -> nn.Module:
        """What takes the layer's place once it has no adapters, given ``merged_weight().weight``."""
        raise NotImplementedError

    def weight_holders(self) -> list[nn.Module]:
        """The modules that go over to another weight with this layer."""
        return [self]

    def merge(self) -> Merged:
        """Put the acting adapters into the weight: forward is one plain product until ``unmerge``, and trains nothing.

        The original weight is kept beside the new one. A 4-bit weight is quantised again, which may cost more than the
        update is worth: look at the errors returned.

        Raises:
            ValueError: merged already, no adapter acts, or as ``merged_weight``.
        """
        self.check_change("merge")
        if not self.acting_adapters():
            raise ValueError("merge: no adapter acts here; set_adapter or enable_adapters first")
        made = self.merged_weight()
        self.use_merged(made.weight)
        return made

    def use_merged(self, merged: Any) -> None:
        """Go on with ``merged``, in which the acting adapters are, until ``unmerge``."""
        self._shelf, self.merged_adapters = (self._on_shelf(merged),), self.acting_adapters()
        self._exchange()

    def unmerge(self) -> None:
        """The base that there was before ``merge``, bit for bit; nothing where nothing is merged.

        Raises:
            ValueError: the weight was sharded since.
        """
        if self.merged_adapters:
            if self.adapters_enabled:
                self._exchange()
            self._shelf, self.merged_adapters = (), []

    def enable_adapters(self, enabled: bool = True) -> None:
        """Switch all adapters on or off, merged ones too; off, the layer is its base.

        Raises:
            ValueError: adapters were merged, and the weight was sharded since.
        """
        if self.merged_adapters and enabled != self.adapters_enabled:
            self._exchange()
        super().enable_adapters(enabled)

    def check_exchange(self, enabled: bool, sharded: bool = False) -> None:
        """ValueError if ``enable_adapters(enabled)`` would exchange weights that are sharded, or said to be.

        FSDP trains, gathers and frees the Parameter that it was given: another in its place is never sharded, and what
        FSDP gathers goes nowhere. ``unmerge`` exchanges as ``enable_adapters(False)`` does.
        """
        if not self.merged_adapters or enabled == self.adapters_enabled:
            return
        parameters = (*self.parameters(), *self._shelf[0].parameters())
        if sharded or any(map(is_sharded, parameters)):
            raise ValueError(
                f"adapters {self.merged_adapters} were merged before the weight was sharded; unmerge before fully_shard"
            )

    def _exchange(self) -> None:
        self.check_exchange(not self.adapters_enabled)
        self._shelf = (self._take(self._shelf[0]),)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        for shelf in self._shelf:  # moved and cast as one
            shelf._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def check_whole(self) -> None:
        """ValueError unless every parameter is here, and has values."""
        check_whole(self.parameters())


class MergeableLayer(Mergeable):
    """Merging into a weight. A subclass says what its weight is, and what its adapters make of it."""

    weight: Tensor | NF4Tensor

    def _floats(self) -> Tensor:
        """The weight in fp32, or in fp64 if it is that."""
        assert isinstance(self.weight, Tensor)
        return self.weight.data.to(torch.promote_types(self.weight.dtype, torch.float32))

    def _stored(self, exact: Tensor, dequantize: bool | torch.dtype) -> Tensor | NF4Tensor:
        """``exact`` as the layer keeps its weight, or with ``dequantize`` in floats; see ``merged_weight``."""
        return exact.to(self.weight.dtype)

    def _hold_weight(self, weight: Tensor | NF4Tensor) -> None:
        """Use another weight from now on."""
        self.weight = weight

    def as_base(self, weight: Tensor | NF4Tensor) -> nn.Module:
        """What takes the layer's place once it has no adapters, with ``weight``; a Parameter stays itself.

        A layer around a module gives that one, and puts the weight in.
        """
        raise NotImplementedError

    def without_adapters(self) -> nn.Module:
        enabled, self.adapters_enabled = self.adapters_enabled, False
        try:
            return self.as_base(self.weight)
        finally:
            self.adapters_enabled = enabled

    def _on_shelf(self, merged: Tensor | NF4Tensor) -> nn.Module:
        shelf = nn.Module()
        shelf.weight = merged if isinstance(merged, NF4Tensor) else nn.Parameter(merged, False)
        return shelf

    def _take(self, shelf: nn.Module) -> nn.Module:
        weight = self.weight
        self._hold_weight(shelf.weight)  # type: ignore[arg-type]
        shelf.weight = weight
        return shelf

    def merged_weight(self, dequantize: bool | torch.dtype = False) -> Merged:
        """W + sum of s B A over the acting adapters, summed in fp32, as the layer would keep it; nothing is changed.

        The result does not depend on what is around the call: autocast, TF32, inference mode.

        Args:
            dequantize: a 4-bit weight comes as floats of this dtype, rather than quantised again. True: of the bias's,
                which follows casts of the layer, or without one of the dtype that the weight was quantised from.

        Raises:
            ValueError: the weight is sharded or on the meta device, the sum overflows or is not finite, or it is FP4.
        """
        if not self.acting_adapters() and not (dequantize and isinstance(self.weight, NF4Tensor)):
            return Merged(self.weight, 0.0, 0.0)
        self.check_whole()
        with plain_mode(self.weight.device.type):
            base = self._floats()
            exact = self._with_updates(base)
            self._check_finite(exact)
            weight = self._stored(exact, dequantize)
            kept = weight.dequantize(exact.dtype) if isinstance(weight, NF4Tensor) else weight
            self._check_finite(kept)
            total, update, error = map(_norm, (exact, exact - base, kept - exact))
        return Merged(weight, error / (total or 1.0), update / (total or 1.0))

    def _with_updates(self, base: Tensor) -> Tensor:
        """The exact merged weight, a new tensor, of ``base``, which is ``_floats()``."""
        raise NotImplementedError

    def _check_finite(self, weight: Tensor) -> None:
        if not bool(torch.isfinite(weight).all()):
            names = self.acting_adapters()
            what = (
                f"with adapters {names} in it, it" if names else "the base's own, no adapter in it,"
            )
            raise ValueError(
                f"weight: {what} overflows {weight.dtype} or holds NaN or infinity; look for the step that did it"
            )


def check_whole(parameters: Iterable[Tensor]) -> None:
    """ValueError unless every one is here, and has values."""
    for parameter in parameters:
        if parameter.is_meta or is_sharded(parameter):
            place = "on the meta device" if parameter.is_meta else "sharded"
            raise ValueError(f"weight: is {place}; merge where it is whole")


@contextlib.contextmanager
def plain_mode(device_type: str) -> Iterator[None]:
    """No autograd, no autocast, and tensors that can be trained on later, whatever is around the call."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device_type, enabled=False):
        yield


def as_parameter(weight: Tensor) -> nn.Parameter:
    """A frozen Parameter; one that is there already is the weight as it was, maybe another module's too."""
    return weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def is_sharded(parameter: Tensor) -> bool:
    """Whether it is a DTensor."""
    return type(parameter).__name__ == "DTensor"
