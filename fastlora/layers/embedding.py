"""``LoRAEmbedding``: a frozen nn.Embedding and its adapters."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autograd import scale_columns
from ..quant import NF4Tensor
from .base import LoRALayer
from .dora import BaseRows, rows_of
from .inits import Factors
from .merging import MergeableLayer, as_parameter
from .plain import FLOATS, bare

# A module keeps its hooks in these dicts. They go over to the layer as they are, so that a handle still removes its hook:
# enable_input_require_grads() hooks the embedding of a model before it has adapters.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def embedding_problem(module: nn.Module) -> str | None:
    """Why the rows of an embedding cannot be computed here; None: its forward looks them up, and scales them by
    ``embed_scale`` where it has one (as those of Gemma and BART do)."""
    if not isinstance(module, nn.Embedding):
        return f"a {type(module).__name__} is no nn.Embedding"
    weight = module.weight
    if weight.dtype not in FLOATS or weight.shape != (module.num_embeddings, module.embedding_dim):
        return f"its weight is {weight.dtype} {tuple(weight.shape)}, not floats [{module.num_embeddings}, {module.embedding_dim}]"
    if module.max_norm is not None:
        return "max_norm rewrites the frozen weight in forward; make it an nn.Embedding without max_norm"
    if "forward" in module.__dict__:
        return "its forward is replaced (by accelerate's hooks, say)"
    if type(module) is nn.Embedding or _scales_rows(module):
        return None
    return f"a {type(module).__name__}'s forward does more than look up rows (and scale them by embed_scale)"


def _scales_rows(module: nn.Embedding) -> bool:
    """Whether a subclass gives the rows of its weight times its ``embed_scale``: it is asked for some."""
    scale = getattr(module, "embed_scale", 1.0)
    number = isinstance(scale, (int, float)) or (isinstance(scale, Tensor) and scale.numel() == 1)
    if not number or module.weight.is_meta or not module.num_embeddings:
        return number and hasattr(module, "embed_scale")
    ids = torch.arange(min(4, module.num_embeddings), device=module.weight.device)[None]
    try:
        with torch.no_grad():
            return torch.equal(
                type(module).forward(module, ids), scaled(F.embedding(ids, module.weight), scale)
            )
    except Exception:  # another signature, say
        return False


def scaled(rows: Tensor, scale: float | Tensor | None) -> Tensor:
    """``rows`` times an ``embed_scale``, as the embeddings that have one do it."""
    if scale is None:
        return rows
    return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)


class LoRAEmbedding(MergeableLayer, LoRALayer):
    """``y = embed_scale * (W[ids] + scaling * A^T[ids] B^T)``, W [num_embeddings, dim] frozen.

    ``weight`` keeps the name of nn.Embedding; the adapters are ``lora_embedding_A.<name>`` [r, num_embeddings], zeros at
    first, and ``lora_embedding_B.<name>`` [dim, r], normal, as PEFT has them. As matrices they are a LoRALayer's A and B,
    of W^T [dim, num_embeddings], and ``lora_A`` and ``lora_B`` are other names for them; so the magnitudes of a DoRA adapter
    are [dim], one a column of W. There is no dropout: ids have nothing to drop. A padding row gets no gradient, and A's gradient is dense whatever ``sparse`` says.

    Args:
        embedding: an nn.Embedding, or a subclass that scales its rows by ``embed_scale``; its weight is shared, not copied,
            and frozen.
        adapter_name, and the rest: the first adapter; see ``LoRALayer.add_adapter``. Of ``init_lora_weights`` only False
            (A normal too) differs, as in PEFT.

    Raises:
        TypeError: ``embedding`` does more than look up rows, or renormalises them (``max_norm``).
        ValueError: an argument is out of range.
    """

    is_linear: ClassVar[bool] = False
    factor_names: ClassVar[tuple[str, str]] = ("lora_embedding_A", "lora_embedding_B")
    factor_keys: ClassVar[tuple[str, str]] = factor_names
    weight: Tensor
    embed_scale: Any  # a number, a Tensor with one, or None
    lora_embedding_A: nn.ParameterDict
    lora_embedding_B: nn.ParameterDict

    def __init__(
        self, embedding: nn.Embedding, adapter_name: str = "default", **settings: Any
    ) -> None:
        if problem := embedding_problem(embedding):
            raise TypeError(f"embedding: {problem}")
        super().__init__(embedding.num_embeddings, embedding.embedding_dim)
        self.num_embeddings, self.embedding_dim = embedding.weight.shape
        self.padding_idx = embedding.padding_idx
        self.scale_grad_by_freq = embedding.scale_grad_by_freq
        self.weight = embedding.weight
        self._buffers.update(embedding._buffers)
        self._non_persistent_buffers_set |= embedding._non_persistent_buffers_set
        if "embed_scale" not in self._buffers:
            self.embed_scale = getattr(embedding, "embed_scale", None)
        for name in _HOOKS:
            self.__dict__[name] = embedding.__dict__[name]
        # What to unload into: the module without its tensors. In a tuple, so that it is no submodule.
        self._bare = (bare(embedding),)
        self.tied: list[LoRALayer] = []  # output layers with the same adapters, see TiedLoRALinear
        self.add_adapter(adapter_name, **settings)
        self.weight.requires_grad_(False)  # last: an error above leaves the caller's as it was
        self.train(embedding.training)

    @property
    def lora_A(self) -> nn.ParameterDict:  # type: ignore[override]
        return self.lora_embedding_A

    @property
    def lora_B(self) -> nn.ParameterDict:  # type: ignore[override]
        return self.lora_embedding_B

    def _base_weight(self) -> Tensor:
        return self.weight.data.t()

    def _base_device_dtype(self) -> tuple[torch.device, torch.dtype]:
        return self.weight.device, self.weight.dtype

    def _base_rows(self) -> BaseRows:
        return rows_of(self.weight.t())

    def add_adapter(self, name: str = "default", *args: Any, **settings: Any) -> None:
        """As ``LoRALayer.add_adapter``.

        Raises:
            ValueError: also with lora_bias.
        """
        if settings.get("lora_bias"):
            raise ValueError(
                "lora_bias: got True over an embedding; accepted is False there, as in PEFT: its rows have no bias to add to. "
                "Leave it out of target_modules"
            )
        super().add_adapter(name, *args, **settings)

    def _factors(
        self, init: bool | str, r: int, scaling: float, lora_bias: bool = False
    ) -> Factors:
        # The numbers that PEFT draws, in its order: one seed gives one adapter in both libraries.
        a = torch.randn(r, self.in_features, dtype=torch.float32, device="cpu")
        b = torch.randn(self.out_features, r, dtype=torch.float32, device="cpu")
        if init is not False:
            a.zero_()
            b.normal_()
        return Factors(a.to(self.weight.dtype), b.to(self.weight.dtype))

    def _rows(self, ids: Tensor) -> Tensor:
        return scaled(F.embedding(ids, self.weight, self.padding_idx), self.embed_scale)

    def _scale_of_update(self) -> Tensor | float | None:
        """``embed_scale`` for updates: PEFT rounds one that is a plain number to the weight's dtype."""
        scale = self.embed_scale
        if scale is None or isinstance(scale, Tensor):
            return scale
        return torch.tensor(scale, dtype=self.weight.dtype).item()

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] of integers -> [..., dim] in the weight's dtype."""
        y = self._rows(ids)
        dtype = y.dtype
        if self.mixed is not None:
            if self._is_mixed():
                batch = self.mixed.of(ids)
                for name in filter(self.lora_embedding_A.__contains__, batch.adapters):
                    items = batch.items(name, ids.device)
                    update = self._update(ids.index_select(0, items), name)
                    y = y.index_add(0, items, update.to(dtype))
            return y
        for name in self.acting_adapters():
            y = y + self._update(ids, name)
            if name in self.lora_magnitude_vector:
                y = scale_columns(y, self.lora_magnitude_vector[name], self._row_norms(name), None)
        return y.to(dtype)

    def _update(self, ids: Tensor, name: str) -> Tensor:
        a, b = self.lora_embedding_A[name], self.lora_embedding_B[name]
        h = F.embedding(ids, a.t(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        return scaled((h @ b.t()) * self.scaling[name], self._scale_of_update())

    def _with_updates(self, base: Tensor) -> Tensor:
        exact = base.clone()
        for name in self.acting_adapters():
            b, scaling = self.lora_embedding_B[name].double(), float(self.scaling[name])
            a = self.lora_embedding_A[name].t()
            for rows, part in zip(exact.split(1024), a.split(1024), strict=True):
                rows += (part.double() @ b.t()) * scaling
            if name in self.lora_magnitude_vector:
                exact *= self._column_factors(name).to(exact.dtype)
        return exact

    def widen_slot(self, name: str, rank: int) -> None:
        """As ``LoRALayer.widen_slot``; tied output layers go over to the new Parameters."""
        super().widen_slot(name, rank)
        for layer in self.tied:
            layer.widen_slot(name, rank)

    def weight_holders(self) -> list[nn.Module]:
        return [self, *self.tied]

    def as_base(self, weight: Tensor | NF4Tensor) -> nn.Module:
        """The embedding, over ``weight``."""
        assert isinstance(weight, Tensor)
        base = bare(self._bare[0])
        base._parameters["weight"] = as_parameter(weight)
        base._buffers.update(self._buffers)
        return base.train(self.training)
