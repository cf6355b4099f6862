"""``LoRAParameter``: adapters of a Parameter that a module reads itself, stacked expert weights above all."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from ..quant import NF4Tensor
from .base import LoRALayer
from .experts import experts_forward, reads_experts
from .inits import Factors, changes_base_weight, initial_factors
from .merging import MergeableLayer, Merged, as_parameter, check_whole, plain_mode
from .plain import FLOATS
from .standin import StandIn


def parameter_problem(module: nn.Module, name: str) -> str | None:
    """Why the Parameter ``name`` of ``module`` cannot have adapters, or None."""
    parameter = module._parameters.get(name)
    if parameter is None:
        return f"a {type(module).__name__} has no Parameter of its own called {name!r}"
    if parameter.dtype not in FLOATS or parameter.ndim not in (2, 3):
        return f"it is {parameter.dtype} {tuple(parameter.shape)}; accepted are floats with two or three dimensions"
    return None


class LoRAParameter(StandIn, MergeableLayer, LoRALayer):
    """A module that computes with ``W + scaling * B A`` in place of one of its Parameters (``target_parameters``).

    W is [N, K], or stacked matrices: [E, N, K], [E, K, N] where the module says ``is_transposed``. One adapter's A is
    ``lora_A[name]`` [r * E, K], with row e * r + i for expert e, and its B is ``lora_B[name]`` [N, r * E], with column
    i * E + e: PEFT's layout. For two Parameters of a module, one layer is around the other, that of the Parameter which the
    module registered last outermost; that one's forward is for both.

    What forward costs: transformers' experts (see ``experts.reads_experts``) get their low-rank terms by one grouped product
    for all, with no B A. Of any other module W + scaling * B A is made as long as a forward takes, and made again in backward
    (the module's forward is run twice, as under gradient checkpointing), where its gradient is of the same size.

    Args:
        base_layer: the module, or a LoRAParameter around it for another Parameter; it is frozen, and not changed.
        parameter_name: the Parameter.
        adapter_name, and the rest: the first adapter; see ``LoRALayer.add_adapter``. No dropout: there is no x to drop from.

    Raises:
        TypeError: see ``parameter_problem``.
        ValueError: an argument is out of range; dropout; an init that changes W.
    """

    stands_for: ClassVar[str] = "base_layer"
    is_linear: ClassVar[bool] = False

    def __init__(
        self,
        base_layer: nn.Module,
        parameter_name: str,
        adapter_name: str = "default",
        **settings: Any,
    ) -> None:
        module = base_layer.module if isinstance(base_layer, LoRAParameter) else base_layer
        if problem := parameter_problem(module, parameter_name):
            raise TypeError(f"parameter_name: {problem}")
        shape = module._parameters[parameter_name].shape  # type: ignore[union-attr]
        self_transposed = len(shape) == 3 and bool(getattr(module, "is_transposed", False))
        n, k = shape[-2:][::-1] if self_transposed else shape[-2:]
        super().__init__(k, n)
        self.stacked = shape[0] if len(shape) == 3 else 1
        self.transposed = self_transposed
        self.parameter_name = parameter_name
        self.base_layer = base_layer
        self.add_adapter(adapter_name, **settings)
        module.requires_grad_(False)  # last: an error above leaves the caller's as it was
        self.train(base_layer.training)

    @property
    def module(self) -> nn.Module:
        """The module itself, inside all layers around it."""
        base = self.base_layer
        return base.module if isinstance(base, LoRAParameter) else base

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The Parameter; while merged, with adapters in it."""
        weight: Tensor = getattr(self.module, self.parameter_name)
        return weight

    def chain(self) -> list[LoRAParameter]:
        """This layer and those inside it: one for each Parameter."""
        inner = self.base_layer.chain() if isinstance(self.base_layer, LoRAParameter) else []
        return [self, *inner]

    def add_adapter(self, name: str = "default", *args: Any, **settings: Any) -> None:
        """As ``LoRALayer.add_adapter``.

        Raises:
            ValueError: also with dropout, or an init that changes W.
        """
        if settings.get("lora_dropout"):
            raise ValueError(
                f"lora_dropout: got {settings['lora_dropout']} with target_parameters; accepted is 0.0, for a Parameter has "
                "no input to drop from"
            )
        for field in ("use_dora", "lora_bias"):
            if settings.get(field):
                raise NotImplementedError(
                    f"{field}: got True with target_parameters; accepted is False, for a Parameter that its module reads itself"
                )
        super().add_adapter(name, *args, **settings)

    def _base_weight(self) -> None:
        return None

    def _base_device_dtype(self) -> tuple[torch.device, torch.dtype]:
        return self.weight.device, self.weight.dtype

    def _factors(
        self, init: bool | str, r: int, scaling: float, lora_bias: bool = False
    ) -> Factors:
        if changes_base_weight(init):
            raise ValueError(
                f"init_lora_weights: got {init!r} with target_parameters; accepted are True, False and 'gaussian'"
            )
        k, n = self.in_features, self.out_features
        made = initial_factors(init, None, k, n, r * self.stacked, scaling)
        # a gaussian's deviation is 1 / r, whatever the number of experts
        a = made.a * self.stacked if init == "gaussian" else made.a
        return Factors(a.to(self.weight.dtype), made.b.to(self.weight.dtype))

    def pattern_name(self, module_name: str) -> str:
        return f"{module_name.replace('.base_layer', '')}.{self.parameter_name}"

    def split_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A [E, r, K] and B [E, N, r] of an adapter, as views."""
        a = self.lora_A[name].unflatten(0, (self.stacked, -1))
        b = self.lora_B[name].unflatten(1, (-1, self.stacked)).permute(2, 0, 1)
        return a, b

    def matrices(self) -> Tensor:
        """W as [E, N, K], a view."""
        return self._matrices_of(self.weight.detach())

    def _matrices_of(self, weight: Tensor) -> Tensor:
        weight = weight if weight.ndim == 3 else weight[None]
        return weight.mT if self.transposed else weight

    def effective(self) -> Tensor:
        """W + sum of scaling * B A over the acting adapters, in W's dtype and shape."""
        whole = self.matrices()
        with torch.autocast(whole.device.type, enabled=False):
            for name in self.acting_adapters():
                a, b = (factor.to(whole.dtype) for factor in self.split_factors(name))
                whole = torch.baddbmm(whole, b * self.scaling[name], a)
        whole = whole.mT if self.transposed else whole
        return whole.view(self.weight.shape) if self.weight.ndim == 2 else whole

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own, with what its Parameters are under the acting adapters."""
        layers = [layer for layer in self.chain() if layer.acting_adapters()]
        if not layers:
            return self.module(*args, **kwargs)
        by_name = {layer.parameter_name: layer for layer in layers}
        if reads_experts(self.module, by_name, args, kwargs):
            return experts_forward(self.module, by_name, *args)

        def run(*args: Any, **kwargs: Any) -> Any:
            weights = {name: layer.effective() for name, layer in by_name.items()}
            return functional_call(self.module, weights, args, kwargs)

        if not torch.is_grad_enabled():
            return run(*args, **kwargs)
        return checkpoint(run, *args, use_reentrant=False, **kwargs)

    # Merging.

    def merged_weight(self, dequantize: bool | torch.dtype = False) -> Merged:
        """As ``MergeableLayer.merged_weight``, matrix by matrix: beside what comes out no tensor is larger than one of them."""
        names = self.acting_adapters()
        if not names:
            return Merged(self.weight, 0.0, 0.0)
        check_whole([self.weight, *(p for name in names for p in self.adapter_parameters(name))])
        with plain_mode(self.weight.device.type):
            made = torch.empty_like(self.weight)
            pairs = zip(self.matrices(), self._matrices_of(made), range(self.stacked), strict=True)
            squares = torch.tensor([self._merge_matrix(*pair, names) for pair in pairs])
        total, update, error = squares.view(-1, 3).sum(0).sqrt().tolist()
        return Merged(made, error / (total or 1.0), update / (total or 1.0))

    def _merge_matrix(
        self, base: Tensor, out: Tensor, index: int, names: list[str]
    ) -> tuple[float, float, float]:
        """Put base + sum of s B A of one matrix into ``out``; the squared norms of that sum, of the update and of the rounding."""
        wide = base.to(torch.promote_types(base.dtype, torch.float32))
        exact = wide.clone()
        for name in names:
            a, b = (factors[index].double() for factors in self.split_factors(name))
            exact += (b @ a) * float(self.scaling[name])  # in fp64, which TF32 does not touch
        self._check_finite(exact)
        self._check_finite(out.copy_(exact))
        norms = (float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in (exact, exact - wide, out.to(exact.dtype) - exact))  # fmt: skip
        total, update, error = (norm**2 for norm in norms)
        return total, update, error

    def weight_holders(self) -> list[nn.Module]:
        return [self.module]

    def _hold_weight(self, weight: Tensor | NF4Tensor) -> None:
        assert isinstance(weight, Tensor)
        setattr(self.module, self.parameter_name, as_parameter(weight))

    def as_base(self, weight: Tensor | NF4Tensor) -> nn.Module:
        """The module, with ``weight`` in it."""
        self._hold_weight(weight)
        return self.module

    def without_adapters(self) -> nn.Module:
        return self.module

    def extra_repr(self) -> str:
        return f"parameter_name={self.parameter_name!r}, {super().extra_repr()}"
