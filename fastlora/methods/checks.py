"""What configurations check of their fields: errors name the field, what was given and what is accepted."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ..ops.support import MAX_RANK


def check_rank(name: str, value: Any) -> None:
    """ValueError unless ``value`` is a rank."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise ValueError(f"{name}: got {value!r}; accepted are integers from 1 to {MAX_RANK}")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """ValueError unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: got {value!r}; accepted are integers from {least} on")


def check_indices(name: str, value: Any) -> list[int]:
    """``value`` as a list of different integers from 0 on; TypeError or ValueError unless it is one."""
    if isinstance(value, (str, Mapping)) or not hasattr(value, "__iter__"):
        raise TypeError(f"{name}: got {value!r}; accepted is a list of indices")
    indices = list(value)
    if any(isinstance(index, bool) or not isinstance(index, int) for index in indices):
        raise TypeError(f"{name}: got {indices[:8]!r}; accepted are integers")
    if not indices or min(indices) < 0 or len(set(indices)) != len(indices):
        raise ValueError(f"{name}: got {indices[:8]!r}; accepted are different indices from 0 on")
    return indices


def check_finite(name: str, value: Any) -> None:
    """ValueError unless ``value`` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}: got {value!r}; accepted are finite numbers")


def check_probability(name: str, value: Any) -> None:
    """ValueError unless ``value`` is a probability below 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: got {value!r}; accepted are probabilities in [0, 1)")


def check_flag(name: str, value: Any) -> None:
    """TypeError unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}; accepted are True and False")


def check_choice(name: str, value: Any, accepted: tuple[Any, ...]) -> None:
    """ValueError unless ``value`` is one of ``accepted``."""
    if value not in accepted:
        *most, last = map(repr, accepted)
        raise ValueError(f"{name}: got {value!r}; accepted are {', '.join(most)} and {last}")


def check_regex(name: str, pattern: Any) -> None:
    """TypeError or ValueError unless ``pattern`` is a regular expression."""
    if not isinstance(pattern, str):
        raise TypeError(f"{name}: got {pattern!r}; accepted are strings")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{name}: {pattern!r} is no regular expression ({error})") from None


def module_names(name: str, value: Any) -> list[str]:
    """A list of module names in the order given (a set: sorted); TypeError for anything else."""
    if isinstance(value, (str, Mapping)) or not hasattr(value, "__iter__"):
        raise TypeError(f"{name}: got {value!r}; accepted is a list of module names")
    names = sorted(value, key=str) if isinstance(value, (set, frozenset)) else list(value)
    if any(not isinstance(item, str) or not item for item in names):
        raise TypeError(f"{name}: got {names!r}; accepted are non-empty module names")
    return list(dict.fromkeys(names))
