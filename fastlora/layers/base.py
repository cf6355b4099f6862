"""What every layer with LoRA adapters shares: their parameters and settings, and which act."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.support import MAX_RANK
from .adapter import AdapterLayer, AdapterTensor, check_adapter_name
from .inits import check_init, initial_factors


def adapter_dtype_for(dtype: torch.dtype | None) -> torch.dtype:
    """PEFT's default: adapters of a base below fp32 (or with no float weight) are kept in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Merged(NamedTuple):
    """A base weight with adapters in it, and how far that is from the exact W + sum of s B A.

    ``error`` is ||weight - exact|| / ||exact||, ``update`` is ||exact - W|| / ||exact||, in Frobenius norms: an error as
    large as the update means that the update is lost in the rounding.
    """

    weight: Any  # Tensor | NF4Tensor; an ExchangeLayer's is a module
    error: float
    update: float


class LoRALayer(AdapterLayer):
    """A linear map [..., K] -> [..., N] with any number of named adapters, some of them active.

    Parameters: ``lora_A[name]`` [r, K] and ``lora_B[name]`` [N, r]. The dicts ``r``,
    ``lora_alpha``, ``scaling``, ``lora_dropout``, ``use_rslora`` and ``init_lora_weights`` hold one
    value per adapter; ``scaling`` is read at every forward. With several active adapters their
    updates are added, as in PEFT.
    """

    by_adapter: ClassVar[tuple[str, ...]] = (
        "r",
        "lora_A",
        "lora_B",
        "lora_alpha",
        "scaling",
        "lora_dropout",
        "use_rslora",
        "init_lora_weights",
    )

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float | Tensor] = {}
        self.lora_dropout: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.init_lora_weights: dict[str, bool | str] = {}

    # What a subclass says about its base.

    def _base_weight(self) -> Tensor | None:
        """The base weight [N, K] as floats, or None where it cannot be read."""
        raise NotImplementedError

    def _replace_base_weight(self, weight: Tensor) -> None:
        """Use ``weight`` [N, K] from now on, leaving the tensor used so far as it is."""
        raise NotImplementedError

    def _base_device_dtype(self) -> tuple[torch.device, torch.dtype | None]:
        """Where the base computes, and in which float dtype (None: unknown)."""
        raise NotImplementedError

    # Adapters.

    def add_adapter(
        self,
        name: str = "default",
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        """Add an adapter and initialise it; it becomes active if it is the first.

        Args:
            name: its name; ``lora_A.<name>`` and ``lora_B.<name>`` are its state_dict keys.
            r: rank, 1 to 512.
            lora_alpha: scaling = lora_alpha / r, or lora_alpha / sqrt(r) with ``use_rslora`` (arXiv
                2312.03732).
            lora_dropout: probability in [0, 1], on the low-rank path only.
            init_lora_weights: see ``layers/inits.py``. PiSSA and OLoRA give the layer a base weight
                of its own.
            adapter_dtype: dtype of A and B; None: fp32 for a base in fp32 or below.

        Raises:
            ValueError: any of these is out of range, the name is taken, or adapters are merged.
        """
        self.check_change("add_adapter")
        if check_adapter_name(name) in self.r:
            raise ValueError(f"name: adapter {name!r} exists already; choose another name")
        if isinstance(r, bool) or not isinstance(r, int) or not 1 <= r <= MAX_RANK:
            raise ValueError(f"r: got {r!r}; accepted are integers from 1 to {MAX_RANK}")
        if not 0.0 <= lora_dropout <= 1.0:
            raise ValueError(
                f"lora_dropout: got {lora_dropout!r}; accepted are probabilities from 0 to 1"
            )
        init = check_init(init_lora_weights)
        device, base_dtype = self._base_device_dtype()
        dtype = adapter_dtype or adapter_dtype_for(base_dtype)
        scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        if device.type == "meta":
            a, b, residual = (
                torch.empty(r, self.in_features),
                torch.empty(self.out_features, r),
                None,
            )
        else:
            a, b, residual = self._factors(init, r, scaling)
        if residual is not None:
            self._replace_base_weight(residual)
        self.lora_A[name] = nn.Parameter(a.to(device, dtype))
        self.lora_B[name] = nn.Parameter(b.to(device, dtype))
        self.r[name], self.lora_alpha[name], self.scaling[name] = r, lora_alpha, scaling
        self.lora_dropout[name], self.use_rslora[name] = float(lora_dropout), use_rslora
        self.init_lora_weights[name] = init
        if not self.active_adapters:
            self.active_adapters = [name]

    def _factors(
        self, init: bool | str, r: int, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        a, b, residual = initial_factors(
            init, self._base_weight(), self.in_features, self.out_features, r, scaling
        )
        dtype = self._base_device_dtype()[1]
        if residual is None and dtype is not None:
            # PEFT creates A and B in the base's dtype and widens them after; rounding alike keeps
            # one seed one adapter.
            a, b = a.to(dtype), b.to(dtype)
        return a, b, residual

    def reset_adapters(self) -> None:
        """Initialise every adapter again from its own settings (after ``to_empty``, say).

        PiSSA and OLoRA split the base weight: its original values must be in place, not a residual.
        """
        self.check_change("reset_adapters")
        for name, r in self.r.items():
            scaling = self._own_scaling(name)
            a, b, residual = self._factors(self.init_lora_weights[name], r, scaling)
            if residual is not None:
                self._replace_base_weight(residual)
            with torch.no_grad():
                self.lora_A[name].copy_(a)
                self.lora_B[name].copy_(b)
            self.scaling[name] = scaling

    def adapter_tensors(self, name: str) -> dict[str, AdapterTensor]:
        if name not in self.r:
            return {}
        return {
            f"{part}.weight": AdapterTensor(f"{part}.{name}", getattr(self, part)[name])
            for part in ("lora_A", "lora_B")
        }

    def set_scale(self, name: str, scale: float) -> None:
        """Let an adapter act ``scale`` times as strongly as its ``lora_alpha`` says. A scaling that is a tensor is
        written in place, so that a captured graph sees it.

        Raises:
            ValueError: ``scale`` is not finite, or adapters are merged.
        """
        self.check_change("set_scale")
        if not math.isfinite(scale):
            raise ValueError(f"scale: got {scale!r}; accepted are finite numbers")
        value, now = scale * self._own_scaling(name), self.scaling[name]
        if isinstance(now, Tensor):
            now.fill_(value)
        else:
            self.scaling[name] = value

    def _own_scaling(self, name: str) -> float:
        r = self.r[name]
        return self.lora_alpha[name] / (math.sqrt(r) if self.use_rslora[name] else r)

    def merged_weight(self, dequantize: bool | torch.dtype = False) -> Merged:
        """The base weight with the acting adapters in it; nothing is changed.

        Raises:
            NotImplementedError: the base's weight is not fastlora's to write.
        """
        raise NotImplementedError(
            f"a {type(self).__name__} leaves its base as it is: merging is for LoRALinear and QLoRALinear. "
            "Save the adapter and merge it with stock peft"
        )

    def _add_updates(self, y: Tensor, x: Tensor, names: list[str]) -> Tensor:
        """y + the updates of ``names``, in plain torch, each in its adapter's dtype."""
        dtype = y.dtype
        for name in names:
            a, b = self.lora_A[name], self.lora_B[name]
            dropped = F.dropout(x.to(a.dtype), self.lora_dropout[name], self.training)
            y = y + F.linear(F.linear(dropped, a), b) * self.scaling[name]
        return y.to(dtype)

    def extra_repr(self) -> str:
        parts = [f"in_features={self.in_features}", f"out_features={self.out_features}"]
        for name, r in self.r.items():
            state = "" if name in self.acting_adapters() else ", inactive"
            state = ", merged" if name in self.merged_adapters else state
            scaling, dropout = self.scaling[name], self.lora_dropout[name]
            parts.append(f"{name}(r={r}, scaling={float(scaling):g}, dropout={dropout:g}{state})")
        return ", ".join(parts)
