"""What every layer with LoRA adapters shares: their parameters and settings, and which act."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autograd import scale_columns
from ..ops.support import MAX_RANK
from .adapter import AdapterLayer, AdapterTensor, check_adapter_name
from .dora import BaseRows, exact_row_norms, row_norms
from .inits import Factors, check_init, check_lora_bias, initial_factors
from .merging import Merged

if TYPE_CHECKING:
    from typing_extensions import Self

# Key in an adapter's file, as PEFT writes it -> the dict that holds the tensor, beside A and B.
_MORE_KEYS = {"lora_B.bias": "lora_bias", "lora_magnitude_vector": "lora_magnitude_vector"}


def adapter_dtype_for(dtype: torch.dtype | None) -> torch.dtype:
    """PEFT's default: adapters of a base below fp32 (or with no float weight) are kept in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class LoRALayer(AdapterLayer):
    """A matrix [N, K], of a linear map [..., K] -> [..., N] as a rule, with any number of named adapters, some active.

    Parameters: ``lora_A[name]`` [r, K] and ``lora_B[name]`` [N, r]; of a DoRA adapter (arXiv 2402.09353)
    ``lora_magnitude_vector[name]`` [N], of one with ``lora_bias`` ``lora_bias[name]`` [N] (PEFT's ``lora_B.bias``). The
    dicts ``r``, ``lora_alpha``, ``scaling``, ``lora_dropout``, ``use_rslora`` and ``init_lora_weights`` hold one value
    per adapter; ``scaling`` is read at every forward. Several active adapters act one after another, as in PEFT: an
    update is added, and DoRA scales what there is by then.
    """

    is_linear: ClassVar[bool] = True  # whether forward is that linear map
    factor_names: ClassVar[tuple[str, str]] = ("lora_A", "lora_B")
    factor_keys: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")  # in a file
    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict
    # Matrices that one adapter's A [r * stacked, K] and B [N, r * stacked] are for: experts, say.
    stacked: int = 1
    by_adapter: ClassVar[tuple[str, ...]] = (
        "r",
        "lora_A",
        "lora_B",
        "lora_magnitude_vector",
        "lora_bias",
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
        for part in self.factor_names:
            self.add_module(part, nn.ParameterDict())
        self.lora_magnitude_vector = nn.ParameterDict()
        self.lora_bias = nn.ParameterDict()
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

    def _base_rows(self) -> BaseRows:
        """The base weight to be read by rows, for DoRA's norms.

        Raises:
            NotImplementedError: it cannot be read.
        """
        raise NotImplementedError

    def _base(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The base's product, with ``bias`` [N] or none in place of its own."""
        raise NotImplementedError

    def _base_bias(self) -> Tensor | None:
        """The base's bias [N]."""
        bias: Tensor | None = getattr(self, "bias", None)
        return bias

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
        use_dora: bool = False,
        lora_bias: bool = False,
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
            use_dora: DoRA: the rows of W + s B A get a trained length, at first that which they have.
            lora_bias: the update has a bias of its own, s * (B A x + lora_bias); zero at first.

        Raises:
            ValueError: any of these is out of range or excludes another, the name is taken, or adapters are merged.
            NotImplementedError: ``use_dora`` over a base whose weight cannot be read.
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
        check_lora_bias(lora_bias, use_dora, init)
        if use_dora:
            self._base_rows()
        device, base_dtype = self._base_device_dtype()
        dtype = adapter_dtype or adapter_dtype_for(base_dtype)
        scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        k, n = self.in_features, self.out_features
        if device.type == "meta":
            bias, ranks = torch.empty(n) if lora_bias else None, r * self.stacked
            made = Factors(torch.empty(ranks, k), torch.empty(n, ranks), None, bias)
        else:
            made = self._factors(init, r, scaling, lora_bias)
        if made.residual is not None:
            self._replace_base_weight(made.residual)
        self._hold_factors(name, made.a.to(device, dtype), made.b.to(device, dtype))
        if made.bias is not None:
            self.lora_bias[name] = nn.Parameter(made.bias.to(device, dtype))
        self.r[name], self.lora_alpha[name], self.scaling[name] = r, lora_alpha, scaling
        if use_dora:
            norms = torch.empty(n) if device.type == "meta" else self._row_norms(name)
            self.lora_magnitude_vector[name] = nn.Parameter(norms.to(device, dtype))
        self.lora_dropout[name], self.use_rslora[name] = float(lora_dropout), use_rslora
        self.init_lora_weights[name] = init
        if not self.active_adapters:
            self.active_adapters = [name]

    def _hold_factors(self, name: str, a: Tensor, b: Tensor) -> None:
        """Make A [r, K] and B [N, r] the factors of a new adapter."""
        self.lora_A[name] = nn.Parameter(a)
        self.lora_B[name] = nn.Parameter(b)

    def _factors(
        self, init: bool | str, r: int, scaling: float, lora_bias: bool = False
    ) -> Factors:
        made = initial_factors(
            init, self._base_weight(), self.in_features, self.out_features, r, scaling, lora_bias
        )
        dtype = self._base_device_dtype()[1]
        if made.residual is None and dtype is not None:
            # PEFT creates A and B in the base's dtype and widens them after; rounding alike keeps
            # one seed one adapter.
            bias = None if made.bias is None else made.bias.to(dtype)
            made = Factors(made.a.to(dtype), made.b.to(dtype), None, bias)
        return made

    def _row_norms(self, name: str) -> Tensor:
        """||W + s B A|| by rows [N], of one adapter alone over the base, whatever else is active."""
        return row_norms(
            self._base_rows(), self.lora_A[name], self.lora_B[name], self.scaling[name]
        )

    def _column_factors(self, name: str) -> Tensor:
        """What DoRA multiplies the rows of W + s B A by: m / ||W + s B A|| [N] in fp64."""
        factors = self.lora_A[name], self.lora_B[name], self.scaling[name]
        norms = exact_row_norms(self._base_rows(), *factors)
        return torch.where(norms > 0, self.lora_magnitude_vector[name].double() / norms, 0)

    def take_factors_out(self, name: str, init: bool | str) -> None:
        """Give the layer the base weight that an adapter began with under ``init`` (PiSSA, OLoRA): without its first factors."""
        made = self._factors(init, self.r[name], self._own_scaling(name))
        assert made.residual is not None
        self._replace_base_weight(made.residual)

    def reset_adapters(self) -> None:
        """Initialise every adapter again from its own settings (after ``to_empty``, say).

        PiSSA and OLoRA split the base weight: its original values must be in place, not a residual.
        """
        self.check_change("reset_adapters")
        for name, r in self.r.items():
            if r == 0:
                continue
            scaling = self._own_scaling(name)
            bias = name in self.lora_bias
            made = self._factors(self.init_lora_weights[name], r, scaling, bias)
            if made.residual is not None:
                self._replace_base_weight(made.residual)
            self.write_factors(name, made.a, made.b)
            self._set_scaling(name, scaling)
            with torch.no_grad():
                if made.bias is not None:
                    self.lora_bias[name].copy_(made.bias)
                if name in self.lora_magnitude_vector:
                    self.lora_magnitude_vector[name].copy_(self._row_norms(name))

    def adapter_tensors(self, name: str) -> dict[str, AdapterTensor]:
        if not self.r.get(name):
            return {}
        return {
            **dict(zip(self.factor_keys, self._factor_entries(name), strict=True)),
            **{
                key: AdapterTensor(f"{_MORE_KEYS[key]}.{name}", value)
                for key, value in self.more_tensors(name).items()
            },
        }

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A [r * stacked, K] and B [N, r * stacked] of an adapter, of a slot for hot-swapping its own ranks."""
        a, b = self._factor_entries(name)
        return a.tensor, b.tensor

    def _factor_entries(self, name: str) -> list[AdapterTensor]:
        """A and B as a file has them: of a slot for hot-swapping, the adapter's own ranks."""
        a, b, r = self.lora_A[name], self.lora_B[name], self.r[name]
        at_a, at_b = (f"{part}.{name}" for part in self.factor_names)
        entries = [AdapterTensor(at_a, a), AdapterTensor(at_b, b[:, : r * self.stacked])]
        if a.shape[0] == r * self.stacked:
            entries[1] = AdapterTensor(at_b, b)
        elif self.stacked == 1:
            entries[0] = AdapterTensor(at_a, a[:r])
        else:  # these rows are not a view of the slot's

            def narrow(slot: Tensor) -> Tensor:
                return self._by_matrix(slot)[:, :r].flatten(0, 1)

            entries[0] = AdapterTensor(at_a, narrow(a), narrow=narrow)
        return entries

    def _by_matrix(self, a: Tensor) -> Tensor:
        """An A [r * stacked, K] as [stacked, r, K], a view."""
        return a.view(self.stacked, a.shape[0] // self.stacked, a.shape[1])

    def pattern_name(self, module_name: str) -> str:
        """What ``rank_pattern`` and ``alpha_pattern`` match: the name of what has the adapter."""
        return module_name

    def more_tensors(self, name: str) -> dict[str, nn.Parameter]:
        """What an adapter has beside A and B, by its key in a file."""
        found = {key: getattr(self, part).get(name) for key, part in _MORE_KEYS.items()}
        return {key: value for key, value in found.items() if value is not None}

    def set_scale(self, name: str, scale: float) -> None:
        """Let an adapter act ``scale`` times as strongly as its ``lora_alpha`` says. A scaling that is a tensor is
        written in place, so that a captured graph sees it.

        Raises:
            ValueError: ``scale`` is not finite, or adapters are merged.
        """
        self.check_change("set_scale")
        if not math.isfinite(scale):
            raise ValueError(f"scale: got {scale!r}; accepted are finite numbers")
        self._set_scaling(name, scale * self._own_scaling(name))

    def _set_scaling(self, name: str, value: float) -> None:
        now = self.scaling[name]
        if isinstance(now, Tensor):
            now.fill_(value)
        else:
            self.scaling[name] = value

    def write_factors(self, name: str, a: Tensor, b: Tensor) -> None:
        """Copy A [r * stacked, K] and B [N, r * stacked] into an adapter's parameters; ranks that are left over become zero."""
        with torch.no_grad():
            slot = self._by_matrix(self.lora_A[name].zero_())
            slot[:, : a.shape[0] // self.stacked].copy_(self._by_matrix(a))
            self.lora_B[name].zero_()[:, : b.shape[1]].copy_(b)

    def slot_rank(self, name: str) -> int:
        """The rank that an adapter's parameters have room for."""
        return self.lora_A[name].shape[0] // self.stacked

    def widen_slot(self, name: str, rank: int) -> None:
        """Give an adapter parameters of ``rank``, zeros where its own ends, and a scaling that is read on the device:
        another adapter of up to that rank can then take its place without any tensor being made anew.

        Raises:
            ValueError: ``rank`` is below that of the adapter's parameters or above 512, or adapters are merged.
        """
        self.check_change("widen_slot")
        a, b = self.lora_A[name], self.lora_B[name]
        if not self.slot_rank(name) <= rank <= MAX_RANK:
            raise ValueError(
                f"rank: got {rank!r}; accepted are {self.slot_rank(name)} to {MAX_RANK}"
            )
        ranks = rank * self.stacked
        self.lora_A[name] = nn.Parameter(a.new_empty(ranks, a.shape[1]), a.requires_grad)
        self.lora_B[name] = nn.Parameter(b.new_empty(b.shape[0], ranks), b.requires_grad)
        self.write_factors(name, a, b)
        self._scale_on_device(name)

    def _scale_on_device(self, name: str) -> None:
        """Keep an adapter's scaling where its factors are, to be written in place."""
        device = self.lora_A[name].device
        self.scaling[name] = torch.as_tensor(self.scaling[name], dtype=torch.float32, device=device)

    def fill_slot(
        self,
        name: str,
        a: Tensor,
        b: Tensor,
        lora_alpha: float,
        use_rslora: bool,
        more: Mapping[str, Tensor],
    ) -> None:
        """Let another adapter's A [r * stacked, K], B [N, r * stacked] and ``more`` (see ``more_tensors``) take the place of
        ``name``'s, in the same memory. Without ``more`` an adapter of no ranks changes nothing."""
        self.write_factors(name, a, b)
        self.r[name], self.lora_alpha[name] = a.shape[0] // self.stacked, lora_alpha
        self.use_rslora[name] = use_rslora
        self._set_scaling(name, self._own_scaling(name))
        with torch.no_grad():
            for key, slot in self.more_tensors(name).items():
                if key in more:
                    slot.copy_(more[key])
                elif name in self.lora_magnitude_vector:
                    slot.copy_(self._row_norms(name))
                else:
                    slot.zero_()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for name, scaling in self.scaling.items():
            if isinstance(scaling, Tensor):  # moved with the layer, and never cast
                self.scaling[name] = scaling.to(fn(scaling).device)
        return self

    def _own_scaling(self, name: str) -> float:
        r = max(1, self.r[name])  # of 0 ranks (hot-swapped) any scaling is right
        return self.lora_alpha[name] / (math.sqrt(r) if self.use_rslora[name] else r)

    def merged_weight(self, dequantize: bool | torch.dtype = False) -> Merged:
        """The base weight with the acting adapters in it; nothing is changed.

        Raises:
            NotImplementedError: the base's weight is not fastlora's to write.
        """
        raise NotImplementedError(
            f"a {type(self).__name__} leaves its base as it is: merging is for layers whose weight is fastlora's. "
            "Save the adapter and merge it with stock peft"
        )

    def acting_adapters(self) -> list[str]:
        """The adapters that forward adds to the base: none while they are off or merged."""
        if not self.adapters_enabled or self.merged_adapters or self.mixed is not None:
            return []
        # Not of the ranks: hot-swapping writes those, which a compiled model must not look at.
        return [name for name in self.active_adapters if name in self.lora_A]

    def _add_updates(self, y: Tensor, x: Tensor, names: list[str]) -> Tensor:
        """y + the updates of ``names``, in plain torch, each in its adapter's dtype."""
        dtype = y.dtype
        for name in names:
            a, b = self.lora_A[name], self.lora_B[name]
            bias = self.lora_bias.get(name)
            dropped = F.dropout(x.to(a.dtype), self.lora_dropout[name], self.training)
            update = F.linear(F.linear(dropped, a), b, bias) * self.scaling[name]
            if name not in self.lora_magnitude_vector:
                y = y + update
                continue
            rest: Tensor | None
            if self.training and self.lora_dropout[name] > 0:
                # PEFT's formula: dropout acts on the base's share of the scaled part as well.
                base = self._base(dropped.to(x.dtype), None)
                y, rest = base, y - base
            else:
                rest = self._base_bias()
                y = y if rest is None else y - rest
            magnitude = self.lora_magnitude_vector[name]
            y = scale_columns(y + update, magnitude, self._row_norms(name), rest)
        return y.to(dtype)

    def _is_mixed(self) -> bool:
        """Whether items of this batch have adapters of their own here."""
        batch = self.mixed
        if batch is None or not self.adapters_enabled:
            return False
        return any(name in self.lora_A for name in batch.adapters)

    def extra_repr(self) -> str:
        parts = [f"in_features={self.in_features}", f"out_features={self.out_features}"]
        for name, r in self.r.items():
            state = "" if name in self.acting_adapters() else ", inactive"
            state = ", merged" if name in self.merged_adapters else state
            scaling, dropout = self.scaling[name], self.lora_dropout[name]
            kind = ", DoRA" if name in self.lora_magnitude_vector else ""
            kind += ", lora_bias" if name in self.lora_bias else ""
            parts.append(
                f"{name}(r={r}, scaling={float(scaling):g}, dropout={dropout:g}{kind}{state})"
            )
        return ", ".join(parts)
