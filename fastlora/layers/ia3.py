"""``IA3Layer``: a linear whose output, or input, is scaled by a learned vector ((IA)^3, arXiv 2205.05638)."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..autograd import scale_columns
from .adapter import AdapterTensor, check_adapter_name
from .base import adapter_dtype_for
from .exchange import ExchangeLayer, distances
from .fused import FusedLayer
from .merging import Merged
from .plain import FLOATS
from .wrapper import linear_features


class IA3Layer(ExchangeLayer):
    """``y = l * base(x)``, or for a feedforward module ``y = base(l * x)``; the acting adapters' vectors are multiplied.

    Parameters: ``ia3_l[name]`` [N, 1], or [1, K] of a feedforward module.

    Args:
        base_layer: a module that acts as a linear and says its features: nn.Linear, Conv1D, ``QLoRALinear`` without
            adapters, bitsandbytes' linears.
        adapter_name, init_ia3_weights, adapter_dtype: the first adapter; see ``add_adapter``.
        is_feedforward: whether the input is scaled; the same for all adapters.

    Raises:
        TypeError: ``base_layer`` does not say its features.
    """

    by_adapter: ClassVar[tuple[str, ...]] = ("ia3_l",)

    def __init__(
        self,
        base_layer: nn.Module,
        is_feedforward: bool = False,
        init_ia3_weights: bool = True,
        adapter_dtype: torch.dtype | None = None,
        adapter_name: str = "default",
    ) -> None:
        features = linear_features(base_layer)
        if features is None:
            raise TypeError(
                f"base_layer: got {type(base_layer).__name__}; accepted is a module with "
                "in_features and out_features"
            )
        super().__init__(base_layer)
        self.in_features, self.out_features = features
        self.is_feedforward = is_feedforward
        self.ia3_l = nn.ParameterDict()
        self.add_adapter(adapter_name, init_ia3_weights, adapter_dtype)
        self.active_adapters = [adapter_name]

    def add_adapter(
        self,
        name: str,
        init_ia3_weights: bool = True,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        """Add an adapter.

        Args:
            name: its name.
            init_ia3_weights: ones, with which it changes nothing; False: drawn from N(0, 1).
            adapter_dtype: its dtype; None: fp32 for a base in fp32 or below.

        Raises:
            ValueError: the name is taken, or none; or adapters are merged.
        """
        self.check_change("add_adapter")
        if check_adapter_name(name) in self.ia3_l:
            raise ValueError(f"name: adapter {name!r} exists already; choose another name")
        device, dtype = self._base_device_dtype()
        shape = (1, self.in_features) if self.is_feedforward else (self.out_features, 1)
        vector = torch.ones(shape) if init_ia3_weights else torch.randn(shape)
        if dtype is not None:
            vector = vector.to(dtype)  # as peft rounds it, before it is widened
        self.ia3_l[name] = nn.Parameter(
            vector.to(device, adapter_dtype or adapter_dtype_for(dtype))
        )

    def _base_device_dtype(self) -> tuple[torch.device, torch.dtype | None]:
        tensors = [*self.base_layer.parameters(), *self.base_layer.buffers()]
        dtype = getattr(self.base_layer, "compute_dtype", None)  # bitsandbytes'
        if dtype is None:
            dtype = getattr(self.base_layer.weight, "dtype", None)
        return tensors[0].device, dtype if dtype in FLOATS else None

    def adapter_tensors(self, name: str) -> dict[str, AdapterTensor]:
        if name not in self.ia3_l:
            return {}
        return {"ia3_l": AdapterTensor(f"ia3_l.{name}", self.ia3_l[name])}

    def neutral_tensors(self, name: str) -> dict[str, Tensor]:
        return {"ia3_l": torch.ones_like(self.ia3_l[name])}

    def _vector(self) -> Tensor | None:
        """The product of the acting adapters' vectors, [N] or [K]; None: none acts."""
        vector = None
        for name in self.acting_adapters():
            own = self.ia3_l[name].flatten()
            vector = own if vector is None else vector * own
        return vector

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in the base's output dtype."""
        vector = self._vector()
        if vector is None:
            return self.base_layer(x)
        if self.is_feedforward:
            return self.base_layer(scale_columns(x, vector))
        return scale_columns(self.base_layer(x), vector)

    def _merged(self, dequantize: bool | torch.dtype) -> Merged:
        base: Any = self.base_layer
        vector = self._vector()
        if vector is None and not (dequantize and isinstance(base, FusedLayer)):
            return Merged(base, 0.0, 0.0)
        if (
            not isinstance(base, FusedLayer)
            and type(base) is not nn.Linear
            and not _is_conv1d(base)
        ):
            raise NotImplementedError(
                f"a {type(base).__name__}'s weight is not fastlora's to write: merging is for nn.Linear, Conv1D and "
                "QLoRALinear. Save the adapter and merge it with stock peft"
            )
        weight = base.weight
        floats = (
            base._floats()
            if isinstance(base, FusedLayer)
            else weight.to(torch.promote_types(weight.dtype, torch.float32))
        )
        exact, bias = floats, base.bias
        if vector is not None:
            wide = vector.to(floats.dtype)
            # A linear's weight is [N, K], a Conv1D's [K, N].
            rows = self.is_feedforward == _is_conv1d(base)
            exact = floats * (wide[:, None] if rows else wide)
            if bias is not None and not self.is_feedforward:
                scaled = (bias.to(wide.dtype) * wide).to(bias.dtype)
                bias = nn.Parameter(scaled, requires_grad=False)
        if isinstance(base, FusedLayer):
            weight = base._stored(exact, dequantize)
            made = base.as_base(weight)
            kept = weight if isinstance(weight, Tensor) else weight.dequantize(exact.dtype)
        else:
            made, kept = copy.copy(base), exact.to(base.weight.dtype)
            made._parameters = {**base._parameters, "weight": nn.Parameter(kept, False)}
        made.bias = bias
        return Merged(made, *distances([(floats, exact, kept)]))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, is_feedforward={self.is_feedforward}"


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, without importing it."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
