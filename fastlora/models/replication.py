"""``layer_replication``: a model deepened by layers that occur again, with the weights that they have and adapters of their own."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

# Where PEFT looks for the layers, inside ".model" of ".model" and so on, and inside ".bert".
_PLACES = ("layers", "encoder.layer", "h")


def find_layers(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds a model's layers, and under which name.

    Raises:
        ValueError: there are none where PEFT looks for them.
    """
    inner: Any = model
    while isinstance(getattr(inner, "model", None), nn.Module):
        inner = inner.model
    inner = getattr(inner, "bert", inner)
    for place in _PLACES:
        path, _, name = place.rpartition(".")
        try:
            owner = inner.get_submodule(path)
            if isinstance(owner.get_submodule(name), nn.ModuleList):
                return owner, name
        except AttributeError:
            continue
    raise ValueError(
        f"layer_replication: found no layers in this {type(model).__name__}; accepted are models that have them in one of "
        f"{', '.join(_PLACES)}, as Llama and BERT do"
    )


def replicated(model: nn.Module, layer_replication: list[list[int]]) -> list[tuple[Any, str, Any]]:
    """(object, attribute, value) of everything to set in ``model``; nothing is changed.

    Args:
        layer_replication: [start, end] of runs of layers, one after another: [[0, 4], [2, 5]] is 0 1 2 3 2 3 4.

    Raises:
        ValueError: a run beyond the layers; as ``find_layers``.
    """
    owner, name = find_layers(model)
    layers: Any = owner.get_submodule(name)
    if max(end for _, end in layer_replication) > len(layers):
        raise ValueError(
            f"layer_replication: got {layer_replication} for a model with {len(layers)} layers; accepted are ends up to that"
        )
    order = [i for start, end in layer_replication for i in range(start, end)]
    config: Any = getattr(model, "config", None)
    # What copies share with the originals.
    shared = {id(shared): shared for shared in (*layers.parameters(), config)}
    made = nn.ModuleList(copy.deepcopy(layers[i], dict(shared)) for i in order)
    made.train(layers.training)
    made.layer_replication = layer_replication  # type: ignore[assignment]
    for index, layer in enumerate(made):
        parts: Any = layer.modules()
        for part in parts:
            if hasattr(part, "layer_idx"):
                part.layer_idx = index  # where it keeps its keys and values
    changes: list[tuple[Any, str, Any]] = [(owner, name, made)]
    if hasattr(config, "num_hidden_layers"):
        changes.append((config, "num_hidden_layers", len(order)))
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list) and len(kinds) == len(layers):
        changes.append((config, "layer_types", [kinds[i] for i in order]))
    return changes


def check_replication(model: nn.Module, layer_replication: list[list[int]] | None) -> None:
    """ValueError unless a model with adapters is replicated as another adapter says."""
    try:
        owner, name = find_layers(model)
        found = getattr(owner.get_submodule(name), "layer_replication", None)
    except ValueError:
        found = None
    if found != layer_replication:
        raise ValueError(
            f"layer_replication: got {layer_replication} for another adapter of a base with {found}; accepted is the same"
        )
