"""``BottleneckConfig``: the adapters library's fields, checked when constructed, and its presets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from .. import __version__
from ..activations import ACTIVATIONS
from ..layers.bottleneck import BottleneckSettings
from . import adapters_layout
from .base import PeftConfig, TargetedConfig
from .checks import check_choice, check_finite, check_flag, check_probability

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(kw_only=True)
class BottleneckConfig(TargetedConfig):
    """Small feed-forward networks behind or beside the sublayers of a transformer (arXiv 1902.00751, 2005.00247,
    2110.04366). Field names, defaults and meaning are those of ``adapters.BnConfig``; ``layers/bottleneck.py`` has the
    formulas. ``HoulsbyConfig``, ``PfeifferConfig`` and ``ParallelConfig`` are its presets.

    Args:
        mh_adapter, output_adapter: behind (or beside) the attention, and the feed-forward sublayer, of every layer.
        reduction_factor: the model's width over the bottleneck's; or a dict from layer index to that, and "default".
        non_linearity: the activation between the two projections.
        original_ln_before: the adapter reads the sum of the sublayer's output and its residual, where the model has a
            norm behind that sum (BERT) after it. Not with ``target_modules``.
        original_ln_after: the model's own sum (and norm) follows. False for models with a norm behind the sum alone.
        ln_before, ln_after: new norms before the bottleneck and after it.
        init_weights: "bert", "houlsby" or "mam_adapter", with which the model starts as it was.
        is_parallel: the adapter reads what the sublayer's output is added to, rather than that output.
        scaling: a number, "learned" (one) or "channel" (one per channel).
        use_gating: a learned gate per sequence.
        residual_before_ln: what the update is added to where ``original_ln_before``: True, the sublayer's output; False,
            what the adapter reads; "post_add", the sum before the norm.
        adapter_residual_before_ln: with ``ln_after``: the norm is over the sum rather than over the update.
        leave_out: indices of layers without adapters.
        dropout: probability in [0, 1), on the update.
        target_modules: modules to adapt instead, by name as in ``LoraConfig``: sequential adapters at their output,
            parallel ones from their input to their output. ``mh_adapter``, ``output_adapter`` do not count then.
        exclude_modules, modules_to_save: see ``TargetedConfig``.

    Every other field of ``adapters.BnConfig`` is refused by name.

    Raises:
        TypeError: a field has the wrong type, is missing or not known.
        ValueError: a value is out of range.
        NotImplementedError: a feature of the adapters library that fastlora does not have.
    """

    peft_type: ClassVar[str] = "BOTTLENECK"
    prefix: ClassVar[str] = "bottlenecks."
    weights_name: ClassVar[str] = adapters_layout.WEIGHTS_NAME
    # Of the library's fields: they say nothing while phm_layer and inv_adapter are off.
    ignored: ClassVar[tuple[str, ...]] = (
        *PeftConfig.ignored,
        "phm_dim",
        "factorized_phm_W",
        "shared_W_phm",
        "shared_phm_rule",
        "factorized_phm_rule",
        "phm_c_init",
        "phm_init_range",
        "learn_phm",
        "hypercomplex_nonlinearity",
        "phm_rank",
        "phm_bias",
        "inv_adapter_reduction_factor",
        "init_weights_seed",
    )
    unsupported: ClassVar[Mapping[str, Any]] = {
        "phm_layer": False,
        "inv_adapter": None,
        "invertible_adapter": None,
        "cross_adapter": False,
        "stochastic_depth": 0.0,
    }
    meaning: ClassVar[tuple[str, ...]] = (
        "non_linearity",
        "scaling",
        "is_parallel",
        "original_ln_before",
        "original_ln_after",
        "residual_before_ln",
        "adapter_residual_before_ln",
    )

    mh_adapter: bool
    output_adapter: bool
    reduction_factor: float | Mapping[str, float]
    non_linearity: str
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
    leave_out: list[int] = field(default_factory=list)
    dropout: float = 0.0
    phm_layer: bool = False
    inv_adapter: str | None = None
    invertible_adapter: Any = None
    cross_adapter: bool = False
    stochastic_depth: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "mh_adapter",
            "output_adapter",
            "original_ln_before",
            "original_ln_after",
            "ln_before",
            "ln_after",
            "is_parallel",
            "use_gating",
            "adapter_residual_before_ln",
        ):
            check_flag(name, getattr(self, name))
        if not isinstance(self.non_linearity, str):
            raise TypeError(f"non_linearity: got {self.non_linearity!r}; accepted is a name")
        self.non_linearity = self.non_linearity.lower()
        check_choice("non_linearity", self.non_linearity, tuple(ACTIVATIONS))
        check_choice("init_weights", self.init_weights, ("bert", "mam_adapter", "houlsby"))
        check_choice("residual_before_ln", self.residual_before_ln, (True, False, "post_add"))
        if isinstance(self.scaling, str):
            check_choice("scaling", self.scaling, ("learned", "channel"))
        else:
            check_finite("scaling", self.scaling)
            self.scaling = float(self.scaling)  # the library takes no integer
        check_probability("dropout", self.dropout)
        self._check_factors()
        self.leave_out = list(self.leave_out or [])
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in self.leave_out):
            raise ValueError(f"leave_out: got {self.leave_out!r}; accepted are indices >= 0")
        if self.target_modules is not None:
            self._check_targets()

    def _check_factors(self) -> None:
        factors = self.reduction_factor
        if isinstance(factors, Mapping):
            factors = self.reduction_factor = {str(key): value for key, value in factors.items()}
            wrong = [key for key in factors if key != "default" and not key.isdecimal()]
            if wrong or not factors:
                raise ValueError(
                    f"reduction_factor: got the keys {list(factors)}; accepted are layer indices and 'default'"
                )
        for value in factors.values() if isinstance(factors, Mapping) else [factors]:
            check_finite("reduction_factor", value)
            if value <= 0:
                raise ValueError(f"reduction_factor: got {value!r}; accepted are positive numbers")

    def _check_targets(self) -> None:
        for name, bad, why in (
            (
                "original_ln_before",
                self.original_ln_before and not self.is_parallel,
                "a module does not tell what its output is added to",
            ),
            (
                "original_ln_after",
                not self.original_ln_after,
                "a module does not tell what follows",
            ),
            ("leave_out", bool(self.leave_out), "exclude_modules keeps adapters off modules"),
            (
                "reduction_factor",
                isinstance(self.reduction_factor, Mapping),
                "modules have no index",
            ),
        ):
            if bad:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r} beside target_modules, where it means nothing: {why}"
                )

    def _refuse_unsupported(self) -> None:
        for name, accepted in self.unsupported.items():
            value = getattr(self, name)
            if value != accepted and value is not None:
                raise NotImplementedError(
                    f"{name}: got {value!r}; fastlora does not have it, accepted is {accepted!r}. Use the adapters library"
                )

    def width(self, features: int, index: int | None) -> int:
        """Of the bottleneck in the layer ``index``.

        Raises:
            ValueError: ``reduction_factor`` has neither the layer nor "default".
        """
        factor = self.reduction_factor
        if isinstance(factor, Mapping):
            if str(index) not in factor and "default" not in factor:
                raise ValueError(
                    f"reduction_factor: has neither layer {index} nor 'default'; got {dict(factor)}"
                )
            factor = factor.get(str(index), factor.get("default", 1.0))
        return max(1, int(features // factor))

    def settings(self) -> BottleneckSettings:
        """What an adapter is told."""
        names = [f.name for f in dataclasses.fields(BottleneckSettings)]
        return BottleneckSettings(**{name: getattr(self, name) for name in names})

    # Files.

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From flat fields, or from the adapters library's ``adapter_config.json``."""
        if adapters_layout.is_layout(values):
            values = {**adapters_layout.flat(values), "peft_type": cls.peft_type}
        return super().from_dict(values)

    def to_json(self, **changes: Any) -> str:
        """``adapter_config.json`` in the adapters library's layout."""
        values = self.to_dict()
        del values["peft_type"]
        own = [f.name for f in dataclasses.fields(TargetedConfig)]
        text = {"version": f"fastlora.{__version__}", **adapters_layout.nested(values, own)}
        return json.dumps({**text, **changes}, indent=2, sort_keys=True)

    def file_fields(self, model: nn.Module, adapter_name: str) -> dict[str, Any]:
        about = getattr(model, "config", None)
        return {
            "name": adapter_name,
            "model_class": type(model).__name__,
            "model_name": getattr(model, "name_or_path", None) or None,
            "model_type": getattr(about, "model_type", None),
            "hidden_size": getattr(about, "hidden_size", None),
        }

    def own_keys(
        self, tensors: Mapping[str, Any], known: set[str], model: nn.Module, adapter_name: str
    ) -> dict[str, Any]:
        prefix = getattr(model, "base_model_prefix", "")
        return adapters_layout.own_keys(tensors, known, adapter_name, prefix)


def HoulsbyConfig(**changes: Any) -> BottleneckConfig:
    """Behind both sublayers, with swish (arXiv 1902.00751): "double_seq_bn" of the adapters library."""
    preset: dict[str, Any] = {"mh_adapter": True, "output_adapter": True, "reduction_factor": 16}
    return BottleneckConfig(**{**preset, "non_linearity": "swish", **changes})


def PfeifferConfig(**changes: Any) -> BottleneckConfig:
    """Behind the feed-forward sublayer, reading the sum with its residual (arXiv 2005.00247): "seq_bn". With
    ``target_modules`` it reads the module's output."""
    preset: dict[str, Any] = {"mh_adapter": False, "output_adapter": True, "reduction_factor": 16}
    before = changes.get("target_modules") is None
    preset |= {"non_linearity": "relu", "original_ln_before": before}
    return BottleneckConfig(**{**preset, **changes})


def ParallelConfig(**changes: Any) -> BottleneckConfig:
    """Beside the feed-forward sublayer, times four (arXiv 2110.04366): "par_bn"."""
    preset: dict[str, Any] = {"mh_adapter": False, "output_adapter": True, "reduction_factor": 2}
    preset |= {"non_linearity": "relu", "init_weights": "mam_adapter", "is_parallel": True}
    return BottleneckConfig(**{**preset, "scaling": 4.0, **changes})
