"""``FusedLayer``: a layer whose base and one acting adapter are one product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._autocast import autocast_dtype
from ..autograd import scale_columns
from ..functional import dora_linear
from ..quant import NF4Tensor
from .base import LoRALayer
from .dora import column_factors
from .merging import MergeableLayer, Merged, as_parameter
from .mixed import mixed_linear


class FusedLayer(MergeableLayer, LoRALayer):
    """``forward`` of LoRALinear, LoRAConv1D and QLoRALinear. A subclass says what its products are, and its weight."""

    bias: Tensor | None

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

    def _matrix(self) -> Tensor | NF4Tensor:
        """The weight [N, K]."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]; see ``fastlora.lora_linear`` and ``qlora_linear`` for dtypes and errors."""
        if self.mixed is not None:
            if self._is_mixed():
                return mixed_linear(self, self.mixed, x, self._matrix(), self.bias)
            return self._base(x, self.bias)
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
        magnitude = self.lora_magnitude_vector[name]
        dropout_p = self.lora_dropout[name] if self.training else 0.0
        if dropout_p == 0:
            columns = lambda: column_factors(self._base_rows(), a, b, scaling, magnitude)  # noqa: E731
            return dora_linear(x, self._matrix(), a, b, scaling, magnitude, columns, self.bias)
        dropped = F.dropout(x, dropout_p)
        rest = self._base(x - dropped, self.bias)
        z = self._product(dropped, a, b, scaling, None, 0.0)
        return scale_columns(z, magnitude, self._row_norms(name), rest)

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

    def merged_weight(self, dequantize: bool | torch.dtype = False) -> Merged:
        """As ``MergeableLayer.merged_weight``; a DoRA adapter scales the rows of what is there with its own update.

        Raises:
            ValueError: also where an adapter's ``lora_bias`` finds no bias of the base.
        """
        self.merged_bias()  # refuses what has no place
        return super().merged_weight(dequantize)

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
        return exact

    def _on_shelf(self, merged: Tensor | NF4Tensor) -> nn.Module:
        shelf: Any = super()._on_shelf(merged)
        bias = self.merged_bias()
        if bias is not self.bias:
            shelf.bias = bias
        return shelf

    def _take(self, shelf: Any) -> nn.Module:
        if hasattr(shelf, "bias"):
            shelf.bias, self.bias = self.bias, shelf.bias
        return super()._take(shelf)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias={self.bias is not None}"

    def as_base(self, weight: Tensor | NF4Tensor) -> nn.Module:
        """A layer without adapters over ``weight`` and this one's bias, the Parameter itself where its dtype fits."""
        assert isinstance(weight, Tensor)
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = as_parameter(weight)
        linear.bias = self._bias_in(weight.dtype)  # type: ignore[assignment]  # a Parameter, or None
        return linear.train(self.training)

    def _bias_in(self, dtype: torch.dtype) -> Tensor | None:
        """The bias with what adapters add to it, the Parameter itself where it is of ``dtype``."""
        bias = self.merged_bias()
        if bias is None or bias.dtype == dtype:
            return bias
        return nn.Parameter(bias.detach().to(dtype), bias.requires_grad)


def _fits(x: Tensor, a: Tensor) -> bool:
    """Adapters below x's precision (cast to bf16 in an fp32 model) go through plain torch."""
    return a.dtype == torch.float32 or a.dtype == x.dtype or autocast_dtype(x.device) is not None
