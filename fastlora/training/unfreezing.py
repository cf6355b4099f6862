"""Progressive unfreezing (ULMFiT, arXiv 1801.06146): adapters begin to train layer by layer, from the output down."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

_LAYER = re.compile(r"(.*?\.)(\d+)\.")


class Unfreezing:
    """Which of a model's trainable parameters train at a point of the run.

    Of L layers the last trains from the start, and one more joins every ``share`` / L of the run, so that all train once
    ``share`` of it is over; what stands before the first layer (embeddings) joins then, what stands after the last (the output
    layer) trains from the start. 0: everything trains at once.

    Args:
        parameters: name -> parameter, in the model's order; a layer's number is the first in its name, behind the prefix that most
            numbers follow (a head may be numbered inside as well).
        share: in [0, 1].
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], share: float) -> None:
        found = {name: _LAYER.match(name) for name in parameters}
        numbers: dict[str, set[int]] = {}
        for named in filter(None, found.values()):
            numbers.setdefault(named[1], set()).add(int(named[2]))
        prefix = max(numbers, key=lambda prefix: len(numbers[prefix]), default="")
        layers = sorted(numbers.get(prefix, ()))
        rank = {layer: i for i, layer in enumerate(layers)}
        self._starts: list[tuple[float, nn.Parameter]] = []
        before = True  # the first layer
        for name, parameter in parameters.items():
            match = found[name]
            match = match if match is not None and match[1] == prefix else None
            before = before and match is None
            if match is not None:
                start = share * (len(layers) - 1 - rank[int(match[2])]) / len(layers)
            else:
                start = share if before and layers else 0.0
            self._starts.append((start, parameter))

    def at(self, progress: float) -> None:
        """Let those parameters train, and only those, whose time has come at ``progress`` in [0, 1]."""
        for start, parameter in self._starts:
            if (progress >= start) != parameter.requires_grad:
                parameter.requires_grad_(progress >= start)
