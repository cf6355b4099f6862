"""``QLoRALinear``: a frozen 4-bit linear and its adapters as one product."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import ops
from ..functional import qlora_linear
from ..quant import NF4Tensor
from .base import LoRALayer
from .dora import BaseRows
from .fused import FusedLayer
from .inits import check_init, check_lora_bias, loftq

if TYPE_CHECKING:
    from typing_extensions import Self


class QLoRALinear(FusedLayer):
    """``y = x W^T + bias + scaling * dropout(x) A^T B^T``, W [N, K] in 4 bits and frozen (QLoRA, arXiv 2305.14314).

    ``weight`` is an ``NF4Tensor``: its state_dict keys are ``weight.codes``, ``weight.absmax``, ... and no cast changes
    them. With one active adapter forward is ``fastlora.qlora_linear``; with none it is the base; with several it adds
    their updates in plain torch. The compute dtype is x's, or autocast's.

    Args:
        in_features, out_features: K and N.
        r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype: the first adapter, named "default";
            see ``LoRALayer.add_adapter``. ``r=None``: no adapter yet. PiSSA and OLoRA, which change W, are refused.
        bias: whether the base has a bias [N]. It is frozen; ``layer.bias.requires_grad_()`` trains it.
        use_dora, lora_bias: of the first adapter as well.
        block_size, double_quant: see ``NF4Tensor.quantize``.
        device, dtype: of the base weight that is drawn and quantised.

    Raises:
        ValueError: an argument is out of range.
    """

    weight: NF4Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int | None = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        use_dora: bool = False,
        block_size: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        init_lora_weights: bool | str = True,
        lora_bias: bool = False,
    ) -> None:
        super().__init__(in_features, out_features)
        linear = nn.Linear(in_features, out_features, bias, device, dtype)
        self._hold(_quantized(linear, block_size, double_quant, None), linear.bias)
        if r is not None:
            self.add_adapter(
                "default", r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype,
                use_dora, lora_bias,
            )  # fmt: skip

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int | None = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        block_size: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
        adapter_dtype: torch.dtype | None = None,
        init_lora_weights: bool | str = True,
        adapter_name: str = "default",
        lora_bias: bool = False,
        loftq_iter: int = 1,
    ) -> Self:
        """A layer with ``linear``'s weight in NF4 and a copy of its bias; ``linear`` is left as it is.

        Args:
            device: where the weight is quantised and the layer lives; None: where ``linear`` does.
            init_lora_weights: "loftq" as well: the adapter makes up for what quantising takes.
            loftq_iter: its iterations. From the second on the 4-bit weight is no longer that of ``linear`` alone.

        Raises:
            TypeError: ``linear`` is no nn.Linear.
            ValueError: its weight is not floating point, or another argument is out of range.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: got {type(linear).__name__}; accepted is a torch.nn.Linear")
        bias = None
        if linear.bias is not None:
            bias = linear.bias.detach().clone()
        init = check_init(init_lora_weights)
        check_lora_bias(lora_bias, use_dora, init)
        fits = r is not None and init == "loftq"
        layer = cls.from_quantized(
            _quantized(linear, block_size, double_quant, device),
            bias,
            r,
            lora_alpha,
            lora_dropout,
            use_rslora,
            use_dora,
            adapter_dtype,
            False if fits else init,
            adapter_name,
            lora_bias,
        )
        if fits:
            layer._fit(adapter_name, linear.weight, loftq_iter)
        return layer.train(linear.training)

    def _fit(self, name: str, weight: Tensor, iterations: int) -> None:
        """LoftQ: values for an adapter, and for the 4-bit weight, that together are near ``weight``."""
        settings = self.r[name], float(self.scaling[name]), iterations
        weight = weight.detach().to(self.weight.device)
        self.weight, made = loftq(weight, self.weight.requantize, *settings)
        with torch.no_grad():
            self.lora_A[name].copy_(made.a)
            self.lora_B[name].copy_(made.b)
            if name in self.lora_magnitude_vector:
                self.lora_magnitude_vector[name].copy_(self._row_norms(name))
        self.init_lora_weights[name] = "loftq"

    @classmethod
    def from_quantized(
        cls,
        weight: NF4Tensor,
        bias: Tensor | None = None,
        r: int | None = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        init_lora_weights: bool | str = True,
        adapter_name: str = "default",
        lora_bias: bool = False,
    ) -> Self:
        """A layer over a 4-bit weight and a bias [N], which are shared, not copied.

        Raises:
            TypeError: ``weight`` is no NF4Tensor.
            ValueError: as the constructor.
        """
        if not isinstance(weight, NF4Tensor):
            raise TypeError(
                f"weight: got {type(weight).__name__}; accepted is a fastlora.NF4Tensor"
            )
        n, k = weight.shape
        if bias is not None and tuple(bias.shape) != (n,):
            raise ValueError(f"bias: got shape {tuple(bias.shape)}; accepted is [{n}]")
        layer = cls.__new__(cls)
        LoRALayer.__init__(layer, k, n)
        layer._hold(weight, bias)
        if r is not None:
            layer.add_adapter(
                adapter_name, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype,
                use_dora, lora_bias,
            )  # fmt: skip
        return layer

    def _hold(self, weight: NF4Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        if bias is not None:
            bias = nn.Parameter(bias.detach().to(weight.device), requires_grad=False)
        self.register_parameter("bias", bias)

    def _base_weight(self) -> None:
        """None: what an initialisation takes out of W could not be put back into 4 bits."""

    def _floats(self) -> Tensor:
        return self.weight.dequantize(torch.float32)

    def _stored(self, exact: Tensor, dequantize: bool | torch.dtype) -> Tensor | NF4Tensor:
        if not dequantize:
            return self.weight.requantize(exact)
        if dequantize is True:
            dequantize = self.weight.dtype if self.bias is None else self.bias.dtype
        return exact.to(dequantize)

    def as_base(self, weight: Tensor | NF4Tensor) -> nn.Module:
        """In 4 bits a QLoRALinear without adapters, in floats an nn.Linear."""
        if isinstance(weight, NF4Tensor):
            layer = type(self).from_quantized(weight, r=None)
            layer.bias = self.merged_bias()  # as a rule itself: it may be trained
            return layer.train(self.training)
        return super().as_base(weight)

    def _base_device_dtype(self) -> tuple[torch.device, torch.dtype]:
        return self.weight.device, self.weight.dtype

    def _base_rows(self) -> BaseRows:
        shape, weight = (self.out_features, self.in_features), self.weight
        return BaseRows(
            shape,
            torch.float32,
            lambda: weight.row_reader(torch.float32),
            partial(ops.nf4_row_norms, weight.codes, weight.scales, weight.form),
        )

    def _product(
        self,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: float | Tensor,
        bias: Tensor | None,
        dropout_p: float,
    ) -> Tensor:
        return qlora_linear(x, self.weight, a, b, scaling, bias, dropout_p, self.training)

    def _base(self, x: Tensor, bias: Tensor | None) -> Tensor:
        nothing = x.new_empty(0, self.in_features), x.new_empty(self.out_features, 0)
        return qlora_linear(x, self.weight, *nothing, bias=bias)


def _quantized(
    linear: nn.Linear, block_size: int, double_quant: bool, device: torch.device | str | None
) -> NF4Tensor:
    weight = linear.weight
    if weight.shape != (linear.out_features, linear.in_features):
        raise ValueError(
            f"linear: its weight is {tuple(weight.shape)}; accepted is [{linear.out_features}, {linear.in_features}]"
        )
    if weight.is_meta:
        shape = linear.out_features, linear.in_features
        return NF4Tensor.empty(shape, weight.dtype, block_size, double_quant, "meta")
    return NF4Tensor.quantize(weight.detach().to(device or weight.device), block_size, double_quant)
