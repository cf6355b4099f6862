"""``LoRAWrapper``: adapters over any module that acts as a linear, quantised ones included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import LoRALayer
from .dora import BaseRows, rows_of
from .mixed import mixed_linear


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(K, N) of a module that maps [..., K] to [..., N], or None if it does not say so.

    Known are ``in_features``/``out_features`` (nn.Linear and what derives from it, bitsandbytes,
    torch.ao, most quantisers), ``infeatures``/``outfeatures`` (GPTQ), and transformers' Conv1D,
    whose weight is [K, N].
    """
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        sizes = [getattr(module, name, None) for name in names]
        if all(isinstance(size, int) and size > 0 for size in sizes):
            return sizes[0], sizes[1]  # type: ignore[return-value]
    weight = getattr(module, "weight", None)
    if (
        type(module).__name__ == "Conv1D"
        and isinstance(getattr(module, "nf", None), int)
        and weight is not None
    ):
        return int(weight.shape[0]), int(weight.shape[1])
    return None


class LoRAWrapper(LoRALayer):
    """``y = base_layer(x) + scaling * dropout(x) A^T B^T``, the update in plain torch.

    For bases whose forward must stay theirs: bitsandbytes' Linear4bit and Linear8bitLt, other
    quantised linears, Conv1D, and nn.Linear with hooks or a forward of its own. The base is kept as
    ``base_layer`` and not changed.

    Args:
        base_layer: the module; it must have ``in_features`` and ``out_features`` (see
            ``linear_features``).
        adapter_name, and the rest: the first adapter; see ``LoRALayer.add_adapter``.

    Raises:
        TypeError: ``base_layer`` does not say its features.
        ValueError: an argument is out of range; PiSSA and OLoRA, which would have to rewrite the
            base.
        NotImplementedError: ``use_dora`` over a base without a float weight: its norms could not be read.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        adapter_dtype: torch.dtype | None = None,
        adapter_name: str = "default",
        use_dora: bool = False,
        lora_bias: bool = False,
    ) -> None:
        features = linear_features(base_layer)
        if features is None:
            raise TypeError(
                f"base_layer: got {type(base_layer).__name__}; accepted is a module with "
                "in_features and out_features"
            )
        super().__init__(*features)
        self.base_layer = base_layer
        self.add_adapter(
            adapter_name, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype,
            use_dora, lora_bias,
        )  # fmt: skip
        self.train(base_layer.training)

    @property
    def weight(self) -> Any:
        """The base's weight, in whatever form it keeps it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        return self.base_layer.bias

    def _base_weight(self) -> None:
        return None

    def _base_rows(self) -> BaseRows:
        base, weight = self.base_layer, getattr(self.base_layer, "weight", None)
        shape = (self.out_features, self.in_features)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            if type(base).__name__ == "Conv1D":
                weight = weight.t()
            if weight.shape == shape:
                return rows_of(weight)
        raise NotImplementedError(
            f"use_dora: the base is a {type(base).__name__}, whose weight cannot be read as floats {list(shape)}; over a "
            "4-bit base use fastlora.load_quantized or LoraConfig(quantize='nf4'), or stock peft"
        )

    def _base(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = self.base_layer(x)
        own = self._base_bias()
        y = y if own is None else y - own
        return y if bias is None else y + bias

    def _base_device_dtype(self) -> tuple[torch.device, torch.dtype | None]:
        tensors = [*self.base_layer.parameters(), *self.base_layer.buffers()]
        device = tensors[0].device if tensors else torch.device("cpu")
        weight = getattr(self.base_layer, "weight", None)
        # bitsandbytes names the dtype it computes in; its weight's own is uint8.
        dtype = getattr(self.base_layer, "compute_dtype", None)
        if dtype is None and isinstance(weight, Tensor) and weight.is_floating_point():
            dtype = weight.dtype
        return device, dtype

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., K] -> [..., N] in the base's output dtype; further arguments go to the base."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.mixed is not None:
            if not self._is_mixed():
                return y
            return (y + mixed_linear(self, self.mixed, x, None, None)).to(y.dtype)
        names = self.acting_adapters()
        return self._add_updates(y, x, names) if names else y
