"""The adapters library's folder (``adapter_config.json``, ``adapter.safetensors``): all that is known of its layout.

    adapter_config.json   {"config": {BnConfig's fields}, "name", "model_type", "model_class", "model_name", "hidden_size",
                          "version"}, and for what BnConfig has no field: {"fastlora": {...}}, which the library ignores
    adapter.safetensors   <place>.adapters.<name>.adapter_down.0.weight [r, K], .adapter_down.0.bias, .adapter_up.weight
                          [N, r], .adapter_up.bias; with ln_before the norm is adapter_down.0 (and adapter_norm_before)
                          and the linear adapter_down.1; adapter_norm_after, gate, scaling where there are such

<place> is the name of a module in the library's model, with or without the prefix of the model below a head: see
``models/bottleneck_places.py``. ``pytorch_adapter.bin``, a pickle, is never read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

Value = TypeVar("Value")

WEIGHTS_NAME = "adapter.safetensors"
PICKLE_NAME = "pytorch_adapter.bin"
_OWN = "fastlora"
# Files from before they had a version call activations otherwise.
_OLD_NAMES = {"gelu": "gelu_new", "gelu_orig": "gelu"}
_NAME = re.compile(r"\.adapters\.([^.]+)\.")


def is_layout(values: Mapping[str, Any]) -> bool:
    """Whether a parsed ``adapter_config.json`` is the library's rather than PEFT's."""
    return isinstance(values.get("config"), Mapping) and "peft_type" not in values


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a parsed ``adapter_config.json``.

    Raises:
        ValueError: it describes another kind of adapter.
    """
    config = dict(values["config"])
    kind = config.pop("architecture", None)
    if kind is not None:
        raise ValueError(
            f"architecture: got {kind!r}; of the adapters library's files fastlora reads bottleneck adapters"
        )
    if "version" not in values:
        name = str(config.get("non_linearity"))
        config["non_linearity"] = _OLD_NAMES.get(name, name)
    own = values.get(_OWN)
    return {**config, **(own if isinstance(own, Mapping) else {})}


def nested(values: Mapping[str, Any], own: Iterable[str]) -> dict[str, Any]:
    """``flat``'s inverse: ``own`` are the fields that the library does not have."""
    own = set(own)
    return {
        "config": {key: value for key, value in values.items() if key not in own},
        _OWN: {key: value for key, value in values.items() if key in own},
    }


def own_keys(
    tensors: Mapping[str, Value], known: Iterable[str], adapter_name: str, prefix: str
) -> dict[str, Value]:
    """A file's tensors by our keys: another adapter name, the model's ``prefix`` there or not."""
    known = set(known)
    found = {}
    for key, value in tensors.items():
        own = _NAME.sub(f".adapters.{adapter_name}.", key)
        if own not in known and prefix:
            start = f"{prefix}."
            other = own.removeprefix(start) if own.startswith(start) else start + own
            own = other if other in known else own
        found[own] = value
    return found
