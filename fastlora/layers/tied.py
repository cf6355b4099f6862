"""``TiedLoRALinear``: an output layer over the weight of the input embeddings, with their adapters (``ensure_weight_tying``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .adapter import AdapterTensor
from .base import LoRALayer
from .embedding import LoRAEmbedding
from .linear import LoRALinear


class _Transposed(Mapping[str, Tensor]):
    """Parameters by adapter, each seen transposed."""

    def __init__(self, parameters: nn.ParameterDict) -> None:
        self._parameters = parameters

    def __getitem__(self, name: str) -> Tensor:
        return self._parameters[name].t()

    def __contains__(self, name: Any) -> bool:
        return name in self._parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


class TiedLoRALinear(LoRALinear):
    """``LoRALinear`` over the weight [V, D] of a ``LoRAEmbedding``, whose factors are the embedding's: one update for both.

    The embedding's A [r, V] and B [D, r] are Parameters of this layer too, under the same names; as the factors of a map from
    D to V they are its B^T and A^T, and their gradients are the sums of both uses. Scaling, dropout and magnitudes are the
    layer's own.

    Args:
        linear: the output layer.
        embedding: the embedding, with the adapter in it.
        adapter_name, and the rest: as ``LoRALayer.add_adapter``; the embedding's factors begin as the layer's own would.

    Raises:
        ValueError: an argument is out of range, or the rank is not the embedding's.
    """

    factor_names: ClassVar[tuple[str, str]] = ("lora_embedding_B", "lora_embedding_A")
    by_adapter: ClassVar[tuple[str, ...]] = (
        "r",
        *factor_names,
        *(part for part in LoRALayer.by_adapter if part not in ("r", "lora_A", "lora_B")),
    )
    lora_embedding_A: nn.ParameterDict
    lora_embedding_B: nn.ParameterDict

    def __init__(
        self,
        linear: nn.Linear,
        embedding: LoRAEmbedding,
        adapter_name: str = "default",
        **settings: Any,
    ) -> None:
        LoRALayer.__init__(self, linear.in_features, linear.out_features)
        self._source = (embedding,)  # in a tuple, so that it is no submodule
        embedding.tied.append(self)
        self._share(linear)
        self.add_adapter(adapter_name, **settings)
        self._freeze_base()
        self.train(linear.training)

    @property
    def lora_A(self) -> _Transposed:  # type: ignore[override]
        return _Transposed(self.lora_embedding_B)

    @property
    def lora_B(self) -> _Transposed:  # type: ignore[override]
        return _Transposed(self.lora_embedding_A)

    def add_adapter(self, name: str = "default", r: int = 16, *args: Any, **settings: Any) -> None:
        """As ``LoRALayer.add_adapter``, of an adapter that the embedding has.

        Raises:
            ValueError: also where the rank is not the embedding's.
        """
        rank = self._source[0].r.get(name)
        if rank != r:
            raise ValueError(
                f"r: got {r} for a layer that is tied to embeddings whose adapter {name!r} has rank {rank} "
                "(ensure_weight_tying); accepted is the same"
            )
        super().add_adapter(name, r, *args, **settings)

    def _hold_factors(self, name: str, a: Tensor, b: Tensor) -> None:
        self._share_factors(name)
        with torch.no_grad():
            self.lora_A[name].copy_(a)
            self.lora_B[name].copy_(b)

    def _share_factors(self, name: str) -> None:
        for part in self.factor_names:
            getattr(self, part)[name] = getattr(self._source[0], part)[name]

    def widen_slot(self, name: str, rank: int) -> None:
        """As ``LoRALayer.widen_slot``, of the embedding and this layer."""
        source = self._source[0]
        if source.slot_rank(name) != rank:
            source.widen_slot(name, rank)  # which calls this again
            return
        self._share_factors(name)
        self._scale_on_device(name)

    def adapter_tensors(self, name: str) -> dict[str, AdapterTensor]:
        entries = super().adapter_tensors(name)
        for key, part in zip(("lora_A.weight", "lora_B.weight"), self.factor_names, strict=True):
            if key in entries:
                entries[key] = entries[key]._replace(key=f"{part}.{name}", transposed=True)
        return entries

    def weight_holders(self) -> list[nn.Module]:
        return self._source[0].weight_holders()
