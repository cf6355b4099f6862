"""Bottleneck adapters: ``Bottleneck``, two small linears with an activation between, and ``BottleneckLayer``, a module
with some of them behind or beside it.

With h the module's output and s what its block adds it to (arXiv 1902.00751, 2005.00247, 2110.04366):

    f(x) = scaling * up(act(down(x)))
    sequential    y = h + f(h)
                  y = h + f(norm(h + s))        original_ln_before; without a norm behind the sum: h + f(h + s)
    parallel      y = h + f(s)

Several that act: sequential ones one behind the other, the updates of parallel ones are added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..autograd.bottleneck import bottleneck
from .adapter import AdapterLayer, AdapterTensor, check_adapter_name


@dataclass(frozen=True)
class BottleneckSettings:
    """Of one adapter; see ``BottleneckConfig``."""

    non_linearity: str = "relu"
    original_ln_before: bool = False
    original_ln_after: bool = True
    ln_before: bool = False
    ln_after: bool = False
    init_weights: str = "bert"
    is_parallel: bool = False
    scaling: float | str = 1.0
    use_gating: bool = False
    residual_before_ln: bool | str = True
    adapter_residual_before_ln: bool = False
    dropout: float = 0.0

    @property
    def needs_stream(self) -> bool:
        """Whether it reads what the module's output is added to."""
        return self.is_parallel or self.original_ln_before


class Bottleneck(nn.Module):
    """[..., K] -> residual [..., N] + scaling * up(act(down(x))), with the adapters library's names of parameters.

    Args:
        in_features, out_features, r: K, N and the width between.
        settings: the rest.
    """

    def __init__(
        self, in_features: int, out_features: int, r: int, settings: BottleneckSettings
    ) -> None:
        super().__init__()
        self.settings = settings
        norms: list[nn.Module] = []
        if settings.ln_before:
            self.adapter_norm_before = nn.LayerNorm(in_features)
            norms = [self.adapter_norm_before]
        self.adapter_down = nn.Sequential(*norms, nn.Linear(in_features, r))
        self.adapter_up = nn.Linear(r, out_features)
        if isinstance(settings.scaling, str):
            size = 1 if settings.scaling == "learned" else out_features
            self.scaling = nn.Parameter(torch.ones(size))
        if settings.ln_after:
            self.adapter_norm_after = nn.LayerNorm(out_features)
        if settings.use_gating:
            self.gate = nn.Linear(in_features, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """ "bert": N(0, 0.02). "houlsby": N(0, 0.01) cut at two standard deviations. "mam_adapter": as nn.Linear, and an
        up-projection of zeros, with which the adapter starts as nothing. Biases are zero."""
        down, up, how = self.adapter_down[-1], self.adapter_up, self.settings.init_weights
        assert isinstance(down, nn.Linear)
        for linear in (down, up):
            if how == "houlsby":
                nn.init.trunc_normal_(linear.weight, std=0.01, a=-0.02, b=0.02)
            elif how == "bert":
                nn.init.normal_(linear.weight, std=0.02)
            elif linear is down:
                nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
            else:
                nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        if self.settings.use_gating and how != "houlsby":
            nn.init.normal_(self.gate.weight, std=0.02)
            nn.init.zeros_(self.gate.bias)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x [..., K] and residual [..., N] (the same tensor perhaps) -> [..., N] in residual's dtype.

        Raises:
            ValueError: shapes do not fit; or gating, which averages over a sequence, without one.
        """
        settings = self.settings
        inner = _normed(x, self.adapter_norm_before) if settings.ln_before else x
        down: Any = self.adapter_down[-1]
        weight: Tensor = self.adapter_up.weight
        bias: Tensor = self.adapter_up.bias
        if isinstance(settings.scaling, str):
            weight, bias = weight * self.scaling[:, None], bias * self.scaling
        elif settings.scaling != 1.0:
            weight, bias = weight * settings.scaling, bias * settings.scaling
        drops = settings.dropout > 0 and self.training
        alone = drops or settings.use_gating or settings.ln_after
        y = bottleneck(
            inner,
            None if alone else residual,
            down.weight,
            down.bias,
            weight,
            bias,
            settings.non_linearity,
        )
        if not alone:
            return y
        y = F.dropout(y, settings.dropout, drops)
        if settings.use_gating:
            y = y * self._gate(x).to(y.dtype)
        if settings.ln_after:
            if settings.adapter_residual_before_ln and not settings.is_parallel:
                return _normed(y + residual, self.adapter_norm_after).to(residual.dtype)
            y = _normed(y, self.adapter_norm_after)
        return (y + residual).to(residual.dtype)

    def _gate(self, x: Tensor) -> Tensor:
        """One number per sequence: [B, 1, 1] of x [B, S, K]."""
        if x.ndim != 3:
            raise ValueError(
                f"x: got shape {tuple(x.shape)}; use_gating averages over the tokens of [batch, tokens, width]"
            )
        gate = self.gate
        scores = F.linear(x.to(gate.weight.dtype), gate.weight, gate.bias)
        return torch.sigmoid(scores).mean(1, keepdim=True)

    def extra_repr(self) -> str:
        settings = self.settings
        return f"non_linearity={settings.non_linearity}, scaling={settings.scaling}, dropout={settings.dropout}"


class BottleneckLayer(AdapterLayer):
    """A module of a transformer's block, and bottlenecks at its output.

    Attributes that this module lacks are the base's.

    Args:
        base_layer: the module; its output is a tensor [..., N] or a tuple that begins with one.
        in_features, out_features: K of what a parallel adapter reads, and N.
        stream: where s comes from: "input", the module's own first argument; "tap", what ``see`` was given last; "block",
            the second argument of a block of ``dense``, ``dropout`` and ``LayerNorm`` as in BERT, whose adapters stand
            before the sum.
        saved_as: the module's name in a file of the adapters library.
    """

    by_adapter: ClassVar[tuple[str, ...]] = ("bottlenecks",)

    def __init__(
        self,
        base_layer: nn.Module,
        in_features: int,
        out_features: int,
        stream: str = "input",
        saved_as: str = "",
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottlenecks = nn.ModuleDict()
        self.in_features, self.out_features = in_features, out_features
        self.stream, self.saved_as = stream, saved_as
        self._seen: Tensor | None = None
        self.train(base_layer.training)

    def add_adapter(
        self,
        name: str,
        r: int,
        settings: BottleneckSettings,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Another bottleneck.

        Raises:
            ValueError: the name is taken, or none.
        """
        if check_adapter_name(name) in self.bottlenecks:
            raise ValueError(f"name: adapter {name!r} exists already; choose another name")
        width = self.in_features if settings.is_parallel else self.out_features
        made = Bottleneck(width, self.out_features, r, settings).to(device, dtype)
        self.bottlenecks[name] = made.train(self.training)
        if not self.active_adapters:
            self.active_adapters = [name]

    def adapter_tensors(self, name: str) -> dict[str, AdapterTensor]:
        if name not in self.bottlenecks:
            return {}
        return {
            f"adapters.{name}.{key}": AdapterTensor(f"bottlenecks.{name}.{key}", tensor)
            for key, tensor in self.bottlenecks[name].state_dict().items()
        }

    def _acting(self) -> list[Bottleneck]:
        return [self.bottlenecks[name] for name in self.acting_adapters()]  # type: ignore[misc]

    def see(self, stream: Tensor) -> None:
        """What the output of the call that follows will be added to."""
        if any(adapter.settings.needs_stream for adapter in self._acting()):
            self._seen = stream

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's output, adapted."""
        adapters = self._acting()
        seen, self._seen = self._seen, None
        if not adapters:
            return self.base_layer(*args, **kwargs)
        if self.stream == "block":
            return self._block(adapters, *args, **kwargs)
        if self.stream == "input":
            seen = args[0] if args else next(iter(kwargs.values()), None)
        out = self.base_layer(*args, **kwargs)
        h = out[0] if isinstance(out, tuple) else out
        if not isinstance(h, Tensor) or h.shape[-1:] != (self.out_features,):
            got = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
            raise ValueError(
                f"the adapted {type(self.base_layer).__name__} returned {got}; accepted is a tensor [..., "
                f"{self.out_features}], or a tuple that begins with one"
            )
        y = self._adapt(adapters, h, seen, None)
        return (y, *out[1:]) if isinstance(out, tuple) else y

    def _block(
        self, adapters: list[Bottleneck], hidden_states: Tensor, input_tensor: Tensor
    ) -> Tensor:
        base: Any = self.base_layer
        h = base.dropout(base.dense(hidden_states))
        y = self._adapt(adapters, h, input_tensor, base.LayerNorm)
        last = adapters[-1].settings
        return base.LayerNorm(y + input_tensor) if last.original_ln_after else y

    def _adapt(
        self, adapters: list[Bottleneck], h: Tensor, stream: Tensor | None, norm: nn.Module | None
    ) -> Tensor:
        for adapter in adapters:
            settings = adapter.settings
            if stream is None:
                if not settings.needs_stream:
                    h = adapter(h, h)
                    continue
                raise RuntimeError(
                    f"the {type(self.base_layer).__name__} was called without the norm before it, whose input this adapter "
                    "reads; call the whole transformer layer"
                )
            if settings.is_parallel:
                h = adapter(stream, h)
                continue
            inner = residual = h
            if settings.original_ln_before:
                inner = summed = h + stream
                if norm is not None:
                    inner = norm(summed)
                if settings.residual_before_ln == "post_add":
                    residual = summed
                elif not settings.residual_before_ln:
                    residual = inner
            h = adapter(inner, residual)
        return h

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_layer" not in self.__dict__.get("_modules", {}):
                raise  # not built yet (unpickling): nothing to read from
            return getattr(self.base_layer, name)


class StreamTap:
    """A forward pre-hook of the norm at a sublayer's beginning: its input is what the sublayer's output is added to."""

    def __init__(self, layer: BottleneckLayer) -> None:
        self.layer = layer

    def __call__(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.layer.see(args[0] if args else next(iter(kwargs.values())))


def _normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """``norm`` in its own dtype, the result in x's."""
    wide = x.to(norm.weight.dtype)
    return F.layer_norm(wide, norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(x.dtype)
