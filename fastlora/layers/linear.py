"""``LoRALinear``: a frozen nn.Linear and its adapters as one product."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import lora_linear
from .base import LoRALayer
from .dora import BaseRows, rows_of
from .fused import FusedLayer

if TYPE_CHECKING:
    from typing_extensions import Self


class LoRALinear(FusedLayer):
    """``y = x W^T + bias + scaling * dropout(x) A^T B^T``, W [N, K] frozen (arXiv 2106.09685).

    ``weight`` and ``bias`` keep the names of nn.Linear, so a base checkpoint loads with
    ``strict=False``; the adapters are ``lora_A.<name>`` and ``lora_B.<name>``. With one active
    adapter forward is ``fastlora.lora_linear``; with none it is the base; with several it adds
    their updates in plain torch.

    Args:
        in_features, out_features: K and N.
        r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype: the first
            adapter, named "default"; see ``LoRALayer.add_adapter``.
        bias: whether the base has a bias [N]. It is frozen like the weight;
            ``layer.bias.requires_grad_()`` trains it.
        use_dora, lora_bias: of the first adapter as well.
        device, dtype: of the base weight.

    Raises:
        ValueError: an argument is out of range.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        use_dora: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        init_lora_weights: bool | str = True,
        lora_bias: bool = False,
    ) -> None:
        super().__init__(in_features, out_features)
        self._share(nn.Linear(in_features, out_features, bias, device, dtype))
        self.add_adapter(
            "default", r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype,
            use_dora, lora_bias,
        )  # fmt: skip
        self._freeze_base()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        init_lora_weights: bool | str = True,
        adapter_name: str = "default",
        lora_bias: bool = False,
    ) -> Self:
        """A layer over ``linear``'s own weight and bias: shared, not copied, and now frozen.

        PiSSA and OLoRA give the new layer a weight of its own instead and leave ``linear`` as it
        is.

        Raises:
            TypeError: ``linear`` is no nn.Linear.
            ValueError: its weight is not floating point, or another argument is out of range.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: got {type(linear).__name__}; accepted is a torch.nn.Linear")
        if not linear.weight.is_floating_point() or linear.weight.shape != (
            linear.out_features,
            linear.in_features,
        ):
            raise ValueError(
                f"linear: its weight is {linear.weight.dtype} {tuple(linear.weight.shape)}; "
                "accepted is a float weight [N, K]. fastlora.layers.LoRAWrapper puts adapters "
                "over a quantised linear"
            )
        layer = cls.__new__(cls)
        LoRALayer.__init__(layer, linear.in_features, linear.out_features)
        layer._share(linear)
        layer.add_adapter(
            adapter_name, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype,
            use_dora, lora_bias,
        )  # fmt: skip
        layer._freeze_base()  # last: an error above leaves the caller's linear as it was
        return layer.train(linear.training)

    def _share(self, linear: nn.Linear) -> None:
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)

    def _freeze_base(self) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def _base_weight(self) -> Tensor:
        return self.weight.data

    def _replace_base_weight(self, weight: Tensor) -> None:
        self.weight = nn.Parameter(weight, requires_grad=False)

    def _base_device_dtype(self) -> tuple[torch.device, torch.dtype]:
        return self.weight.device, self.weight.dtype

    def _base_rows(self) -> BaseRows:
        return rows_of(self.weight)

    def reset_parameters(self) -> None:
        """Draw the base anew as nn.Linear does, then every adapter (after the meta device, say).

        Raises:
            ValueError: adapters are merged into the weight.
        """
        self.check_change("reset_parameters")
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]  # it reads weight and bias alone
        self.reset_adapters()

    def _product(
        self,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: float | Tensor,
        bias: Tensor | None,
        dropout_p: float,
    ) -> Tensor:
        return lora_linear(x, self.weight, a, b, scaling, bias, dropout_p, self.training)

    def _base(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.weight, bias)
