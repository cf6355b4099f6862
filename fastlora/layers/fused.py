"""``FusedLayer``: a layer whose base and one acting adapter are one product."""

from __future__ import annotations

import torch
from torch import Tensor

from .._autocast import autocast_dtype
from .base import LoRALayer


class FusedLayer(LoRALayer):
    """``forward`` of LoRALinear and QLoRALinear. A subclass says what its products are."""

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
        names = self._acting()
        if len(names) == 1 and _fits(x, self.lora_A[names[0]]):
            name = names[0]
            a, b = self.lora_A[name], self.lora_B[name]
            return self._product(x, a, b, self.scaling[name], self.lora_dropout[name])
        y = self._base(x)
        return self._add_updates(y, x, names) if names else y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias={self.bias is not None}"


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
