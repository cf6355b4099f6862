"""``LoRAConv1D``: transformers' Conv1D, a linear whose weight is stored [K, N], and its adapters as one product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import lora_linear
from ..quant import NF4Tensor
from .dora import BaseRows, rows_of
from .fused import FusedLayer
from .merging import Merged, as_parameter
from .plain import FLOATS, bare, is_conv1d


class LoRAConv1D(FusedLayer):
    """``y = x W + bias + scaling * dropout(x) A^T B^T``, W [K, N] frozen (GPT-2's linears).

    ``weight`` and ``bias`` keep the names and shapes of the Conv1D. The products are those of ``LoRALinear``, over the
    view W^T [N, K]; so is everything that reads the weight as a matrix, merging for one.

    Args:
        conv1d: the module; its weight and bias are shared, not copied, and frozen. PiSSA and OLoRA give the layer a
            weight of its own instead.
        adapter_name, and the rest: the first adapter; see ``LoRALayer.add_adapter``.

    Raises:
        TypeError: ``conv1d`` is no Conv1D of transformers'.
        ValueError: its weight is not floating point, or another argument is out of range.
    """

    weight: Tensor

    def __init__(self, conv1d: nn.Module, adapter_name: str = "default", **settings: Any) -> None:
        weight = getattr(conv1d, "weight", None)
        if not is_conv1d(conv1d) or not isinstance(weight, Tensor):
            raise TypeError(
                f"conv1d: got {type(conv1d).__name__}; accepted is a transformers Conv1D"
            )
        if weight.dtype not in FLOATS or weight.ndim != 2:
            raise ValueError(
                f"conv1d: its weight is {weight.dtype} {tuple(weight.shape)}; accepted is a float weight [K, N]"
            )
        super().__init__(*weight.shape)
        self.weight = weight
        self.register_parameter("bias", conv1d.bias)  # type: ignore[arg-type]
        # What to unload into: the module without its tensors. In a tuple, so that it is no submodule.
        self._bare = (bare(conv1d),)
        self.add_adapter(adapter_name, **settings)
        self.weight.requires_grad_(False)  # last: an error above leaves the caller's as it was
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.train(conv1d.training)

    def _base_weight(self) -> Tensor:
        return self.weight.data.t()

    def _replace_base_weight(self, weight: Tensor) -> None:
        self.weight = nn.Parameter(weight.t().contiguous(), requires_grad=False)

    def _base_device_dtype(self) -> tuple[torch.device, torch.dtype]:
        return self.weight.device, self.weight.dtype

    def _base_rows(self) -> BaseRows:
        return rows_of(self.weight.t())

    def _product(
        self,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: float | Tensor,
        bias: Tensor | None,
        dropout_p: float,
    ) -> Tensor:
        return lora_linear(x, self.weight.t(), a, b, scaling, bias, dropout_p, self.training)

    def _matrix(self) -> Tensor:
        return self.weight.t()

    def _base(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.weight.t(), bias)

    # Merging works on W^T [N, K], as that of every linear; what is kept is [K, N].

    def _floats(self) -> Tensor:
        return super()._floats().t()

    def merged_weight(self, dequantize: bool | torch.dtype = False) -> Merged:
        made = super().merged_weight(dequantize)
        if made.weight is self.weight:
            return made
        assert isinstance(made.weight, Tensor)
        return made._replace(weight=made.weight.t().contiguous())

    def as_base(self, weight: Tensor | NF4Tensor) -> nn.Module:
        """The Conv1D over ``weight`` [K, N] and this layer's bias."""
        assert isinstance(weight, Tensor)
        base = bare(self._bare[0])
        base._parameters.update(weight=as_parameter(weight), bias=self._bias_in(weight.dtype))  # type: ignore[arg-type]
        return base.train(self.training)
