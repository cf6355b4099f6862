"""Settings of initialisations that have some: ``EvaConfig`` and ``LoftQConfig``, with PEFT's field names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from .checks import check_count, check_finite, check_flag

_Settings = TypeVar("_Settings")


@dataclass
class EvaConfig:
    """``init_lora_weights="eva"`` (arXiv 2410.07170): A from the principal components of what the layer is given.

    Args:
        rho: a layer may get up to ``rho`` times its rank; 1 keeps every rank as it is.
        tau: cosine similarity from which on a component counts as converged.
        use_label_mask, label_mask_value: leave out tokens whose label is ``label_mask_value``.
        whiten: divide components by the root of their singular value.
        adjust_scaling_factors: where a rank changes, ``lora_alpha`` changes with it, so that the scaling stays.

    Raises:
        TypeError, ValueError: a field has the wrong type or is out of range.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        check_finite("rho", self.rho)
        check_finite("tau", self.tau)
        if self.rho < 1:
            raise ValueError(f"rho: got {self.rho!r}; accepted are numbers from 1 on")
        if not 0 <= self.tau <= 1:
            raise ValueError(f"tau: got {self.tau!r}; accepted are numbers from 0 to 1")
        for name in ("use_label_mask", "whiten", "adjust_scaling_factors"):
            check_flag(name, getattr(self, name))


@dataclass
class LoftQConfig:
    """``init_lora_weights="loftq"`` (arXiv 2310.08659).

    Args:
        loftq_bits: 4.
        loftq_iter: how often quantising and decomposing take turns. From the second on the quantised base is no longer
            that of the weight alone: it must be kept with the adapter.

    Raises:
        ValueError: a field is out of range.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        if self.loftq_bits != 4:
            raise ValueError(f"loftq_bits: got {self.loftq_bits!r}; accepted is 4, NF4")
        check_count("loftq_iter", self.loftq_iter)


def settings(name: str, value: Any, kind: type[_Settings]) -> _Settings:
    """``value`` as a ``kind``: one already, a dict of its fields, or PEFT's object of that name.

    Raises:
        TypeError: it is none of these, or has other fields; ValueError: as ``kind``.
    """
    if isinstance(value, kind):
        return value
    fields = value if isinstance(value, Mapping) else getattr(value, "__dict__", None)
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if fields is None or isinstance(value, type) or not set(fields) <= known:
        raise TypeError(
            f"{name}: got {value!r}; accepted is a fastlora.{kind.__name__}, or a dict of {', '.join(sorted(known))}"
        )
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
