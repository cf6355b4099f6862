"""``FusedLayer``: a layer whose base and one acting adapter are one product."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._autocast import autocast_dtype
from ..quant import NF4Tensor
from .base import LoRALayer, Merged
from .dora import exact_row_norms, scale_columns

if TYPE_CHECKING:
    from typing_extensions import Self


class FusedLayer(LoRALayer):
    """``forward`` and merging of LoRALinear and QLoRALinear. A subclass says what its products are, and its weight."""

    weight: Tensor | NF4Tensor
    bias: Tensor | None
    # While adapters are merged: what holds the weight that is not in use, the original as a rule. In a tuple, so that
    # it is no submodule: the state_dict is that of the weight in use.
    _shelf: tuple[nn.Module, ...] = ()

    def _product(
        self,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: float | Tensor,
        bias: Tensor | None,
        dropout_p: float,
    ) -> Tensor:
        """Base and update of one adapter, with ``bias`` [N] or none in place of the base's own."""
        raise NotImplementedError

    def _floats(self) -> Tensor:
        """The weight [N, K] in fp32, or in fp64 if it is that."""
        raise NotImplementedError

    def _stored(self, exact: Tensor, dequantize: bool | torch.dtype) -> Tensor | NF4Tensor:
        """``exact`` [N, K] as the layer keeps its weight, or with ``dequantize`` in floats; see ``merged_weight``."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]; see ``fastlora.lora_linear`` and ``qlora_linear`` for dtypes and errors."""
        names = self.acting_adapters()
        if len(names) == 1 and _fits(x, self.lora_A[names[0]]):
            name = names[0]
            update = self.lora_A[name], self.lora_B[name], self.scaling[name]
            if name in self.lora_magnitude_vector:
                return self._dora_product(x, name, *update)
            bias = self.bias
            if name in self.lora_bias:
                own = self.lora_bias[name] * self.scaling[name]
                bias = own if bias is None else bias + own
            return self._product(x, *update, bias, self.lora_dropout[name])
        y = self._base(x, self.bias)
        return self._add_updates(y, x, names) if names else y

    def _dora_product(
        self, x: Tensor, name: str, a: Tensor, b: Tensor, scaling: float | Tensor
    ) -> Tensor:
        """bias + c (W x + s B A x), c = m / ||W + s B A||. With dropout PEFT's W x + bias + (c - 1) W x' + c s B A x' of
        x' = dropout(x), as bias + W (x - x') + c (W x' + s B A x'): one product more than without."""
        rest = self.bias
        if self.training and self.lora_dropout[name] > 0:
            dropped = F.dropout(x, self.lora_dropout[name])
            rest = self._base(x - dropped, rest)
            x = dropped
        z = self._product(x, a, b, scaling, None, 0.0)
        return scale_columns(z, self.lora_magnitude_vector[name], self._row_norms(name), rest)

    # Merging.

    def merged_bias(self) -> Tensor | None:
        """The base's bias with what the acting adapters' ``lora_bias`` add to it; itself where they have none.

        Raises:
            ValueError: they have, and the base has no bias.
        """
        names = self.acting_adapters()
        owners = [name for name in names if name in self.lora_bias]
        if not owners:
            return self.bias
        if self.bias is None:
            raise ValueError(
                f"bias: adapter {owners[0]!r} has lora_bias, and the base has no bias to put it into; it cannot be merged"
            )
        with torch.inference_mode(False), torch.no_grad():
            total = torch.zeros_like(self.bias, dtype=torch.float64)
            for name in names:
                if name in self.lora_magnitude_vector:
                    total *= self._column_factors(name)
                elif name in self.lora_bias:
                    total += self.lora_bias[name].double() * float(self.scaling[name])
            made = (self.bias.double() + total).to(self.bias.dtype)
            self._check_finite(made)
            return nn.Parameter(made, requires_grad=False)

    def _column_factors(self, name: str) -> Tensor:
        """What DoRA multiplies the rows of W + s B A by: m / ||W + s B A|| [N] in fp64."""
        factors = self.lora_A[name], self.lora_B[name], self.scaling[name]
        norms = exact_row_norms(self._base_rows(), *factors)
        return torch.where(norms > 0, self.lora_magnitude_vector[name].double() / norms, 0)

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

    def merged_weight(self, dequantize: bool | torch.dtype = False) -> Merged:
        """W + sum of s B A over the acting adapters, summed in fp32, as the layer would keep it; nothing is changed. A DoRA
        adapter scales the rows of what is there with its own update.

        The result does not depend on what is around the call: autocast, TF32, inference mode.

        Args:
            dequantize: a 4-bit weight comes as floats of this dtype, rather than quantised again. True: of the bias's,
                which follows casts of the layer, or without one of the dtype that the weight was quantised from.

        Raises:
            ValueError: the weight is sharded or on the meta device, the sum overflows or is not finite, or it is FP4.
        """
        if not self.acting_adapters() and not (dequantize and isinstance(self.weight, NF4Tensor)):
            return Merged(self.weight, 0.0, 0.0)
        self.merged_bias()  # refuses what has no place
        for parameter in self.parameters():
            if parameter.is_meta or _is_sharded(parameter):
                place = "on the meta device" if parameter.is_meta else "sharded"
                raise ValueError(f"weight: is {place}; merge where it is whole")
        # Tensors made in inference mode could not be trained on later.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(self.weight.device.type, enabled=False),
        ):
            base = self._floats()
            exact = self._with_updates(base)
            weight = self._stored(exact, dequantize)
            kept = weight.dequantize(exact.dtype) if isinstance(weight, NF4Tensor) else weight
            self._check_finite(kept)
            total, update, error = map(_norm, (exact, exact - base, kept - exact))
        return Merged(weight, error / (total or 1.0), update / (total or 1.0))

    def _with_updates(self, base: Tensor) -> Tensor:
        """base + sum of s B A, a new tensor; what is there by then times its factors, where an adapter is DoRA."""
        exact = base.clone()
        for name in self.acting_adapters():
            # In fp64, which TF32 does not touch, and by rows: whole, it would be the largest tensor of the merge.
            a, scaling = self.lora_A[name].double(), float(self.scaling[name])
            for rows, b in zip(exact.split(1024), self.lora_B[name].split(1024), strict=True):
                rows += (b.double() @ a) * scaling
            if name in self.lora_magnitude_vector:
                exact *= self._column_factors(name).to(exact.dtype)[:, None]
        self._check_finite(exact)
        return exact

    def _check_finite(self, weight: Tensor) -> None:
        if not bool(torch.isfinite(weight).all()):
            names = self.acting_adapters()
            what = (
                f"with adapters {names} in it, it" if names else "the base's own, no adapter in it,"
            )
            raise ValueError(
                f"weight: {what} overflows {weight.dtype} or holds NaN or infinity; look for the step that did it"
            )

    def use_merged(self, weight: Tensor | NF4Tensor) -> None:
        """Go on with ``weight``, which holds the acting adapters, until ``unmerge``."""
        shelf = nn.Module()
        shelf.weight = weight if isinstance(weight, NF4Tensor) else nn.Parameter(weight, False)
        bias: Any = self.merged_bias()
        if bias is not self.bias:
            shelf.bias = bias
        self._shelf, self.merged_adapters = (shelf,), self.acting_adapters()
        self._exchange()

    def unmerge(self) -> None:
        """The weight that there was before ``merge``, bit for bit; nothing where nothing is merged.

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
        if sharded or any(map(_is_sharded, parameters)):
            raise ValueError(
                f"adapters {self.merged_adapters} were merged before the weight was sharded; unmerge before fully_shard"
            )

    def _exchange(self) -> None:
        self.check_exchange(not self.adapters_enabled)
        shelf: Any = self._shelf[0]
        shelf.weight, self.weight = self.weight, shelf.weight
        if hasattr(shelf, "bias"):
            shelf.bias, self.bias = self.bias, shelf.bias

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        for shelf in self._shelf:  # moved and cast as one
            shelf._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias={self.bias is not None}"

    def as_base(self, weight: Tensor | NF4Tensor) -> nn.Module:
        """A layer without adapters over ``weight`` and this one's bias, the Parameter itself where its dtype fits."""
        assert isinstance(weight, Tensor)
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        if not isinstance(
            weight, nn.Parameter
        ):  # one is the weight as it was, maybe another module's too
            weight = nn.Parameter(weight, requires_grad=False)
        linear.weight = weight
        bias = self.merged_bias()
        if bias is not None and bias.dtype != weight.dtype:
            bias = nn.Parameter(bias.detach().to(weight.dtype), bias.requires_grad)
        linear.bias = bias  # type: ignore[assignment]  # a Parameter, or None
        return linear.train(self.training)


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def _is_sharded(parameter: Tensor) -> bool:
    return type(parameter).__name__ == "DTensor"


def _fits(x: Tensor, a: Tensor) -> bool:
    """Adapters below x's precision (cast to bf16 in an fp32 model) go through plain torch."""
    return a.dtype == torch.float32 or a.dtype == x.dtype or autocast_dtype(x.device) is not None
