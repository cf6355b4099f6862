"""``TrainableTokens``: an embedding or output layer of which chosen rows are trained (``trainable_token_indices``)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quant import NF4Tensor
from .adapter import AdapterTensor, check_adapter_name
from .base import adapter_dtype_for
from .embedding import embedding_problem, scaled
from .merging import MergeableLayer, as_parameter
from .plain import is_plain_linear
from .standin import StandIn


def tokens_problem(module: nn.Module) -> str | None:
    """Why rows of ``module`` cannot be trained alone, or None."""
    if isinstance(module, nn.Embedding):
        return embedding_problem(module)
    if is_plain_linear(module):
        return None
    return f"a {type(module).__name__} is neither an nn.Embedding nor a plain nn.Linear"


class TrainableTokens(StandIn, MergeableLayer):
    """A module over a weight [V, D] and, per adapter, a trained copy of some of the rows, which act in their place.

    The module is an nn.Embedding or an nn.Linear, kept as ``original_module`` and frozen. Nothing of size [V, D] is made:
    the module computes as ever, and what it gave for the trained rows is replaced. Parameters:
    ``trainable_tokens_delta.<name>`` [len(token_indices[name]), D], which PEFT calls a delta though it holds whole rows.

    Args:
        module: see ``tokens_problem``.
        adapter_name, token_indices, adapter_dtype: the first adapter; see ``add_adapter``.

    Raises:
        TypeError: ``module`` is of another kind, or computes something else.
        ValueError: as ``add_adapter``.
    """

    stands_for: ClassVar[str] = "original_module"
    by_adapter: ClassVar[tuple[str, ...]] = ("token_indices", "trainable_tokens_delta", "_sorted")

    def __init__(
        self,
        module: nn.Module,
        token_indices: list[int],
        adapter_name: str = "default",
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if problem := tokens_problem(module):
            raise TypeError(f"module: {problem}")
        self.original_module = module
        self.trainable_tokens_delta = nn.ParameterDict()
        self.token_indices: dict[str, list[int]] = {}
        self._sorted: dict[str, Tensor] = {}  # see _index; made at need
        self.tied: list[TiedTokens] = []
        self.add_adapter(adapter_name, token_indices, adapter_dtype)
        module.requires_grad_(False)  # last: an error above leaves the caller's as it was
        self.train(module.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The base's weight; while merged, with the trained rows in it."""
        weight: Tensor = self.original_module.weight  # type: ignore[assignment]
        return weight

    def add_adapter(
        self, name: str, token_indices: list[int], adapter_dtype: torch.dtype | None = None
    ) -> None:
        """Copies of the rows ``token_indices``, to be trained; they become active if they are the first.

        Args:
            name: its name; ``trainable_tokens_delta.<name>`` is its state_dict key.
            token_indices: the rows.
            adapter_dtype: of the copies; None: fp32 for a base in fp32 or below.

        Raises:
            ValueError: the name is taken, an index is out of range or there twice, or adapters are merged.
        """
        self.check_change("add_adapter")
        if check_adapter_name(name) in self.token_indices:
            raise ValueError(f"name: adapter {name!r} exists already; choose another name")
        self.check_rows(token_indices)
        dtype = adapter_dtype or adapter_dtype_for(self.weight.dtype)
        delta = self.weight.detach()[token_indices].to(dtype, copy=True)
        self.trainable_tokens_delta[name] = nn.Parameter(delta)
        self.token_indices[name] = list(token_indices)
        if not self.active_adapters:
            self.active_adapters = [name]

    def check_rows(self, token_indices: list[int]) -> None:
        """ValueError unless the weight has these rows."""
        rows = self.weight.shape[0]
        if any(not 0 <= index < rows for index in token_indices):
            raise ValueError(
                f"trainable_token_indices: got {token_indices[:8]}; accepted are rows of the weight, 0 to {rows - 1}"
            )

    def tie(self, module: nn.Module) -> TiedTokens:
        """What takes the place of another module over the same weight, so that the trained rows act there too."""
        made = TiedTokens(module, self)
        self.tied.append(made)
        return made

    def adapter_tensors(self, name: str) -> dict[str, AdapterTensor]:
        if name not in self.token_indices:
            return {}
        part = "trainable_tokens_delta"
        entry = AdapterTensor(f"{part}.{name}", self.trainable_tokens_delta[name])
        return {f"token_adapter.{part}": entry}

    def neutral_tensors(self, name: str) -> dict[str, Tensor]:
        rows = self.weight.detach()[self.token_indices[name]]
        return {"token_adapter.trainable_tokens_delta": rows}

    def check_active(self, names: list[str]) -> None:
        """ValueError if more than one of ``names`` trained rows here."""
        present = [name for name in names if name in self.token_indices]
        if len(present) > 1:
            raise ValueError(
                f"names: got {present}, which all trained rows of this weight (trainable_token_indices); accepted is one "
                "of them at a time"
            )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the module gives for x, as if the trained rows were in its weight."""
        return self._replaced(self.original_module, x, *args, **kwargs)

    def _replaced(self, module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = module(x, *args, **kwargs)
        for name in self.acting_adapters():
            rows = self.trainable_tokens_delta[name].to(self.weight.dtype)
            if isinstance(module, nn.Embedding):
                y = self._looked_up(module, y, x, rows, self._index(name, x.device))
            else:
                assert isinstance(module, nn.Linear)
                index = self._index(name, y.device)[1]
                bias = None if module.bias is None else module.bias[index]
                # In place: logits are large, and a linear's result is nobody else's.
                y.index_copy_(-1, index, F.linear(x, rows, bias).to(y.dtype))
        return y

    @staticmethod
    def _looked_up(
        module: nn.Embedding, y: Tensor, ids: Tensor, rows: Tensor, index: Tensor
    ) -> Tensor:
        """y [..., D] = module(ids), with ``rows`` where an id is theirs. ``index``: see ``_index``."""
        known, indices, order = index
        at = torch.searchsorted(known, ids).clamp_(max=len(known) - 1)
        hit = known[at] == ids
        # Ids that are not trained look up one more row. A padding row has no gradient.
        slot = torch.where(hit, order[at], len(known))
        table = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        if module.padding_idx is not None:
            slots = (indices == module.padding_idx)[:, None]
            table = torch.cat([torch.where(slots, rows.detach(), rows), table[-1:]])
        own = F.embedding(slot, table, scale_grad_by_freq=module.scale_grad_by_freq)
        own = scaled(own, getattr(module, "embed_scale", None))
        return torch.where(hit[..., None], own.to(y.dtype), y)

    def _index(self, name: str, device: torch.device) -> Tensor:
        """[3, n] on ``device``: the indices sorted, as they were given, and where each of the sorted was given."""
        kept = self._sorted.get(name)
        if kept is None or kept.device != device:
            given = torch.tensor(self.token_indices[name])
            known, order = torch.sort(given)
            kept = self._sorted[name] = torch.stack([known, given, order]).to(device)
        return kept

    # Merging.

    def _with_updates(self, base: Tensor) -> Tensor:
        exact = base.clone()
        for name in self.acting_adapters():
            exact[self.token_indices[name]] = self.trainable_tokens_delta[name].to(exact.dtype)
        return exact

    def weight_holders(self) -> list[nn.Module]:
        return [self.original_module, *(tied.original_module for tied in self.tied)]

    def _hold_weight(self, weight: Tensor | NF4Tensor) -> None:
        assert isinstance(weight, Tensor)
        weight = as_parameter(weight)
        for module in self.weight_holders():
            module.weight = weight

    def as_base(self, weight: Tensor | NF4Tensor) -> nn.Module:
        """The module, with ``weight`` in it; those tied to it get that as well."""
        self._hold_weight(weight)
        return self.original_module


class TiedTokens(StandIn):
    """A module over the weight of a ``TrainableTokens``: the rows trained there act here as well.

    It has nothing of its own to save, and whatever is done to adapters is done there.
    """

    stands_for: ClassVar[str] = "original_module"

    def __init__(self, module: nn.Module, source: TrainableTokens) -> None:
        super().__init__()
        if problem := tokens_problem(module):
            raise TypeError(f"module: {problem}")
        self.original_module = module
        self._source = (source,)  # in a tuple, so that it is no submodule
        self.train(module.training)

    @property
    def adapters(self) -> list[str]:
        return self._source[0].adapters

    def adapter_tensors(self, name: str) -> dict[str, AdapterTensor]:
        return {}

    def acting_adapters(self) -> list[str]:
        return self._source[0].acting_adapters()

    def rename_adapter(self, old: str, new: str) -> None:
        """Nothing: it is renamed where it is."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the module gives for x, as if the trained rows were in its weight."""
        return self._source[0]._replaced(self.original_module, x, *args, **kwargs)
