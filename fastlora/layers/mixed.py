"""Mixed batches: each item of a batch uses an adapter of its own, or none, in inference and in training.

Items are sorted by adapter, so that the rows of each are contiguous, and one grouped product does them all
(``fastlora.lora_linear_segments``); the result is sorted back. A batch that is sorted already is left as it lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import lora_linear_segments
from ..quant import NF4Tensor

if TYPE_CHECKING:
    from .base import LoRALayer

BASE = "__base__"  # PEFT's name for no adapter


class MixedBatch:
    """Which adapter each item of a batch uses.

    Args:
        names: one adapter's name an item, or ``BASE``.
        repeats: rows of a batch for each item, next to one another: beams of a search.
    """

    def __init__(self, names: Sequence[str], repeats: int = 1) -> None:
        self.names = [name for name in names for _ in range(repeats)]
        self._single = MixedBatch(names) if repeats > 1 else self
        self.adapters = [name for name in dict.fromkeys(self.names) if name != BASE]
        place = {name: i for i, name in enumerate([*self.adapters, BASE])}
        self._order = sorted(range(len(self.names)), key=lambda i: place[self.names[i]])
        self._counts = [self.names.count(name) for name in self.adapters]
        # Made once for all layers: a layer's own would wait for the device each time.
        self._kept: dict[tuple[torch.device, int], Tensor] = {}

    def of(self, x: Tensor) -> MixedBatch:
        """The batch that ``x`` is one of: this one, or the one before its items were repeated (an encoder's).

        Raises:
            ValueError: the first dimension of ``x`` is neither's.
        """
        for batch in (self, self._single):
            if x.ndim > 0 and x.shape[0] == len(batch.names):
                return batch
        raise ValueError(
            f"adapter_names: names {len(self.names)} items, and an input has shape {tuple(x.shape)}; accepted are modules whose "
            "input has the batch first"
        )

    def sort(self, x: Tensor) -> Tensor:
        """The items of ``x`` by adapter, those without one last."""
        return x if self._is_sorted else x.index_select(0, self._index(x.device, -1))

    def unsort(self, y: Tensor) -> Tensor:
        """The inverse of ``sort``."""
        return y if self._is_sorted else y.index_select(0, self._index(y.device, -2))

    def offsets(self, x: Tensor) -> Tensor:
        """Where each adapter's rows begin and end, of ``x`` [items, ..., K] after ``sort``: int64 [adapters + 1]."""
        return self._index(x.device, x[0].numel() // x.shape[-1] if x.shape[-1] else 0)

    def items(self, name: str, device: torch.device) -> Tensor:
        """The items that use an adapter."""
        found = [i for i, other in enumerate(self.names) if other == name]
        return torch.tensor(found, device=device)

    @property
    def _is_sorted(self) -> bool:
        return self._order == list(range(len(self._order)))

    def _index(self, device: torch.device, what: int) -> Tensor:
        """The order (-1), its inverse (-2), or the offsets of items of ``what`` rows."""
        kept = self._kept.get((device, what))
        if kept is None:
            values = self._order
            if what == -2:
                values = sorted(range(len(self._order)), key=self._order.__getitem__)
            elif what >= 0:
                values = [what * sum(self._counts[:e]) for e in range(len(self._counts) + 1)]
            kept = self._kept[device, what] = torch.tensor(values, device=device)
        return kept


def mixed_linear(
    layer: LoRALayer,
    batch: MixedBatch,
    x: Tensor,
    weight: Tensor | NF4Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """x W^T + bias [items, ..., N] with each item's own update; ``weight`` None: the updates alone.

    Raises:
        ValueError: the first dimension of ``x`` is not the batch's.
    """
    batch = batch.of(x)
    rank = max(layer.lora_A[name].shape[0] for name in batch.adapters if name in layer.lora_A)
    factors = [_padded(layer, name, rank) for name in batch.adapters]
    a, b = (torch.stack(parts) for parts in zip(*factors, strict=True))
    if not (a.dtype in (torch.float32, x.dtype) or torch.is_autocast_enabled(x.device.type)):
        a, b = a.to(x.dtype), b.to(x.dtype)
    drop = max(layer.lora_dropout[name] for name in batch.adapters if name in layer.lora_A)
    ordered = batch.sort(x)
    y = lora_linear_segments(
        ordered, weight, a, b, batch.offsets(x), 1.0, bias, drop, layer.training
    )
    return batch.unsort(y)


def _padded(layer: LoRALayer, name: str, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, K] and s B [N, rank] of an adapter, zeros where it has no rank, or is not at this layer."""
    if name not in layer.lora_A:
        like = next(iter(layer.lora_A.values()))
        return like.new_zeros(rank, layer.in_features), like.new_zeros(layer.out_features, rank)
    a, b = layer.lora_A[name], layer.lora_B[name] * layer.scaling[name]
    more = rank - a.shape[0]
    return (F.pad(a, (0, 0, 0, more)), F.pad(b, (0, more))) if more else (a, b)
