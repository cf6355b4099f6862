"""``FusedLayer``: a layer whose base and one acting adapter are one product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._autocast import autocast_dtype
from ..quant import NF4Tensor
from .base import LoRALayer
from .merging import MergeableLayer, as_parameter


class FusedLayer(MergeableLayer, LoRALayer):
    """``forward`` of LoRALinear, LoRAConv1D and QLoRALinear. A subclass says what its products are, and its weight."""

    bias: Tensor | None

    def _product(
        self, x: Tensor, a: Tensor, b: Tensor, scaling: float | Tensor, dropout_p: float
    ) -> Tensor:
        """Base and update of one adapter."""
        raise NotImplementedError

    def _base(self, x: Tensor) -> Tensor:
        """The base alone."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]; see ``fastlora.lora_linear`` and ``qlora_linear`` for dtypes and errors."""
        names = self.acting_adapters()
        if len(names) == 1 and _fits(x, self.lora_A[names[0]]):
            name = names[0]
            a, b = self.lora_A[name], self.lora_B[name]
            return self._product(x, a, b, self.scaling[name], self.lora_dropout[name])
        y = self._base(x)
        return self._add_updates(y, x, names) if names else y

    def _with_updates(self, base: Tensor) -> Tensor:
        """base [N, K] + sum of s B A, a new tensor."""
        exact = base.clone()
        for name in self.acting_adapters():
            # In fp64, which TF32 does not touch, and by rows: whole, it would be the largest tensor of the merge.
            a, scaling = self.lora_A[name].double(), float(self.scaling[name])
            for rows, b in zip(exact.split(1024), self.lora_B[name].split(1024), strict=True):
                rows += (b.double() @ a) * scaling
        return exact

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
        """The bias, the Parameter itself where it is of ``dtype``."""
        bias = self.bias
        if bias is None or bias.dtype == dtype:
            return bias
        return nn.Parameter(bias.detach().to(dtype), bias.requires_grad)


def _fits(x: Tensor, a: Tensor) -> bool:
    """Adapters below x's precision (cast to bf16 in an fp32 model) go through plain torch."""
    return a.dtype == torch.float32 or a.dtype == x.dtype or autocast_dtype(x.device) is not None


def refuse_dora(use_dora: bool) -> None:
    """NotImplementedError if ``use_dora``."""
    if use_dora:
        raise NotImplementedError(
            "use_dora: got True; DoRA is not there yet. Use peft.LoraConfig(use_dora=True) with "
            "peft.get_peft_model (fastlora.accelerate then speeds up the model's plain LoRA layers)"
        )
